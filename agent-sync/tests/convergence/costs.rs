//! What single changes cost, and that a restart costs nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_sync::mesh::{Fact, FactKey, Links, Mesh, RemoteService};
use agent_sync::reconcile::Reconciler;
use agent_sync::tunnels::Tunnels;
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    Affinity, BackendState, Balancing, External, LocalBackend, LocalService, Port, PortMap, Protocol,
};
use ebpf_global_svc::Tables;
use ebpf_global_svc::abi::{AffinityKey, AffinityValue, IpValue, MAX_GROUPS};

use crate::kernel::{self, Kernel};
use crate::model;

struct Agent {
    kernel: Arc<Mutex<Kernel>>,
    tables: Tables,
    mesh: Mesh,
    reconciler: Reconciler,
}

impl Agent {
    fn start(kernel: Arc<Mutex<Kernel>>, tables: Tables) -> Self {
        let now = kernel.lock().unwrap().now;
        let (reconciler, restored) = Reconciler::restore(&tables, now).unwrap();
        let mut mesh = Mesh::new(id(1), MaxConnectedClusters::C255, "n1", Tunnels::default(), restored);
        mesh.set_links(Links::Absent);
        Self { kernel, tables, mesh, reconciler }
    }

    fn fresh() -> Self {
        let kernel = Kernel::new(0, Instant::now());
        let tables = kernel::tables(&kernel);
        Self::start(kernel, tables)
    }

    fn restart(self) -> Self {
        Self::start(self.kernel, self.tables)
    }

    /// Writes everything, swept up too; gives the writes by table.
    fn writes(&mut self) -> BTreeMap<&'static str, usize> {
        self.kernel.lock().unwrap().writes.clear();
        let changes = self.mesh.compute();
        self.reconciler.accept(changes);
        let now = self.kernel.lock().unwrap().now;
        self.reconciler.run(now, &mut self.tables);
        while let Some(at) = self.reconciler.deadline() {
            self.kernel.lock().unwrap().now = at;
            self.reconciler.run(at, &mut self.tables);
        }
        self.kernel.lock().unwrap().now += Duration::from_secs(1);
        self.kernel.lock().unwrap().writes.clone()
    }

    /// What the table of addresses has.
    fn addresses(&mut self) -> Vec<IpValue> {
        self.writes();
        self.tables.ipcache.dump().unwrap().into_iter().map(|(_, value)| value).collect()
    }

    /// What a list says, from its begin to its end.
    fn list(&mut self, cluster: u16, kind: Kind, facts: Vec<Fact>) {
        self.mesh.begin_list(id(cluster), kind);
        facts.into_iter().for_each(|fact| self.mesh.upsert(id(cluster), fact, 0));
        self.mesh.finish_list(id(cluster), kind);
    }

    fn clusters_in_service(&self) -> Vec<u16> {
        let (_, value) = self.tables.service.dump().unwrap()[0];
        value.groups[..usize::from(value.n_groups)].iter().map(|group| group.cluster).collect()
    }
}

/// The own cluster's service, and how its calls are spread.
fn with(service: Fact, balancing: Balancing) -> Fact {
    let Fact::LocalService(service) = service else { unreachable!("no service") };
    Fact::LocalService(Box::new(LocalService { balancing, ..*service }))
}

fn id(cluster: u16) -> ClusterId {
    ClusterId::new(cluster.into(), MaxConnectedClusters::C255).unwrap()
}

fn name() -> NamespacedName {
    NamespacedName { namespace: "shop".into(), name: "orders".into() }
}

fn ports(port: u16) -> PortMap {
    [("http".to_owned(), Port { protocol: Protocol::Tcp, port })].into()
}

fn pod(cluster: u16, number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, u8::try_from(cluster).unwrap(), high, low).into()
}

fn remote(cluster: u16, pods: impl IntoIterator<Item = u16>) -> Fact {
    let backends = pods.into_iter().map(|number| (pod(cluster, number), ports(8080))).collect();
    Fact::Service(name(), RemoteService { shared: true, backends, ..RemoteService::default() })
}

