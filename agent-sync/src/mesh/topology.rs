//! Who carries which pod prefix, and who may speak from which underlay address.
//!
//! Both follow from the nodes of all clusters, and both can be claimed by several clusters at once,
//! by mistake or on purpose. The own cluster always keeps what is its own; among others the first
//! holder keeps it, so that a newcomer cannot take traffic away by claiming an address. Prefixes
//! exclude each other already when they overlap: a longer one would win in the kernel.
//!
//! A change is decided anew only together with what it can touch: the claims to the same address, or
//! those inside the widest prefix around it. So a node costs the same in a mesh of any size.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ebpf_global_svc::abi::{
    NODE_CLEAR, NODE_ENCRYPTED, NODE_VIRTUAL, NodeKey, NodeValue, PREFIX_VIRTUAL, PrefixKey, PrefixValue,
};
use ipnet::IpNet;

use super::fact::NodeFact;
use super::underlay::Underlay;
use crate::desired::Changes;
use crate::encryption::Scope;
use crate::wire_key;

/// All claims, and who holds what.
#[derive(Clone, Debug, Default)]
pub(super) struct Topology {
    /// What nodes are called.
    pub(super) underlay: Underlay,
    prefix_claims: BTreeMap<IpNet, Claims<Carrier>>,
    address_claims: BTreeMap<IpAddr, Claims<Speaker>>,
    /// Accepted.
    prefixes: BTreeMap<IpNet, Holder>,
    /// Lengths that accepted prefixes have, or once had, by family.
    lengths: BTreeSet<(bool, u8)>,
    addresses: BTreeMap<IpAddr, NodeValue>,
    encryption: Encryption,
    /// Addresses whose node may be another one, or say something else.
    ends: BTreeSet<IpAddr>,
    /// Clusters whose claim was refused, and for whom.
    refused_prefixes: BTreeMap<(IpNet, u16), u16>,
    refused_addresses: BTreeMap<(IpAddr, u16), u16>,
    /// What was installed before and is in question until its cluster's nodes are known.
    restored: BTreeMap<u16, (Vec<IpNet>, Vec<IpAddr>)>,
    /// Claims were decided since this was asked last, perhaps against somebody.
    decided: bool,
    /// What clusters hold no more.
    lost: BTreeSet<(u16, Lost)>,
    dirty_prefixes: BTreeSet<IpNet>,
    dirty_addresses: BTreeSet<IpAddr>,
}

/// What has to be encrypted, and is.
#[derive(Clone, Debug, Default)]
struct Encryption {
    /// None: nothing has to be.
    scope: Option<Scope>,
    encrypted: BTreeSet<IpAddr>,
}

impl Encryption {
    fn flags(&self, own: u16, cluster: u16, ip: IpAddr) -> u16 {
        let Some(scope) = self.scope else { return 0 };
        if scope == Scope::Clusters && cluster == own {
            return NODE_CLEAR;
        }
        if self.encrypted.contains(&ip) { NODE_ENCRYPTED } else { 0 }
    }
}

/// Who claims one thing, by cluster and node; what was restored is nobody's and counts least. Of several
/// nodes of a cluster the last by name counts, whichever came first.
type Claims<T> = BTreeMap<Claimant, T>;
type Claimant = (u16, Option<Box<str>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    cluster: u16,
    carrier: Carrier,
}

/// What carries a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Carrier {
    /// The node, as tables call it.
    node_ip: [u8; 4],
    /// Pods have other addresses there.
    is_virtual: bool,
}

/// Who speaks from an underlay address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Speaker {
    /// Pods of its cluster are known by virtual addresses.
    is_virtual: bool,
}

/// What a cluster held until now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lost {
    Prefix(IpNet),
    Address(IpAddr),
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

impl Topology {
    pub(super) fn new(underlay: Underlay) -> Self {
        Self { underlay, ..Self::default() }
    }

    /// A prefix that was installed before; false if it is none that we would install.
    pub(super) fn restore_prefix(&mut self, key: PrefixKey, value: PrefixValue) -> bool {
        let Some(net) = wire_key::prefix(&key).filter(|net| wire_key::prefix_key(*net) == key) else {
            return false;
        };
        let carrier = Carrier { node_ip: value.node_ip, is_virtual: value.flags & PREFIX_VIRTUAL != 0 };
        self.prefix_claims.entry(net).or_default().insert((value.cluster, None), carrier);
        self.restored.entry(value.cluster).or_default().0.push(net);
        let holder = Holder { cluster: value.cluster, carrier };
        if holder.value() == value {
            self.prefixes.insert(net, holder);
            self.lengths.insert((net.addr().is_ipv4(), net.prefix_len()));
        }
        self.dirty_prefixes.insert(net);
        true
    }

