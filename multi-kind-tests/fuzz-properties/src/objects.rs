//! Objects as an API server tells of them, written by anybody who may in that cluster. Each line is
//! `KIND JSON`, or `KIND NAMESPACE/NAME` of one that goes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_apiserver::export::{Cluster, Exporter, KeyChange, Rules};
use clustermesh_apiserver::identity::Allocator;
use clustermesh_apiserver::objects::{Change, Effect, Object, ObjectKey, ObjectKind, Policy};
use clustermesh_apiserver::source::kubernetes;
use clustermesh_apiserver::source::manifests;
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::import_policy::{PeerPolicy, Reason, admit};
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::labels::CLUSTER_LABEL;
use clustermesh_kvstore::record::{LocalPolicy, Record, Requirement};

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
const MOST: usize = 64;

pub(crate) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut exporter = exporter();
    let mut policies = BTreeMap::new();
    let mut now = Instant::now();
    for line in text.lines().take(MOST) {
        let Some((kind, rest)) = line.split_once(' ') else { continue };
        let Some(kind) = ObjectKind::ALL.into_iter().find(|known| known.as_str() == kind) else { continue };
        let Some(change) = change(kind, rest) else { continue };
        match &change {
            Change::Upsert(Object::Policy(policy)) => {
                drop(policies.insert(change_key(&change), Arc::clone(policy)))
            }
            _ => drop(policies.remove(&change_key(&change))),
        }
        exporter.apply(vec![change], now).iter().for_each(check);
        check_policies(&exporter, &policies);
        now += Duration::from_secs(1);
    }
    now += Duration::from_secs(3600);
    exporter.tick(now).iter().for_each(check);
}

fn change(kind: ObjectKind, text: &str) -> Option<Change> {
    if !text.starts_with('{') {
        let (namespace, name) = text.split_once('/').unwrap_or(("", text));
        let name = NamespacedName { namespace: namespace.to_owned(), name: name.to_owned() };
        return Some(Change::Delete(ObjectKey { kind, name }));
    }
    match kubernetes::read(kind, text) {
        Ok(object) => {
            assert_eq!(object.key().kind, kind);
            // A manifest of the same object says the same, if it can be read as one.
            if let Ok(parsed) = manifests::parse(text)
                && let [manifest] = parsed.as_slice()
                && manifest.key().kind == kind
            {
                assert_eq!(*manifest, object);
            }
            Some(Change::Upsert(object))
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
    }
}

fn change_key(change: &Change) -> ObjectKey {
    match change {
        Change::Upsert(object) => object.key(),
        Change::Delete(key) => key.clone(),
    }
}

/// A policy has a record if it is there and not refused; it is about pods of the own cluster and of its namespace.
fn check_policies(exporter: &Exporter, policies: &BTreeMap<ObjectKey, Arc<Policy>>) {
    let prefix = data_prefix(Kind::LocalPolicies, &"alpha".parse().unwrap(), Layout::State);
    let mut count = 0;
    for policy in policies.values() {
        let is_refused = policy.gaps.iter().any(|gap| gap.effect == Effect::Refused);
        assert!(!is_refused || policy.rules.is_empty(), "{policy:?}");
        count += usize::from(!policy.rules.is_empty());
    }
    assert_eq!(exporter.published_count(Kind::LocalPolicies), count);
    let records =
        exporter.published().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), value)));
    for (suffix, value) in records {
        let record = LocalPolicy::decode(&suffix, value).unwrap();
        let namespace = &record.name.namespace;
        for rule in &record.rules {
            assert!(rule.subject.0.contains(&Requirement::is("k8s", CLUSTER_LABEL, "alpha")), "{rule:?}");
            let own = Requirement::is("k8s", "io.kubernetes.pod.namespace", namespace);
            assert!(namespace.is_empty() || rule.subject.0.contains(&own), "{rule:?}");
            assert!(rule.ingress.is_some() || rule.egress.is_some(), "{rule:?}");
        }
    }
}

fn exporter() -> Exporter {
    let id = ClusterId::new(1, MAX).unwrap();
    let cluster = Cluster { name: "alpha".parse().unwrap(), id };
    let allocator = Allocator::new(id, MAX, Duration::from_secs(60));
    Exporter::new(cluster, allocator, Rules { default_global: true, complete: true, ..Rules::default() })
}

/// What is written can be read by the own agents and by those of other clusters, and is this cluster's.
fn check(change: &KeyChange) {
    let KeyChange { key, value } = change;
    let alpha = "alpha".parse().unwrap();
    let place = Exporter::KINDS.into_iter().find_map(|kind| {
        let prefix = data_prefix(kind, &alpha, Layout::State);
        Some((kind, key.strip_prefix(&prefix)?))
    });
    let (kind, suffix) = place.unwrap_or_else(|| panic!("{key:?} is none of our keys"));
    let slashes = match kind {
        Kind::Services | Kind::LocalServices => 1,
        Kind::LocalPolicies => 2,
        _ => 0,
    };
    assert_eq!(suffix.matches('/').count(), slashes, "{key:?}");
    let Some(value) = value else { return };
    let id = ClusterId::new(1, MAX).unwrap();
    for is_own in [true, false] {
        if kind.is_private() && !is_own {
            continue;
        }
        let peer = PeerPolicy { name: alpha.clone(), id, max: MAX, is_own, rules: std::sync::Arc::default() };
        if let Err(refusal) = admit(kind, suffix, value, &peer) {
            // An object may well have an address that no pod has, or too much of something.
            let is_odd = matches!(
                refusal.reason,
                Reason::ImplausibleAddress | Reason::PrefixTooWide | Reason::TooMany | Reason::Backends
            );
            // Cilium's own identities are passed on as they are, like its exporter does; also that an endpoint has none yet.
            let has_none = String::from_utf8_lossy(value).contains(r#""ID":0,"#);
            let is_ciliums = matches!(refusal.reason, Reason::ClusterLabel | Reason::IdentityRange)
                || refusal.reason == Reason::Record("bad_identity") && has_none;
            assert!(is_odd || is_ciliums, "{key}: {refusal}: {}", String::from_utf8_lossy(value));
        }
    }
}
