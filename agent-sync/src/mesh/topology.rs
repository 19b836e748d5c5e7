//! Who carries which pod prefix, and who may speak from which underlay address.
//!
//! Both follow from the nodes of all clusters, and both can be claimed by several clusters at once,
//! by mistake or on purpose. The own cluster always keeps what is its own; among others the first
//! holder keeps it, so that a newcomer cannot take traffic away by claiming an address. Prefixes
//! exclude each other already when they overlap: a longer one would win in the kernel.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ebpf_global_svc::abi::{NodeKey, NodeValue, PrefixKey, PrefixValue};
use ipnet::IpNet;

use super::fact::NodeFact;
use crate::wire_key;

/// Accepted claims, and those that were refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Topology {
    pub(super) prefixes: BTreeMap<PrefixKey, PrefixValue>,
    pub(super) nodes: BTreeMap<NodeKey, NodeValue>,
    pub(super) conflicts: BTreeSet<Conflict>,
}

/// A claim that was refused because another cluster holds the address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// Whose claim was refused.
    pub cluster: u16,
    /// What it claimed: a prefix or an address.
    pub claim: String,
    /// Who holds it.
    pub holder: u16,
}

/// Everything that clusters claim at the moment; for each key the last claim of a cluster counts.
#[derive(Debug, Default)]
pub(super) struct Claims {
    prefixes: BTreeMap<(PrefixKey, u16), PrefixValue>,
    nodes: BTreeMap<(NodeKey, u16), NodeValue>,
}

impl Claims {
    pub(super) fn add_node(&mut self, cluster: u16, node: &NodeFact) {
        let node_ip = node.tunnel_ip().map_or([0; 4], |ip| ip.octets());
        for cidr in &node.pod_cidrs {
            let value = PrefixValue { cluster, flags: 0, pad: 0, node_ip, reserved: 0 };
            self.add_prefix(wire_key::prefix_key(*cidr), value);
        }
        for ip in &node.internal_ips {
            self.add_address(wire_key::node_key(*ip), NodeValue { cluster, flags: 0, reserved: 0 });
        }
    }

    pub(super) fn add_prefix(&mut self, key: PrefixKey, value: PrefixValue) {
        self.prefixes.insert((key, value.cluster), value);
    }

    pub(super) fn add_address(&mut self, key: NodeKey, value: NodeValue) {
        self.nodes.insert((key, value.cluster), value);
    }

    /// Decides all claims anew; `before` is who holds what until now.
    pub(super) fn resolve(&self, own: u16, before: &Topology) -> Topology {
        let mut after = Topology::default();
        self.resolve_prefixes(own, before, &mut after);
        self.resolve_nodes(own, before, &mut after);
        after
    }

    fn resolve_prefixes(&self, own: u16, before: &Topology, after: &mut Topology) {
        let held =
            |key: &PrefixKey, cluster| before.prefixes.get(key).is_some_and(|value| value.cluster == cluster);
        let mut claims: Vec<_> = self.prefixes.iter().collect();
        claims.sort_by_key(|((key, cluster), _)| (*cluster != own, !held(key, *cluster), *cluster, *key));
        let mut accepted = Prefixes::default();
        for ((key, cluster), value) in claims {
            let Some(net) = wire_key::prefix(key) else { continue };
            match accepted.overlapped_by(net, *cluster) {
                Some(holder) => {
                    let claim = net.to_string();
                    after.conflicts.insert(Conflict { cluster: *cluster, claim, holder });
                }
                None => {
                    accepted.insert(net, *cluster);
                    after.prefixes.insert(*key, *value);
                }
            }
        }
    }

    fn resolve_nodes(&self, own: u16, before: &Topology, after: &mut Topology) {
        let held = |key, cluster| before.nodes.get(key).is_some_and(|value| value.cluster == cluster);
        let mut claims: Vec<_> = self.nodes.iter().collect();
        claims.sort_by_key(|((key, cluster), _)| (*cluster != own, !held(key, *cluster), *cluster));
        for ((key, cluster), value) in claims {
            let holder = after.nodes.entry(*key).or_insert(*value).cluster;
            if holder != *cluster {
                let claim =
                    wire_key::address(key.family, key.ip).map_or_else(String::new, |ip| ip.to_string());
                after.conflicts.insert(Conflict { cluster: *cluster, claim, holder });
            }
        }
    }
}

