//! Records against what Cilium writes, against arbitrary bytes, and there and back again.
#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::key::{Kind, Layout, cluster_config_key, data_prefix};
use clustermesh_kvstore::labels::{Label, Labels};
use clustermesh_kvstore::record::{
    Affinity, Algorithm, BackendState, Balancing, ClusterConfig, ExportPort, ExportType, External, Failover,
    IdentityRecord, IpRecord, LocalBackend, LocalService, MAX_VALUE, NamedPort, Nearness, Node, NodeAddress,
    NodeAddressKind, Port, PortMap, Protocol, Record, RecordError, Service, ServiceExport, WireguardKey,
    Zone,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::strategy::Union;

const STATE: &str = include_str!("../testdata/state-1.17.tsv");
const CACHE: &str = include_str!("../testdata/cache-1.17.tsv");

/// Lines of a capture whose keys stand under the prefix of `R`, as (suffix, value).
fn captured<R: Record>(layout: Layout, dump: &str) -> Vec<(&str, &str)> {
    let alpha: ClusterName = "alpha".parse().unwrap();
    let prefix = data_prefix(R::KIND, &alpha, layout);
    let lines = dump.lines().filter_map(|line| line.split_once('\t'));
    lines.filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?, value))).collect()
}

fn assert_round_trip<R: Record>() {
    for (layout, dump) in [(Layout::State, STATE), (Layout::Cache, CACHE)] {
        let lines = captured::<R>(layout, dump);
        assert!(!lines.is_empty(), "the capture has no {}", R::KIND);
        for (suffix, value) in lines {
            let record = R::decode(suffix, value.as_bytes()).unwrap();
            assert_eq!(record.suffix(), suffix);
            assert_eq!(String::from_utf8(record.encode()).unwrap(), value);
        }
    }
}

#[test]
fn what_cilium_wrote_is_written_again_byte_for_byte() {
    assert_round_trip::<Node>();
    assert_round_trip::<IdentityRecord>();
    assert_round_trip::<IpRecord>();
    assert_round_trip::<Service>();
    assert_round_trip::<ServiceExport>();
    let key = cluster_config_key(&"alpha".parse().unwrap());
    for line in STATE.lines().chain(CACHE.lines()) {
        if let Some(value) = line.strip_prefix(&format!("{key}\t")) {
            let config = ClusterConfig::decode(value.as_bytes()).unwrap();
            assert_eq!(config.id, 1);
            assert_eq!(String::from_utf8(config.encode()).unwrap(), value);
        }
    }
}

#[test]
fn fields_mean_what_they_say() {
    let (suffix, value) = captured::<Node>(Layout::State, STATE)[0];
    let node = Node::decode(suffix, value.as_bytes()).unwrap();
    assert_eq!(node.internal_ip(true), Some("172.18.0.2".parse().unwrap()));
    assert_eq!(node.internal_ip(false), Some("fc00:c111::2".parse().unwrap()));
    assert_eq!(node.cilium_internal_ip(true), Some("10.1.0.200".parse().unwrap()));
    let cidrs: Vec<_> = node.pod_cidrs().map(|cidr| cidr.to_string()).collect();
    assert_eq!(cidrs, ["10.1.0.0/24", "fd00:10:1::/64"]);
    assert_eq!((node.cluster_id, node.encryption_key, node.ipv6_ingress_ip), (1, 3, None));
}

