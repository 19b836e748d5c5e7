use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_kvstore::cluster::{Identity, MaxConnectedClusters};
use clustermesh_kvstore::record::{Balancing, LocalService, Nearness, Record as _};
use proptest::prelude::*;

use super::*;
use crate::fixtures::{objects, upserts};
use crate::objects::ObjectKey;

const GRACE: Duration = Duration::from_secs(600);

pub(super) fn exporter() -> Exporter {
    let max = MaxConnectedClusters::C255;
    let cluster = Cluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let allocator = Allocator::new(cluster.id, max, GRACE);
    Exporter::new(cluster, allocator, Rules::default())
}

pub(super) fn value(exporter: &Exporter, key: &str) -> Option<String> {
    let mut keys = exporter.published();
    keys.find(|(found, _)| found == key).map(|(_, value)| String::from_utf8(value.to_vec()).unwrap())
}

pub(super) fn pod(name: &str, ip: &str, extra: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{namespace: shop, name: {name}, labels: {{app: web}}{extra}}}\n\
         spec: {{nodeName: n1, containers: [{{name: c, ports: [{{name: web, containerPort: 8080}}]}}]}}\n\
         status: {{podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}

pub(super) const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web, annotations: {service.cilium.io/global: 'true'}}
spec: {clusterIP: 10.9.0.1, selector: {app: web}, ports: [{port: 80, targetPort: web}]}
";

#[test]
fn a_change_touches_only_what_depends_on_it() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(upserts(SERVICE), now);
    exporter.apply(upserts(&pod("web-0", "10.1.0.1", "")), now);
    let changes = exporter.apply(upserts(&pod("web-1", "10.1.0.2", "")), now);
    let keys: Vec<&str> = changes.iter().map(|change| change.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "cilium/state/ip/v1/default/10.1.0.2",
            "clustermesh/local/services/v1/alpha/shop/web",
            "cilium/state/services/v1/alpha/shop/web",
        ]
    );
    assert!(exporter.apply(upserts(&pod("web-1", "10.1.0.2", "")), now).is_empty());
}

#[test]
fn a_service_that_is_no_longer_shared_leaves_the_mesh_but_not_the_cluster() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(upserts(SERVICE), now);
    let private = SERVICE.replace("'true'", "'true', service.cilium.io/shared: 'false'");
    let changes = exporter.apply(upserts(&private), now);
    assert_eq!(changes.len(), 2);
    assert_eq!(changes[1], KeyChange { key: "cilium/state/services/v1/alpha/shop/web".into(), value: None });
}

#[test]
fn pods_that_are_not_ready_count_for_the_failover_threshold() {
    let now = Instant::now();
    let mut exporter = exporter();
    let service = |annotations: &str| SERVICE.replace("'true'}", &format!("'true', {annotations}}}"));
    let key = "clustermesh/local/services/v1/alpha/shop/web";
    let failover = |exporter: &Exporter| {
        let record = LocalService::decode("shop/web", value(exporter, key).unwrap().as_bytes()).unwrap();
        record.failover.map(|failover| (failover.threshold, failover.expected))
    };
    exporter.apply(upserts(&pod("web-0", "10.1.0.1", "")), now);
    exporter.apply(upserts(&service("clustermesh.io/failover-threshold: 70%")), now);
    assert_eq!(failover(&exporter), None, "callers do not prefer this cluster");
    let local = "service.cilium.io/affinity: local, clustermesh.io/failover-threshold:";
    exporter.apply(upserts(&service(&format!("{local} 70%"))), now);
    assert_eq!(failover(&exporter), Some((70, 1)));
    exporter.apply(upserts(&service(&format!("{local} most"))), now);
    assert_eq!(failover(&exporter), None, "the service stays, although that is no share");
    exporter.apply(upserts(&service(&format!("{local} '70'"))), now);
    let waiting = pod("web-1", "10.1.0.2", "").replace("'True'", "'False'");
    exporter.apply(upserts(&waiting), now);
    assert_eq!(failover(&exporter), Some((70, 2)));
    let going = pod("web-1", "10.1.0.2", ", deletionTimestamp: '2026-01-01T00:00:00Z'");
    exporter.apply(upserts(&going), now);
    assert_eq!(failover(&exporter), Some((70, 1)));
}

