//! Seeded schedules: while desired state changes, scans find nothing; what a hand did to an entry is put
//! right within one scan.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    LabelSelector, LocalPolicy, Peer, PolicyRule, PolicySection, Requirement, Traffic,
};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ebpf_global_svc::abi::{ClusterState, IpValue, PolicyKey, SlotKey, TranslateKey, UnderlayKey};
use ebpf_global_svc::table::Table;
use ebpf_global_svc::{MapSizes, Tables};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::super::Reconciler;
use super::Scan;
use crate::desired::{BackendKey, Changes, GroupPlan, Restored, ServicePlan};
use crate::mesh::{Fact, FactKey, Links, Mesh, NodeFact};
use crate::tunnels::{Tunnels, UnderlayProtocol};
use crate::wire_key::{TCP, ip_key, node_key, prefix_key, service_key};

const INTERVAL: Duration = Duration::from_secs(1);
/// Of each cluster.
const IDENTITIES: u32 = 9;

struct World {
    rng: SmallRng,
    now: Instant,
    mesh: Mesh,
    reconciler: Reconciler,
    scan: Scan,
    tables: Tables,
    over_ipv6: bool,
}

fn cluster(id: u32) -> ClusterId {
    ClusterId::new(id, MaxConnectedClusters::C255).unwrap()
}

fn identity(cluster: u32, n: u32) -> u32 {
    cluster << 16 | (300 + n)
}

/// Of pods of one label: what those of another may, and what a range outside of the mesh may not.
fn policy(n: u8) -> LocalPolicy {
    let app = |n: u8| LabelSelector(vec![Requirement::is("k8s", "app", &format!("a{}", n % 3))]);
    let range = Peer::Cidr { net: format!("198.51.{n}.0/24").parse().unwrap(), except: Vec::new() };
    let section = PolicySection {
        default_deny: true,
        allow: vec![Traffic { peers: vec![Peer::Labels(app(n / 3))], ports: Vec::new() }],
        deny: vec![Traffic { peers: vec![range], ports: Vec::new() }],
    };
    LocalPolicy {
        cluster: "c1".into(),
        cluster_id: 1,
        name: format!("cnp/shop/p{n}").parse().unwrap(),
        rules: vec![PolicyRule { subject: app(n), ingress: Some(section), egress: None }],
    }
}

fn virtual_cidrs(n: u8) -> VirtualCidrs {
    let pair =
        |n: u8| (format!("10.{n}.0.0/16").parse().unwrap(), format!("240.{n}.0.0/16").parse().unwrap());
    VirtualCidrs::new((0..n % 3).map(pair)).unwrap()
}

fn ip(a: u8, b: u8) -> IpAddr {
    Ipv4Addr::new(10, a, 0, b).into()
}

