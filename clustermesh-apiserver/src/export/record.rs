//! One object to one record, as Cilium's exporter would write it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::Identity;
use clustermesh_kvstore::record::{
    self, BackendState, Failover, IpRecord, LocalBackend, LocalService, NamedPort, NodeAddress,
    NodeAddressKind, Port, PortMap, Zone,
};
use ipnet::IpNet;

use super::{Claim, Cluster};
use crate::endpoints::Backend;
use crate::objects::{CiliumEndpoint, CiliumNode, Node, Objects, Pod, Service};

/// A node. Cluster and ID are ours, whatever the object says.
pub(super) fn node(node: &Node, cluster: &Cluster) -> record::Node {
    let of_kind = |kind: NodeAddressKind, ips: &[IpAddr]| -> Vec<NodeAddress> {
        ips.iter().map(|ip| NodeAddress { kind: kind.clone(), ip: *ip }).collect()
    };
    let mut v4 = Vec::new();
    let mut v6 = Vec::new();
    for cidr in &node.pod_cidrs {
        match cidr {
            IpNet::V4(net) => v4.push(*net),
            IpNet::V6(net) => v6.push(*net),
        }
    }
    let mut v4 = v4.into_iter();
    let mut v6 = v6.into_iter();
    record::Node {
        name: node.name.clone(),
        cluster: cluster.name.to_string(),
        addresses: [
            of_kind(NodeAddressKind::InternalIp, &node.internal_ips),
            of_kind(NodeAddressKind::ExternalIp, &node.external_ips),
            of_kind(NodeAddressKind::CiliumInternalIp, &node.cilium_internal_ips),
        ]
        .concat(),
        ipv4_alloc_cidr: v4.next(),
        ipv4_secondary_alloc_cidrs: v4.collect(),
        ipv6_alloc_cidr: v6.next(),
        ipv6_secondary_alloc_cidrs: v6.collect(),
        ipv4_health_ip: node.ipv4_health_ip,
        ipv6_health_ip: node.ipv6_health_ip,
        cluster_id: cluster.id.get().into(),
        source: "custom-resource".to_owned(),
        encryption_key: node.encryption_key,
        labels: Some(node.labels.clone()).filter(|labels| !labels.is_empty()),
        annotations: Some(node.annotations.clone()).filter(|annotations| !annotations.is_empty()),
        node_identity: Some(0),
        wireguard_pub_key: node.wireguard_pub_key.clone(),
        boot_id: node.boot_id.clone(),
        ..record::Node::default()
    }
}

/// A node as Cilium's agent describes it. Cluster and ID are ours, whatever the object says.
pub(super) fn cilium_node(node: &CiliumNode, cluster: &Cluster) -> record::Node {
    record::Node {
        cluster: cluster.name.to_string(),
        cluster_id: cluster.id.get().into(),
        ..node.record.clone()
    }
}

/// Who has an address that these claim.
pub(super) enum Holder<'a> {
    /// A node itself.
    Node(&'a Node),
    /// A pod.
    Pod(&'a Pod),
}

/// Which of several claims to an address holds. A node's own address is nobody else's; of pods one
/// that does not terminate, then the younger one has it, since an address is given away again while
/// the former owner's object is still there.
pub(super) fn holder<'a>(claims: &BTreeSet<Claim>, objects: &'a Objects) -> Option<Holder<'a>> {
    let node = claims.iter().find_map(|claim| match claim {
        Claim::Node(name) => objects.node(name),
        Claim::Pod(_) => None,
    });
    if let Some(node) = node {
        return Some(Holder::Node(node));
    }
    let pods = claims.iter().filter_map(|claim| match claim {
        Claim::Node(_) => None,
        Claim::Pod(name) => objects.pod(name),
    });
    pods.max_by(|a, b| {
        let rank = |pod: &Pod| (!pod.terminating, pod.created);
        rank(a).cmp(&rank(b)).then_with(|| b.name.cmp(&a.name))
    })
    .map(Holder::Pod)
}

