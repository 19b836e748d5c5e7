//! What a cluster may find in its neighbour's etcd and must never act on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;

use clustermesh_kvstore::cluster::{Identity, NamespacedName};
use clustermesh_kvstore::key::{Kind, Layout, cluster_config_key, data_prefix};
use clustermesh_kvstore::record::{
    ClusterConfig, IpRecord, Node, NodeAddress, NodeAddressKind, Port, PortMap, Protocol, Record as _,
    Service,
};
use rand::Rng as _;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;

use crate::etcd::Write;
use crate::objects::{PORTS, Truth};
use crate::place::Place;

/// A record of `place`, whose cluster has ID `id`, against the one whose truth and ID is `victim`.
pub(crate) fn record(
    place: &Place,
    id: u16,
    truth: &Truth,
    victim: (&Truth, u16),
    rng: &mut SmallRng,
) -> Write {
    let prefix = |kind| data_prefix(kind, &place.name, Layout::State);
    let (victim, victim_id) = victim;
    let any_pod = |truth: &Truth| truth.pods.values().next().map(|pod| truth.pod_ip(pod));
    let own_ip = any_pod(truth).unwrap_or_else(|| truth.mesh_ip(1));
    let their_ip = any_pod(victim).unwrap_or_else(|| victim.mesh_ip(1));
    let (key, value) = match rng.random_range(0..9) {
        // An identity that is another cluster's to give.
        0 => (format!("{}{own_ip}", prefix(Kind::Ip)), ip(own_ip, truth, victim_id)),
        1 => (format!("{}{their_ip}", prefix(Kind::Ip)), ip(their_ip, truth, victim_id)),
        // Another cluster's address under an identity of its own.
        2 => (format!("{}{their_ip}", prefix(Kind::Ip)), ip(their_ip, truth, id)),
        3 => {
            let name = format!("n{}", rng.random_range(1..4));
            (format!("{}{name}", prefix(Kind::Nodes)), node(&name, place, id, victim))
        }
        4 => {
            let name = format!("n{}", rng.random_range(1..4));
            (format!("{}{name}", prefix(Kind::Nodes)), node(&name, place, victim_id, truth))
        }
        5 => {
            let name = format!("s{}", rng.random_range(1..3));
            (format!("{}shop/{name}", prefix(Kind::Services)), service(name, place, id, [own_ip, their_ip]))
        }
        6 => {
            let number = u32::from(victim_id) << 16 | 300;
            let labels = b"k8s:app=x;k8s:io.cilium.k8s.policy.cluster=alpha;".to_vec();
            (format!("{}{number}", prefix(Kind::Identities)), labels)
        }
        7 => {
            let id = *[0, u32::from(victim_id), 256, u32::from(id)].choose(rng).unwrap_or(&0);
            let config = ClusterConfig {
                id,
                synced_canaries: rng.random_bool(0.8),
                cached: rng.random_bool(0.2),
                max_connected_clusters: Some(255),
                service_exports_enabled: None,
            };
            (cluster_config_key(&place.name), config.encode())
        }
        _ => {
            let kind =
                *[Kind::Nodes, Kind::Ip, Kind::Identities, Kind::Services].choose(rng).unwrap_or(&Kind::Ip);
            let suffix = *["", "a", "shop/s1", "n1", "10.0.0.1", "70000", "shop/../x", "\u{0}"]
                .choose(rng)
                .unwrap_or(&"");
            let values: [&[u8]; 6] = [b"", b"{", b"{}", b"null", b"\xff\xfe", b"[1]"];
            (prefix(kind) + suffix, values.choose(rng).copied().unwrap_or_default().to_vec())
        }
    };
    (key, Some((Rc::from(value), 0)))
}

fn ip(address: IpAddr, truth: &Truth, id: u16) -> Vec<u8> {
    IpRecord {
        prefix: address.into(),
        host: true,
        host_ip: Some(truth.node_ip(1)),
        identity: Identity(u32::from(id) << 16 | 300),
        key: 0,
        metadata: String::new(),
        namespace: "shop".into(),
        pod_name: "evil".into(),
        service_account: String::new(),
        named_ports: Vec::new(),
    }
    .encode()
}

/// A node of this name with the addresses of `truth`'s first one.
fn node(name: &str, place: &Place, id: u16, truth: &Truth) -> Vec<u8> {
    let cidr = match truth.mesh_ip(1) {
        IpAddr::V4(ip) => ipnet_of(ip),
        IpAddr::V6(_) => None,
    };
    Node {
        name: name.into(),
        cluster: place.name.as_str().into(),
        addresses: vec![NodeAddress { kind: NodeAddressKind::InternalIp, ip: truth.node_ip(1) }],
        ipv4_alloc_cidr: cidr,
        cluster_id: id.into(),
        ..Node::default()
    }
    .encode()
}

fn ipnet_of(ip: std::net::Ipv4Addr) -> Option<ipnet::Ipv4Net> {
    Some(ipnet::Ipv4Net::new(ip, 24).ok()?.trunc())
}

fn service(name: String, place: &Place, id: u16, backends: [IpAddr; 2]) -> Vec<u8> {
    let ports: PortMap = [("http".to_owned(), Port { protocol: Protocol::Tcp, port: PORTS.1 })].into();
    Service {
        cluster: place.name.as_str().into(),
        name: NamespacedName { namespace: "shop".into(), name },
        frontends: BTreeMap::new(),
        backends: backends.into_iter().map(|ip| (ip, ports.clone())).collect(),
        hostnames: BTreeMap::new(),
        zones: BTreeMap::new(),
        labels: BTreeMap::new(),
        selector: BTreeMap::new(),
        include_external: true,
        shared: true,
        cluster_id: id.into(),
    }
    .encode()
}