/// Newer exporters: fields that 1.17 does not have, in their places.
#[test]
fn newer_fields() {
    let service = r#"{"cluster":"a","namespace":"n","name":"s","frontends":{},"backends":{"10.0.0.10":{},"10.0.0.9":{}},"hostnames":{},"zones":{"10.0.0.9":{"zone":"z","forZones":[{"name":"y"}]}},"labels":{},"selector":{},"includeExternal":true,"shared":true,"clusterID":1}"#;
    let decoded = Service::decode("n/s", service.as_bytes()).unwrap();
    assert_eq!(decoded.zones.len(), 1);
    // Go orders map keys as text: .10 before .9.
    assert_eq!(String::from_utf8(decoded.encode()).unwrap(), service);

    let ip = r#"{"IP":"10.0.0.0","Mask":"////AA==","HostIP":"","ID":2,"Key":0,"Metadata":"","K8sServiceAccount":"sa","NamedPorts":[{"Name":"web","Port":80,"Protocol":"TCP"}]}"#;
    let decoded = IpRecord::decode("10.0.0.0/24", ip.as_bytes()).unwrap();
    assert!(!decoded.host && decoded.host_ip.is_none());
    assert_eq!(String::from_utf8(decoded.encode()).unwrap(), ip);

    let config = r#"{"id":3,"capabilities":{},"addedLater":[1]}"#;
    assert_eq!(ClusterConfig::decode(config.as_bytes()).unwrap().service_exports_enabled, None);
    assert_eq!(ClusterConfig::default().encode(), br#"{"capabilities":{}}"#);
}

#[test]
fn null_maps_are_empty_maps() {
    let service =
        r#"{"cluster":"a","namespace":"n","name":"s","frontends":null,"backends":null,"labels":null}"#;
    let service = Service::decode("n/s", service.as_bytes()).unwrap();
    assert!(service.frontends.is_empty() && service.labels.is_empty());
}

fn reason<R: Record + Debug>(suffix: &str, value: &str) -> &'static str {
    R::decode(suffix, value.as_bytes()).expect_err(value).reason()
}

