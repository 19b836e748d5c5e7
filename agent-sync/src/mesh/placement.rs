//! Whether an address is where its cluster says it is.
//!
//! A pod's record names the node that carries it, by any of its addresses. Packets are sent there only if that is a
//! node which the same cluster holds, or lies in the operator's CIDRs for its nodes; otherwise the pod's prefix says
//! where to go, which only the prefix's holder decides. With [`PlacementRules::at_own_nodes`], a pod
//! outside of the prefixes of its own cluster is not installed at all.
//!
//! Records come before their nodes and stay when these go, so each answer holds until the topology
//! changes. Addresses that are not used as their records say are few, and remembered.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use ebpf_global_svc::abi::IpValue;
use ipnet::IpNet;

use super::service::Standing;
use super::topology::Topology;

/// No node: the pod's prefix decides.
const NOWHERE: [u8; 4] = [0; 4];

/// What the operator says about one cluster's places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlacementRules {
    /// Where its nodes may be, even such as have no record.
    pub hosts: Vec<IpNet>,
    /// Pods and backends must lie in prefixes of its nodes.
    pub at_own_nodes: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Placement {
    rules: HashMap<u16, PlacementRules>,
    /// Addresses of each cluster with the node that their records name.
    misplaced: HashMap<u16, BTreeMap<IpAddr, [u8; 4]>>,
    /// The same by node: those that a node of that address would put right.
    awaiting: BTreeSet<(u16, [u8; 4], IpAddr)>,
}

impl Placement {
    /// Tells whether these are other rules than before.
    pub(super) fn set_rules(&mut self, cluster: u16, rules: PlacementRules) -> bool {
        let before = match rules == PlacementRules::default() {
            true => self.rules.remove(&cluster),
            false => self.rules.insert(cluster, rules.clone()),
        };
        before.unwrap_or_default() != rules
    }

    /// What is to be installed for an address of another cluster; none: nothing.
    pub(super) fn place(
        &mut self,
        topology: &Topology,
        cluster: u16,
        ip: IpAddr,
        value: IpValue,
    ) -> Option<IpValue> {
        let placed = self.judge(topology, cluster, ip, value);
        self.forget(cluster, ip);
        if placed.is_none_or(|placed| placed.node_ip == NOWHERE && value.node_ip != NOWHERE) {
            self.misplaced.entry(cluster).or_default().insert(ip, value.node_ip);
            self.awaiting.insert((cluster, value.node_ip, ip));
        }
        placed
    }

    /// The address is none of the cluster's any more.
    pub(super) fn forget(&mut self, cluster: u16, ip: IpAddr) {
        if let Some(misplaced) = self.misplaced.get_mut(&cluster) {
            if let Some(node_ip) = misplaced.remove(&ip) {
                self.awaiting.remove(&(cluster, node_ip, ip));
            }
            if misplaced.is_empty() {
                self.misplaced.remove(&cluster);
            }
        }
    }

    /// The cluster is gone.
    pub(super) fn drain(&mut self, cluster: u16) {
        self.rules.remove(&cluster);
        for (ip, node_ip) in self.misplaced.remove(&cluster).into_iter().flatten() {
            self.awaiting.remove(&(cluster, node_ip, ip));
        }
    }

    /// How many addresses of a cluster are not used as their records say.
    pub(super) fn misplaced(&self, cluster: u16) -> usize {
        self.misplaced.get(&cluster).map_or(0, BTreeMap::len)
    }

    /// Whether an address is not used as its record says.
    pub(super) fn is_misplaced(&self, cluster: u16, ip: IpAddr) -> bool {
        self.misplaced.get(&cluster).is_some_and(|ips| ips.contains_key(&ip))
    }

    /// Misplaced addresses of `cluster` that may be right now that it holds this node's address.
    pub(super) fn awaiting_node(&self, cluster: u16, node_ip: [u8; 4]) -> Vec<IpAddr> {
        let first = (cluster, node_ip, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let all = self.awaiting.range(first..).take_while(|(c, node, _)| (*c, *node) == (cluster, node_ip));
        all.map(|(_, _, ip)| *ip).collect()
    }

    /// Misplaced addresses of `cluster` that may be right now that it holds this prefix.
    pub(super) fn awaiting_prefix(&self, cluster: u16, net: IpNet) -> Vec<IpAddr> {
        let misplaced = self.misplaced.get(&cluster).filter(|_| self.at_own_nodes(cluster));
        let inside = misplaced.into_iter().flat_map(|ips| ips.range(net.network()..=net.broadcast()));
        inside.map(|(ip, _)| *ip).collect()
    }

    /// Whether a backend may be used: nobody else holds its address.
    pub(super) fn standing(&self, topology: &Topology, cluster: u16, ip: IpAddr) -> Standing {
        match topology.holder(ip) {
            Some(holder) if holder != cluster => Standing::HeldBy(holder),
            Some(_) => Standing::May,
            None if self.at_own_nodes(cluster) => Standing::Unwanted,
            None => Standing::Outside,
        }
    }

    /// What is to be installed as things stand.
    pub(super) fn judge(
        &self,
        topology: &Topology,
        cluster: u16,
        ip: IpAddr,
        value: IpValue,
    ) -> Option<IpValue> {
        if self.at_own_nodes(cluster) && topology.holder(ip) != Some(cluster) {
            return None;
        }
        let is_its = |name: &[u8; 4]| {
            topology.underlay.address(*name).is_some_and(|host| {
                let listed = || self.rules.get(&cluster).is_some_and(|rules| contains(&rules.hosts, host));
                topology.address_holder(host) == Some(cluster) || listed()
            })
        };
        let named = Some(value.node_ip).filter(is_its);
        let node_ip = named.and_then(|name| topology.tunnel_name(name)).filter(is_its);
        Some(IpValue { node_ip: node_ip.unwrap_or(NOWHERE), ..value })
    }

    /// Whether pods and backends of a cluster must lie in prefixes of its nodes.
    pub(super) fn at_own_nodes(&self, cluster: u16) -> bool {
        self.rules.get(&cluster).is_some_and(|rules| rules.at_own_nodes)
    }
}

fn contains(nets: &[IpNet], ip: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&ip))
}
