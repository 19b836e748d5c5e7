//! What a cluster may say: each reason by example, and the promise for whatever bytes come.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::net::IpAddr;
use std::sync::Arc;

use clustermesh_kvstore::cluster::{ClusterId, Identity, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::import_policy::{
    Admitted, Imported, PeerPolicy, PodCidrs, PolicyFile, Reason, Refusal, Rules, admit,
};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::labels::Labels;
use clustermesh_kvstore::record::{
    Affinity, Balancing, External, IdentityRecord, IpRecord, LocalService, Node, NodeAddress,
    NodeAddressKind, PortMap, Record, Service,
};
use proptest::prelude::*;

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
const BETA: u32 = 2;

fn beta(rules: Rules) -> PeerPolicy {
    PeerPolicy {
        name: "beta".parse().unwrap(),
        id: ClusterId::new(BETA, MAX).unwrap(),
        max: MAX,
        is_own: false,
        rules: Arc::new(rules),
    }
}

/// beta under the rules of its entry.
fn ruled(entry: &str) -> PeerPolicy {
    let file = PolicyFile::parse(&format!("clusters: {{beta: {{{entry}}}}}")).unwrap();
    PeerPolicy { rules: file.rules_for(&"beta".parse().unwrap()), ..beta(Rules::default()) }
}

fn judge<R: Record>(record: &R, peer: &PeerPolicy) -> Result<Admitted, Refusal> {
    admit(R::KIND, &record.suffix(), &record.encode(), peer)
}

/// The reason's word; empty if the record is let in without remark.
fn reason<R: Record>(record: &R, peer: &PeerPolicy) -> &'static str {
    match judge(record, peer) {
        Ok(Admitted { audited: Some(refusal), .. }) | Err(refusal) => refusal.reason.as_str(),
        Ok(_) => "",
    }
}

fn node(cluster: &str, cluster_id: u32, ip: &str, cidr: &str) -> Node {
    Node {
        name: "n1".into(),
        cluster: cluster.into(),
        cluster_id,
        addresses: vec![NodeAddress { kind: NodeAddressKind::InternalIp, ip: ip.parse().unwrap() }],
        ipv4_alloc_cidr: Some(cidr.parse().unwrap()),
        ..Node::default()
    }
}

fn ip(address: &str, identity: u32) -> IpRecord {
    IpRecord {
        prefix: address.parse().unwrap(),
        host: address.ends_with("/32"),
        host_ip: Some("192.0.2.1".parse().unwrap()),
        identity: Identity(identity),
        key: 0,
        metadata: String::new(),
        namespace: "shop".into(),
        pod_name: "p".into(),
        service_account: String::new(),
        named_ports: Vec::new(),
    }
}

fn identity(id: u32, labels: &str) -> IdentityRecord {
    IdentityRecord { id: Identity(id), labels: Labels::parse(labels).unwrap() }
}

fn service(namespace: &str, name: &str, backends: &[&str]) -> Service {
    Service {
        cluster: "beta".into(),
        name: NamespacedName { namespace: namespace.into(), name: name.into() },
        frontends: [].into(),
        backends: backends.iter().map(|ip| (ip.parse().unwrap(), PortMap::new())).collect(),
        hostnames: [].into(),
        zones: [].into(),
        labels: [].into(),
        selector: [].into(),
        include_external: true,
        shared: true,
        cluster_id: BETA,
    }
}

#[test]
fn nodes_must_be_the_peers_own_and_have_plausible_addresses() {
    let peer = beta(Rules::default());
    let reason = |node: Node| reason(&node, &peer);
    assert_eq!(reason(node("beta", 2, "192.0.2.1", "10.2.0.0/16")), "");
    assert_eq!(reason(node("gamma", 2, "192.0.2.1", "10.2.0.0/16")), "cluster_name_mismatch");
    assert_eq!(reason(node("beta", 1, "192.0.2.1", "10.2.0.0/16")), "cluster_id_mismatch");
    for bad in ["127.0.0.1", "0.0.0.0", "169.254.1.1", "224.0.0.1", "255.255.255.255", "fe80::1", "::1"] {
        assert_eq!(reason(node("beta", 2, bad, "10.2.0.0/16")), "implausible_address", "{bad}");
    }
    assert_eq!(reason(node("beta", 2, "192.0.2.1", "0.0.0.0/0")), "prefix_too_wide");
    assert_eq!(reason(node("beta", 2, "192.0.2.1", "127.0.0.0/16")), "implausible_address");
}

#[test]
fn identities_stay_in_the_peers_range_and_hosts_become_remote_nodes() {
    let mut peer = beta(Rules::default());
    assert_eq!(reason(&ip("10.2.0.1/32", 2 << 16 | 7), &peer), "");
    assert_eq!(reason(&ip("10.2.0.1/32", 1 << 16 | 7), &peer), "identity_out_of_range");
    assert_eq!(reason(&ip("10.2.0.1/32", 256), &peer), "identity_out_of_range");
    assert_eq!(reason(&ip("10.2.0.0/24", 2 << 16 | 7), &peer), "not_an_address");
    // The key `10.2.0.1/32` beside the key `10.2.0.1`: two records for one address.
    let second_key = IpRecord { host: false, ..ip("10.2.0.1/32", 2 << 16 | 7) };
    assert_eq!(reason(&second_key, &peer), "not_an_address");
    let host = ip("10.2.0.1/32", 1);
    assert_eq!(peer.identity_of(&host), Identity::REMOTE_NODE);
    peer.is_own = true;
    assert_eq!(peer.identity_of(&host), Identity::HOST);
}