#[test]
fn malformed_records_say_why() {
    let ip = |text: &str| format!(r#"{{"IP":{text},"HostIP":"","ID":300}}"#);
    assert_eq!(reason::<IpRecord>("10.0.0.1", "{"), "bad_json");
    assert_eq!(reason::<IpRecord>("10.0.0.1", "[]"), "bad_json");
    assert_eq!(reason::<IpRecord>("10.0.0.1", &ip(r#""10.0.0.2""#)), "name_mismatch");
    assert_eq!(reason::<IpRecord>("10.0.0.1/32", &ip(r#""10.0.0.1""#)), "name_mismatch");
    assert_eq!(reason::<IpRecord>("10.0.0.01", &ip(r#""10.0.0.01""#)), "bad_address");
    assert_eq!(reason::<IpRecord>("::ffff:10.0.0.1", &ip(r#""::ffff:10.0.0.1""#)), "bad_address");
    assert_eq!(reason::<IpRecord>("fe80::1%eth0", &ip(r#""fe80::1%eth0""#)), "bad_address");
    // The address has bits outside of the mask; the mask has a hole; it is one of the other family.
    assert_eq!(reason::<IpRecord>("10.0.0.1/24", &ip(r#""10.0.0.1","Mask":"////AA==""#)), "bad_mask");
    assert_eq!(reason::<IpRecord>("10.0.0.0/24", &ip(r#""10.0.0.0","Mask":"/wD//w==""#)), "bad_mask");
    assert_eq!(reason::<IpRecord>("::/24", &ip(r#""::","Mask":"////AA==""#)), "bad_mask");
    let large = r#"{"IP":"10.0.0.1","ID":16777216}"#;
    assert_eq!(reason::<IpRecord>("10.0.0.1", large), "bad_identity");
    let named = |port: &str| format!(r#"{{"IP":"10.0.0.1","ID":300,"NamedPorts":[{port}]}}"#);
    let port = named(r#"{"Name":"a","Port":65536,"Protocol":"TCP"}"#);
    assert_eq!(reason::<IpRecord>("10.0.0.1", &port), "bad_port");
    let protocol = named(r#"{"Name":"a","Port":1,"Protocol":"tcp"}"#);
    assert_eq!(reason::<IpRecord>("10.0.0.1", &protocol), "bad_protocol");
    assert_eq!(reason::<IpRecord>("10.0.0.1", &" ".repeat(MAX_VALUE + 1)), "too_large");

    assert_eq!(reason::<IdentityRecord>("+300", "k8s:a=b;"), "bad_key");
    assert_eq!(reason::<IdentityRecord>("0300", "k8s:a=b;"), "bad_key");
    assert_eq!(reason::<IdentityRecord>("4294967296", "k8s:a=b;"), "bad_key");
    assert_eq!(reason::<IdentityRecord>("16777216", "k8s:a=b;"), "bad_identity");
    assert_eq!(reason::<IdentityRecord>("300", ""), "bad_labels");
    assert_eq!(reason::<IdentityRecord>("300", "k8s:a=b;any:a=c;"), "bad_labels");
    assert_eq!(IdentityRecord::decode("300", b"\xff").unwrap_err().reason(), "bad_labels");

    let node = |more: &str| format!(r#"{{"Name":"n","Cluster":"c"{more}}}"#);
    assert_eq!(reason::<Node>("m", &node("")), "name_mismatch");
    assert_eq!(reason::<Node>("", r#"{"Name":"","Cluster":"c"}"#), "bad_name");
    assert_eq!(reason::<Node>("a/b", r#"{"Name":"a/b","Cluster":"c"}"#), "bad_name");
    assert_eq!(reason::<Node>("n", &node(r#","IPv4HealthIP":"::1""#)), "bad_address");
    assert_eq!(reason::<Node>("n", &node(r#","IPv4AllocCIDR":{"IP":"10.0.0.0","Mask":"x"}"#)), "bad_mask");
    let v6 = r#","IPv4AllocCIDR":{"IP":"fd00::","Mask":"//////////8AAAAAAAAAAA=="}"#;
    assert_eq!(reason::<Node>("n", &node(v6)), "bad_address");

    let service = |more: &str| format!(r#"{{"cluster":"c","namespace":"n","name":"s"{more}}}"#);
    assert_eq!(reason::<Service>("n/t", &service("")), "name_mismatch");
    assert_eq!(reason::<Service>("n/s", &service(r#","backends":{"x":{}}"#)), "bad_address");
    assert_eq!(reason::<Service>("n/s", &service(r#","hostnames":{"x":"h"}"#)), "bad_address");
    let twice = service(r#","backends":{"fd00::1":{},"fd00:0::1":{}}"#);
    assert_eq!(reason::<Service>("n/s", &twice), "duplicate_address");
    let port = service(r#","frontends":{"10.0.0.1":{"p":{"Protocol":"TCP","Port":0}}}"#);
    assert_eq!(reason::<Service>("n/s", &port), "bad_port");
    let protocol = service(r#","frontends":{"10.0.0.1":{"p":{"Protocol":"ICMP","Port":1}}}"#);
    assert_eq!(reason::<Service>("n/s", &protocol), "bad_protocol");

    let kind = r#"{"cluster":"c","namespace":"n","name":"s","type":"Any"}"#;
    assert_eq!(reason::<ServiceExport>("n/s", kind), "bad_value");
    let local = r#"{"cluster":"c","namespace":"n","name":"s","clusterId":1,"global":true,"shared":true,"affinity":"near"}"#;
    assert_eq!(reason::<LocalService>("n/s", local), "bad_json");
    let plain = r#"{"cluster":"c","namespace":"n","name":"s","clusterId":1,"global":true,"shared":true"#;
    assert_eq!(
        LocalService::decode("n/s", format!("{plain}}}").as_bytes()).unwrap().balancing,
        Balancing::default()
    );
    let balancing = |more: &str| format!(r#"{plain},"balancing":{{{more}}}}}"#);
    let many = |n: usize| (0..n).map(|n| format!(r#"["c{n}"]"#)).collect::<Vec<_>>().join(",");
    for (more, expected) in [
        (r#""session":0"#, "bad_value"),
        (r#""session":86401"#, "bad_value"),
        (r#""order":[["alpha"],[]]"#, "bad_value"),
        (r#""order":[["alpha"],["beta","alpha"]]"#, "bad_value"),
        (r#""order":[["Alpha"]]"#, "bad_name"),
        (r#""weights":{"alpha":0,"beta":0}"#, "bad_value"),
        (r#""weights":{"":1}"#, "bad_name"),
        (r#""weights":{"alpha":65536}"#, "bad_json"),
        (r#""nearness":"far""#, "bad_json"),
        (&format!(r#""order":[{}]"#, many(256)), "bad_value"),
    ] {
        assert_eq!(reason::<LocalService>("n/s", &balancing(more)), expected, "{more}");
    }
    LocalService::decode("n/s", balancing(&format!(r#""order":[{}]"#, many(255))).as_bytes()).unwrap();
}

/// What a peer wrote must not write into our logs what it likes.
#[test]
fn error_texts_are_short_and_escaped() {
    let key = format!("10.0.0.1\n{}", "x".repeat(10_000));
    let error = IpRecord::decode(&key, br#"{"IP":"10.0.0.1","ID":300}"#).unwrap_err().to_string();
    assert!(!error.contains('\n') && error.len() < 300, "{error}");
}

/// It stands in an annotation, where it is as much a key as the other one is in its field.
#[test]
fn a_nodes_key_for_ipsec_is_one_or_the_record_is_refused() {
    let node = |key: &str| {
        format!(r#"{{"Name":"n","Cluster":"c","Annotations":{{"clustermesh.io/ipsec-pub-key":"{key}"}}}}"#)
    };
    let key = WireguardKey::new([7; 32]).unwrap().to_string();
    let read = Node::decode("n", node(&key).as_bytes()).unwrap();
    assert_eq!((read.ipsec_key(), read.wireguard_key()), (Some(key.parse().unwrap()), None));
    for bad in ["", "AAAA", &"A".repeat(44)] {
        assert_eq!(reason::<Node>("n", &node(bad)), "bad_ipsec_key", "{bad}");
    }
}

#[test]
fn deep_json_is_refused() {
    let deep = format!(r#"{{"x":{}"#, "[".repeat(1_000_000));
    assert_eq!(reason::<Node>("n", &deep), "bad_json");
}

// ---- there and back again

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?"
}

fn text() -> impl Strategy<Value = String> {
    // Everything JSON has to escape, and some that Go escapes besides.
    "[a-z<>&\"\\\\\u{2028}\u{1}é ]{0,8}"
}

fn texts() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(text(), text(), 0..4)
}

fn address() -> impl Strategy<Value = IpAddr> {
    let mapped = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    any::<IpAddr>().prop_filter("not an alias", move |address| !mapped(address))
}

fn v4_net() -> impl Strategy<Value = Ipv4Net> {
    (any::<u32>(), 0..=32u8).prop_map(|(ip, len)| Ipv4Net::new(ip.into(), len).unwrap().trunc())
}

fn v6_net() -> impl Strategy<Value = Ipv6Net> {
    // Long enough to stay outside of the mapped range.
    (any::<u128>(), 1..=128u8)
        .prop_map(|(ip, len)| Ipv6Net::new((ip | 1 << 127).into(), len).unwrap().trunc())
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)]
}

fn ports() -> impl Strategy<Value = PortMap> {
    let port = (protocol(), 1..=u16::MAX).prop_map(|(protocol, port)| Port { protocol, port });
    btree_map(text(), port, 0..3)
}

fn addresses() -> impl Strategy<Value = BTreeMap<IpAddr, PortMap>> {
    btree_map(address(), ports(), 0..4)
}

fn namespaced() -> impl Strategy<Value = NamespacedName> {
    (name(), name()).prop_map(|(namespace, name)| NamespacedName { namespace, name })
}

fn node() -> impl Strategy<Value = Node> {
    let kind = prop_oneof![
        Just(NodeAddressKind::InternalIp),
        Just(NodeAddressKind::ExternalIp),
        Just(NodeAddressKind::CiliumInternalIp),
        Just(NodeAddressKind::Hostname),
        Just(NodeAddressKind::Other("Later".into())),
    ];
    let addresses = vec((kind, address()).prop_map(|(kind, ip)| NodeAddress { kind, ip }), 0..4);
    let cidrs = (option::of(v4_net()), vec(v4_net(), 0..3), option::of(v6_net()), vec(v6_net(), 0..3));
    let rest = (option::of(texts()), option::of(texts()), option::of(any::<u32>()), wireguard_key());
    (name(), name(), addresses, cidrs, any::<(u32, u8)>(), rest).prop_map(
        |(name, cluster, addresses, cidrs, (cluster_id, encryption_key), rest)| Node {
            name,
            cluster,
            addresses,
            ipv4_alloc_cidr: cidrs.0,
            ipv4_secondary_alloc_cidrs: cidrs.1,
            ipv6_alloc_cidr: cidrs.2,
            ipv6_secondary_alloc_cidrs: cidrs.3,
            cluster_id,
            encryption_key,
            labels: rest.0,
            annotations: rest.1,
            node_identity: rest.2,
            wireguard_pub_key: rest.3,
            ipv4_health_ip: cidrs.0.map(|net| net.addr()),
            ..Node::default()
        },
    )
}

fn wireguard_key() -> impl Strategy<Value = String> {
    any::<[u8; 32]>().prop_map(|key| WireguardKey::new(key).map(|key| key.to_string()).unwrap_or_default())
}

fn ip_record() -> impl Strategy<Value = IpRecord> {
    let net = prop_oneof![
        (v4_net().prop_map(IpNet::V4), Just(false)),
        (v6_net().prop_map(IpNet::V6), Just(false)),
        (address().prop_map(IpNet::from), Just(true)),
    ];
    let port = (name(), 1..=u16::MAX, protocol()).prop_map(|(name, port, protocol)| NamedPort {
        name,
        port,
        protocol,
    });
    (net, option::of(address()), 1..1u32 << 24, any::<u8>(), (text(), text(), text()), vec(port, 0..3))
        .prop_map(|((prefix, host), host_ip, id, key, texts, named_ports)| IpRecord {
            prefix,
            host,
            host_ip,
            identity: Identity(id),
            key,
            metadata: String::new(),
            namespace: texts.0,
            pod_name: texts.1,
            service_account: texts.2,
            named_ports,
        })
}

fn identity() -> impl Strategy<Value = IdentityRecord> {
    let label = ("[a-z0-9]{1,8}", "[a-z.:/]{1,10}", "[a-zA-Z:= .]{0,10}")
        .prop_map(|(source, key, value)| Label { source, key, value });
    (1..1u32 << 24, vec(label, 1..6))
        .prop_map(|(id, labels)| IdentityRecord { id: Identity(id), labels: Labels::from_iter(labels) })
}

fn service() -> impl Strategy<Value = Service> {
    let hostnames = btree_map(address().prop_map(|ip| ip.to_string()), text(), 0..3);
    let zone = (text(), vec(text(), 0..3)).prop_map(|(zone, for_zones)| Zone { zone, for_zones });
    let flags = any::<(bool, bool, u32)>();
    let maps = (hostnames, btree_map(address(), zone, 0..3), texts(), texts());
    (name(), namespaced(), addresses(), addresses(), maps, flags).prop_map(
        |(cluster, name, frontends, backends, maps, (include_external, shared, cluster_id))| Service {
            cluster,
            name,
            frontends,
            backends: backends.into_iter().collect(),
            hostnames: maps.0,
            zones: maps.1,
            labels: maps.2,
            selector: maps.3,
            include_external,
            shared,
            cluster_id,
        },
    )
}

fn local_service() -> impl Strategy<Value = LocalService> {
    let state = prop_oneof![Just(BackendState::Active), Just(BackendState::Terminating)];
    let backend = (address(), ports(), state, option::of(name()), option::of(text()), option::of(name()));
    let backend = backend.prop_map(|(ip, ports, state, node, zone, hostname)| LocalBackend {
        ip,
        ports,
        state,
        node,
        zone,
        hostname,
    });
    let affinity = prop_oneof![Just(Affinity::None), Just(Affinity::Local), Just(Affinity::Remote)];
    let flags = any::<(u32, bool, bool, bool, bool)>();
    let spread = (balancing(), external());
    (name(), namespaced(), flags, affinity, spread, addresses(), vec(backend, 0..4)).prop_map(
        |(cluster, name, flags, affinity, (balancing, external), frontends, backends)| {
            let (cluster_id, global, shared, private, headless) = flags;
            LocalService {
                cluster,
                name,
                cluster_id,
                global,
                shared,
                private,
                affinity,
                failover: (cluster_id % 2 == 0)
                    .then_some(Failover { threshold: (cluster_id % 100) as u8 + 1, expected: cluster_id }),
                balancing,
                external,
                headless,
                frontends,
                backends,
            }
        },
    )
}

fn external() -> impl Strategy<Value = External> {
    let algorithm = option::of(prop_oneof![Just(Algorithm::Random), Just(Algorithm::Maglev)]);
    let ips = btree_map(any::<std::net::IpAddr>(), Just(()), 0..3);
    (ips, btree_map("[a-z]{0,4}", 1..=u16::MAX, 0..3), any::<bool>(), algorithm).prop_map(
        |(ips, node_ports, only_node, algorithm)| External {
            ips: ips.into_keys().map(|ip: std::net::IpAddr| ip.to_canonical()).collect(),
            node_ports,
            only_node,
            algorithm,
        },
    )
}

fn balancing() -> impl Strategy<Value = Balancing> {
    let cluster = || (0_u8..9).prop_map(|n| format!("c{n}").parse::<ClusterName>().unwrap());
    let nearness = [Nearness::Any, Nearness::PreferZone, Nearness::PreferNode, Nearness::OnlyNode].map(Just);
    let weights = btree_map(cluster(), 1..=u16::MAX, 0..4);
    let order = btree_map(cluster(), 0_u8..4, 0..6);
    (option::of(1..=Balancing::MAX_SESSION), order, weights, Union::new(nearness)).prop_map(
        |(session, order, mut weights, nearness)| {
            let mut tiers = BTreeMap::<u8, BTreeSet<ClusterName>>::new();
            for (name, tier) in order {
                tiers.entry(tier).or_default().insert(name);
            }
            if weights.len() > 1 {
                weights.first_entry().unwrap().insert(0);
            }
            Balancing { session, order: tiers.into_values().collect(), weights, nearness }
        },
    )
}

fn service_export() -> impl Strategy<Value = ServiceExport> {
    let port = (text(), protocol(), text(), 1..=u16::MAX)
        .prop_map(|(name, protocol, app_protocol, port)| ExportPort { name, protocol, app_protocol, port });
    let kind = prop_oneof![Just(ExportType::ClusterSetIp), Just(ExportType::Headless)];
    (name(), namespaced(), text(), vec(port, 0..4), kind).prop_map(|(cluster, name, created, ports, kind)| {
        ServiceExport {
            cluster,
            name,
            created,
            ports,
            kind,
            session_affinity: "ClientIP".into(),
            session_affinity_config: None,
        }
    })
}

fn there_and_back<R: Record + PartialEq + Debug>(record: &R) -> Result<(), TestCaseError> {
    let value = record.encode();
    let read = R::decode(&record.suffix(), &value);
    prop_assert_eq!(read.as_ref(), Ok(record), "{}", String::from_utf8_lossy(&value));
    Ok(())
}

/// A value as a peer gone wrong might write it: one of ours with bytes changed.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let whole = prop_oneof![
        node().prop_map(|record| record.encode()),
        ip_record().prop_map(|record| record.encode()),
        service().prop_map(|record| record.encode()),
        local_service().prop_map(|record| record.encode()),
        vec(any::<u8>(), 0..64),
    ];
    (whole, vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)).prop_map(|(mut bytes, changes)| {
        for (at, byte) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        bytes
    })
}

/// Whatever decodes must encode to something that decodes to the same.
fn stable<R: Record + PartialEq + Debug>(suffix: &str, value: &[u8]) -> Result<(), TestCaseError> {
    match R::decode(suffix, value) {
        Ok(record) => there_and_back(&record),
        Err(error) => {
            prop_assert!(!error.reason().is_empty() && error.to_string().len() < 1_000);
            Ok(())
        }
    }
}

proptest! {
    #[test]
    fn nodes_come_back(record in node()) { there_and_back(&record)?; }
    #[test]
    fn ip_records_come_back(record in ip_record()) { there_and_back(&record)?; }
    #[test]
    fn identities_come_back(record in identity()) {
        // A ':' or '=' in the wrong place is another label; only what parses as it was is ours to write.
        let text = record.labels.to_string();
        prop_assume!(Labels::parse(&text).is_ok_and(|labels| labels == record.labels));
        there_and_back(&record)?;
    }
    #[test]
    fn services_come_back(record in service()) { there_and_back(&record)?; }
    #[test]
    fn local_services_come_back(record in local_service()) { there_and_back(&record)?; }
    #[test]
    fn service_exports_come_back(record in service_export()) { there_and_back(&record)?; }

    #[test]
    fn no_bytes_can_hurt(suffix in "[a-z0-9/.:]{0,12}", value in damaged()) {
        stable::<Node>(&suffix, &value)?;
        stable::<IpRecord>(&suffix, &value)?;
        stable::<IdentityRecord>(&suffix, &value)?;
        stable::<Service>(&suffix, &value)?;
        stable::<ServiceExport>(&suffix, &value)?;
        stable::<LocalService>(&suffix, &value)?;
        if let Ok(config) = ClusterConfig::decode(&value) {
            let again: Result<_, RecordError> = ClusterConfig::decode(&config.encode());
            prop_assert_eq!(again, Ok(config));
        }
    }
}

#[test]
fn kinds_have_their_own_prefixes() {
    let kinds = [Node::KIND, IdentityRecord::KIND, IpRecord::KIND, Service::KIND, ServiceExport::KIND];
    assert_eq!(kinds, [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::Services, Kind::ServiceExports]);
}
