//! Whether an address is where its cluster says it is.
//!
//! A pod's record names the node that carries it. Packets are sent there only if that is a node which the
//! same cluster holds, or lies in the operator's CIDRs for its nodes; otherwise the pod's prefix says
//! where to go, which only the prefix's holder decides. With [`PlacementRules::at_own_nodes`], a pod
//! outside of the prefixes of its own cluster is not installed at all.
//!
//! Records come before their nodes and stay when these go, so each answer holds until the topology
//! changes. Addresses that are not used as their records say are few, and remembered.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use ebpf_global_svc::abi::IpValue;
use ipnet::IpNet;

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
    misplaced: HashMap<u16, BTreeSet<IpAddr>>,
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
        if placed == Some(value) {
            self.forget(cluster, ip);
        } else {
            self.misplaced.entry(cluster).or_default().insert(ip);
        }
        placed
    }

    /// The address is none of the cluster's any more.
    pub(super) fn forget(&mut self, cluster: u16, ip: IpAddr) {
        if let Some(misplaced) = self.misplaced.get_mut(&cluster) {
            misplaced.remove(&ip);
            if misplaced.is_empty() {
                self.misplaced.remove(&cluster);
            }
        }
    }

    /// The cluster is gone.
    pub(super) fn drain(&mut self, cluster: u16) {
        self.rules.remove(&cluster);
        self.misplaced.remove(&cluster);
    }

    /// Clusters that have such addresses.
    pub(super) fn clusters(&self) -> impl Iterator<Item = u16> {
        self.misplaced.keys().copied()
    }

    /// Addresses of a cluster that are not used as their records say.
    pub(super) fn misplaced(&self, cluster: u16) -> Option<&BTreeSet<IpAddr>> {
        self.misplaced.get(&cluster)
    }

    /// Whether a backend may be used: nobody else holds its address.
    pub(super) fn may_serve(&self, topology: &Topology, cluster: u16, ip: IpAddr) -> bool {
        match topology.holder(ip) {
            Some(holder) => holder == cluster,
            None => !self.at_own_nodes(cluster),
        }
    }

    fn judge(&self, topology: &Topology, cluster: u16, ip: IpAddr, value: IpValue) -> Option<IpValue> {
        if self.at_own_nodes(cluster) && topology.holder(ip) != Some(cluster) {
            return None;
        }
        let host = IpAddr::V4(Ipv4Addr::from(value.node_ip));
        let listed = || self.rules.get(&cluster).is_some_and(|rules| contains(&rules.hosts, host));
        if value.node_ip == NOWHERE || topology.address_holder(host) == Some(cluster) || listed() {
            return Some(value);
        }
        Some(IpValue { node_ip: NOWHERE, ..value })
    }

    fn at_own_nodes(&self, cluster: u16) -> bool {
        self.rules.get(&cluster).is_some_and(|rules| rules.at_own_nodes)
    }
}

fn contains(nets: &[IpNet], ip: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&ip))
}
