use std::sync::Arc;

use super::basis::SETTLE;
use super::tests::{exporter, pod, value};
use super::*;
use crate::fixtures::upserts;
use crate::objects::{CiliumEndpoint, CiliumEndpointSlice, CiliumIdentity, ObjectKey};

const IP: &str = "cilium/state/ip/v1/default/10.1.0.1";
const LOCAL_IP: &str = "clustermesh/local/ip/v1/alpha/10.1.0.1";
const LABELS: &str =
    "k8s:app=web;k8s:io.cilium.k8s.policy.cluster=alpha;k8s:io.kubernetes.pod.namespace=shop;";

fn endpoint(name: &str, ip: &str) -> CiliumEndpoint {
    CiliumEndpoint {
        name: NamespacedName { namespace: "shop".into(), name: name.into() },
        identity: 65_800,
        node_ip: None,
        encryption_key: 0,
        ips: vec![ip.parse().unwrap()],
    }
}

fn cep(name: &str, ip: &str) -> Change {
    Change::Upsert(Object::CiliumEndpoint(Arc::new(endpoint(name, ip))))
}

fn ces(name: &str, endpoints: Vec<CiliumEndpoint>) -> Change {
    Change::Upsert(Object::CiliumEndpointSlice(Arc::new(CiliumEndpointSlice {
        name: name.into(),
        endpoints,
    })))
}

fn identity(number: u32) -> Change {
    Change::Upsert(Object::CiliumIdentity(Arc::new(CiliumIdentity {
        name: number.to_string(),
        labels: Some(LABELS.into()),
        namespace: Some("shop".into()),
    })))
}

fn gone(kind: ObjectKind, namespace: &str, name: &str) -> Change {
    Change::Delete(ObjectKey {
        kind,
        name: NamespacedName { namespace: namespace.into(), name: name.into() },
    })
}

fn deleted(changes: &[KeyChange]) -> Vec<&str> {
    changes.iter().filter(|change| change.value.is_none()).map(|change| change.key.as_str()).collect()
}

#[test]
fn an_address_belongs_to_who_had_it_first() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(vec![cep("b-old", "10.1.0.1")], now);
    assert_eq!(exporter.apply(vec![cep("a-new", "10.1.0.1")], now), []);
    // The old one goes, or takes another address: the next one has it, and the key never went.
    let changes = exporter.apply(vec![gone(ObjectKind::CiliumEndpoint, "shop", "b-old")], now);
    assert_eq!(deleted(&changes), [""; 0]);
    assert!(value(&exporter, IP).unwrap().contains("a-new"));
    let changes = exporter.apply(vec![cep("a-new", "10.1.0.2")], now);
    assert_eq!(deleted(&changes), [IP]);
}

#[test]
fn slices_count_where_there_are_no_endpoints() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(vec![ces("ces-1", vec![endpoint("web-0", "10.1.0.1")])], now);
    assert!(value(&exporter, IP).is_some());
    // An endpoint that moves to another slice stays.
    exporter.apply(vec![ces("ces-2", vec![endpoint("web-0", "10.1.0.1")])], now);
    let changes = exporter.apply(vec![gone(ObjectKind::CiliumEndpointSlice, "", "ces-1")], now);
    assert_eq!(changes, []);
    let changes = exporter.apply(vec![ces("ces-2", Vec::new())], now);
    assert_eq!(deleted(&changes), [IP]);
}

#[test]
fn cilium_that_is_installed_takes_over_without_a_gap() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(upserts(&pod("web-0", "10.1.0.1", "")), now);
    let own = value(&exporter, IP).unwrap();
    exporter.apply(vec![identity(65_800)], now);
    exporter.apply(vec![cep("web-0", "10.1.0.1")], now + SETTLE / 2);
    assert_eq!(exporter.tick(now + SETTLE / 2), []);
    assert_eq!(value(&exporter, IP).unwrap(), own);
    let changes = exporter.tick(now + SETTLE);
    assert!(value(&exporter, IP).unwrap().contains(r#""ID":65800"#));
    // Only the identity of our own goes, last of all.
    assert_eq!(deleted(&changes).len(), 1, "{changes:?}");
    assert!(changes.last().unwrap().value.is_none() && changes.last().unwrap().key.contains("/identities/"));
}

#[test]
fn cilium_that_is_removed_leaves_no_gap() {
    let now = Instant::now();
    let mut exporter = exporter();
    let mut changes = upserts(&pod("web-0", "10.1.0.1", ""));
    changes.extend([identity(65_800), cep("web-0", "10.1.0.1")]);
    exporter.apply(changes, now);
    let before: Vec<_> = exporter.published().map(|(key, _)| key).collect();
    let removed = vec![
        gone(ObjectKind::CiliumEndpoint, "shop", "web-0"),
        gone(ObjectKind::CiliumIdentity, "", "65800"),
    ];
    assert_eq!(exporter.apply(removed, now), []);
    let changes = exporter.tick(now + SETTLE);
    assert!(!deleted(&changes).contains(&IP), "{changes:?}");
    // The number that Cilium gave is not given to anybody else for a while.
    assert!(before.iter().all(|key| exporter.published().any(|(found, _)| found == *key)));
}

#[test]
fn cilium_that_comes_back_in_time_changes_nothing() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(vec![identity(65_800), cep("web-0", "10.1.0.1")], now);
    let all = vec![
        gone(ObjectKind::CiliumEndpoint, "shop", "web-0"),
        gone(ObjectKind::CiliumIdentity, "", "65800"),
    ];
    assert_eq!(exporter.apply(all, now), []);
    assert_eq!(exporter.apply(vec![identity(65_800)], now + SETTLE / 2), []);
    assert_eq!(exporter.apply(vec![cep("web-0", "10.1.0.1")], now + SETTLE), []);
    assert_eq!(exporter.tick(now + SETTLE * 2), []);
}

