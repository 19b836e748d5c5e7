//! Records that may be refused, and what the mirror makes of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use clustermesh_kvstore::cluster::{ClusterId, Identity, NamespacedName};
use clustermesh_kvstore::import_policy::{PeerPolicy, PolicyFile, Rules};
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::labels::{CLUSTER_LABEL, Labels};
use clustermesh_kvstore::record::{
    Backends, ExportType, IdentityRecord, IpRecord, Node, NodeAddress, NodeAddressKind, Record as _, Service,
    ServiceExport,
};
use rand::Rng as _;
use rand::rngs::SmallRng;

use super::super::admit::{Gate, Record, Verdict};
use super::{KINDS, Keys, World};

/// Of the cluster's range.
pub(super) const FIRST_IDENTITY: u32 = (2 << 16) + 1;

const POLICIES: [&str; 5] = [
    "",
    "default: {namespaces: {deny: [pay]}, services: {deny: ['shop/s1']}}",
    "default: {node-cidrs: [192.0.2.0/30], pod-cidrs: [10.0.0.0/30], services: {allow: [shop/*]}}",
    "default: {quotas: {ip: 3, nodes: 2, services: 1}}",
    "default: {mode: audit, namespaces: {deny: ['*']}, quotas: {nodes: 1}}",
];

fn parse(policy: &str) -> Arc<Rules> {
    PolicyFile::parse(policy).unwrap().rules_for(&"beta".parse().unwrap())
}

pub(super) fn rules(rng: &mut SmallRng) -> Arc<Rules> {
    parse(POLICIES[rng.random_range(0..POLICIES.len())])
}

/// A record of some namespace; now and then one that cannot be read, or that is another cluster's.
pub(super) fn a_value(rng: &mut SmallRng, kind: Kind, n: u32) -> Vec<u8> {
    if rng.random_bool(0.1) {
        return vec![rng.random()];
    }
    let cluster_id = if rng.random_bool(0.1) { 3 } else { 2 };
    let namespace = if rng.random_bool(0.5) { "shop" } else { "pay" };
    let variant: u8 = rng.random_range(0..3);
    let octet = u8::try_from(n).unwrap();
    let node_ip = |last| IpAddr::from(Ipv4Addr::new(192, 0, 2, last));
    // A service's namespace is that of its key.
    let name = NamespacedName { namespace: "shop".into(), name: format!("s{n}") };
    match kind {
        Kind::Nodes => Node {
            name: format!("n{n}"),
            cluster: "beta".into(),
            cluster_id,
            addresses: vec![NodeAddress { kind: NodeAddressKind::InternalIp, ip: node_ip(octet) }],
            encryption_key: variant,
            ..Node::default()
        }
        .encode(),
        Kind::Identities => IdentityRecord {
            id: Identity(FIRST_IDENTITY + n),
            labels: Labels::parse(&format!(
                "k8s:{CLUSTER_LABEL}=beta;k8s:io.kubernetes.pod.namespace={namespace};k8s:v={variant};"
            ))
            .unwrap(),
        }
        .encode(),
        Kind::Ip => IpRecord {
            prefix: IpAddr::from(Ipv4Addr::new(10, 0, 0, octet)).into(),
            host: true,
            host_ip: Some(node_ip(variant * 3)),
            identity: Identity((cluster_id << 16) + u32::from(variant)),
            key: 0,
            metadata: String::new(),
            namespace: namespace.into(),
            pod_name: String::new(),
            service_account: String::new(),
            named_ports: Vec::new(),
        }
        .encode(),
        Kind::ServiceExports => {
            let cluster = if cluster_id == 2 { "beta" } else { "gamma" };
            ServiceExport {
                cluster: cluster.into(),
                name,
                created: format!("2026-01-0{}T00:00:00Z", variant + 1),
                ports: Vec::new(),
                kind: ExportType::ClusterSetIp,
                session_affinity: "None".into(),
                session_affinity_config: None,
            }
            .encode()
        }
        _ => Service {
            cluster: "beta".into(),
            cluster_id,
            name,
            frontends: [].into(),
            backends: Backends::default(),
            hostnames: [].into(),
            zones: [].into(),
            labels: [].into(),
            selector: [].into(),
            include_external: true,
            shared: variant == 0,
        }
        .encode(),
    }
}

impl World {
    fn peer(&self) -> PeerPolicy {
        let (name, max) = (self.name.clone(), self.mesh.max);
        let id = ClusterId::new(2, max).unwrap();
        PeerPolicy { name, id, max, is_own: false, rules: self.rules.clone() }
    }

    pub(super) fn verdict(&self, kind: Kind, suffix: &str, value: &[u8]) -> Verdict {
        Gate::default().judge(&self.peer(), &Record { kind, suffix, value }, None)
    }

    /// Which records are mirrored may depend on their order.
    pub(super) fn may_be_full(&self, kind: Kind) -> bool {
        self.peer().check_quota(kind, 5).is_err()
    }

    /// The mirror has of a kind what the cluster has and may say.
    pub(super) fn check_mirrored(&self, kind: Kind, prefix: &str, data: &Keys) {
        let seed = self.seed;
        let stands: BTreeSet<&str> =
            self.local.stands.keys().filter_map(|key| key.strip_prefix(prefix)).collect();
        if self.may_be_full(kind) {
            let quota = self.rules.quotas.of(kind);
            assert!(stands.len() <= quota, "seed {seed}: {kind}: {stands:?} are more than {quota}");
        }
        for suffix in &stands {
            assert!(data.contains_key(*suffix), "seed {seed}: {kind} {suffix} is not the cluster's");
        }
        for (suffix, value) in data {
            let mirrored = self.local.stands.get(&[prefix, suffix].concat());
            match self.verdict(kind, suffix, value) {
                Verdict::Take if mirrored.is_none() && self.may_be_full(kind) => {}
                Verdict::Take => assert_eq!(mirrored, Some(value), "seed {seed}: {kind} {suffix}"),
                Verdict::Drop => assert_eq!(mirrored, None, "seed {seed}: {kind} {suffix} is forbidden"),
                // The last one that could be read.
                Verdict::Keep => assert_ne!(mirrored, Some(value), "seed {seed}: {kind} {suffix}"),
            }
        }
    }
}

#[test]
fn a_stricter_policy_is_obeyed_without_the_cluster_and_a_looser_one_with_it() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        world.mesh.cache_ttl = None;
        world.rules = parse("");
        world.restart();
        for _ in 0..100 {
            world.mutate();
        }
        let data = world.source.data.clone();
        world.settle();
        world.source.data = data.clone();
        let before = world.local.stands.clone();
        world.disconnect();
        world.rules = parse(POLICIES[1 + usize::try_from(seed).unwrap() % 2]);
        world.restart();
        while world.write_one() {}
        let mut expected = before.clone();
        for kind in KINDS {
            let prefix = data_prefix(kind, &world.name, Layout::Cache);
            expected.retain(|key, value| {
                key.strip_prefix(&prefix)
                    .is_none_or(|suffix| world.verdict(kind, suffix, value) == Verdict::Take)
            });
        }
        assert_eq!(world.local.stands, expected, "seed {seed}");
        world.settle();
        world.source.data = data;
        assert_eq!(world.local.stands, expected, "seed {seed}");
        world.rules = parse("");
        world.restart();
        world.settle();
        assert_eq!(world.local.stands, before, "seed {seed}");
    }
}
