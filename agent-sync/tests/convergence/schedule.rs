//! Random histories of a mesh: clusters change, disconnect, are listed anew, removed and added again,
//! under another ID too; the agent is killed and started again; table writes fail.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_sync::mesh::{Fact, FactKey, Links, Mesh, NodeFact, RemoteService};
use agent_sync::reconcile::Reconciler;
use agent_sync::wire_key;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    Affinity, BackendState, Balancing, External, Failover, LocalBackend, LocalService, Nearness, Port,
    PortMap, Protocol,
};
use ebpf_global_svc::Tables;
use ebpf_global_svc::abi::{IpKey, IpValue, ServiceKey};
use rand::rngs::StdRng;
use rand::seq::{IndexedMutRandom as _, IndexedRandom as _};
use rand::{Rng as _, SeedableRng as _};

use crate::kernel::{self, Kernel};
use crate::model::{self, Truth};

const OWN: u16 = 1;
const NODE_IP: [u8; 4] = [192, 0, 2, 11];
const KINDS: [Kind; 4] = [Kind::Nodes, Kind::Ip, Kind::Services, Kind::LocalServices];

/// One kind of one cluster on its way to the agent.
#[derive(Default)]
struct Stream {
    /// Nothing arrives.
    down: bool,
    /// Left of a list that is being read.
    list: Option<VecDeque<Event>>,
}

#[derive(Clone)]
enum Event {
    Upsert(Fact),
    Delete(FactKey),
    Finish,
}