fn ip6(a: u8, b: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, a.into(), 0, 0, 0, 0, 0, b.into()).into()
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        // Every other world has an IPv6 underlay.
        let tunnels = match seed % 2 {
            0 => Ipv4Addr::new(10, 1, 0, 1).into(),
            _ => Tunnels { protocol: UnderlayProtocol::Ipv6, node_ip: Some(ip6(1, 1)) },
        };
        let mut scan = Scan::default();
        scan.set_interval(Some(INTERVAL), now);
        let mut mesh = Mesh::new(cluster(1), MaxConnectedClusters::C255, "n1", tunnels, Restored::default());
        mesh.set_links(Links::Absent);
        for of in 1..4 {
            mesh.begin_list(cluster(of), Kind::Identities);
            for n in 0..IDENTITIES {
                let labels = format!("k8s:app=a{};k8s:io.cilium.k8s.policy.cluster=c{of};", n % 3);
                mesh.upsert(cluster(of), Fact::Identity(identity(of, n), labels.into()), 0);
            }
            mesh.finish_list(cluster(of), Kind::Identities);
        }
        for kind in [Kind::LocalIdentities, Kind::LocalPolicies] {
            mesh.begin_list(cluster(1), kind);
            mesh.finish_list(cluster(1), kind);
        }
        Self {
            rng: SmallRng::seed_from_u64(seed),
            now,
            mesh,
            reconciler: Reconciler::default(),
            scan,
            tables: Tables::memory(&MapSizes::default()),
            over_ipv6: tunnels.protocol == UnderlayProtocol::Ipv6,
        }
    }

    /// A random fact about nodes, addresses, states, services or policies.
    fn change(&mut self) {
        let of = self.rng.random_range(1..4_u8);
        let id = cluster(of.into());
        let n = self.rng.random_range(1..30_u8);
        match self.rng.random_range(0..10) {
            0 => {
                let cidr = format!("10.{}.{n}.0/24", of + 100).parse().unwrap();
                let internal_ips = vec![ip(of, n % 3 + 1), ip6(of, n % 3 + 1)];
                let node = NodeFact { internal_ips, pod_cidrs: vec![cidr], ..NodeFact::default() };
                self.mesh.upsert(id, Fact::Node(format!("n{}", n % 3), node), 0);
            }
            1 => self.mesh.delete(id, &FactKey::Node(format!("n{}", n % 3))),
            2..5 => {
                let identity = identity(of.into(), self.rng.random_range(0..IDENTITIES));
                let node = if self.over_ipv6 { ip6(of, n % 3 + 1) } else { ip(of, n % 3 + 1) };
                let node_ip = self.mesh.name_node(node);
                let value = IpValue { identity, node_ip, key: 0, flags: 0, pad: 0 };
                self.mesh.upsert(id, Fact::Ip(ip(of + 100, n), value), 0);
            }
            5 => self.mesh.delete(id, &FactKey::Ip(ip(of + 100, n))),
            8 => self.mesh.upsert(cluster(1), Fact::LocalPolicy(Box::new(policy(n % 9))), 0),
            9 => self.mesh.delete(cluster(1), &FactKey::LocalPolicy(policy(n % 9).name)),
            6 if of > 1 => self.mesh.set_dead(id, n % 2 == 0),
            7 if n < 10 => self.mesh.set_virtual_cidrs(id, &virtual_cidrs(n)),
            _ => {
                let plan = self.rng.random_bool(0.8).then(|| self.plan());
                let service = vec![(service_key(1, ip(96, n % 4), 80, TCP), plan)];
                self.reconciler.accept(Changes { service, ..Changes::default() });
            }
        }
    }

    fn plan(&mut self) -> ServicePlan {
        let rng = &mut self.rng;
        let mut group = |cluster: u16| {
            let mut backends: Vec<BackendKey> = (0..12)
                .filter(|_| rng.random_bool(0.5))
                .map(|n| BackendKey { cluster, ip: ip(100, n), port: 80, proto: TCP, terminating: false })
                .collect();
            backends.sort_unstable();
            (!backends.is_empty()).then_some(GroupPlan { cluster, weight: 1, tier: 0, backends })
        };
        let groups = [group(1), group(2)].into_iter().flatten().collect();
        let table = if self.rng.random_bool(0.3) { 251 } else { 0 };
        ServicePlan { affinity_timeout: if self.rng.random_bool(0.5) { 30 } else { 0 }, table, groups }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.random_range(1..200));
        self.reconciler.accept(self.mesh.compute());
        self.reconciler.run(self.now, &mut self.tables);
        self.scan.run(self.now, &self.mesh, &self.reconciler, &mut self.tables);
    }

    /// Runs a scan from its beginning to its end.
    fn scan(&mut self) {
        let scans = self.scan.drift().unwrap().scans;
        while self.scan.drift().unwrap().scans == scans {
            self.step();
        }
    }

    fn found(&self) -> u64 {
        self.scan.drift().unwrap().total()
    }

    fn dump(&self) -> String {
        let t = &self.tables;
        let services = (t.service.dump().unwrap(), t.slot.dump().unwrap(), t.backend.dump().unwrap());
        let nodes = (t.node.dump().unwrap(), t.prefix.dump().unwrap(), t.cluster.dump().unwrap());
        let nodes = (nodes, t.underlay.dump().unwrap());
        let pods = (t.ipcache.dump().unwrap(), t.endpoint.dump().unwrap());
        let policies = (t.policy.dump().unwrap(), t.cidr.dump().unwrap(), t.translate.dump().unwrap());
        format!("{services:?} {nodes:?} {pods:?} {policies:?}")
    }

    /// Changes one entry of one table by hand; tells which, unless there is none to be changed.
    fn damage(&mut self) -> Option<usize> {
        let Self { rng, tables: t, .. } = self;
        let strange = ip(200, 7);
        let which = rng.random_range(0..12);
        let done = match which {
            0 => spoil(rng, &mut *t.ipcache, |_| ip_key(9, strange), |v| v.identity += 1),
            1 => spoil(rng, &mut *t.prefix, |_| prefix_key(strange.into()), |v| v.node_ip[3] ^= 64),
            2 => spoil(rng, &mut *t.node, |_| node_key(strange), |v| v.cluster += 1),
            3 => spoil(rng, &mut *t.endpoint, |_| ip_key(1, strange), |v| v.ifindex += 1),
            4 => spoil(rng, &mut *t.service, |_| service_key(1, strange, 1, TCP), |v| v.id += 1),
            5 => spoil(rng, &mut *t.slot, |key| SlotKey { slot: 9_999, ..key }, |v| *v += 1),
            6 => spoil(rng, &mut *t.backend, |_| 999_999, |v| v.port ^= 1),
            7 => spoil(rng, &mut *t.policy, |key| PolicyKey { peer: 99, ..key }, |v| v.flags ^= 1),
            8 => spoil(rng, &mut *t.cidr, |_| prefix_key(strange.into()), |v| *v += 1),
            9 => spoil(rng, &mut *t.translate, |key| TranslateKey { cluster: 9, ..key }, |v| v.bits[1] ^= 1),
            10 => spoil(rng, &mut *t.underlay, |_| UnderlayKey { number: [0, 99, 0, 0] }, |v| v.ip[3] ^= 1),
            _ => spoil(rng, &mut *t.cluster, |_| 77, |v| *v = ClusterState { state: v.state ^ 3 }),
        };
        done.then_some(which)
    }
}