#[test]
fn an_identitys_labels_name_the_peer() {
    let peer = beta(Rules::default());
    let reason = |id, labels| reason(&identity(id, labels), &peer);
    let good = "k8s:app=a;k8s:io.cilium.k8s.policy.cluster=beta;";
    assert_eq!(reason(2 << 16 | 1, good), "");
    assert_eq!(reason(3 << 16 | 1, good), "identity_out_of_range");
    let alpha = "k8s:io.cilium.k8s.policy.cluster=alpha;";
    for bad in ["k8s:app=a;", alpha, "any:io.cilium.k8s.policy.cluster=beta;"] {
        assert_eq!(reason(2 << 16 | 1, bad), "cluster_label_mismatch", "{bad}");
    }
}

#[test]
fn a_remote_defines_no_services_of_this_cluster() {
    let service = LocalService {
        cluster: "beta".into(),
        name: NamespacedName { namespace: "shop".into(), name: "orders".into() },
        cluster_id: 2,
        global: true,
        shared: true,
        private: false,
        affinity: Affinity::None,
        failover: None,
        balancing: Balancing::default(),
        external: External::default(),
        headless: false,
        frontends: [("10.96.0.1".parse().unwrap(), PortMap::new())].into(),
        backends: Vec::new(),
    };
    assert_eq!(reason(&service, &beta(Rules::default())), "not_own_cluster");
}

#[test]
fn pods_and_nodes_stay_in_the_cidrs_that_the_operator_lists() {
    let peer = ruled("pod-cidrs: [10.2.0.0/16], node-cidrs: [192.0.2.0/24]");
    assert_eq!(reason(&node("beta", 2, "192.0.2.1", "10.2.7.0/24"), &peer), "");
    assert_eq!(reason(&node("beta", 2, "192.0.2.1", "10.0.0.0/8"), &peer), "outside_pod_cidrs");
    assert_eq!(reason(&node("beta", 2, "198.51.100.1", "10.2.7.0/24"), &peer), "outside_node_cidrs");
    assert_eq!(reason(&ip("10.2.0.1/32", 2 << 16 | 7), &peer), "");
    assert_eq!(reason(&ip("10.3.0.1/32", 2 << 16 | 7), &peer), "outside_pod_cidrs");
    // Only what is reserved may have a node's address.
    assert_eq!(reason(&ip("192.0.2.1/32", 2 << 16 | 7), &peer), "outside_pod_cidrs");
    assert_eq!(reason(&ip("192.0.2.1/32", 1), &peer), "");
    let mut elsewhere = ip("10.2.0.1/32", 2 << 16 | 7);
    elsewhere.host_ip = Some("198.51.100.1".parse().unwrap());
    assert_eq!(reason(&elsewhere, &peer), "outside_node_cidrs");
    assert_eq!(reason(&service("shop", "orders", &["10.2.0.1", "192.0.2.9"]), &peer), "");
    assert_eq!(reason(&service("shop", "orders", &["10.2.0.1", "10.1.0.1"]), &peer), "outside_pod_cidrs");
}

#[test]
fn namespaces_services_and_reserved_identities_can_be_kept_out() {
    let peer = ruled(
        "namespaces: {allow: [shop, 'web-*'], deny: [web-x]}, services: {deny: ['shop/internal-*']},
         refuse-identities: [ingress]",
    );
    assert_eq!(reason(&service("shop", "orders", &[]), &peer), "");
    assert_eq!(reason(&service("shop", "internal-a", &[]), &peer), "service_not_allowed");
    assert_eq!(reason(&service("bank", "orders", &[]), &peer), "namespace_not_allowed");
    assert_eq!(reason(&service("web-x", "orders", &[]), &peer), "namespace_not_allowed");
    let mut pod = ip("10.2.0.1/32", 2 << 16 | 7);
    assert_eq!(reason(&pod, &peer), "");
    pod.namespace = "bank".into();
    assert_eq!(reason(&pod, &peer), "namespace_not_allowed");
    // What is no pod has no namespace.
    (pod.namespace, pod.identity) = (String::new(), Identity(6));
    assert_eq!(reason(&pod, &peer), "");
    pod.identity = Identity(8);
    assert_eq!(reason(&pod, &peer), "identity_not_allowed");
    let labels = |namespace| {
        format!("k8s:io.cilium.k8s.policy.cluster=beta;k8s:io.kubernetes.pod.namespace={namespace};")
    };
    assert_eq!(reason(&identity(2 << 16 | 1, &labels("shop")), &peer), "");
    assert_eq!(reason(&identity(2 << 16 | 1, &labels("bank")), &peer), "namespace_not_allowed");
}