/// As Cilium's exporter writes it: the endpoint is there, and has none yet. Agents refuse the address until it has.
#[test]
fn an_endpoint_without_an_identity_is_exported_with_none() {
    let now = Instant::now();
    let mut exporter = exporter();
    exporter.apply(vec![identity(65_800), cep("web-0", "10.1.0.1")], now);
    exporter.tick(now + SETTLE);
    let none = CiliumEndpoint { identity: 0, ..endpoint("web-0", "10.1.0.1") };
    exporter.apply(vec![Change::Upsert(Object::CiliumEndpoint(Arc::new(none)))], now + SETTLE);
    assert!(value(&exporter, IP).unwrap().contains(r#""ID":0,"#));
}

#[test]
fn an_identity_without_labels_is_none() {
    let mut exporter = exporter();
    let empty = CiliumIdentity { name: "65800".into(), labels: None, namespace: None };
    assert_eq!(
        exporter.apply(vec![Change::Upsert(Object::CiliumIdentity(Arc::new(empty)))], Instant::now()),
        []
    );
}

#[test]
fn a_namespace_may_keep_to_itself() {
    let now = Instant::now();
    let namespace = |global: &str| {
        upserts(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, annotations: {{{global}}}}}"
        ))
    };
    let shop = "clustermesh.cilium.io/global: 'false'";
    for cilium in [false, true] {
        let mut exporter = exporter();
        let mut changes = upserts(&pod("web-0", "10.1.0.1", ""));
        changes.extend(upserts(super::tests::SERVICE));
        changes.extend(namespace(""));
        if cilium {
            changes.extend([identity(65_800), cep("web-0", "10.1.0.1")]);
        }
        exporter.apply(changes, now);
        let open: Vec<(String, Vec<u8>)> =
            exporter.published().map(|(key, value)| (key, value.to_vec())).collect();

        // The own agents keep all of it: what moves is in both places for a while.
        let changes = exporter.apply(namespace(shop), now);
        assert_eq!(deleted(&changes), ["cilium/state/services/v1/alpha/shop/web"]);
        assert_eq!(exporter.tick(now), []);
        let gone = exporter.tick(now + MOVE);
        assert_eq!(deleted(&gone).len(), 2, "{gone:?}");
        let left: Vec<(String, Vec<u8>)> =
            exporter.published().map(|(key, value)| (key, value.to_vec())).collect();
        assert!(left.iter().all(|(key, _)| key.starts_with("clustermesh/local/")), "{left:?}");
        assert_eq!(left.len(), 3);
        let service = "clustermesh/local/services/v1/alpha/shop/web";
        let service = value(&exporter, service).unwrap();
        assert!(service.contains(r#""global":false"#) && service.contains(r#""private":true"#), "{service}");
        let public = open.iter().find(|(key, _)| key == IP).unwrap();
        assert_eq!(value(&exporter, LOCAL_IP).unwrap().as_bytes(), public.1);

        // Back again; a change of mind before the old place is empty keeps the new one.
        let open_again = "clustermesh.cilium.io/global: 'TRUE'";
        exporter.apply(namespace(open_again), now);
        exporter.apply(namespace(shop), now);
        exporter.tick(now + MOVE);
        let private: Vec<_> = exporter.published().map(|(key, value)| (key, value.to_vec())).collect();
        assert_eq!(private, left);
        exporter.apply(namespace(open_again), now);
        exporter.tick(now + MOVE);
        let again: Vec<_> = exporter.published().map(|(key, value)| (key, value.to_vec())).collect();
        assert_eq!(again, open);
    }
}

#[test]
fn namespaces_may_have_to_ask_for_it() {
    let now = Instant::now();
    let max = clustermesh_kvstore::cluster::MaxConnectedClusters::C255;
    let cluster = Cluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let identities = Allocator::new(cluster.id, max, std::time::Duration::from_secs(600));
    let mut exporter = Exporter::new(
        cluster,
        identities,
        Rules { default_global: false, complete: true, ..Rules::default() },
    );
    exporter.apply(upserts(&pod("web-0", "10.1.0.1", "")), now);
    exporter.apply(upserts("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}"), now);
    assert!(value(&exporter, IP).is_none() && value(&exporter, LOCAL_IP).is_some());
    let asks = "metadata: {name: shop, annotations: {clustermesh.cilium.io/global: 'true'}}";
    exporter.apply(upserts(&format!("apiVersion: v1\nkind: Namespace\n{asks}")), now);
    exporter.tick(now + MOVE);
    assert_eq!((exporter.published_count(Kind::Ip), exporter.published_count(Kind::LocalIp)), (1, 0));
    // A namespace that goes takes what others know of it along.
    exporter.apply(vec![gone(ObjectKind::Namespace, "", "shop")], now);
    exporter.tick(now + MOVE);
    assert!(value(&exporter, IP).is_none() && value(&exporter, LOCAL_IP).is_some());
}