#[test]
fn what_a_service_says_of_its_balancing_reaches_the_agents() {
    let now = Instant::now();
    let mut exporter = exporter();
    let key = "clustermesh/local/services/v1/alpha/shop/web";
    let mut balancing = |annotations: &str, spec: &str| {
        let text = SERVICE.replace("'true'}", &format!("'true'{annotations}}}"));
        exporter.apply(upserts(&text.replace("clusterIP:", &format!("{spec} clusterIP:"))), now);
        LocalService::decode("shop/web", value(&exporter, key).unwrap().as_bytes()).unwrap().balancing
    };
    let nothing = Balancing::default();
    assert_eq!(balancing("", "sessionAffinity: None,"), nothing);
    let session = |seconds| Balancing { session: Some(seconds), ..Balancing::default() };
    assert_eq!(balancing("", "sessionAffinity: ClientIP,"), session(10_800));
    let config = |seconds: &str| {
        format!(
            "sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}},"
        )
    };
    assert_eq!(balancing("", &config("60")), session(60));
    assert_eq!(balancing("", &config("86401")), session(10_800), "no such time counts as none");
    assert_eq!(balancing("", "sessionAffinity: Cookie,"), nothing);

    let clusters = balancing(
        ", service.cilium.io/affinity: local, clustermesh.io/cluster-order: 'beta=alpha,gamma', \
         clustermesh.io/cluster-weights: 'alpha=80,beta=20'",
        "",
    );
    let names = |tier: &[&str]| tier.iter().map(|name| name.parse().unwrap()).collect::<BTreeSet<_>>();
    assert_eq!(clusters.order, [names(&["alpha", "beta"]), names(&["gamma"])]);
    assert_eq!(clusters.weights.values().copied().collect::<Vec<_>>(), [80, 20]);
    assert_eq!(balancing(", clustermesh.io/cluster-order: 'beta;gamma'", ""), nothing);
    assert_eq!(balancing(", clustermesh.io/cluster-weights: 'beta=most'", ""), nothing);
    assert_eq!(balancing(", io.cilium/other: x, clustermesh.io/cluster-order: 'beta,beta'", ""), nothing);

    for (annotations, spec, nearness) in [
        ("", "trafficDistribution: PreferClose,", Nearness::PreferZone),
        ("", "trafficDistribution: PreferSameZone,", Nearness::PreferZone),
        ("", "trafficDistribution: PreferSameNode,", Nearness::PreferNode),
        ("", "trafficDistribution: PreferFar,", Nearness::Any),
        (", service.kubernetes.io/topology-mode: Auto", "", Nearness::PreferZone),
        (", service.kubernetes.io/topology-mode: Disabled", "", Nearness::Any),
        ("", "internalTrafficPolicy: Cluster,", Nearness::Any),
        ("", "internalTrafficPolicy: Local, trafficDistribution: PreferClose,", Nearness::OnlyNode),
    ] {
        assert_eq!(balancing(annotations, spec).nearness, nearness, "{annotations} {spec}");
    }
}

#[test]
fn an_address_that_moves_to_another_pod_stays() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(upserts(&pod("old", "10.1.0.1", "")), now);
    let key = "cilium/state/ip/v1/default/10.1.0.1";
    // The new pod comes before the old one goes, which is on its way.
    exporter.apply(upserts(&pod("old", "10.1.0.1", ", deletionTimestamp: '2026-01-01T00:00:00Z'")), now);
    exporter.apply(upserts(&pod("new", "10.1.0.1", "")), now);
    assert!(value(&exporter, key).unwrap().contains(r#""K8sPodName":"new""#));
    let gone = objects(&pod("old", "10.1.0.1", ""))[0].key();
    assert_eq!(exporter.apply(vec![Change::Delete(gone)], now), []);
    assert!(value(&exporter, key).is_some());
}

#[test]
fn identities_outlive_their_pods_for_a_while() {
    let now = Instant::now();
    let mut exporter = exporter();
    let changes = exporter.apply(upserts(&pod("web-0", "10.1.0.1", "")), now);
    let identity = changes[0].key.clone();
    assert!(identity.starts_with("cilium/state/identities/v1/id/"), "{identity}");
    exporter.apply(vec![Change::Delete(objects(&pod("web-0", "10.1.0.1", ""))[0].key())], now);
    assert_eq!(exporter.tick(now + GRACE / 2), []);
    assert!(value(&exporter, &identity).is_some());
    assert_eq!(exporter.tick(now + GRACE), [KeyChange { key: identity, value: None }]);
}

#[test]
fn pods_without_an_identity_get_one_when_there_is_one() {
    let now = Instant::now();
    let max = MaxConnectedClusters::C511;
    let cluster = Cluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let mut allocator = Allocator::new(cluster.id, max, GRACE);
    let (first, last) = cluster.id.identity_range(max);
    for number in first.0 + 256..=last.0 {
        allocator.adopt(Identity(number), &format!("k8s:old={number};"), now).unwrap();
    }
    let mut exporter = Exporter::new(cluster, allocator, Rules::default());
    exporter.apply(upserts(&pod("web-0", "10.1.0.1", "")), now);
    assert!(matches!(&exporter.take_problems()[..], [Problem::NoIdentity { .. }]));
    assert_eq!((exporter.starved_count(), exporter.published_count(Kind::Ip)), (1, 0));
    exporter.tick(now + GRACE);
    assert_eq!((exporter.starved_count(), exporter.published_count(Kind::Ip)), (0, 1));
    assert_eq!(exporter.published_count(Kind::Identities), 1);
}

/// What is published, with label strings in place of numbers, and only of identities that somebody has:
/// numbers may depend on history, nothing else may.
fn meaning(exporter: &Exporter) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    let mut used = BTreeSet::new();
    for (key, value) in exporter.published() {
        let mut value = String::from_utf8(value.to_vec()).unwrap();
        if key.starts_with("cilium/state/ip/") {
            for (identity, labels) in exporter.identities.assignments() {
                let number = format!(r#""ID":{identity},"#);
                if value.contains(&number) {
                    value = value.replace(&number, labels);
                    used.insert(labels.to_owned());
                }
            }
        }
        if !key.starts_with("cilium/state/identities/") {
            keys.insert(key, value);
        }
    }
    keys.extend(used.into_iter().map(|labels| (labels, String::new())));
    keys
}

/// One of few objects in one of few variants.
fn any_object() -> impl Strategy<Value = Object> {
    let text = prop_oneof![
        (0..2_u8, 0..3_u8).prop_map(|(n, l)| format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: ns{n}, labels: {{l: v{l}}}}}"
        )),
        (0..2_u8, 0..3_u8, 0..3_u8, 0..2_u8).prop_map(|(n, zone, ip, cilium)| format!(
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: n{n}\n  labels: {{topology.kubernetes.io/zone: z{zone}}}\n  \
             annotations: {{network.cilium.io/ipv4-cilium-host: 10.1.0.{cilium}}}\n\
             status: {{addresses: [{{type: InternalIP, address: 172.18.0.{ip}}}]}}"
        )),
        any_pod(),
        (0..2_u8, 0..2_u8, 0..3_u8, 0..4_u8, any::<bool>()).prop_map(|(ns, n, app, kind, notready)| {
            let annotations = match kind {
                0 => "{service.cilium.io/global: 'true', service.cilium.io/affinity: local, clustermesh.io/failover-threshold: 50%}",
                1 => "{service.cilium.io/global: 'true', service.cilium.io/shared: 'false'}",
                _ => "{service.cilium.io/global: 'true'}",
            };
            let ip = if kind == 3 { "None".to_owned() } else { format!("10.9.{ns}.{n}") };
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{namespace: ns{ns}, name: s{n}, annotations: {annotations}}}\n\
                 spec: {{clusterIP: {ip}, publishNotReadyAddresses: {notready}, selector: {{app: a{app}}}, ports: [{{port: 80, targetPort: web}}]}}"
            )
        }),
        (0..2_u8, 0..2_u8, 0..3_u8, 0..3_u8, 0..2_u8).prop_map(|(ns, n, service, ip, node)| format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  namespace: ns{ns}\n  name: e{n}\n  \
             labels: {{kubernetes.io/service-name: s{service}}}\naddressType: IPv4\n\
             endpoints: [{{addresses: [10.7.0.{ip}], nodeName: n{node}}}]\nports: [{{port: 8080}}]"
        )),
    ];
    text.prop_map(|text| objects(&text).remove(0))
}

