use std::collections::BTreeMap;

use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::abi::{EndpointValue, IpKey, NodeKey, NodeValue, UnderlayKey, UnderlayValue};

use super::*;
use crate::desired::Restored;
use crate::mesh::{Fact, FactKey, Links, NodeFact};
use crate::tunnels::{Tunnels, UnderlayProtocol};

/// Tables as a mesh fills them, with tunnels over IPv6 between nodes of both families.
#[derive(Default)]
struct Tables {
    ipcache: BTreeMap<IpKey, IpValue>,
    endpoint: BTreeMap<IpKey, EndpointValue>,
    node: BTreeMap<NodeKey, NodeValue>,
    underlay: BTreeMap<UnderlayKey, UnderlayValue>,
}

impl Tables {
    fn mesh(&self) -> Mesh {
        let restored = Restored {
            ipcache: self.ipcache.iter().map(|(key, value)| (*key, *value)).collect(),
            endpoint: self.endpoint.iter().map(|(key, value)| (*key, *value)).collect(),
            node: self.node.iter().map(|(key, value)| (*key, *value)).collect(),
            underlay: self.underlay.iter().map(|(key, value)| (*key, *value)).collect(),
            ..Restored::default()
        };
        let tunnels = Tunnels { protocol: UnderlayProtocol::Ipv6, node_ip: Some(v6(1, 1)) };
        let mut mesh = Mesh::new(cluster(1), MaxConnectedClusters::C255, "n1", tunnels, restored);
        mesh.set_links(Links::Absent);
        // Without policies.
        for kind in [Kind::Identities, Kind::LocalIdentities, Kind::LocalPolicies] {
            mesh.begin_list(cluster(1), kind);
            mesh.finish_list(cluster(1), kind);
        }
        mesh
    }

    fn follow(&mut self, mesh: &mut Mesh) {
        let changes = mesh.compute();
        apply(&mut self.ipcache, changes.ipcache);
        apply(&mut self.endpoint, changes.endpoint);
        apply(&mut self.node, changes.node);
        apply(&mut self.underlay, changes.underlay);
        for (key, value) in &self.ipcache {
            assert_eq!(mesh.wanted_address(key), Some(*value));
        }
    }

    /// Where packets to a pod of a cluster are sent; none: where its prefix leads.
    #[track_caller]
    fn end(&self, cluster: u16, pod: &str) -> Option<IpAddr> {
        let value = self.ipcache[&wire_key::ip_key(cluster, pod.parse().unwrap())];
        assert!(value.node_ip[0] == 0, "an IPv4 address is none of an IPv6 underlay: {value:?}");
        self.underlay.get(&UnderlayKey { number: value.node_ip }).map(|value| value.ip.into())
    }
}

fn apply<K: Ord, V>(table: &mut BTreeMap<K, V>, changes: Vec<(K, Option<V>)>) {
    for (key, value) in changes {
        match value {
            Some(value) => drop(table.insert(key, value)),
            None => drop(table.remove(&key)),
        }
    }
}

fn cluster(id: u32) -> ClusterId {
    ClusterId::new(id, MaxConnectedClusters::C255).unwrap()
}

fn v4(cluster: u8, node: u8) -> IpAddr {
    [192, 0, cluster, node].into()
}

fn v6(cluster: u16, node: u16) -> IpAddr {
    [0xfd00, 0, 0, 0, 0, 0, cluster, node].into()
}

/// Node `n<node>`.
fn node(mesh: &mut Mesh, id: u8, number: u8, ips: &[IpAddr]) {
    let fact = NodeFact { internal_ips: ips.to_vec(), ..NodeFact::default() };
    mesh.upsert(cluster(id.into()), Fact::Node(format!("n{number}"), fact), 0);
}

fn both(id: u8, number: u8) -> [IpAddr; 2] {
    [v4(id, number), v6(id.into(), number.into())]
}

fn pod(mesh: &mut Mesh, id: u8, ip: &str, host: IpAddr) {
    let node_ip = mesh.name_node(host);
    let value = IpValue { identity: u32::from(id) << 16 | 300, node_ip, key: 0, flags: 0, pad: 0 };
    mesh.upsert(cluster(id.into()), Fact::Ip(ip.parse().unwrap(), value), 1);
}