fn local(pods: &[u16]) -> Fact {
    let backend = |number: &u16| LocalBackend {
        ip: pod(1, *number),
        ports: ports(8080),
        state: BackendState::Active,
        node: None,
        zone: None,
        hostname: None,
    };
    Fact::LocalService(Box::new(LocalService {
        cluster: "own".into(),
        name: name(),
        cluster_id: 1,
        global: true,
        shared: true,
        private: false,
        affinity: Affinity::None,
        failover: None,
        balancing: Balancing::default(),
        external: External::default(),
        headless: false,
        frontends: [(Ipv4Addr::new(10, 96, 0, 1).into(), ports(80))].into(),
        backends: pods.iter().map(backend).collect(),
    }))
}

#[test]
fn a_leaving_backend_costs_the_same_whatever_the_size() {
    for size in [3, 2000] {
        let mut agent = Agent::fresh();
        agent.list(1, Kind::LocalServices, vec![local(&[1])]);
        agent.list(2, Kind::Services, vec![remote(2, 1..=size)]);
        agent.writes();
        agent.mesh.upsert(id(2), remote(2, (1..=size).filter(|number| *number != 2)), 0);
        // Hole filled and last slot removed; one value; the backend itself.
        let expected = BTreeMap::from([("cm_slot", 2), ("cm_service", 1), ("cm_backend", 1)]);
        assert_eq!(agent.writes(), expected, "{size}");
    }
}

#[test]
fn a_restart_writes_nothing_and_keeps_all_ids() {
    let mut agent = Agent::fresh();
    agent.list(1, Kind::LocalServices, vec![local(&[1, 2])]);
    agent.list(2, Kind::Services, vec![remote(2, 1..=3)]);
    agent.list(3, Kind::Services, vec![remote(3, 1..=3)]);
    agent.writes();
    let installed = |agent: &Agent| {
        (
            agent.tables.service.dump().unwrap(),
            agent.tables.slot.dump().unwrap(),
            agent.tables.backend.dump().unwrap(),
        )
    };
    let before = installed(&agent);

    let mut agent = agent.restart();
    assert_eq!(agent.writes(), BTreeMap::new());
    // In any order, and with a cluster that takes its time.
    agent.list(2, Kind::Services, vec![remote(2, 1..=3)]);
    agent.list(1, Kind::LocalServices, vec![local(&[1, 2])]);
    assert_eq!(agent.writes(), BTreeMap::new());
    agent.list(3, Kind::Services, vec![remote(3, 1..=3)]);
    assert_eq!(agent.writes(), BTreeMap::new());
    assert_eq!(installed(&agent), before);

    // What changed meanwhile is all that is written.
    let mut agent = agent.restart();
    agent.list(1, Kind::LocalServices, vec![local(&[1, 2])]);
    agent.list(2, Kind::Services, vec![remote(2, 1..=4)]);
    let grown = BTreeMap::from([("cm_slot", 1), ("cm_service", 1), ("cm_backend", 1)]);
    assert_eq!(agent.writes(), grown);
    // Cluster 3 was removed while the agent was down.
    agent.mesh.keep_only(&[1, 2].into());
    agent.writes();
    assert_eq!(agent.clusters_in_service(), [1, 2]);
}

#[test]
fn a_full_frontend_keeps_the_own_cluster_and_the_lowest_ids() {
    let mut agent = Agent::fresh();
    let remotes = u16::try_from(MAX_GROUPS).unwrap() + 3;
    // The own backends come last, and still get their place.
    agent.list(1, Kind::LocalServices, vec![local(&[])]);
    for cluster in 2..2 + remotes {
        agent.list(cluster, Kind::Services, vec![remote(cluster, 1..=1)]);
    }
    agent.writes();
    agent.mesh.upsert(id(1), local(&[1]), 0);
    agent.writes();
    let clusters = agent.clusters_in_service();
    assert_eq!(clusters, (1..=u16::try_from(MAX_GROUPS).unwrap()).collect::<Vec<_>>());
    assert_eq!(agent.mesh.left_out().clusters, 4);
    agent.mesh.delete(id(5), &FactKey::Service(name()));
    agent.writes();
    assert_eq!((agent.clusters_in_service().len(), agent.mesh.left_out().clusters), (MAX_GROUPS, 3));
}

