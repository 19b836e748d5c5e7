//! Who carries which pod prefix.
//!
//! Prefixes exclude each other already when they overlap: a longer one would win in the kernel. A change is decided
//! anew only together with the claims inside the widest prefix around it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ebpf_global_svc::abi::{PREFIX_VIRTUAL, PrefixKey, PrefixValue};
use ipnet::IpNet;

use super::claims::Claims;
use super::{Lost, Ruling};
use crate::wire_key;

/// Claims to pod prefixes, and who holds them.
#[derive(Clone, Debug, Default)]
pub(super) struct Prefixes {
    pub(super) claims: Claims<IpNet, Carrier>,
    accepted: BTreeMap<IpNet, Holder>,
    /// Lengths that accepted prefixes have, or once had, by family.
    lengths: BTreeSet<(bool, u8)>,
}

/// What carries a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Carrier {
    /// The node, as tables call it.
    pub(super) node_ip: [u8; 4],
    /// Pods have other addresses there.
    pub(super) is_virtual: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    cluster: u16,
    carrier: Carrier,
}

impl Prefixes {
    /// A prefix that was installed before; false if it is none that we would install.
    pub(super) fn restore(&mut self, key: PrefixKey, value: PrefixValue) -> bool {
        let Some(net) = wire_key::prefix(&key).filter(|net| wire_key::prefix_key(*net) == key) else {
            return false;
        };
        let carrier = Carrier { node_ip: value.node_ip, is_virtual: value.flags & PREFIX_VIRTUAL != 0 };
        self.claims.restore(net, value.cluster, carrier);
        let holder = Holder { cluster: value.cluster, carrier };
        if holder.value() == value {
            self.accept(net, holder);
        }
        true
    }

    /// Decides what changed.
    pub(super) fn resolve(&mut self, ruling: &mut Ruling<'_>) {
        let dirty = self.claims.take_dirty();
        ruling.decided |= !dirty.is_empty();
        let roots: BTreeSet<IpNet> = dirty.iter().map(|net| self.widest_around(*net, &dirty)).collect();
        for root in roots {
            self.resolve_within(root, ruling);
        }
    }

    /// Accepted ones, with the cluster and the node, as tables call it.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNet, u16, [u8; 4])> {
        self.accepted.iter().map(|(net, holder)| (*net, holder.cluster, holder.carrier.node_ip))
    }

    /// The longest accepted one around an address, and its cluster.
    pub(super) fn around(&self, ip: IpAddr) -> Option<(IpNet, u16)> {
        let lengths = self.lengths.range((ip.is_ipv4(), 0)..=(ip.is_ipv4(), u8::MAX)).rev();
        lengths
            .filter_map(|(_, length)| IpNet::new(ip, *length).ok())
            .find_map(|net| self.accepted.get_key_value(&net.trunc()))
            .map(|(net, holder)| (*net, holder.cluster))
    }

    /// What is to be installed for one.
    pub(super) fn wanted(&self, net: &IpNet) -> Option<PrefixValue> {
        self.accepted.get(net).map(|holder| holder.value())
    }

    /// The widest prefix around `net` that is claimed, or was until now.
    fn widest_around(&self, net: IpNet, dirty: &BTreeSet<IpNet>) -> IpNet {
        let around =
            (0..net.prefix_len()).filter_map(|length| Some(IpNet::new(net.addr(), length).ok()?.trunc()));
        let claimed = |net: &IpNet| self.claims.is_claimed(net) || dirty.contains(net);
        around.into_iter().find(claimed).unwrap_or(net)
    }

    /// Decides all claims inside `root`, which overlap with none outside of it.
    fn resolve_within(&mut self, root: IpNet, ruling: &mut Ruling<'_>) {
        // Prefixes are ordered by their first address, wider ones first.
        let before: BTreeMap<IpNet, Holder> = self
            .accepted
            .range(root..)
            .take_while(|(net, _)| root.contains(*net))
            .map(|(net, holder)| (*net, *holder))
            .collect();
        for net in before.keys() {
            self.accepted.remove(net);
        }
        self.claims.forget_refused(root, |net| root.contains(&net));
        let mut taken = Taken::default();
        for (net, holder) in self.claims_within(root, &before, ruling.own) {
            if let Some(other) = taken.overlapped_by(net, holder.cluster) {
                self.claims.refuse(net, holder.cluster, other);
                continue;
            }
            taken.insert(net, holder.cluster);
            self.accept(net, holder);
            if before.get(&net) != Some(&holder) {
                ruling.changes.prefix.push((wire_key::prefix_key(net), Some(holder.value())));
            }
        }
        for (net, holder) in before {
            let now = self.accepted.get(&net);
            if now.is_none_or(|now| now.cluster != holder.cluster) {
                ruling.lost.insert((holder.cluster, Lost::Prefix(net)));
            }
            if now.is_none() {
                ruling.changes.prefix.push((wire_key::prefix_key(net), None));
            }
        }
    }

    /// One claim of each cluster to each prefix inside `root`, in the order in which they are heard.
    fn claims_within(&self, root: IpNet, before: &BTreeMap<IpNet, Holder>, own: u16) -> Vec<(IpNet, Holder)> {
        let mut claims: Vec<(IpNet, Holder)> = Vec::new();
        for (net, claimants) in self.claims.range_from(root).take_while(|(net, _)| root.contains(net)) {
            for ((cluster, _), carrier) in claimants {
                let claim = (net, Holder { cluster: *cluster, carrier: *carrier });
                match claims.last_mut().filter(|(last, holder)| (*last, holder.cluster) == (net, *cluster)) {
                    Some(same) => *same = claim,
                    None => claims.push(claim),
                }
            }
        }
        let held = |net: &IpNet, cluster| before.get(net).is_some_and(|holder| holder.cluster == cluster);
        claims.sort_by_key(|(net, holder)| {
            (holder.cluster != own, !held(net, holder.cluster), holder.cluster, *net)
        });
        claims
    }

    fn accept(&mut self, net: IpNet, holder: Holder) {
        self.accepted.insert(net, holder);
        self.lengths.insert((net.addr().is_ipv4(), net.prefix_len()));
    }
}

impl Holder {
    fn value(self) -> PrefixValue {
        let Carrier { node_ip, is_virtual } = self.carrier;
        let flags = if is_virtual { PREFIX_VIRTUAL } else { 0 };
        PrefixValue { cluster: self.cluster, flags, pad: 0, node_ip, reserved: 0 }
    }
}

/// Prefixes that are given away, arranged to answer who overlaps another one.
#[derive(Debug, Default)]
struct Taken {
    /// By first address, then length; families do not mix.
    by_start: BTreeMap<(IpAddr, u8), u16>,
    lengths: HashMap<bool, BTreeSet<u8>>,
}

impl Taken {
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
