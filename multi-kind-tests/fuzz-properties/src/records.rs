//! A record: `KIND SUFFIX`, a line break, the value. The kind is that of a prefix, or `config` or `digest`.

use std::fmt::Debug;
use std::sync::{Arc, LazyLock};

use clustermesh_kvstore::accept::Accepted;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::digest::{DigestRecord, MAX_RECENT, record_hash};
use clustermesh_kvstore::import_policy::{Imported, PeerPolicy, PolicyFile, Rules, admit};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    ClusterConfig, IdentityRecord, IpRecord, LocalPolicy, LocalService, MAX_VALUE, Node, Record, Service,
    ServiceExport,
};

/// Longest text of an error: what a peer writes must not fill our logs.
const MAX_ERROR: usize = 1024;

/// Rules that judge everything there is to judge.
const STRICT: &str = "
default:
  pod-cidrs: [10.0.0.0/8, 'fd00::/16']
  node-cidrs: [172.16.0.0/12]
  refuse-identities: [ingress, 7]
  namespaces: {allow: ['shop*', 'a*b*c'], deny: [kube-system]}
  services: {deny: ['*/secret*']}
  quotas: {nodes: 3}
  max-record-bytes: 1500
  max-backends: 4
";

static STRICTLY: LazyLock<PolicyFile> = LazyLock::new(|| PolicyFile::parse(STRICT).unwrap());

pub(crate) fn run(input: &[u8]) {
    let Some(at) = input.iter().position(|byte| *byte == b'\n') else { return };
    let (head, value) = (&input[..at], &input[at + 1..]);
    let Some((kind, suffix)) = std::str::from_utf8(head).ok().and_then(|head| head.split_once(' ')) else {
        return;
    };
    match (kind, Kind::named(kind)) {
        ("config", _) => config(value),
        ("digest", _) => digest(value),
        (_, Some(kind)) => record(kind, suffix, value),
        _ => {}
    }
}

fn record(kind: Kind, suffix: &str, value: &[u8]) {
    match kind {
        Kind::Nodes => round_trip::<Node>(suffix, value),
        Kind::Identities | Kind::LocalIdentities => round_trip::<IdentityRecord>(suffix, value),
        Kind::Ip | Kind::LocalIp => round_trip::<IpRecord>(suffix, value),
        Kind::Services => round_trip::<Service>(suffix, value),
        Kind::ServiceExports => round_trip::<ServiceExport>(suffix, value),
        Kind::LocalServices => round_trip::<LocalService>(suffix, value),
        Kind::LocalPolicies => round_trip::<LocalPolicy>(suffix, value),
    }
    for max in [MaxConnectedClusters::C255, MaxConnectedClusters::C511] {
        for is_own in [false, true] {
            let lenient = judge(kind, suffix, value, &alpha(max, is_own, Arc::default()));
            let rules = STRICTLY.rules_for(&"alpha".parse().unwrap());
            let strict = judge(kind, suffix, value, &alpha(max, is_own, rules));
            let audited = STRICTLY.clone().audited().rules_for(&"alpha".parse().unwrap());
            let audited = judge(kind, suffix, value, &alpha(max, is_own, audited));
            assert!(lenient || !strict, "rules let in what is refused without them");
            assert_eq!(lenient, audited, "rules that are only audited refuse nothing");
        }
    }
    let _ = record_hash(suffix, value);
}

/// What was read is written and read again: the same, and the bytes do not change any more.
fn round_trip<R: Record + PartialEq + Debug>(suffix: &str, value: &[u8]) {
    let record = match R::decode(suffix, value) {
        Ok(record) => record,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() <= MAX_ERROR && !text.contains('\n'), "{text}");
            return assert!(!error.reason().is_empty());
        }
    };
    assert_eq!(record.suffix(), suffix, "a record has one key");
    let encoded = record.encode();
    if encoded.len() <= MAX_VALUE {
        let again = R::decode(suffix, &encoded).expect("what we write can be read");
        assert_eq!(again, record);
        assert_eq!(again.encode(), encoded);
    }
}

/// Whether `peer` may say it; if so, that nothing is of another cluster.
fn judge(kind: Kind, suffix: &str, value: &[u8], peer: &PeerPolicy) -> bool {
    let admitted = match admit(kind, suffix, value, peer) {
        Ok(admitted) => admitted,
        Err(refusal) => {
            assert!(!refusal.reason.as_str().is_empty());
            assert!(refusal.detail.len() <= MAX_ERROR, "{}", refusal.detail);
            return false;
        }
    };
    let (name, id) = (peer.name.as_str(), u32::from(peer.id.get()));
    match admitted.record {
        Imported::Node(node) => assert_eq!((node.cluster.as_str(), node.cluster_id), (name, id)),
        Imported::Ip(record) => {
            let identity = peer.identity_of(&record);
            assert!(identity.is_reserved() || identity.belongs_to(peer.id, peer.max));
            assert_eq!(
                record.suffix(),
                record.prefix.addr().to_string(),
                "the key of an address is its text"
            );
        }
        Imported::Identity(record) => {
            assert!(record.id.belongs_to(peer.id, peer.max));
            assert_eq!(record.labels.cluster(), Some(name));
        }
        Imported::Service(service) => assert_eq!((service.cluster.as_str(), service.cluster_id), (name, id)),
        Imported::ServiceExport(export) => assert_eq!(export.cluster, name),
        Imported::LocalService(service) => {
            assert!(peer.is_own);
            assert_eq!((service.cluster.as_str(), service.cluster_id), (name, id));
        }
        Imported::LocalPolicy(policy) => {
            assert!(peer.is_own);
            assert_eq!((policy.cluster.as_str(), policy.cluster_id), (name, id));
        }
    }
    true
}

fn alpha(max: MaxConnectedClusters, is_own: bool, rules: Arc<Rules>) -> PeerPolicy {
    let id = ClusterId::new(1, max).unwrap();
    PeerPolicy { name: "alpha".parse().unwrap(), id, max, is_own, rules }
}

fn config(value: &[u8]) {
    let name: ClusterName = "alpha".parse().unwrap();
    for max in [MaxConnectedClusters::C255, MaxConnectedClusters::C511] {
        match Accepted::check(&name, value, max) {
            Ok(accepted) => assert!((1..=max.get()).contains(&accepted.id.get())),
            Err(error) => assert!(error.to_string().len() <= MAX_ERROR, "{error}"),
        }
    }
    if let Ok(config) = ClusterConfig::decode(value) {
        assert_eq!(ClusterConfig::decode(&config.encode()).as_ref(), Ok(&config));
    }
}

fn digest(value: &[u8]) {
    if let Ok(record) = DigestRecord::decode(value) {
        assert!(record.recent.len() <= MAX_RECENT);
        assert_eq!(DigestRecord::decode(&record.encode()).as_ref(), Ok(&record));
    }
}