    /// An address that was installed before; false if it is none that we would install.
    pub(super) fn restore_address(&mut self, key: NodeKey, value: NodeValue) -> bool {
        let Some(ip) = wire_key::address(key.family, key.ip).filter(|ip| wire_key::node_key(*ip) == key)
        else {
            return false;
        };
        let speaker = Speaker { is_virtual: value.flags & NODE_VIRTUAL != 0 };
        self.address_claims.entry(ip).or_default().insert((value.cluster, None), speaker);
        self.restored.entry(value.cluster).or_default().1.push(ip);
        // Whatever it says: what is there is corrected, or removed, by what is claimed.
        self.addresses.insert(ip, value);
        self.dirty_addresses.insert(ip);
        true
    }

    /// The cluster's nodes are all known: what was restored of it counts no more.
    pub(super) fn forget_restored(&mut self, cluster: u16) {
        let Some((prefixes, addresses)) = self.restored.remove(&cluster) else { return };
        let restored = (cluster, None);
        for net in prefixes {
            withdraw(&mut self.prefix_claims, &net, &restored);
            self.dirty_prefixes.insert(net);
        }
        for ip in addresses {
            withdraw(&mut self.address_claims, &ip, &restored);
            self.dirty_addresses.insert(ip);
        }
    }

    /// A node says something else than before.
    pub(super) fn node_changed(
        &mut self,
        cluster: u16,
        name: &str,
        before: Option<&NodeFact>,
        after: Option<&NodeFact>,
    ) {
        let claimant = || (cluster, Some(name.into()));
        if let Some(before) = before {
            for net in before.pod_cidrs.iter().map(IpNet::trunc) {
                withdraw(&mut self.prefix_claims, &net, &claimant());
                self.dirty_prefixes.insert(net);
            }
            for ip in &before.internal_ips {
                withdraw(&mut self.address_claims, ip, &claimant());
                self.dirty_addresses.insert(*ip);
            }
        }
        if let Some(after) = after {
            let tunnel_ip = after.tunnel_ip(self.underlay.protocol());
            let node_ip = tunnel_ip.map_or([0; 4], |ip| self.underlay.name(ip));
            for net in after.pod_cidrs.iter().map(IpNet::trunc) {
                let carrier = Carrier { node_ip, is_virtual: after.virtual_cidrs.is_virtual(net) };
                self.prefix_claims.entry(net).or_default().insert(claimant(), carrier);
                self.dirty_prefixes.insert(net);
            }
            let speaker = Speaker { is_virtual: !after.virtual_cidrs.is_empty() };
            for ip in &after.internal_ips {
                self.underlay.name(*ip);
                self.address_claims.entry(*ip).or_default().insert(claimant(), speaker);
                self.dirty_addresses.insert(*ip);
            }
        }
    }

    /// Decides what changed.
    pub(super) fn resolve(&mut self, own: u16, changes: &mut Changes) {
        self.decided |= !self.dirty_prefixes.is_empty() || !self.dirty_addresses.is_empty();
        let dirty = std::mem::take(&mut self.dirty_prefixes);
        let roots: BTreeSet<IpNet> = dirty.iter().map(|net| self.widest_around(*net, &dirty)).collect();
        dirty.iter().for_each(|net| drop_empty(&mut self.prefix_claims, net));
        for root in roots {
            self.resolve_prefixes(root, own, changes);
        }
        for ip in std::mem::take(&mut self.dirty_addresses) {
            drop_empty(&mut self.address_claims, &ip);
            if self.underlay.protocol().takes(ip) {
                self.ends.insert(ip);
            }
            self.resolve_address(ip, own, changes);
        }
    }

    /// What goes between nodes in `scope` has to be encrypted, as it is to `encrypted`.
    pub(super) fn require_encryption(&mut self, scope: Scope, encrypted: BTreeSet<IpAddr>) {
        let scoped = self.encryption.scope.replace(scope) == Some(scope);
        let before = std::mem::replace(&mut self.encryption.encrypted, encrypted);
        let now = &self.encryption.encrypted;
        self.dirty_addresses.extend(before.symmetric_difference(now));
        if !scoped {
            self.dirty_addresses.extend(self.addresses.keys());
        }
    }