/// Accepted prefixes, arranged to answer who overlaps another one.
#[derive(Debug, Default)]
struct Prefixes {
    /// By first address, then length; families do not mix.
    by_start: BTreeMap<(IpAddr, u8), u16>,
    lengths: HashMap<bool, BTreeSet<u8>>,
}

impl Prefixes {
    fn insert(&mut self, net: IpNet, cluster: u16) {
        self.by_start.insert((net.network(), net.prefix_len()), cluster);
        self.lengths.entry(net.addr().is_ipv4()).or_default().insert(net.prefix_len());
    }

    /// The other cluster that holds a part of `net`, or all of it.
    fn overlapped_by(&self, net: IpNet, cluster: u16) -> Option<u16> {
        let around = self.lengths.get(&net.addr().is_ipv4()).into_iter().flatten().filter_map(|length| {
            let wider = IpNet::new(net.addr(), (*length).min(net.prefix_len())).ok()?;
            self.by_start.get(&(wider.network(), *length))
        });
        let inside = self
            .by_start
            .range((net.network(), net.prefix_len())..=(net.broadcast(), u8::MAX))
            .map(|(_, holder)| holder);
        around.chain(inside).copied().find(|holder| *holder != cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(cidrs: &[&str], ips: &[&str]) -> NodeFact {
        NodeFact {
            internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            mesh_ips: Vec::new(),
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        }
    }

    fn resolve(before: &Topology, nodes: &[(u16, NodeFact)]) -> Topology {
        let mut claims = Claims::default();
        nodes.iter().for_each(|(cluster, node)| claims.add_node(*cluster, node));
        claims.resolve(1, before)
    }

    fn holders(topology: &Topology) -> Vec<(String, u16)> {
        let name = |key| wire_key::prefix(key).unwrap().to_string();
        topology.prefixes.iter().map(|(key, value)| (name(key), value.cluster)).collect()
    }

    #[test]
    fn a_remote_cannot_take_a_part_of_the_own_pod_prefixes() {
        let own = node(&["10.1.0.0/16"], &["192.0.2.1"]);
        for stolen in ["10.1.0.0/16", "10.1.7.0/24", "10.0.0.0/8"] {
            let thief = node(&[stolen], &["192.0.2.1"]);
            // Even if it came first.
            let before = resolve(&Topology::default(), &[(2, thief.clone())]);
            assert_eq!(holders(&before), [(stolen.to_owned(), 2)]);
            let after = resolve(&before, &[(2, thief), (1, own.clone())]);
            assert_eq!(holders(&after), [("10.1.0.0/16".to_owned(), 1)]);
            assert_eq!(after.nodes.values().map(|value| value.cluster).collect::<Vec<_>>(), [1]);
            assert_eq!(after.conflicts.len(), 2);
        }
    }

    #[test]
    fn the_first_holder_keeps_a_prefix_until_it_gives_it_up() {
        let late = node(&["10.9.0.0/16", "fd00:9::/64"], &[]);
        let early = node(&["10.9.1.0/24"], &[]);
        let before = resolve(&Topology::default(), &[(7, early.clone())]);
        let contested = resolve(&before, &[(7, early), (3, late.clone())]);
        assert_eq!(holders(&contested), [("10.9.1.0/24".to_owned(), 7), ("fd00:9::/64".to_owned(), 3)]);
        let settled = resolve(&contested, &[(3, late)]);
        assert_eq!(holders(&settled), [("10.9.0.0/16".to_owned(), 3), ("fd00:9::/64".to_owned(), 3)]);
        assert!(settled.conflicts.is_empty());
    }

    #[test]
    fn one_cluster_may_nest_its_prefixes() {
        let nested = resolve(&Topology::default(), &[(2, node(&["10.2.0.0/16", "10.2.3.0/24"], &[]))]);
        assert_eq!(nested.prefixes.len(), 2);
        assert!(nested.conflicts.is_empty());
    }
}