#[test]
fn a_pod_is_behind_the_tunnel_of_its_node_whichever_address_names_that() {
    let (mut tables, id) = (Tables::default(), cluster(2));
    let mut mesh = tables.mesh();
    pod(&mut mesh, 2, "10.2.0.1", v4(2, 1));
    pod(&mut mesh, 2, "10.2.0.2", v6(2, 1));
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), tables.end(2, "10.2.0.2")), (None, None), "no such node");
    assert_eq!(mesh.misplaced(id), 2);

    node(&mut mesh, 2, 1, &both(2, 1));
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), tables.end(2, "10.2.0.2")), (Some(v6(2, 1)), Some(v6(2, 1))));
    assert_eq!(mesh.misplaced(id), 0);

    // It gets another address where its tunnels end, and then none.
    node(&mut mesh, 2, 1, &[v4(2, 1), v6(2, 9)]);
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), tables.end(2, "10.2.0.2")), (Some(v6(2, 9)), None));
    node(&mut mesh, 2, 1, &[v4(2, 1)]);
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), mesh.misplaced(id)), (None, 2));
    node(&mut mesh, 2, 1, &both(2, 1));
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), mesh.misplaced(id)), (Some(v6(2, 1)), 0));
    mesh.delete(id, &FactKey::Node("n1".into()));
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), mesh.misplaced(id)), (None, 2));
}

#[test]
fn a_node_does_not_lead_to_an_address_of_another_cluster() {
    let mut tables = Tables::default();
    let mut mesh = tables.mesh();
    node(&mut mesh, 3, 1, &both(3, 1));
    pod(&mut mesh, 3, "10.3.0.1", v4(3, 1));
    tables.follow(&mut mesh);
    // One says that its tunnels end at the other's, and a pod that it is behind that one.
    node(&mut mesh, 2, 1, &[v4(2, 1), v6(3, 1)]);
    pod(&mut mesh, 2, "10.2.0.1", v4(2, 1));
    pod(&mut mesh, 2, "10.2.0.2", v4(3, 1));
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), tables.end(2, "10.2.0.2")), (None, None));
    assert_eq!(tables.end(3, "10.3.0.1"), Some(v6(3, 1)));

    // It gets that address when the other one leaves it, and loses it to the own cluster.
    node(&mut mesh, 3, 1, &[v4(3, 1)]);
    tables.follow(&mut mesh);
    assert_eq!((tables.end(2, "10.2.0.1"), tables.end(3, "10.3.0.1")), (Some(v6(3, 1)), None));
    node(&mut mesh, 1, 7, &[v4(1, 7), v6(3, 1)]);
    tables.follow(&mut mesh);
    assert_eq!(tables.end(2, "10.2.0.1"), None);
}

#[test]
fn pods_of_this_node_are_known_by_either_address_and_stay_over_a_restart() {
    let mut tables = Tables::default();
    let mut mesh = tables.mesh();
    for (ip, host) in [("10.1.0.1", v4(1, 1)), ("10.1.0.2", v6(1, 1)), ("10.1.1.1", v4(1, 2))] {
        pod(&mut mesh, 1, ip, host);
    }
    tables.follow(&mut mesh);
    let local = |tables: &Tables| tables.endpoint.keys().map(|key| key.ip[3]).collect::<Vec<_>>();
    assert_eq!(local(&tables), [2], "its record may say what else it is called");
    node(&mut mesh, 1, 1, &both(1, 1));
    node(&mut mesh, 1, 2, &both(1, 2));
    tables.follow(&mut mesh);
    assert_eq!(local(&tables), [1, 2]);
    assert_eq!((tables.end(1, "10.1.0.1"), tables.end(1, "10.1.1.1")), (Some(v6(1, 1)), Some(v6(1, 2))));

    // Addresses are listed before nodes are.
    let (ipcache, endpoint) = (tables.ipcache.clone(), tables.endpoint.clone());
    let mut mesh = tables.mesh();
    mesh.begin_list(cluster(1), Kind::Ip);
    for (ip, host) in [("10.1.0.1", v4(1, 1)), ("10.1.0.2", v6(1, 1)), ("10.1.1.1", v4(1, 2))] {
        pod(&mut mesh, 1, ip, host);
    }
    mesh.finish_list(cluster(1), Kind::Ip);
    tables.follow(&mut mesh);
    assert_eq!((&tables.ipcache, &tables.endpoint), (&ipcache, &endpoint));
    mesh.begin_list(cluster(1), Kind::Nodes);
    node(&mut mesh, 1, 1, &both(1, 1));
    mesh.finish_list(cluster(1), Kind::Nodes);
    tables.follow(&mut mesh);
    assert_eq!(tables.endpoint, endpoint);
    assert_eq!(tables.end(1, "10.1.1.1"), None, "there is no such node any more");
}