pub(crate) struct World {
    rng: StdRng,
    kernel: Arc<Mutex<Kernel>>,
    tables: Tables,
    mesh: Mesh,
    reconciler: Reconciler,
    /// What is in the etcds of the clusters that are configured.
    truth: BTreeMap<u16, Truth>,
    /// What the agent has heard.
    views: BTreeMap<u16, Truth>,
    streams: BTreeMap<(u16, Kind), Stream>,
    /// Restored and not confirmed: may not go before its list is complete.
    kept: BTreeMap<u16, BTreeSet<IpKey>>,
    kept_services: BTreeSet<ServiceKey>,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let now = Instant::now();
        let kernel = Kernel::new(seed, now);
        let tables = kernel::tables(&kernel);
        let (mesh, reconciler) = start_agent(&tables, now);
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            kernel,
            tables,
            mesh,
            reconciler,
            truth: BTreeMap::new(),
            views: BTreeMap::new(),
            streams: BTreeMap::new(),
            kept: BTreeMap::new(),
            kept_services: BTreeSet::new(),
        };
        let mut own = Truth::default();
        own.nodes.insert("n1".into(), node(&[192, 0, 2, 11], &["10.1.1.0/24"]));
        world.truth.insert(OWN, own);
        world.begin_lists(OWN);
        world
    }

    pub(crate) fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
            if self.rng.random_bool(0.5) {
                self.reconcile();
            }
        }
        self.settle();
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..50 => self.mutate(),
            50..70 => self.deliver_some(),
            70..76 => self.toggle_connection(),
            76..80 => self.relist(),
            80..86 => self.add_cluster(),
            86..89 => self.remove_cluster(),
            89..91 => self.renumber_cluster(),
            91..94 => self.restart_agent(),
            94..97 => self.settle(),
            _ => {
                let failing = if self.rng.random_bool(0.5) { 0.3 } else { 0.0 };
                self.kernel.lock().unwrap().failing = failing;
            }
        }
    }

    /// Something changes in a cluster's etcd.
    fn mutate(&mut self) {
        let Some(cluster) = self.any_cluster() else { return };
        let kind = if cluster == OWN {
            *[Kind::Nodes, Kind::Ip, Kind::LocalServices, Kind::LocalServices].choose(&mut self.rng).unwrap()
        } else {
            *[Kind::Nodes, Kind::Ip, Kind::Services, Kind::Services].choose(&mut self.rng).unwrap()
        };
        let event = match kind {
            Kind::Nodes => self.random_node(cluster),
            Kind::Ip => self.random_ip(cluster),
            Kind::Services => self.random_service(),
            _ => self.random_local_service(),
        };
        apply(self.truth.get_mut(&cluster).unwrap(), &event);
        let stream = self.streams.get_mut(&(cluster, kind)).unwrap();
        match &mut stream.list {
            _ if stream.down => {}
            // A change during the list comes after it.
            Some(list) => list.push_back(event),
            None => self.deliver(cluster, event),
        }
    }

    fn deliver(&mut self, cluster: u16, event: Event) {
        let id = id(cluster);
        apply(self.views.entry(cluster).or_default(), &event);
        if let Event::Upsert(Fact::LocalService(service)) = &event {
            // Its frontends are known again, so they may go with it.
            self.kept_services.retain(|key| {
                let vip = wire_key::address(key.family, key.ip).unwrap();
                !service.frontends.contains_key(&vip)
            });
        }
        match event {
            Event::Upsert(fact) => self.mesh.upsert(id, fact, 0),
            Event::Delete(key) => self.mesh.delete(id, &key),
            Event::Finish => unreachable!(),
        }
    }

    fn deliver_some(&mut self) {
        let streams: Vec<_> = self.streams.keys().copied().collect();
        let Some((cluster, kind)) = streams.choose(&mut self.rng).copied() else { return };
        let n = self.rng.random_range(1..6);
        for _ in 0..n {
            self.deliver_next(cluster, kind);
        }
    }

    /// Returns whether there was anything.
    fn deliver_next(&mut self, cluster: u16, kind: Kind) -> bool {
        let stream = self.streams.get_mut(&(cluster, kind)).unwrap();
        let Some(list) = stream.list.as_mut().filter(|_| !stream.down) else { return false };
        match list.pop_front() {
            Some(Event::Finish) => {
                self.mesh.finish_list(id(cluster), kind);
                let listed = self.truth_at_list(cluster, kind);
                keep_listed(self.views.entry(cluster).or_default(), kind, &listed);
                if kind == Kind::Ip {
                    self.kept.remove(&cluster);
                }
                if kind == Kind::LocalServices {
                    self.kept_services.clear();
                }
            }
            Some(event) => self.deliver(cluster, event),
            None => stream.list = None,
        }
        true
    }

    /// Keys that the list named: the truth at its begin, which `mutate` may have changed since. What it
    /// deleted meanwhile is still on its way, so a key of the view that is in neither is stale.
    fn truth_at_list(&self, cluster: u16, kind: Kind) -> Truth {
        let mut truth = self.truth[&cluster].clone();
        if let Some(list) = &self.streams[&(cluster, kind)].list {
            for event in list {
                if let Event::Delete(key) = event {
                    insert_key(&mut truth, key);
                }
            }
        }
        truth
    }

    fn toggle_connection(&mut self) {
        let Some(cluster) = self.any_cluster() else { return };
        let down = !self.streams[&(cluster, Kind::Nodes)].down;
        for kind in KINDS {
            self.streams.get_mut(&(cluster, kind)).unwrap().down = down;
        }
        if !down {
            self.begin_lists(cluster);
        }
    }

    fn relist(&mut self) {
        let Some(cluster) = self.any_cluster() else { return };
        if !self.streams[&(cluster, Kind::Nodes)].down {
            self.begin_lists(cluster);
        }
    }

    fn begin_lists(&mut self, cluster: u16) {
        for kind in KINDS {
            let mut list: VecDeque<Event> =
                facts(&self.truth[&cluster], kind).into_iter().map(Event::Upsert).collect();
            list.push_back(Event::Finish);
            self.streams.insert((cluster, kind), Stream { down: false, list: Some(list) });
            self.mesh.begin_list(id(cluster), kind);
        }
        self.mesh.set_name(id(cluster), &model::cluster_name(cluster));
    }

    fn add_cluster(&mut self) {
        let free: Vec<u16> = (2..=6).filter(|cluster| !self.truth.contains_key(cluster)).collect();
        if let Some(cluster) = free.choose(&mut self.rng).copied() {
            self.truth.insert(cluster, Truth::default());
            for _ in 0..self.rng.random_range(0..5) {
                let event = self.random_service();
                apply(self.truth.get_mut(&cluster).unwrap(), &event);
                let event = self.random_ip(cluster);
                apply(self.truth.get_mut(&cluster).unwrap(), &event);
            }
            self.begin_lists(cluster);
        }
    }

    fn remove_cluster(&mut self) {
        if let Some(cluster) = self.any_cluster().filter(|cluster| *cluster != OWN) {
            self.forget(cluster);
        }
    }

    /// The cluster comes back with another ID: drained under the old one first.
    fn renumber_cluster(&mut self) {
        let Some(old) = self.any_cluster().filter(|cluster| *cluster != OWN) else { return };
        let Some(new) = (2..=6).find(|new| !self.truth.contains_key(new)) else { return };
        let truth = self.truth[&old].clone();
        self.forget(old);
        self.truth.insert(new, truth);
        self.begin_lists(new);
    }

    fn forget(&mut self, cluster: u16) {
        self.mesh.drain(id(cluster));
        self.truth.remove(&cluster);
        self.views.remove(&cluster);
        self.kept.remove(&cluster);
        self.streams.retain(|(owner, _), _| *owner != cluster);
    }

    /// Killed at any point; the tables stay.
    fn restart_agent(&mut self) {
        let now = self.advance(Duration::from_secs(1));
        (self.mesh, self.reconciler) = start_agent(&self.tables, now);
        self.views.clear();
        self.kept.clear();
        for (key, _) in self.tables.ipcache.dump().unwrap() {
            self.kept.entry(key.cluster).or_default().insert(key);
        }
        self.kept_services = self.tables.service.dump().unwrap().into_iter().map(|(key, _)| key).collect();
        // A file may have been removed while the agent was down.
        if self.rng.random_bool(0.2)
            && let Some(cluster) = self.any_cluster().filter(|cluster| *cluster != OWN)
        {
            self.truth.remove(&cluster);
            self.streams.retain(|(owner, _), _| *owner != cluster);
        }
        let clusters: Vec<u16> = self.truth.keys().copied().collect();
        for cluster in &clusters {
            self.begin_lists(*cluster);
        }
        if self.rng.random_bool(0.5) {
            self.know_all_ids();
        }
    }

    fn know_all_ids(&mut self) {
        let configured: BTreeSet<u16> = self.truth.keys().copied().collect();
        self.mesh.keep_only(&configured);
        self.kept.retain(|cluster, _| configured.contains(cluster));
    }

    fn reconcile(&mut self) {
        let step = self.rng.random_range(0..30);
        let now = self.advance(Duration::from_millis(step));
        let changes = self.mesh.compute();
        self.reconciler.accept(changes);
        self.reconciler.run(now, &mut self.tables);
        let installed: BTreeSet<IpKey> =
            self.tables.ipcache.dump().unwrap().into_iter().map(|(key, _)| key).collect();
        for key in self.kept.values().flatten() {
            assert!(installed.contains(key), "{key:?} was pruned before its cluster was synced");
        }
        let services: BTreeSet<ServiceKey> =
            self.tables.service.dump().unwrap().into_iter().map(|(key, _)| key).collect();
        for key in &self.kept_services {
            assert!(services.contains(key), "{key:?} was pruned before the own services were synced");
        }
    }

    /// All lists of connected clusters complete, all writes succeed: now the tables must be right.
    fn settle(&mut self) {
        self.kernel.lock().unwrap().failing = 0.0;
        let streams: Vec<_> = self.streams.keys().copied().collect();
        for (cluster, kind) in streams {
            let stream = self.streams.get_mut(&(cluster, kind)).unwrap();
            if stream.down && stream.list.is_some() {
                // It was lost in the middle of a list: what it did not confirm is still believed. The
                // model knows nothing of half lists, so it comes back first.
                for kind in KINDS {
                    self.streams.get_mut(&(cluster, kind)).unwrap().down = false;
                }
                self.begin_lists(cluster);
            }
        }
        let streams: Vec<_> = self.streams.keys().copied().collect();
        for (cluster, kind) in streams {
            while self.deliver_next(cluster, kind) {}
        }
        self.know_all_ids();
        self.reconcile();
        for _ in 0..64 {
            let Some(deadline) = self.reconciler.deadline() else { break };
            self.kernel.lock().unwrap().now = deadline;
            self.reconcile();
        }
        assert_eq!((self.reconciler.pending(), self.reconciler.deadline()), (0, None));
        assert_eq!(self.reconciler.last_error(), None);
        model::check(OWN, NODE_IP, &self.views, &self.tables);
        let again = self.mesh.compute();
        assert!(again.is_empty(), "not a fixpoint: {again:?}");
    }

    fn advance(&self, by: Duration) -> Instant {
        let mut kernel = self.kernel.lock().unwrap();
        kernel.now += by;
        kernel.now
    }

    fn any_cluster(&mut self) -> Option<u16> {
        let clusters: Vec<u16> = self.truth.keys().copied().collect();
        // The own cluster changes as much as all others together.
        if self.rng.random_bool(0.4) { Some(OWN) } else { clusters.choose(&mut self.rng).copied() }
    }

    fn random_node(&mut self, cluster: u16) -> Event {
        let name = format!("n{}", self.rng.random_range(1..4));
        // The node of this agent stays: it says what is local.
        if name != "n1" && self.rng.random_bool(0.3) {
            return Event::Delete(FactKey::Node(name));
        }
        let number: u8 = name[1..].parse().unwrap();
        let owner = if self.rng.random_bool(0.2) { 1 } else { u8::try_from(cluster).unwrap() };
        let cidrs = match self.rng.random_range(0..4) {
            0 => vec![format!("10.{owner}.{number}.0/24"), format!("fd00:{owner}:{number}::/64")],
            1 => vec![format!("10.{owner}.{number}.0/25")],
            2 => vec![format!("10.{owner}.0.0/16")],
            _ => vec![format!("10.{owner}.{number}.0/24")],
        };
        let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
        let ip = if cluster == OWN && name == "n1" { 11 } else { owner * 10 + number };
        let zone = self.random_zone();
        Event::Upsert(Fact::Node(name, NodeFact { zone, ..node(&[192, 0, 2, ip], &cidrs) }))
    }

    fn random_ip(&mut self, cluster: u16) -> Event {
        let ip = self.random_pod(cluster);
        if self.rng.random_bool(0.3) {
            return Event::Delete(FactKey::Ip(ip));
        }
        let value = IpValue {
            identity: u32::from(cluster) << 16 | self.rng.random_range(1..9),
            node_ip: [192, 0, 2, 10 + self.rng.random_range(1..3)],
            key: 0,
            flags: 0,
            pad: 0,
        };
        Event::Upsert(Fact::Ip(ip, value))
    }

    fn random_pod(&mut self, cluster: u16) -> IpAddr {
        // Now and then an address that another cluster uses too.
        let net = if self.rng.random_bool(0.1) { 9 } else { u8::try_from(cluster).unwrap() };
        let host = self.rng.random_range(1..7);
        if self.rng.random_bool(0.2) {
            format!("fd00:{net}:1::{host}").parse().unwrap()
        } else {
            Ipv4Addr::new(10, net, 1, host).into()
        }
    }

    fn random_ports(&mut self) -> PortMap {
        let mut ports = PortMap::new();
        for name in ["http", "dns", ""] {
            if self.rng.random_bool(0.6) {
                let port = *[8080, 9090].choose(&mut self.rng).unwrap();
                let protocol = if name == "dns" { Protocol::Udp } else { Protocol::Tcp };
                ports.insert(name.into(), Port { protocol, port });
            }
        }
        ports
    }

    fn random_name(&mut self) -> NamespacedName {
        let name = format!("s{}", self.rng.random_range(1..4));
        NamespacedName { namespace: "shop".into(), name }
    }

    fn random_service(&mut self) -> Event {
        let name = self.random_name();
        if self.rng.random_bool(0.2) {
            return Event::Delete(FactKey::Service(name));
        }
        let mut backends = BTreeMap::new();
        for _ in 0..self.rng.random_range(0..6) {
            let cluster = self.rng.random_range(1..7);
            backends.insert(self.random_pod(cluster), self.random_ports());
        }
        let backends = backends.into_iter().collect();
        Event::Upsert(Fact::Service(
            name,
            RemoteService { shared: self.rng.random_bool(0.8), backends, ..RemoteService::default() },
        ))
    }

    fn random_local_service(&mut self) -> Event {
        let name = self.random_name();
        if self.rng.random_bool(0.2) {
            return Event::Delete(FactKey::LocalService(name));
        }
        // Two services may have the same address for a moment.
        let vip = self.rng.random_range(1..4);
        let mut frontends = BTreeMap::new();
        let ports: PortMap =
            [("http", Protocol::Tcp, 80), ("dns", Protocol::Udp, 53), ("", Protocol::Tcp, 80)]
                .into_iter()
                .map(|(name, protocol, port)| (name.to_owned(), Port { protocol, port }))
                .collect();
        frontends.insert(Ipv4Addr::new(10, 96, 0, vip).into(), ports.clone());
        if self.rng.random_bool(0.5) {
            frontends.insert(format!("fd00:96::{vip}").parse().unwrap(), ports);
        }
        let mut backends = BTreeMap::new();
        for _ in 0..self.rng.random_range(0..6) {
            let ip = self.random_pod(OWN);
            let state =
                if self.rng.random_bool(0.3) { BackendState::Terminating } else { BackendState::Active };
            let ports = self.random_ports();
            let node = [None, Some("n1"), Some("n2")].choose(&mut self.rng).unwrap().map(str::to_owned);
            let zone = self.random_zone();
            backends.insert(ip, LocalBackend { ip, ports, state, node, zone, hostname: None });
        }
        Event::Upsert(Fact::LocalService(Box::new(LocalService {
            cluster: "own".into(),
            name,
            cluster_id: OWN.into(),
            global: self.rng.random_bool(0.8),
            shared: true,
            private: false,
            affinity: *[Affinity::None, Affinity::Local, Affinity::Remote].choose(&mut self.rng).unwrap(),
            failover: self.rng.random_bool(0.5).then(|| Failover {
                threshold: self.rng.random_range(1..=100),
                expected: self.rng.random_range(0..=6),
            }),
            balancing: self.random_balancing(),
            external: External::default(),
            headless: false,
            frontends,
            backends: backends.into_values().collect(),
        })))
    }

    fn random_zone(&mut self) -> Option<String> {
        [None, Some("z1"), Some("z2")].choose(&mut self.rng).unwrap().map(str::to_owned)
    }

    fn random_balancing(&mut self) -> Balancing {
        let rng = &mut self.rng;
        let mut clusters: Vec<ClusterName> = (2..=6).map(model::cluster_name).collect();
        clusters.push("own".parse().unwrap());
        clusters.retain(|_| rng.random_bool(0.5));
        let mut order = Vec::<BTreeSet<ClusterName>>::new();
        let mut weights = BTreeMap::new();
        if rng.random_bool(0.4) {
            for name in &clusters {
                match order.choose_mut(rng).filter(|_| rng.random_bool(0.4)) {
                    Some(tier) => drop(tier.insert(name.clone())),
                    None => order.push([name.clone()].into()),
                }
            }
        }
        if rng.random_bool(0.3) && !clusters.is_empty() {
            weights = clusters.into_iter().map(|name| (name, rng.random_range(0..100))).collect();
            weights.first_entry().unwrap().insert(80);
        }
        let nearness = [
            Nearness::Any,
            Nearness::Any,
            Nearness::Any,
            Nearness::PreferZone,
            Nearness::PreferNode,
            Nearness::OnlyNode,
        ];
        let session = rng.random_bool(0.4).then(|| rng.random_range(1..=Balancing::MAX_SESSION));
        Balancing { session, order, weights, nearness: *nearness.choose(rng).unwrap() }
    }
}

