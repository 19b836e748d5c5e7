//! Manifests in, keys and values out, compared with files.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clustermesh_apiserver::export::{Cluster, Exporter, Rules};
use clustermesh_apiserver::identity::Allocator;
use clustermesh_apiserver::objects::{Change, Object};
use clustermesh_apiserver::source::manifests::parse;
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};

#[test]
fn a_shop_with_one_of_everything() {
    let keys = keys_of(&manifests("shop"));
    let golden = testdata("shop.keys");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &keys).unwrap();
    }
    similar(&keys, &std::fs::read_to_string(golden).unwrap());
}

/// Byte for byte what Cilium's exporter wrote about the same services.
#[test]
fn services_are_those_of_cilium() {
    let keys = keys_of(&manifests("cilium"));
    let services = keys.lines().skip_while(|line| !line.starts_with("cilium/state/services/"));
    let services: String = services.take_while(|line| !line.starts_with("clustermesh/")).fold(
        String::new(),
        |mut text, line| {
            let _ = writeln!(text, "{line}");
            text
        },
    );
    similar(&services, &std::fs::read_to_string(testdata("cilium/services.keys")).unwrap());
}

/// Which backends a service has by its selector is what Kubernetes' own controller wrote into slices.
#[test]
fn selected_endpoints_are_those_of_kubernetes() {
    let all = manifests("api-lists");
    let is_slice = |change: &&Change| matches!(change, Change::Upsert(Object::EndpointSlice(_)));
    let without_slices: Vec<Change> = all.iter().filter(|change| !is_slice(change)).cloned().collect();
    assert_ne!(without_slices.len(), all.len());
    let orders = |keys: &str| -> String {
        keys.lines()
            .filter(|line| line.contains(r#""name":"orders"#))
            .fold(String::new(), |text, line| text + line + "\n")
    };
    let computed = orders(&keys_of(&without_slices));
    assert!(computed.contains("10.1.0.10") && computed.contains("orders-headless"), "{computed}");
    similar(&computed, &orders(&keys_of(&all)));
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn manifests(directory: &str) -> Vec<Change> {
    let mut changes = Vec::new();
    for entry in std::fs::read_dir(testdata(directory)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "keys" && extension != "txt") {
            let objects = parse(&std::fs::read_to_string(&path).unwrap())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            changes.extend(objects.into_iter().map(Change::Upsert));
        }
    }
    changes
}

fn keys_of(changes: &[Change]) -> String {
    let max = MaxConnectedClusters::C255;
    let cluster = Cluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let allocator = Allocator::new(cluster.id, max, Duration::from_secs(600));
    let mut exporter = Exporter::new(cluster, allocator, Rules::default());
    exporter.apply(changes.to_vec(), Instant::now());
    assert_eq!(exporter.take_problems(), []);
    let mut lines: Vec<(String, String)> =
        exporter.published().map(|(key, value)| (key, String::from_utf8(value.to_vec()).unwrap())).collect();
    lines.sort();
    lines.iter().fold(String::new(), |text, (key, value)| text + key + "\n" + value + "\n")
}

fn similar(actual: &str, expected: &str) {
    for (actual, expected) in actual.lines().zip(expected.lines()) {
        assert_eq!(actual, expected);
    }
    assert_eq!(actual.lines().count(), expected.lines().count(), "{actual}");
}