    /// Addresses with perhaps another node than when this was asked last, and who it is: its cluster and, unless
    /// only an earlier life knew it, its name.
    pub(super) fn take_ends(&mut self) -> Vec<(IpAddr, Option<Claimant>)> {
        let ends = std::mem::take(&mut self.ends);
        let node = |ip: IpAddr| {
            let cluster = self.address_holder(ip)?;
            let claims = self.address_claims.get(&ip)?;
            let last = claims.keys().rfind(|(claimant, _)| *claimant == cluster)?;
            Some((cluster, last.1.clone()))
        };
        ends.into_iter().map(|ip| (ip, node(ip))).collect()
    }

    /// Whether conflicts may be others than when this was asked last.
    pub(super) fn take_decided(&mut self) -> bool {
        std::mem::take(&mut self.decided)
    }

    /// What clusters lost since this was asked last.
    pub(super) fn take_lost(&mut self) -> BTreeSet<(u16, Lost)> {
        std::mem::take(&mut self.lost)
    }

    /// What tables call a node; none if it has no tunnel.
    pub(super) fn node_ip_of(&self, node: &NodeFact) -> Option<[u8; 4]> {
        self.underlay.find(node.tunnel_ip(self.underlay.protocol())?)
    }

    /// Nodes that claims name, as tables call them: those of prefixes, and of addresses.
    pub(super) fn named(&self) -> impl Iterator<Item = [u8; 4]> {
        let carriers = self.prefix_claims.values().flat_map(BTreeMap::values).map(|carrier| carrier.node_ip);
        carriers.chain(self.address_claims.keys().filter_map(|ip| self.underlay.find(*ip)))
    }