/// Deletes a random entry, alters it, or adds another with its value.
fn spoil<K: Copy, V: Copy>(
    rng: &mut SmallRng,
    table: &mut dyn Table<K, V>,
    other: impl Fn(K) -> K,
    alter: impl Fn(&mut V),
) -> bool {
    let entries = table.dump().unwrap();
    if entries.is_empty() {
        return false;
    }
    let (key, mut value) = entries[rng.random_range(0..entries.len())];
    match rng.random_range(0..3) {
        0 => table.remove(&[key]).unwrap(),
        1 => {
            alter(&mut value);
            table.upsert(&[(key, value)]).unwrap();
        }
        _ => table.upsert(&[(other(key), value)]).unwrap(),
    }
    true
}

#[test]
fn changes_are_no_drift_and_what_a_hand_did_is_put_right_within_a_scan() {
    let mut damaged = [0; 12];
    for seed in 0..100 {
        let mut world = World::new(seed);
        for _ in 0..120 {
            (0..world.rng.random_range(0..5)).for_each(|_| world.change());
            world.step();
            assert_eq!(world.found(), 0, "seed {seed}: {:?}", world.scan.drift());
        }
        // What was retired meanwhile goes, and a scan ends.
        world.scan();
        world.scan();
        for _ in 0..5 {
            let (before, found) = (world.dump(), world.found());
            if let Some(which) = world.damage() {
                damaged[which] += 1;
                world.scan();
                assert_eq!(world.dump(), before, "seed {seed}");
                assert_eq!(world.found(), found + 1, "seed {seed}: {:?}", world.scan.drift());
            }
        }
    }
    assert!(damaged.iter().all(|times| *times > 10), "{damaged:?}");
}
