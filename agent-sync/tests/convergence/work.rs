//! That an event costs what has changed and not what there is: the work is counted in meshes of two sizes.

use std::net::{IpAddr, Ipv4Addr};

use agent_sync::desired::{Changes, Restored, RouteChanges};
use agent_sync::mesh::{Fact, FactKey, Links, Mesh, NodeFact, PlacementRules, RemoteService, Work};
use agent_sync::tunnels::Tunnels;
use agent_sync::wire_key;
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{Affinity, Balancing, External, LocalService, Port, PortMap, Protocol};
use ebpf_global_svc::abi::{ENDPOINT_VIA_STACK, EndpointValue, IpValue};

/// Nodes of the small and of the large cluster.
const SIZES: [u16; 2] = [10, 600];
/// Pods of each node.
const PODS: u8 = 20;

fn id(cluster: u16) -> ClusterId {
    ClusterId::new(cluster.into(), MaxConnectedClusters::C255).unwrap()
}

fn node_ip(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(192, 0, high, low)
}

fn pod(node: u16, number: u8) -> IpAddr {
    let [high, low] = node.to_be_bytes();
    Ipv4Addr::new(10 + high, low, 0, number).into()
}

fn node(number: u16) -> Fact {
    let fact = NodeFact {
        internal_ips: vec![node_ip(number).into()],
        pod_cidrs: vec![format!("{}/24", pod(number, 0)).parse().unwrap()],
        ..NodeFact::default()
    };
    Fact::Node(format!("n{number}"), fact)
}

fn ports(port: u16) -> PortMap {
    [("http".to_owned(), Port { protocol: Protocol::Tcp, port })].into()
}

fn name(number: u16) -> NamespacedName {
    NamespacedName { namespace: "shop".into(), name: format!("s{number}") }
}

/// Each node has pods, and a service of its own with two of them as backends.
fn mesh(size: u16, rules: PlacementRules) -> Mesh {
    let mut mesh =
        Mesh::new(id(1), MaxConnectedClusters::C255, "here", Tunnels::default(), Default::default());
    let here = NodeFact { internal_ips: vec![Ipv4Addr::new(198, 51, 100, 1).into()], ..NodeFact::default() };
    mesh.upsert(id(1), Fact::Node("here".into(), here), 0);
    mesh.set_placement(id(2), rules);
    for number in 0..size {
        mesh.upsert(id(2), node(number), 0);
        for at in 1..=PODS {
            let value = IpValue { node_ip: node_ip(number).octets(), identity: 7, ..empty() };
            mesh.upsert(id(2), Fact::Ip(pod(number, at), value), 0);
        }
        let backends = (1..=2).map(|at| (pod(number, at), ports(8080))).collect();
        mesh.upsert(
            id(2),
            Fact::Service(name(number), RemoteService { shared: true, backends, ..RemoteService::default() }),
            0,
        );
        let [high, low] = number.to_be_bytes();
        let frontend = Ipv4Addr::new(172, 16, high, low);
        let service = LocalService {
            private: false,
            cluster: "own".into(),
            name: name(number),
            cluster_id: 1,
            global: true,
            shared: true,
            affinity: Affinity::None,
            failover: None,
            balancing: Balancing::default(),
            external: External::default(),
            headless: false,
            frontends: [(frontend.into(), ports(80))].into(),
            backends: Vec::new(),
        };
        mesh.upsert(id(1), Fact::LocalService(Box::new(service)), 0);
    }
    mesh.compute();
    mesh
}

fn empty() -> IpValue {
    IpValue { identity: 0, node_ip: [0; 4], key: 0, flags: 0, pad: 0 }
}

/// What one event makes the mesh look at again, and what it changes.
fn cost(mesh: &mut Mesh, event: impl FnOnce(&mut Mesh)) -> (Work, Changes) {
    let before = mesh.work();
    event(mesh);
    let changes = mesh.compute();
    let now = mesh.work();
    let work =
        Work { addresses: now.addresses - before.addresses, frontends: now.frontends - before.frontends };
    (work, changes)
}

fn lengths(changes: &Changes) -> [usize; 5] {
    let RouteChanges::Some(routes) = &changes.routes else { panic!("all routes were computed") };
    [changes.ipcache.len(), changes.prefix.len(), changes.node.len(), changes.service.len(), routes.len()]
}

