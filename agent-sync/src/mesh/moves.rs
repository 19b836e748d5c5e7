//! What follows for addresses and backends when nodes and prefixes come, go or change hands.
//!
//! Each costs what leans on it: the addresses behind a node, those inside a prefix, the frontends with a
//! backend there.

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
            if let (Some(value), Some(ip)) = (value, wire_key::address(key.family, key.ip))
                && let Some(node_ip) = self.topology.underlay.find(ip)
            {
                let ips = self.placement.awaiting_node(value.cluster, node_ip);
                // A pod in its host's network.
                if self.placement.is_misplaced(value.cluster, ip) {
                    again.push((value.cluster, ip));
                }
                again.extend(ips.into_iter().map(|ip| (value.cluster, ip)));
            }
        }
        for (key, value) in &changes.prefix {
            if let (Some(value), Some(net)) = (value, wire_key::prefix(key)) {
                let ips = self.placement.awaiting_prefix(value.cluster, net);
                again.extend(ips.into_iter().map(|ip| (value.cluster, ip)));
            }
        }
        for (cluster, ip) in again {
            let value = self.clusters.get(&cluster).and_then(|records| records.ips.get(&ip));
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
                records.ips.behind(node_ip).chain(host).collect()
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