    /// Accepted pod prefixes, with the cluster and the node, as tables call it.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (IpNet, u16, [u8; 4])> {
        self.prefixes.iter().map(|(net, holder)| (*net, holder.cluster, holder.carrier.node_ip))
    }

    /// The cluster that holds an address: by a pod prefix around it, or as a node's.
    pub(super) fn holder(&self, ip: IpAddr) -> Option<u16> {
        self.prefix_of(ip).map(|(_, cluster)| cluster).or_else(|| self.address_holder(ip))
    }

    /// The longest accepted pod prefix around an address, and its cluster.
    pub(super) fn prefix_of(&self, ip: IpAddr) -> Option<(IpNet, u16)> {
        let lengths = self.lengths.range((ip.is_ipv4(), 0)..=(ip.is_ipv4(), u8::MAX)).rev();
        lengths
            .filter_map(|(_, length)| IpNet::new(ip, *length).ok())
            .find_map(|net| self.prefixes.get_key_value(&net.trunc()))
            .map(|(net, holder)| (*net, holder.cluster))
    }

    /// The cluster that has a node of this underlay address.
    pub(super) fn address_holder(&self, ip: IpAddr) -> Option<u16> {
        self.addresses.get(&ip).map(|value| value.cluster)
    }

    /// What is to be installed for a prefix.
    pub(super) fn wanted_prefix(&self, net: &IpNet) -> Option<PrefixValue> {
        self.prefixes.get(net).map(|holder| holder.value())
    }

    /// What is to be installed for an underlay address.
    pub(super) fn wanted_node(&self, ip: IpAddr) -> Option<NodeValue> {
        self.addresses.get(&ip).copied()
    }

    /// Underlay addresses of all nodes.
    pub(super) fn node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.keys().copied()
    }

    pub(super) fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        let prefixes = self.refused_prefixes.iter().map(|((net, cluster), holder)| Conflict {
            cluster: *cluster,
            claim: net.to_string(),
            holder: *holder,
        });
        let addresses = self.refused_addresses.iter().map(|((ip, cluster), holder)| Conflict {
            cluster: *cluster,
            claim: ip.to_string(),
            holder: *holder,
        });
        prefixes.chain(addresses)
    }

    fn node_value(&self, cluster: u16, ip: IpAddr, speaker: Speaker) -> NodeValue {
        let number = match ip {
            // It names itself.
            IpAddr::V4(_) => None,
            IpAddr::V6(_) => self.underlay.find(ip),
        };
        NodeValue {
            cluster,
            flags: if speaker.is_virtual { NODE_VIRTUAL } else { 0 },
            number: number.map_or(0, u32::from_ne_bytes),
        }
    }

    /// The widest prefix around `net` that is claimed, or was until now.
    fn widest_around(&self, net: IpNet, dirty: &BTreeSet<IpNet>) -> IpNet {
        let around =
            (0..net.prefix_len()).filter_map(|length| Some(IpNet::new(net.addr(), length).ok()?.trunc()));
        let claimed = |net: &IpNet| self.prefix_claims.contains_key(net) || dirty.contains(net);
        around.into_iter().find(claimed).unwrap_or(net)
    }

    /// Decides all claims inside `root`, which overlap with none outside of it.
    fn resolve_prefixes(&mut self, root: IpNet, own: u16, changes: &mut Changes) {
        let mut claims: Vec<(IpNet, Holder)> = Vec::new();
        for (net, claimants) in within(&self.prefix_claims, root, |net| *net) {
            for ((cluster, _), carrier) in claimants {
                let claim = (*net, Holder { cluster: *cluster, carrier: *carrier });
                match claims.last_mut().filter(|(last, holder)| (last, holder.cluster) == (net, *cluster)) {
                    Some(same) => *same = claim,
                    None => claims.push(claim),
                }
            }
        }
        let before: BTreeMap<IpNet, Holder> =
            within(&self.prefixes, root, |net| *net).map(|(net, holder)| (*net, *holder)).collect();
        let held = |net: &IpNet, cluster| before.get(net).is_some_and(|holder| holder.cluster == cluster);
        claims.sort_by_key(|(net, holder)| {
            (holder.cluster != own, !held(net, holder.cluster), holder.cluster, *net)
        });
        let refused: Vec<_> =
            within(&self.refused_prefixes, (root, 0), |(net, _)| *net).map(|(key, _)| *key).collect();
        for key in refused {
            self.refused_prefixes.remove(&key);
        }
        for net in before.keys() {
            self.prefixes.remove(net);
        }
        let mut accepted = Prefixes::default();
        for (net, holder) in claims {
            match accepted.overlapped_by(net, holder.cluster) {
                Some(other) => {
                    self.refused_prefixes.insert((net, holder.cluster), other);
                }
                None => {
                    accepted.insert(net, holder.cluster);
                    self.prefixes.insert(net, holder);
                    self.lengths.insert((net.addr().is_ipv4(), net.prefix_len()));
                    if before.get(&net) != Some(&holder) {
                        changes.prefix.push((wire_key::prefix_key(net), Some(holder.value())));
                    }
                }
            }
        }
        for (net, holder) in before {
            let now = self.prefixes.get(&net);
            if now.is_none_or(|now| now.cluster != holder.cluster) {
                self.lost.insert((holder.cluster, Lost::Prefix(net)));
            }
            if now.is_none() {
                changes.prefix.push((wire_key::prefix_key(net), None));
            }
        }
    }

    fn resolve_address(&mut self, ip: IpAddr, own: u16, changes: &mut Changes) {
        let refused: Vec<_> =
            self.refused_addresses.range((ip, 0)..=(ip, u16::MAX)).map(|(key, _)| *key).collect();
        for key in refused {
            self.refused_addresses.remove(&key);
        }
        let claims = self.address_claims.get(&ip).into_iter().flatten();
        let claimants: BTreeMap<u16, Speaker> =
            claims.map(|((cluster, _), speaker)| (*cluster, *speaker)).collect();
        let value = self.addresses.get(&ip).copied();
        let before = value.map(|value| value.cluster);
        let preferred = [Some(own), before].into_iter().flatten();
        let preferred = preferred.filter_map(|cluster| claimants.get_key_value(&cluster)).next();
        let holder =
            preferred.or_else(|| claimants.first_key_value()).map(|(cluster, speaker)| (*cluster, *speaker));
        if holder.map(|(cluster, _)| cluster) != before {
            self.lost.extend(before.map(|cluster| (cluster, Lost::Address(ip))));
        }
        let wanted = holder.map(|(cluster, speaker)| {
            let value = self.node_value(cluster, ip, speaker);
            NodeValue { flags: value.flags | self.encryption.flags(own, cluster, ip), ..value }
        });
        if wanted != value {
            match wanted {
                Some(wanted) => self.addresses.insert(ip, wanted),
                None => self.addresses.remove(&ip),
            };
            changes.node.push((wire_key::node_key(ip), wanted));
        }
        for cluster in claimants.into_keys() {
            if let Some((holder, _)) = holder.filter(|(holder, _)| *holder != cluster) {
                self.refused_addresses.insert((ip, cluster), holder);
            }
        }
    }
}

impl Holder {
    fn value(self) -> PrefixValue {
        let Carrier { node_ip, is_virtual } = self.carrier;
        let flags = if is_virtual { PREFIX_VIRTUAL } else { 0 };
        PrefixValue { cluster: self.cluster, flags, pad: 0, node_ip, reserved: 0 }
    }
}