fn any_pod() -> impl Strategy<Value = String> {
    let place = (0..2_u8, 0..4_u8, 0..3_u8, 0..4_u8);
    let state = (0..2_u8, any::<bool>(), 0..4_u8, any::<bool>());
    (place, state).prop_map(|((ns, n, app, ip), (node, ready, kind, named))| {
        let deleted = if kind == 1 { ", deletionTimestamp: '2026-01-01T00:00:00Z'" } else { "" };
        let phase = if kind == 2 { "Failed" } else { "Running" };
        let host = kind == 3;
        let port = if named { "web" } else { "other" };
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: ns{ns}, name: p{n}, labels: {{app: a{app}}}{deleted}}}\n\
             spec: {{nodeName: n{node}, hostNetwork: {host}, containers: [{{name: c, ports: [{{name: {port}, containerPort: 80{n}}}]}}]}}\n\
             status: {{phase: {phase}, podIP: 10.1.0.{ip}, conditions: [{{type: Ready, status: '{}'}}]}}",
            if ready { "True" } else { "False" }
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever happened before, what is published is what a fresh exporter makes of the same objects,
    /// and the changes that were returned add up to it.
    #[test]
    fn incremental_is_from_scratch(
        steps in prop::collection::vec((any_object(), prop::bool::weighted(0.25)), 1..40),
        batch in 1..5_usize,
    ) {
        let now = Instant::now();
        let mut exporter = exporter();
        let mut facts = BTreeMap::<ObjectKey, Object>::new();
        let mut etcd = BTreeMap::<String, Arc<[u8]>>::new();
        for steps in steps.chunks(batch) {
            let mut changes = Vec::new();
            for (object, delete) in steps {
                if *delete {
                    facts.remove(&object.key());
                    changes.push(Change::Delete(object.key()));
                } else {
                    facts.insert(object.key(), object.clone());
                    changes.push(Change::Upsert(object.clone()));
                }
            }
            for KeyChange { key, value } in exporter.apply(changes, now) {
                match value {
                    Some(value) => prop_assert_ne!(etcd.insert(key, value.clone()), Some(value)),
                    None => prop_assert!(etcd.remove(&key).is_some()),
                }
            }
        }
        let published: BTreeMap<String, Arc<[u8]>> =
            exporter.published().map(|(key, value)| (key, value.into())).collect();
        prop_assert_eq!(&etcd, &published);

        let mut fresh = self::exporter();
        fresh.apply(facts.into_values().map(Change::Upsert).collect(), now);
        prop_assert_eq!(meaning(&exporter), meaning(&fresh));
    }
}