#[test]
fn sizes_are_bounded() {
    let peer = ruled("max-backends: 1, max-record-bytes: 400, quotas: {ip: 2}");
    assert_eq!(reason(&service("shop", "orders", &["10.2.0.1"]), &peer), "");
    assert_eq!(reason(&service("shop", "orders", &["10.2.0.1", "10.2.0.2"]), &peer), "too_many_backends");
    assert_eq!(reason(&service("shop", &"x".repeat(250), &[]), &peer), "record_too_large");
    assert_eq!(peer.check_quota(Kind::Ip, 1), Ok(None));
    assert_eq!(peer.check_quota(Kind::Ip, 2).unwrap_err().reason, Reason::QuotaExceeded);
}

#[test]
fn an_audit_lets_in_and_tells_but_never_what_is_implausible_or_without_end() {
    let peer = ruled("mode: audit, pod-cidrs: [10.2.0.0/16], quotas: {ip: 2}");
    let admitted = judge(&ip("10.3.0.1/32", 2 << 16 | 7), &peer).unwrap();
    assert_eq!(admitted.audited.unwrap().reason, Reason::PodCidr);
    assert!(judge(&ip("10.3.0.1/32", 3 << 16 | 7), &peer).is_err());
    assert_eq!(peer.check_quota(Kind::Ip, 2).unwrap().unwrap().reason, Reason::QuotaExceeded);
    assert!(peer.check_quota(Kind::Ip, 250_000).is_err());
}

fn any_kind() -> impl Strategy<Value = Kind> {
    proptest::sample::select(Kind::ALL.to_vec())
}

fn any_address() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("10.2.0.1".to_owned()),
        Just("10.3.0.1".to_owned()),
        Just("192.0.2.1".to_owned()),
        any::<u32>().prop_map(|bits| std::net::Ipv4Addr::from(bits).to_string()),
        any::<u128>().prop_map(|bits| std::net::Ipv6Addr::from(bits).to_string()),
    ]
}

/// JSON that is nearly right, of a peer that may lie about everything.
fn any_ip() -> impl Strategy<Value = (String, Vec<u8>)> {
    let namespace = proptest::sample::select(vec!["", "shop", "bank"]);
    (any_address(), any_address(), 0_u32..1 << 19, namespace).prop_map(|(ip, host, id, namespace)| {
        let value = serde_json::json!({"IP": ip, "HostIP": host, "ID": id, "K8sNamespace": namespace});
        (ip, value.to_string().into_bytes())
    })
}

proptest! {
    /// No record that passes violates its policy, as told by other means than the policy's own.
    #[test]
    fn an_address_that_passes_keeps_to_all_rules((suffix, value) in any_ip(), listed: bool) {
        let rules = "namespaces: {deny: [bank]}, refuse-identities: [ingress], node-cidrs: [192.0.2.0/24]";
        let peer = ruled(&if listed { format!("pod-cidrs: [10.2.0.0/16], {rules}") } else { rules.to_owned() });
        let json: serde_json::Value = serde_json::from_slice(&value).unwrap();
        match admit(Kind::Ip, &suffix, &value, &peer) {
            Ok(admitted) => {
                let Imported::Ip(record) = admitted.record else { panic!("another kind") };
                let ip = record.prefix.addr();
                prop_assert_eq!(&ip.to_string(), &suffix);
                let id = u32::try_from(json["ID"].as_u64().unwrap()).unwrap();
                prop_assert!(id < 256 && id != 8 || id >> 16 == BETA);
                prop_assert_ne!(json["K8sNamespace"].as_str(), Some("bank"));
                let host: IpAddr = json["HostIP"].as_str().unwrap().parse().unwrap();
                prop_assert!(host.to_string().starts_with("192.0.2."));
                let in_pods = ip.to_string().starts_with("10.2.");
                let in_nodes = ip.to_string().starts_with("192.0.2.");
                prop_assert!(!listed || in_pods || id < 256 && in_nodes);
            }
            Err(refusal) => prop_assert!(!refusal.reason.as_str().is_empty()),
        }
    }

    /// Whatever the bytes and whatever the key: an answer, and one of the fixed set.
    #[test]
    fn every_refusal_has_a_reason(
        kind in any_kind(), suffix in "[a-z0-9./:]{0,20}", value in prop::collection::vec(any::<u8>(), 0..200)
    ) {
        if let Err(refusal) = admit(kind, &suffix, &value, &beta(Rules::default())) {
            let of_record = matches!(refusal.reason, Reason::Record(_));
            prop_assert!(of_record || Reason::OF_POLICY.contains(&refusal.reason));
        }
    }
}

#[test]
fn words_of_reasons_are_unique() {
    let words: std::collections::BTreeSet<_> =
        Reason::OF_POLICY.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(words.len(), Reason::OF_POLICY.len());
    assert_eq!(Rules::default().pod_cidrs, PodCidrs::Any);
}
