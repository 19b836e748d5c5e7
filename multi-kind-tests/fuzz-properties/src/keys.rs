//! Texts that name something: keys and what they are made of, labels, patterns. A line for each reader.

use clustermesh_apiserver::kvstoremesh::admit::{Gate, Record, Verdict};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::etcd::KeyRange;
use clustermesh_kvstore::import_policy::{Ledger, Pattern, PeerPolicy};
use clustermesh_kvstore::key::{Kind, Layout, canary_key, cluster_config_key, data_prefix, digest_key};
use clustermesh_kvstore::labels::Labels;
use clustermesh_kvstore::record::Protocol;

pub(crate) fn run(input: &[u8]) {
    bytes(input);
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(name) = text.parse::<ClusterName>() {
        cluster(&name);
    }
    if let Some(kind) = Kind::named(text) {
        assert_eq!(kind.as_str(), text);
    }
    if let Ok(labels) = Labels::parse(text) {
        let written = labels.to_string();
        assert_eq!(Labels::parse(&written).as_ref(), Ok(&labels), "{written:?}");
    }
    if let Ok(pattern) = text.parse::<Pattern>() {
        let literal = pattern.to_string().replace('*', "");
        assert!(pattern.matches(&literal), "stars may stand for nothing");
    }
    if let Ok(protocol) = text.parse::<Protocol>() {
        assert_eq!(protocol.as_str(), text);
    }
    let shown = Ledger::shown(text);
    assert!(shown.chars().all(|c| !c.is_control()) && shown.len() <= 2048);
    mirrored(text);
}

/// Keys come as bytes.
fn bytes(key: &[u8]) {
    for start in ["cilium/state/ip/v1/default/", "cilium/cluster-config/beta", ""] {
        let range = KeyRange::of(start);
        let suffix = range.suffix(key);
        let text = std::str::from_utf8(key).ok();
        let is_in = text.is_some_and(|text| match start.ends_with('/') {
            true => text.starts_with(start),
            false => text == start,
        });
        assert_eq!(suffix.is_some(), is_in);
        if let Some(suffix) = suffix {
            assert_eq!([start, suffix].concat().as_bytes(), key);
            assert!(key < range.end().as_slice());
        }
    }
}

/// No key of one cluster is one of another, whatever they are called.
fn cluster(name: &ClusterName) {
    let other: ClusterName = if name.as_str() == "beta" { "gamma" } else { "beta" }.parse().unwrap();
    for layout in [Layout::State, Layout::Cache] {
        for kind in Kind::ALL {
            for other_kind in Kind::ALL {
                // At home these two have no name in their keys.
                let is_nameless =
                    |kind| layout == Layout::State && matches!(kind, Kind::Identities | Kind::Ip);
                let (ours, theirs) =
                    (data_prefix(kind, name, layout), data_prefix(other_kind, &other, layout));
                if !is_nameless(kind) && !is_nameless(other_kind) {
                    assert!(!ours.starts_with(&theirs) && !theirs.starts_with(&ours), "{ours} {theirs}");
                }
                assert!(!digest_key(kind, name, layout).starts_with(&theirs));
                assert_ne!(canary_key(kind, name, layout), canary_key(other_kind, &other, layout));
            }
        }
    }
    assert_ne!(cluster_config_key(name), cluster_config_key(&other));
}

/// A key that is let into the mirror stays below its prefix and has one form.
fn mirrored(suffix: &str) {
    let max = MaxConnectedClusters::C255;
    let id = ClusterId::new(2, max).unwrap();
    let peer = PeerPolicy {
        name: "beta".parse().unwrap(),
        id,
        max,
        is_own: false,
        rules: std::sync::Arc::default(),
    };
    for kind in Kind::ALL {
        let value = value(kind, suffix);
        let record = Record { kind, suffix, value: value.as_bytes() };
        if Gate::default().judge(&peer, &record, Some(0)) == Verdict::Take {
            assert!(!kind.is_private());
            let slashes = usize::from(matches!(kind, Kind::Services | Kind::ServiceExports));
            assert_eq!(suffix.matches('/').count(), slashes, "{suffix}");
            assert!(!suffix.contains("..") && suffix.len() <= 600 && suffix.is_ascii());
        }
    }
}

/// The value that would fit.
fn value(kind: Kind, suffix: &str) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let (namespace, name) = suffix.split_once('/').unwrap_or(("", suffix));
    let (namespace, name) = (quoted(namespace), quoted(name));
    match kind {
        Kind::Nodes => format!(r#"{{"Name":{},"Cluster":"beta","ClusterID":2}}"#, quoted(suffix)),
        Kind::Ip | Kind::LocalIp => format!(r#"{{"IP":{},"ID":131373}}"#, quoted(suffix)),
        Kind::Identities | Kind::LocalIdentities => "k8s:io.cilium.k8s.policy.cluster=beta;".to_owned(),
        Kind::Services | Kind::LocalServices => format!(
            r#"{{"cluster":"beta","namespace":{namespace},"name":{name},"clusterID":2,"clusterId":2,"global":true,"shared":true}}"#
        ),
        Kind::LocalPolicies => r#"{"cluster":"beta","clusterID":2,"rules":[]}"#.to_owned(),
        Kind::ServiceExports => {
            format!(r#"{{"cluster":"beta","namespace":{namespace},"name":{name},"type":"Headless"}}"#)
        }
    }
}