/// Entries whose prefix lies in `root`; `from` is the first key there can be.
fn within<K: Ord, V>(
    map: &BTreeMap<K, V>,
    from: K,
    net: impl Fn(&K) -> IpNet,
) -> impl Iterator<Item = (&K, &V)> {
    let root = net(&from);
    // Prefixes are ordered by their first address, wider ones first.
    map.range(from..).take_while(move |(key, _)| root.contains(&net(key)))
}

fn withdraw<K: Ord, T>(claims: &mut BTreeMap<K, Claims<T>>, key: &K, claimant: &Claimant) {
    if let Some(claims) = claims.get_mut(key) {
        claims.remove(claimant);
    }
}

fn drop_empty<K: Ord, T>(claims: &mut BTreeMap<K, Claims<T>>, key: &K) {
    if claims.get(key).is_some_and(BTreeMap::is_empty) {
        claims.remove(key);
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
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            ..NodeFact::default()
        }
    }

    /// The topology after `before` in which there are these nodes and no others.
    fn resolve(before: &Topology, nodes: &[(u16, NodeFact)]) -> Topology {
        let mut after = before.clone();
        after.prefix_claims.iter_mut().for_each(|(net, claims)| {
            claims.clear();
            after.dirty_prefixes.insert(*net);
        });
        after.address_claims.iter_mut().for_each(|(ip, claims)| {
            claims.clear();
            after.dirty_addresses.insert(*ip);
        });
        nodes.iter().for_each(|(cluster, node)| after.node_changed(*cluster, "n", None, Some(node)));
        after.resolve(1, &mut Changes::default());
        after
    }

    fn holders(topology: &Topology) -> Vec<(String, u16)> {
        topology.prefixes().map(|(net, cluster, _)| (net.to_string(), cluster)).collect()
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
            assert_eq!(after.addresses.values().map(|value| value.cluster).collect::<Vec<_>>(), [1]);
            assert_eq!(after.conflicts().count(), 2);
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
        assert!(settled.conflicts().next().is_none());
    }

    #[test]
    fn one_cluster_may_nest_its_prefixes() {
        let nested = resolve(&Topology::default(), &[(2, node(&["10.2.0.0/16", "10.2.3.0/24"], &[]))]);
        assert_eq!(nested.prefixes().count(), 2);
        assert!(nested.conflicts().next().is_none());
    }

    #[test]
    fn single_changes_lead_where_all_of_them_at_once_do() {
        // Whoever holds nothing yet is decided by cluster alone, so order plays no part below.
        let cidrs =
            ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.2.0.0/16", "10.2.2.0/24", "192.168.0.0/24"];
        let mut seed = 1_u32;
        let mut random = |n: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as usize % n
        };
        for _ in 0..2000 {
            let mut step = Topology::default();
            let mut nodes: BTreeMap<(u16, String), NodeFact> = BTreeMap::new();
            let mut installed = BTreeMap::new();
            for _ in 0..12 {
                let cluster = [1, 2, 3][random(3)];
                let name = ["a", "b"][random(2)].to_owned();
                let fact = (random(3) > 0).then(|| {
                    node(&[cidrs[random(6)], cidrs[random(6)]], &[["192.0.2.1", "192.0.2.2"][random(2)]])
                });
                let before = match fact.clone() {
                    Some(fact) => nodes.insert((cluster, name.clone()), fact),
                    None => nodes.remove(&(cluster, name.clone())),
                };
                step.node_changed(cluster, &name, before.as_ref(), fact.as_ref());
                let mut changes = Changes::default();
                let previous = step.clone();
                step.resolve(1, &mut changes);
                for (key, value) in changes.prefix {
                    match value {
                        Some(value) => installed.insert(key, value),
                        None => installed.remove(&key),
                    };
                }
                let wanted: BTreeMap<_, _> = step
                    .prefixes
                    .iter()
                    .map(|(net, holder)| (wire_key::prefix_key(*net), holder.value()))
                    .collect();
                assert_eq!(installed, wanted);
                // The same decision over all claims.
                let mut whole = previous;
                whole.dirty_prefixes.extend(whole.prefix_claims.keys().copied());
                whole.dirty_prefixes.insert("0.0.0.0/0".parse().unwrap());
                whole.resolve(1, &mut Changes::default());
                assert_eq!(whole.prefixes, step.prefixes);
                // Several may hold a part of what is refused; any of them may be named.
                assert!(whole.refused_prefixes.keys().eq(step.refused_prefixes.keys()));
                assert_eq!(
                    (whole.addresses, whole.refused_addresses),
                    (step.addresses.clone(), step.refused_addresses.clone())
                );
            }
        }
    }
}
