//! Which frontends a service has for the outside, and what stands behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::record::{
    Affinity, Algorithm, BackendState, Balancing, External, LocalBackend, LocalService, Nearness, Port,
    PortMap, Protocol,
};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ebpf_global_svc::abi::{ServiceKey, scope};

use crate::desired::{Restored, ServicePlan};
use crate::mesh::{Fact, LetIn, Mesh, NodeFact};
use crate::tunnels::Tunnels;
use crate::wire_key::{self, service_key};

const TCP: u8 = 6;
/// In network order.
const NODE_PORT: u16 = 30080_u16.to_be();

fn ports(port: u16) -> PortMap {
    [("http".to_owned(), Port { protocol: Protocol::Tcp, port })].into()
}

fn service(external: External, nearness: Nearness) -> LocalService {
    let backend = |n: u8| LocalBackend {
        ip: [10, 1, 0, n].into(),
        ports: ports(8080),
        state: BackendState::Active,
        node: Some(format!("n{n}")),
        zone: None,
        hostname: None,
    };
    LocalService {
        cluster: "alpha".into(),
        name: NamespacedName { namespace: "shop".into(), name: "web".into() },
        cluster_id: 1,
        global: true,
        shared: true,
        private: false,
        affinity: Affinity::None,
        failover: None,
        balancing: Balancing { nearness, ..Balancing::default() },
        external,
        headless: false,
        frontends: [([10, 96, 0, 1].into(), ports(80))].into(),
        backends: vec![backend(1), backend(2)],
    }
}

fn plans(service: LocalService, how: Option<LetIn>) -> BTreeMap<ServiceKey, ServicePlan> {
    let own = ClusterId::new(1, MaxConnectedClusters::C255).unwrap();
    let mut mesh = Mesh::new(own, MaxConnectedClusters::C255, "n1", Tunnels::default(), Restored::default());
    if let Some(how) = how {
        mesh.let_in(how);
    }
    let node = NodeFact {
        internal_ips: vec![[192, 0, 2, 1].into()],
        mesh_ips: Vec::new(),
        pod_cidrs: vec!["10.1.0.0/24".parse().unwrap()],
        virtual_cidrs: VirtualCidrs::default(),
        zone: None,
        wireguard: None,
        ipsec: None,
    };
    mesh.upsert(own, Fact::LocalService(Box::new(service)), 0);
    let mut plans: BTreeMap<_, _> = mesh.compute().service.into_iter().collect();
    // As long as no node has said where pods are, no backend is known to be one.
    assert!(plans.keys().all(|key| key.scope == scope::MESH));
    mesh.upsert(own, Fact::Node("n1".to_owned(), node), 0);
    plans.extend(mesh.compute().service);
    plans.into_iter().filter_map(|(key, plan)| Some((key, plan?))).collect()
}

fn let_in(algorithm: Algorithm) -> LetIn {
    LetIn { addresses: vec![[192, 0, 2, 1].into()], algorithm, table_size: 251 }
}

fn external() -> External {
    let ips = BTreeSet::from([[203, 0, 113, 9].into()]);
    External { ips, node_ports: [("http".to_owned(), 30080)].into(), ..External::default() }
}

fn at(ip: [u8; 4], port: u16, scope: u8) -> ServiceKey {
    ServiceKey { scope, ..service_key(1, ip.into(), port, TCP) }
}

fn backends(plan: &ServicePlan) -> usize {
    plan.groups.iter().map(|group| group.backends.len()).sum()
}

#[test]
fn nothing_is_let_in_unless_the_node_does() {
    let inner = [at([10, 96, 0, 1], 80, scope::MESH)];
    assert!(plans(service(external(), Nearness::Any), None).into_keys().eq(inner));
    let nothing = service(External::default(), Nearness::Any);
    assert!(plans(nothing, Some(let_in(Algorithm::Random))).into_keys().eq(inner));
}

#[test]
fn outer_addresses_and_ports_lead_to_the_same_backends_from_in_and_outside() {
    let plans = plans(service(external(), Nearness::Any), Some(let_in(Algorithm::Random)));
    let mut keys = vec![at([10, 96, 0, 1], 80, scope::MESH)];
    for scope in [scope::MESH, scope::OUTSIDE] {
        keys.extend([at([203, 0, 113, 9], 80, scope), at([192, 0, 2, 1], 30080, scope)]);
    }
    assert_eq!(plans.keys().copied().collect::<BTreeSet<_>>(), keys.into_iter().collect());
    assert!(plans.values().all(|plan| backends(plan) == 2 && plan.table == 0));
}