/// The address of a pod: where it lives and what it is.
pub(super) fn pod_ip(ip: IpAddr, pod: &Pod, identity: Identity, objects: &Objects) -> IpRecord {
    let node = pod.node.as_deref().and_then(|name| objects.node(name));
    let named_ports = pod.ports.iter().filter(|port| !port.name.is_empty()).map(|port| NamedPort {
        name: port.name.clone(),
        port: port.number,
        protocol: port.protocol,
    });
    IpRecord {
        prefix: ip.into(),
        host: true,
        host_ip: pod.host_ip.or_else(|| node.and_then(Node::tunnel_ip)),
        identity,
        key: node.map_or(0, |node| node.encryption_key),
        metadata: String::new(),
        namespace: pod.name.namespace.clone(),
        pod_name: pod.name.name.clone(),
        service_account: pod.service_account.clone(),
        named_ports: named_ports.collect(),
    }
}

/// The address that a node itself has in the pod network.
pub(super) fn node_ip(ip: IpAddr, node: &Node) -> IpRecord {
    IpRecord {
        prefix: ip.into(),
        host: true,
        host_ip: node.tunnel_ip(),
        identity: Identity::REMOTE_NODE,
        key: node.encryption_key,
        metadata: String::new(),
        namespace: String::new(),
        pod_name: String::new(),
        service_account: String::new(),
        named_ports: Vec::new(),
    }
}

/// An address of an endpoint of Cilium's.
pub(super) fn cilium_ip(ip: IpAddr, endpoint: &CiliumEndpoint) -> IpRecord {
    IpRecord {
        prefix: ip.into(),
        host: true,
        host_ip: endpoint.node_ip,
        identity: Identity(endpoint.identity),
        key: endpoint.encryption_key,
        metadata: String::new(),
        namespace: endpoint.name.namespace.clone(),
        pod_name: endpoint.name.name.clone(),
        service_account: String::new(),
        named_ports: Vec::new(),
    }
}

/// A service for the agents of the own cluster, `global` if its namespace is. `expected` counts the backends
/// that it would have if all were ready.
pub(super) fn local_service(
    service: &Service,
    global: bool,
    backends: BTreeMap<IpAddr, Backend>,
    expected: impl FnOnce() -> usize,
    cluster: &Cluster,
) -> LocalService {
    let failover = service
        .failover_threshold
        .map(|threshold| Failover { threshold, expected: u32::try_from(expected()).unwrap_or(u32::MAX) });
    let backends = backends.into_iter().map(|(ip, backend)| LocalBackend {
        ip,
        ports: backend.ports,
        state: backend.state,
        node: backend.node,
        zone: backend.zone,
        hostname: backend.hostname,
    });
    LocalService {
        cluster: cluster.name.to_string(),
        name: service.name.clone(),
        cluster_id: cluster.id.get().into(),
        global: global && service.global,
        shared: global && service.shared,
        private: !global,
        affinity: service.affinity,
        failover,
        balancing: service.balancing.clone(),
        external: service.external.clone(),
        headless: service.headless,
        frontends: frontends(service),
        backends: backends.collect(),
    }
}

/// The same service for other clusters.
///
/// The format has no conditions: whatever is listed gets new connections. So backends that terminate
/// are left out, though they serve; other clusters have backends of their own that do not.
pub(super) fn shared_service(service: &Service, local: &LocalService) -> record::Service {
    let active = || local.backends.iter().filter(|backend| backend.state == BackendState::Active);
    let with_hostname =
        active().filter_map(|backend| Some((backend.ip.to_string(), backend.hostname.clone()?)));
    let with_zone = active().filter_map(|backend| {
        Some((backend.ip, Zone { zone: backend.zone.clone()?, for_zones: Vec::new() }))
    });
    record::Service {
        cluster: local.cluster.clone(),
        name: local.name.clone(),
        frontends: local.frontends.clone(),
        backends: active().map(|backend| (backend.ip, backend.ports.clone())).collect(),
        hostnames: with_hostname.collect(),
        zones: with_zone.collect(),
        labels: service.labels.clone(),
        selector: service.selector.clone().unwrap_or_default(),
        include_external: true,
        shared: true,
        cluster_id: local.cluster_id,
    }
}

fn frontends(service: &Service) -> BTreeMap<IpAddr, PortMap> {
    let ports: PortMap = service
        .ports
        .iter()
        .map(|port| (port.name.clone(), Port { protocol: port.protocol, port: port.number }))
        .collect();
    service.cluster_ips.iter().map(|ip| (*ip, ports.clone())).collect()
}