#[test]
fn a_node_costs_what_it_carries() {
    for size in SIZES {
        let mut mesh = mesh(size, PlacementRules::default());
        let lost = cost(&mut mesh, |mesh| mesh.delete(id(2), &FactKey::Node("n3".into())));
        // The pods are still told of, so their prefix decides where they are; so are the backends.
        assert_eq!(lost.0, Work { addresses: PODS.into(), frontends: 1 }, "{size}");
        assert_eq!(lengths(&lost.1), [PODS.into(), 1, 1, 0, 1], "{size}");
        let back = cost(&mut mesh, |mesh| mesh.upsert(id(2), node(3), 0));
        assert_eq!(back.0, Work { addresses: 0, frontends: 1 }, "{size}");
        assert_eq!(lengths(&back.1), [PODS.into(), 1, 1, 0, 1], "{size}");
    }
}

#[test]
fn a_prefix_that_another_cluster_takes_costs_what_is_in_it() {
    for size in SIZES {
        let rules = PlacementRules { at_own_nodes: true, hosts: Vec::new() };
        let mut mesh = mesh(size, rules);
        mesh.upsert(id(2), Fact::Node("n3".into(), NodeFact::default()), 0);
        // Neither pods nor backends are anywhere now.
        let (work, changes) = cost(&mut mesh, |_| {});
        assert_eq!(lengths(&changes), [PODS.into(), 1, 1, 1, 1], "{size}");
        // The pods are behind the node and inside the prefix.
        assert_eq!(work, Work { addresses: 2 * u64::from(PODS), frontends: 1 }, "{size}");
        let (work, changes) = cost(&mut mesh, |mesh| mesh.upsert(id(3), node(3), 0));
        assert_eq!(lengths(&changes), [0, 1, 1, 0, 1], "{size}");
        assert_eq!(work, Work { addresses: 0, frontends: 1 }, "{size}");
    }
}

#[test]
fn a_pod_costs_one_address() {
    for size in SIZES {
        let mut mesh = mesh(size, PlacementRules::default());
        let value = IpValue { node_ip: node_ip(3).octets(), identity: 8, ..empty() };
        let (work, changes) = cost(&mut mesh, |mesh| mesh.upsert(id(2), Fact::Ip(pod(3, 1), value), 0));
        assert_eq!((work, lengths(&changes)), (Work::default(), [1, 0, 0, 0, 0]), "{size}");
        // A list that lacks a few costs those, whatever stays.
        mesh.begin_list(id(2), Kind::Services);
        (0..size).filter(|number| *number != 4).for_each(|number| {
            let backends = (1..=2).map(|at| (pod(number, at), ports(8080))).collect();
            mesh.upsert(
                id(2),
                Fact::Service(
                    name(number),
                    RemoteService { shared: true, backends, ..RemoteService::default() },
                ),
                0,
            );
        });
        let (_, changes) = cost(&mut mesh, |mesh| mesh.finish_list(id(2), Kind::Services));
        assert_eq!(lengths(&changes), [0, 0, 0, 1, 0], "{size}");
    }
}

#[test]
fn pods_that_a_restart_finds_again_have_come_although_nothing_is_written() {
    let (ip, value) = (pod(3, 1), IpValue { node_ip: node_ip(3).octets(), identity: 7, ..empty() });
    let installed = EndpointValue {
        ifindex: 0,
        identity: 7,
        pod_mac: [0; 6],
        host_mac: [0; 6],
        flags: ENDPOINT_VIA_STACK,
    };
    let endpoint = vec![(wire_key::ip_key(1, ip), installed)];
    let mut mesh = Mesh::new(
        id(1),
        MaxConnectedClusters::C255,
        "n3",
        Tunnels::default(),
        Restored { endpoint, ..Restored::default() },
    );
    mesh.set_links(Links::Absent);
    mesh.begin_list(id(1), Kind::Ip);
    mesh.upsert(id(1), Fact::Ip(ip, value), 0);
    mesh.finish_list(id(1), Kind::Ip);
    assert!(mesh.compute().endpoint.is_empty() && mesh.local_pods().is_empty());
    mesh.take_pods_moved();
    mesh.upsert(id(1), node(3), 0);
    assert!(mesh.compute().endpoint.is_empty());
    assert_eq!((mesh.local_pods().len(), mesh.take_pods_moved(), mesh.take_pods_moved()), (1, true, false));
}