#[test]
fn each_traffic_policy_counts_where_it_is_for() {
    let inside = |ip, port| at(ip, port, scope::MESH);
    let outside = |ip, port| at(ip, port, scope::OUTSIDE);
    let (ip, node) = ([203, 0, 113, 9], [192, 0, 2, 1]);
    let local = External { only_node: true, ..external() };
    let by_key = plans(service(local, Nearness::Any), Some(let_in(Algorithm::Random)));
    assert_eq!([outside(ip, 80), outside(node, 30080)].map(|key| backends(&by_key[&key])), [1, 1]);
    assert_eq!([inside(ip, 80), inside([10, 96, 0, 1], 80)].map(|key| backends(&by_key[&key])), [2, 2]);
    let by_key = plans(service(external(), Nearness::OnlyNode), Some(let_in(Algorithm::Random)));
    assert_eq!([outside(ip, 80), outside(node, 30080)].map(|key| backends(&by_key[&key])), [2, 2]);
    assert_eq!([inside(ip, 80), inside([10, 96, 0, 1], 80)].map(|key| backends(&by_key[&key])), [1, 1]);
}

#[test]
fn tables_are_for_the_outside_and_the_service_has_the_last_word() {
    let table = |agent, of_service| {
        let external = External { algorithm: of_service, ..external() };
        let plans = plans(service(external, Nearness::Any), Some(let_in(agent)));
        assert!(plans.iter().all(|(key, plan)| key.scope == scope::OUTSIDE || plan.table == 0));
        plans[&at([203, 0, 113, 9], 80, scope::OUTSIDE)].table
    };
    assert_eq!(table(Algorithm::Maglev, None), 251);
    assert_eq!(table(Algorithm::Maglev, Some(Algorithm::Random)), 0);
    assert_eq!(table(Algorithm::Random, Some(Algorithm::Maglev)), 251);
}

#[test]
fn backends_in_the_network_of_a_node_are_left_to_others() {
    let mut mixed = service(external(), Nearness::Any);
    mixed.backends[1].ip = [192, 0, 2, 7].into();
    let mut hosts = mixed.clone();
    hosts.backends.remove(0);
    let by_scope = |service| {
        let plans = plans(service, Some(let_in(Algorithm::Random)));
        let of = |scope| -> Vec<usize> {
            plans.iter().filter(|(key, _)| key.scope == scope).map(|(_, plan)| backends(plan)).collect()
        };
        [of(scope::MESH), of(scope::OUTSIDE)]
    };
    assert_eq!(by_scope(mixed), [vec![2; 3], vec![1; 2]]);
    assert_eq!(by_scope(hosts), [vec![1; 3], vec![]]);
}

#[test]
fn node_ports_are_at_all_addresses_of_the_node_whose_family_the_service_has() {
    let own = ClusterId::new(1, MaxConnectedClusters::C255).unwrap();
    let mut mesh = Mesh::new(own, MaxConnectedClusters::C255, "n1", Tunnels::default(), Restored::default());
    mesh.let_in(let_in(Algorithm::Random));
    let mut installed = BTreeMap::new();
    let mut ports_at = |mesh: &mut Mesh| -> BTreeSet<IpAddr> {
        for (key, plan) in mesh.compute().service {
            match plan {
                Some(plan) => drop(installed.insert(key, plan)),
                None => drop(installed.remove(&key)),
            }
        }
        let ports = installed.keys().filter(|key| key.port == NODE_PORT && key.scope == scope::OUTSIDE);
        ports.filter_map(|key| wire_key::address(key.family, key.ip)).collect()
    };
    let node = |ips: &[IpAddr]| NodeFact {
        internal_ips: ips.to_vec(),
        pod_cidrs: vec!["10.1.0.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        ..NodeFact::default()
    };
    let [given, second]: [IpAddr; 2] = [[192, 0, 2, 1].into(), [198, 51, 100, 1].into()];
    let sixth: IpAddr = "fd00::1".parse().unwrap();
    let mut both = service(external(), Nearness::Any);
    mesh.upsert(own, Fact::LocalService(Box::new(both.clone())), 0);
    mesh.upsert(own, Fact::Node("n1".to_owned(), node(&[second, sixth])), 0);
    assert_eq!(ports_at(&mut mesh), [given, second].into());
    both.frontends.insert("fd00:96::1".parse().unwrap(), ports(80));
    mesh.upsert(own, Fact::LocalService(Box::new(both)), 1);
    assert_eq!(ports_at(&mut mesh), [given, second, sixth].into());
    mesh.upsert(own, Fact::Node("n1".to_owned(), node(&[given])), 1);
    assert_eq!(ports_at(&mut mesh), [given].into());
}