fn start_agent(tables: &Tables, now: Instant) -> (Mesh, Reconciler) {
    let (reconciler, restored) = Reconciler::restore(tables, now).unwrap();
    let mut mesh = Mesh::new(
        id(OWN),
        MaxConnectedClusters::C255,
        "n1",
        std::net::Ipv4Addr::from(NODE_IP).into(),
        restored,
    );
    // There are no policies, and nobody but they asks for identities.
    for kind in [Kind::Identities, Kind::LocalIdentities, Kind::LocalPolicies] {
        mesh.begin_list(id(OWN), kind);
        mesh.finish_list(id(OWN), kind);
    }
    mesh.set_links(Links::Absent);
    (mesh, reconciler)
}

fn id(cluster: u16) -> ClusterId {
    ClusterId::new(cluster.into(), MaxConnectedClusters::C255).unwrap()
}

fn node(ip: &[u8; 4], cidrs: &[&str]) -> NodeFact {
    NodeFact {
        internal_ips: vec![Ipv4Addr::from(*ip).into()],
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ..NodeFact::default()
    }
}

fn apply(truth: &mut Truth, event: &Event) {
    match event {
        Event::Upsert(Fact::Node(name, node)) => drop(truth.nodes.insert(name.clone(), node.clone())),
        Event::Upsert(Fact::Ip(ip, value)) => drop(truth.ips.insert(*ip, *value)),
        Event::Upsert(Fact::Service(name, service)) => {
            truth.services.insert(name.clone(), service.clone());
        }
        Event::Upsert(Fact::LocalService(service)) => {
            truth.local_services.insert(service.name.clone(), (**service).clone());
        }
        Event::Delete(FactKey::Node(name)) => drop(truth.nodes.remove(name)),
        Event::Delete(FactKey::Ip(ip)) => drop(truth.ips.remove(ip)),
        Event::Delete(FactKey::Service(name)) => drop(truth.services.remove(name)),
        Event::Delete(FactKey::LocalService(name)) => drop(truth.local_services.remove(name)),
        Event::Upsert(_) | Event::Delete(_) | Event::Finish => {}
    }
}

