//! What no rule can allow: records of another cluster, identities of another range, addresses that no pod
//! or node has, and sizes that only an attack has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::PeerPolicy;
use super::refusal::{Reason, Refusal, refuse};
use crate::cluster::Identity;
use crate::record::{
    IdentityRecord, IpRecord, LocalPolicy, LocalService, Node, NodeAddressKind, Service, ServiceExport,
};

/// Shortest pod prefix of a cluster: a typing error must not swallow the address space.
const MIN_PREFIX_V4: u8 = 8;
/// The same for IPv6.
const MIN_PREFIX_V6: u8 = 16;
/// Pod prefixes of one node.
const MAX_NODE_PREFIXES: usize = 64;
/// Addresses of one node.
const MAX_NODE_ADDRESSES: usize = 64;
/// Frontend addresses of one service.
const MAX_FRONTENDS: usize = 16;
/// Ports of one service or backend.
const MAX_PORTS: usize = 256;

impl PeerPolicy {
    pub(super) fn check_node(&self, node: &Node) -> Result<(), Refusal> {
        self.check_owner(&node.cluster, node.cluster_id)?;
        bounded("addresses", node.addresses.len(), MAX_NODE_ADDRESSES)?;
        for address in node.addresses.iter().filter(|address| address.kind == NodeAddressKind::InternalIp) {
            check_address(address.ip)?;
        }
        bounded("pod prefixes", node.pod_cidrs().count(), MAX_NODE_PREFIXES)?;
        node.pod_cidrs().try_for_each(check_prefix)?;
        let of_mesh =
            node.addresses.iter().filter(|address| address.kind == NodeAddressKind::CiliumInternalIp);
        self.rules.check_places(of_mesh.map(|address| address.ip), node.pod_cidrs())
    }

    pub(super) fn check_ip(&self, record: &IpRecord) -> Result<(), Refusal> {
        check_address(record.prefix.addr())?;
        // One of full length, too: it would be a second key for the same address.
        if !record.host {
            return refuse(Reason::NotAnAddress, format!("{} is a prefix, not a pod", record.prefix));
        }
        if let Some(host) = record.host_ip {
            check_address(host)?;
        }
        let identity = record.identity;
        if !identity.is_reserved() && !identity.belongs_to(self.id, self.max) {
            return refuse(Reason::IdentityRange, self.out_of_range(identity));
        }
        self.rules.check_places([record.prefix.addr()].into_iter(), [])
    }

    pub(super) fn check_identity(&self, record: &IdentityRecord) -> Result<(), Refusal> {
        if !record.id.belongs_to(self.id, self.max) {
            return refuse(Reason::IdentityRange, self.out_of_range(record.id));
        }
        match record.labels.cluster() {
            Some(cluster) if cluster == self.name.as_str() => Ok(()),
            label => refuse(
                Reason::ClusterLabel,
                format!("the labels name cluster {:?}, not {}", label.unwrap_or(""), self.name),
            ),
        }
    }

    pub(super) fn check_service(&self, service: &Service) -> Result<(), Refusal> {
        self.check_owner(&service.cluster, service.cluster_id)?;
        for (ip, ports) in &service.backends {
            check_address(*ip)?;
            bounded("ports", ports.len(), MAX_PORTS)?;
        }
        self.rules.check_places(service.backends.iter().map(|(ip, _)| *ip), [])
    }

    /// Of the own cluster, which alone may have one of this kind.
    pub(super) fn check_local_policy(&self, policy: &LocalPolicy) -> Result<(), Refusal> {
        if !self.is_own {
            return refuse(
                Reason::NotOwnCluster,
                format!("{} cannot define policies of this cluster", self.name),
            );
        }
        self.check_owner(&policy.cluster, policy.cluster_id)
    }

    pub(super) fn check_local_service(&self, service: &LocalService) -> Result<(), Refusal> {
        if !self.is_own {
            return refuse(
                Reason::NotOwnCluster,
                format!("{} cannot define services of this cluster", self.name),
            );
        }
        self.check_owner(&service.cluster, service.cluster_id)?;
        bounded("backends", service.backends.len(), self.rules.max_backends)?;
        bounded("frontends", service.frontends.len(), MAX_FRONTENDS)?;
        service.frontends.values().try_for_each(|ports| bounded("ports", ports.len(), MAX_PORTS))?;
        for (ip, ports) in service.backends.iter().map(|backend| (backend.ip, &backend.ports)) {
            check_address(ip)?;
            bounded("ports", ports.len(), MAX_PORTS)?;
        }
        bounded("external addresses", service.external.ips.len(), MAX_FRONTENDS)?;
        bounded("node ports", service.external.node_ports.len(), MAX_PORTS)?;
        service.frontends.keys().chain(&service.external.ips).try_for_each(|ip| check_address(*ip))
    }

    pub(super) fn check_service_export(&self, export: &ServiceExport) -> Result<(), Refusal> {
        // It carries no ID.
        self.check_owner(&export.cluster, self.id.get().into())?;
        bounded("ports", export.ports.len(), MAX_PORTS)
    }

    fn check_owner(&self, name: &str, id: u32) -> Result<(), Refusal> {
        if name != self.name.as_str() {
            return refuse(Reason::ClusterName, format!("it is of cluster {name:?}, not {}", self.name));
        }
        if id != u32::from(self.id.get()) {
            return refuse(Reason::ClusterId, format!("it has cluster ID {id}, not {}", self.id));
        }
        Ok(())
    }

    fn out_of_range(&self, identity: Identity) -> String {
        let (first, last) = self.id.identity_range(self.max);
        format!("identity {identity} is not in {first} to {last}, the range of {}", self.name)
    }
}

/// Refuses what can never be a pod or a node of another machine.
fn check_address(ip: IpAddr) -> Result<(), Refusal> {
    let special = match ip {
        IpAddr::V4(v4) => is_special_v4(v4),
        IpAddr::V6(v6) => is_special_v6(v6),
    };
    if special {
        return refuse(Reason::ImplausibleAddress, format!("{ip} is no address of a pod or node"));
    }
    Ok(())
}

fn check_prefix(prefix: IpNet) -> Result<(), Refusal> {
    let shortest = if prefix.addr().is_ipv4() { MIN_PREFIX_V4 } else { MIN_PREFIX_V6 };
    if prefix.prefix_len() < shortest {
        return refuse(Reason::PrefixTooWide, format!("{prefix} is wider than a /{shortest}"));
    }
    check_address(prefix.network())?;
    check_address(prefix.broadcast())
}

fn is_special_v4(ip: Ipv4Addr) -> bool {
    ip.octets()[0] == 0 || ip.is_loopback() || ip.is_link_local() || ip.octets()[0] >= 224
}

fn is_special_v6(ip: Ipv6Addr) -> bool {
    ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_multicast()
        || ip.is_unicast_link_local()
        // An IPv4 address in disguise would pass by the checks of its family.
        || ip.to_ipv4_mapped().is_some()
}

fn bounded(what: &str, n: usize, max: usize) -> Result<(), Refusal> {
    if n > max { refuse(Reason::TooMany, format!("{n} {what}; at most {max} are taken")) } else { Ok(()) }
}
