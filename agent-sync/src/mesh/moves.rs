//! What follows for addresses and backends when nodes and prefixes come, go or change hands.
//!
//! Each costs what leans on it: the addresses behind a node, those inside a prefix, the frontends with a
//! backend there.

#[cfg(test)]
mod tests;

use std::net::IpAddr;

use ebpf_global_svc::abi::IpValue;
use ipnet::IpNet;

use super::Mesh;
use super::topology::Lost;
use crate::desired::Changes;
use crate::wire_key;

/// What changes of topology made the mesh look at again, since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Addresses of pods.
    pub addresses: u64,
    /// Frontends of services.
    pub frontends: u64,
}

impl Mesh {
    /// Looks again at what a change of topology may have moved: addresses that were not where they were
    /// said to be, those behind nodes that their cluster lost, and backends whose address found another
    /// holder.
    pub(super) fn place_again(&mut self, changes: &Changes) {
        if changes.prefix.is_empty() && changes.node.is_empty() {
            return;
        }
        let mut again: Vec<(u16, IpAddr)> = Vec::new();
        for (key, value) in &changes.node {
            let Some(ip) = wire_key::address(key.family, key.ip) else { continue };
            let cluster = value.map_or(self.own, |value| value.cluster);
            again.extend(self.behind_another_name(cluster, ip).map(|ip| (cluster, ip)));
            if value.is_some() {
                again.extend(self.awaiting(cluster, ip).into_iter().map(|ip| (cluster, ip)));
            }
        }
        for (key, value) in &changes.prefix {
            if let (Some(value), Some(net)) = (value, wire_key::prefix(key)) {
                let ips = self.placement.awaiting_prefix(value.cluster, net);
                again.extend(ips.into_iter().map(|ip| (value.cluster, ip)));
            }
        }
        for (cluster, ip) in again {
            let value = self.clusters.get(&cluster).and_then(|records| records.address(&ip));
            self.address_changed(cluster, ip, value);
        }
        for (cluster, lost) in self.topology.take_lost() {
            let leaning = self.leaning_on(cluster, lost);
            self.work.addresses += leaning.len() as u64;
            self.place(cluster, leaning);
        }
        let nets = changes.prefix.iter().filter_map(|(key, _)| wire_key::prefix(key));
        let hosts = changes.node.iter().filter_map(|(key, _)| wire_key::address(key.family, key.ip));
        let nets = IpNet::aggregate(&nets.chain(hosts.map(IpNet::from)).collect());
        self.work.frontends += nets.iter().map(|net| self.services.holders_changed(*net) as u64).sum::<u64>();
    }

    /// Addresses of a cluster whose records call their node by an address at which no tunnel ends: it may be another
    /// one, or its tunnels end elsewhere.
    fn behind_another_name(&self, cluster: u16, host: IpAddr) -> impl Iterator<Item = IpAddr> {
        let name = self.topology.underlay.find(host);
        let name = name.filter(|_| !self.topology.underlay.protocol().takes(host));
        let records = name.and_then(|name| Some((name, self.clusters.get(&cluster)?)));
        let ips = records
            .into_iter()
            .flat_map(|(name, records)| records.ips.behind(name).chain(records.local_ips.behind(name)));
        ips.map(|(ip, _)| ip)
    }

    /// Misplaced addresses of a cluster that may be right now that it holds this address.
    fn awaiting(&self, cluster: u16, host: IpAddr) -> Vec<IpAddr> {
        let Some(node_ip) = self.topology.underlay.find(host) else { return Vec::new() };
        let mut ips = self.placement.awaiting_node(cluster, node_ip);
        for name in self.names_beside(node_ip) {
            ips.extend(self.placement.awaiting_node(cluster, name));
        }
        // A pod in its host's network.
        ips.extend(Some(host).filter(|ip| self.placement.is_misplaced(cluster, *ip)));
        ips
    }

    /// By which other names records may call a node.
    fn names_beside(&self, node_ip: [u8; 4]) -> impl Iterator<Item = [u8; 4]> {
        self.topology.beside(node_ip).filter_map(|ip| self.topology.underlay.find(ip))
    }

    /// Addresses of a cluster that may be installed because it held this.
    fn leaning_on(&self, cluster: u16, lost: Lost) -> Vec<(IpAddr, IpValue)> {
        let Some(records) = self.clusters.get(&cluster).filter(|_| cluster != self.own) else {
            return Vec::new();
        };
        let needs_prefix = self.placement.at_own_nodes(cluster);
        match lost {
            Lost::Prefix(net) if needs_prefix => records.ips.inside(net),
            Lost::Prefix(_) => Vec::new(),
            Lost::Address(host) => {
                let Some(node_ip) = self.topology.underlay.find(host) else { return Vec::new() };
                // A pod in its host's network.
                let host = records.ips.get(&host).filter(|_| needs_prefix).map(|value| (host, value));
                let beside = self.names_beside(node_ip).flat_map(|name| records.ips.behind(name));
                records.ips.behind(node_ip).chain(beside).chain(host).collect()
            }
        }
    }

    /// Looks again at all addresses of a cluster.
    pub(super) fn place_all(&mut self, cluster: u16) {
        let Some(records) = self.clusters.get(&cluster) else { return };
        let all = records.ips.iter().collect();
        self.place(cluster, all);
    }

    /// Looks again where addresses of another cluster are.
    fn place(&mut self, cluster: u16, addresses: Vec<(IpAddr, IpValue)>) {
        for (ip, value) in addresses {
            let was_misplaced = self.placement.is_misplaced(cluster, ip);
            let placed = self.placement.place(&self.topology, cluster, ip, value);
            if was_misplaced || placed != Some(value) {
                self.ipcache.insert(wire_key::ip_key(cluster, ip), placed);
            }
        }
    }
}