#[test]
fn of_too_many_clusters_those_of_the_first_tiers_stay() {
    let mut agent = Agent::fresh();
    let last = u16::try_from(MAX_GROUPS).unwrap() + 3;
    agent.mesh.set_name(id(last), &model::cluster_name(last));
    let order = vec![[model::cluster_name(last)].into()];
    agent.list(1, Kind::LocalServices, vec![with(local(&[1]), Balancing { order, ..Balancing::default() })]);
    for cluster in 2..=last {
        agent.list(cluster, Kind::Services, vec![remote(cluster, 1..=1)]);
    }
    agent.writes();
    let clusters = agent.clusters_in_service();
    assert_eq!((clusters.len(), clusters.last().copied(), clusters[0]), (MAX_GROUPS, Some(last), 1));
}

#[test]
fn sessions_have_ids_of_their_own_that_are_never_given_away_again() {
    let sticky = |pods: &[u16]| {
        let session = Some(10_800);
        with(local(pods), Balancing { session, ..Balancing::default() })
    };
    let ids = |agent: &Agent| -> BTreeSet<u32> {
        agent.tables.backend.dump().unwrap().into_iter().map(|(id, _)| id).collect()
    };
    let mut agent = Agent::fresh();
    agent.list(1, Kind::LocalServices, vec![local(&[1, 2])]);
    agent.list(2, Kind::Services, vec![remote(2, 1..=2)]);
    agent.writes();
    let shared = ids(&agent);
    // With a session each slot gets another backend, before the value says so; the old ones go.
    agent.mesh.upsert(id(1), sticky(&[1, 2]), 0);
    let writes = BTreeMap::from([("cm_slot", 4), ("cm_service", 1), ("cm_backend", 8)]);
    assert_eq!(agent.writes(), writes);
    let own = ids(&agent);
    assert!(own.len() == 4 && own.is_disjoint(&shared));
    assert_eq!(agent.tables.service.dump().unwrap()[0].1.affinity_timeout, 5_400);

    // They stay when the agent is started again.
    let mut agent = agent.restart();
    agent.list(1, Kind::LocalServices, vec![sticky(&[1, 2])]);
    agent.list(2, Kind::Services, vec![remote(2, 1..=2)]);
    assert_eq!((agent.writes(), ids(&agent)), (BTreeMap::new(), own.clone()));

    // The youngest goes, but somebody is bound to it: nobody else may get its ID, not even from the next agent.
    let youngest = own.last().copied().unwrap();
    let binding = AffinityValue { used: 1, backend: youngest, service: 1 };
    let key = AffinityKey { client: 7, service: 1, pad: 0 };
    agent.tables.affinity.upsert(&[(key, binding)]).unwrap();
    agent.mesh.upsert(id(2), remote(2, 1..=1), 0);
    agent.mesh.upsert(id(1), sticky(&[1]), 0);
    agent.writes();
    let mut agent = agent.restart();
    agent.list(1, Kind::LocalServices, vec![sticky(&[1])]);
    agent.list(2, Kind::Services, vec![remote(2, 1..=3)]);
    agent.writes();
    let new: BTreeSet<u32> = ids(&agent).difference(&own).copied().collect();
    assert!(new.len() == 2 && new.iter().all(|id| *id > youngest), "{new:?} after {youngest}");

    // Without sessions backends are shared again.
    agent.mesh.upsert(id(1), local(&[1]), 0);
    agent.writes();
    assert!(agent.tables.backend.dump().unwrap().iter().all(|(_, value)| value.flags == 0));
}