fn facts(truth: &Truth, kind: Kind) -> Vec<Fact> {
    match kind {
        Kind::Nodes => truth.nodes.iter().map(|(n, v)| Fact::Node(n.clone(), v.clone())).collect(),
        Kind::Ip => truth.ips.iter().map(|(ip, v)| Fact::Ip(*ip, *v)).collect(),
        Kind::Services => truth.services.iter().map(|(n, v)| Fact::Service(n.clone(), v.clone())).collect(),
        _ => truth.local_services.values().map(|v| Fact::LocalService(Box::new(v.clone()))).collect(),
    }
}

/// A list is complete: the view keeps what it named.
fn keep_listed(view: &mut Truth, kind: Kind, listed: &Truth) {
    match kind {
        Kind::Nodes => view.nodes.retain(|name, _| listed.nodes.contains_key(name)),
        Kind::Ip => view.ips.retain(|ip, _| listed.ips.contains_key(ip)),
        Kind::Services => view.services.retain(|name, _| listed.services.contains_key(name)),
        _ => view.local_services.retain(|name, _| listed.local_services.contains_key(name)),
    }
}

/// Names a key that the list had; its value does not matter.
fn insert_key(truth: &mut Truth, key: &FactKey) {
    match key {
        FactKey::Node(name) => drop(truth.nodes.entry(name.clone()).or_default()),
        FactKey::Ip(ip) => {
            truth.ips.entry(*ip).or_insert(IpValue {
                identity: 0,
                node_ip: [0; 4],
                key: 0,
                flags: 0,
                pad: 0,
            });
        }
        FactKey::Service(name) => drop(truth.services.entry(name.clone()).or_default()),
        _ => {}
    }
}
