//! Seeded schedules: while desired state changes, scans find nothing; what a hand did to an entry is put
//! right within one scan.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use ebpf_global_svc::abi::{ClusterState, IpValue, SlotKey};
use ebpf_global_svc::table::Table;
use ebpf_global_svc::{MapSizes, Tables};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::super::Reconciler;
use super::Scan;
use crate::desired::{BackendKey, Changes, GroupPlan, Restored, ServicePlan};
use crate::mesh::{Fact, FactKey, Mesh, NodeFact};
use crate::wire_key::{TCP, ip_key, node_key, prefix_key, service_key};

const INTERVAL: Duration = Duration::from_secs(1);

struct World {
    rng: SmallRng,
    now: Instant,
    mesh: Mesh,
    reconciler: Reconciler,
    scan: Scan,
    tables: Tables,
}

fn cluster(id: u32) -> ClusterId {
    ClusterId::new(id, MaxConnectedClusters::C255).unwrap()
}

fn ip(a: u8, b: u8) -> IpAddr {
    Ipv4Addr::new(10, a, 0, b).into()
}

impl World {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let node_ip = Some(Ipv4Addr::new(10, 1, 0, 1));
        let mut scan = Scan::default();
        scan.set_interval(Some(INTERVAL), now);
        Self {
            rng: SmallRng::seed_from_u64(seed),
            now,
            mesh: Mesh::new(cluster(1), MaxConnectedClusters::C255, "n1", node_ip, Restored::default()),
            reconciler: Reconciler::default(),
            scan,
            tables: Tables::memory(&MapSizes::default()),
        }
    }

    /// A random fact about nodes, addresses, states or services.
    fn change(&mut self) {
        let of = self.rng.random_range(1..4_u8);
        let id = cluster(of.into());
        let n = self.rng.random_range(1..30_u8);
        match self.rng.random_range(0..8) {
            0 => {
                let cidr = format!("10.{}.{n}.0/24", of + 100).parse().unwrap();
                let internal_ips = vec![ip(of, n % 3 + 1)];
                let node = NodeFact { internal_ips, mesh_ips: Vec::new(), pod_cidrs: vec![cidr], zone: None };
                self.mesh.upsert(id, Fact::Node(format!("n{}", n % 3), node), 0);
            }
            1 => self.mesh.delete(id, &FactKey::Node(format!("n{}", n % 3))),
            2..5 => {
                let IpAddr::V4(node) = ip(of, n % 3 + 1) else { return };
                let identity = self.rng.random_range(1..9);
                let value = IpValue { identity, node_ip: node.octets(), key: 0, flags: 0, pad: 0 };
                self.mesh.upsert(id, Fact::Ip(ip(of + 100, n), value), 0);
            }
            5 => self.mesh.delete(id, &FactKey::Ip(ip(of + 100, n))),
            6 if of > 1 => self.mesh.set_dead(id, n % 2 == 0),
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
        ServicePlan { affinity_timeout: if self.rng.random_bool(0.5) { 30 } else { 0 }, groups }
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
        format!("{services:?} {nodes:?} {:?} {:?}", t.ipcache.dump().unwrap(), t.endpoint.dump().unwrap())
    }

    /// Changes one entry of one table by hand; false if there is none to be changed.
    fn damage(&mut self) -> bool {
        let Self { rng, tables: t, .. } = self;
        let strange = ip(200, 7);
        match rng.random_range(0..8) {
            0 => spoil(rng, &mut *t.ipcache, |_| ip_key(9, strange), |v| v.identity += 1),
            1 => spoil(rng, &mut *t.prefix, |_| prefix_key(strange.into()), |v| v.node_ip[3] ^= 64),
            2 => spoil(rng, &mut *t.node, |_| node_key(strange), |v| v.cluster += 1),
            3 => spoil(rng, &mut *t.endpoint, |_| ip_key(1, strange), |v| v.ifindex += 1),
            4 => spoil(rng, &mut *t.service, |_| service_key(1, strange, 1, TCP), |v| v.id += 1),
            5 => spoil(rng, &mut *t.slot, |key| SlotKey { slot: 99, ..key }, |v| *v += 1),
            6 => spoil(rng, &mut *t.backend, |_| 999_999, |v| v.port ^= 1),
            _ => spoil(rng, &mut *t.cluster, |_| 77, |v| *v = ClusterState { state: v.state ^ 3 }),
        }
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
    let mut damaged = 0;
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
            if world.damage() {
                damaged += 1;
                world.scan();
                assert_eq!(world.dump(), before, "seed {seed}");
                assert_eq!(world.found(), found + 1, "seed {seed}: {:?}", world.scan.drift());
            }
        }
    }
    assert!(damaged > 250, "{damaged}");
}