#[test]
fn a_dead_cluster_costs_one_write_and_so_does_its_return_even_after_a_restart() {
    let mut agent = Agent::fresh();
    agent.list(1, Kind::LocalServices, vec![local(&[1, 2])]);
    agent.list(2, Kind::Services, vec![remote(2, 0..1000)]);
    agent.writes();
    agent.mesh.set_dead(id(2), true);
    assert_eq!(agent.writes(), BTreeMap::from([("cm_cluster", 1)]));
    agent.mesh.set_dead(id(2), true);
    assert_eq!(agent.writes(), BTreeMap::new());

    let mut agent = agent.restart();
    assert!(agent.mesh.is_dead(id(2)), "nobody has heard of it since");
    agent.list(1, Kind::LocalServices, vec![local(&[1, 2])]);
    agent.list(2, Kind::Services, vec![remote(2, 0..1000)]);
    assert_eq!(agent.writes(), BTreeMap::new());
    agent.mesh.set_dead(id(2), false);
    assert_eq!(agent.writes(), BTreeMap::from([("cm_cluster", 1)]));
}

#[test]
fn an_id_whose_cluster_is_gone_is_healthy_again() {
    let mut agent = Agent::fresh();
    agent.mesh.set_dead(id(2), true);
    agent.mesh.set_dead(id(3), true);
    agent.list(2, Kind::Services, vec![remote(2, [1])]);
    agent.writes();
    agent.mesh.drain(id(2));
    let mut agent = agent.restart();
    agent.mesh.keep_only(&[1].into());
    agent.writes();
    assert_eq!(agent.tables.cluster.dump().unwrap(), []);
}

#[test]
fn an_address_that_its_cluster_keeps_to_itself_or_no_longer_stays() {
    let ip: IpAddr = Ipv4Addr::new(10, 1, 1, 7).into();
    let value = IpValue { identity: 65_800, node_ip: [192, 0, 2, 12], key: 0, flags: 0, pad: 0 };
    let (public, private) = (Fact::Ip(ip, value), Fact::LocalIp(ip, value));
    let mut agent = Agent::fresh();
    agent.list(1, Kind::Ip, vec![]);
    agent.list(1, Kind::LocalIp, vec![private.clone()]);
    assert_eq!(agent.addresses(), [value]);
    agent.mesh.upsert(id(1), public.clone(), 0);
    agent.mesh.delete(id(1), &private.key());
    assert_eq!((agent.addresses(), agent.mesh.address(id(1), ip)), (vec![value], Some(value)));
    agent.mesh.upsert(id(1), private.clone(), 0);
    agent.mesh.delete(id(1), &public.key());
    assert_eq!((agent.addresses(), agent.mesh.address(id(1), ip)), (vec![value], Some(value)));

    // It moved while nobody looked, before a restart or not: the list that lacks it is complete first.
    for (first, last, kinds) in
        [(&private, &public, [Kind::LocalIp, Kind::Ip]), (&public, &private, [Kind::Ip, Kind::LocalIp])]
    {
        for restart in [false, true] {
            if restart {
                agent = agent.restart();
            }
            kinds.iter().for_each(|kind| agent.mesh.begin_list(id(1), *kind));
            agent.mesh.finish_list(id(1), kinds[0]);
            assert_eq!(agent.addresses(), [value], "{first:?} {restart}");
            agent.mesh.upsert(id(1), last.clone(), 0);
            agent.mesh.finish_list(id(1), kinds[1]);
            assert_eq!(agent.addresses(), [value], "{first:?} {restart}");
        }
    }

    // Neither has it any more.
    [Kind::Ip, Kind::LocalIp].iter().for_each(|kind| agent.mesh.begin_list(id(1), *kind));
    agent.mesh.finish_list(id(1), Kind::LocalIp);
    agent.mesh.finish_list(id(1), Kind::Ip);
    assert_eq!((agent.addresses(), agent.mesh.address(id(1), ip)), (vec![], None));
}
