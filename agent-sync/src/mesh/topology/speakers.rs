//! Who may speak from which underlay address, and what has to be encrypted there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ebpf_global_svc::abi::{NODE_CLEAR, NODE_ENCRYPTED, NODE_VIRTUAL, NodeKey, NodeValue};

use super::claims::{Claimant, Claims};
use super::{Lost, Ruling};
use crate::mesh::underlay::Underlay;
use crate::tunnels::Scope;
use crate::wire_key;

/// Claims to underlay addresses, and who holds them.
#[derive(Clone, Debug, Default)]
pub(super) struct Speakers {
    pub(super) claims: Claims<IpAddr, Speaker>,
    accepted: BTreeMap<IpAddr, NodeValue>,
    encryption: Encryption,
    /// Addresses whose node may be another one, or say something else.
    ends: BTreeSet<IpAddr>,
    /// Accepted addresses at which no tunnel ends, by the name of where their node's do.
    beside: BTreeSet<([u8; 4], IpAddr)>,
}

/// Who speaks from an underlay address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Speaker {
    /// Pods of its cluster are known by virtual addresses.
    pub(super) is_virtual: bool,
    /// What tables call the node; nowhere if it has no tunnel.
    pub(super) node_ip: [u8; 4],
}

/// What has to be encrypted, and is.
#[derive(Clone, Debug, Default)]
struct Encryption {
    /// None: nothing has to be.
    scope: Option<Scope>,
    encrypted: BTreeSet<IpAddr>,
}

impl Speakers {
    /// An address that was installed before; false if it is none that we would install.
    pub(super) fn restore(&mut self, key: NodeKey, value: NodeValue, underlay: &Underlay) -> bool {
        let Some(ip) = wire_key::address(key.family, key.ip).filter(|ip| wire_key::node_key(*ip) == key)
        else {
            return false;
        };
        let speaker =
            Speaker { is_virtual: value.flags & NODE_VIRTUAL != 0, node_ip: value.number.to_ne_bytes() };
        self.claims.restore(ip, value.cluster, speaker);
        // Whatever it says: what is there is corrected, or removed, by what is claimed.
        self.accept(ip, Some(value), underlay);
        true
    }

    /// What goes between nodes in `scope` has to be encrypted, as it is to `encrypted`.
    pub(super) fn require_encryption(&mut self, scope: Scope, encrypted: BTreeSet<IpAddr>) {
        let scoped = self.encryption.scope.replace(scope) == Some(scope);
        let before = std::mem::replace(&mut self.encryption.encrypted, encrypted);
        let now = &self.encryption.encrypted;
        self.claims.touch(before.symmetric_difference(now).copied());
        if !scoped {
            self.claims.touch(self.accepted.keys().copied());
        }
    }

    /// Decides what changed.
    pub(super) fn resolve(&mut self, underlay: &Underlay, ruling: &mut Ruling<'_>) {
        let dirty = self.claims.take_dirty();
        ruling.decided |= !dirty.is_empty();
        for ip in dirty {
            if underlay.protocol().takes(ip) {
                self.ends.insert(ip);
            }
            self.resolve_one(ip, underlay, ruling);
        }
    }

    /// Addresses with perhaps another node than when this was asked last, and who it is: its cluster and, unless
    /// only an earlier life knew it, its name.
    pub(super) fn take_ends(&mut self) -> Vec<(IpAddr, Option<Claimant>)> {
        let ends = std::mem::take(&mut self.ends);
        let node = |ip: IpAddr| {
            let cluster = self.holder(ip)?;
            let mut claimants = self.claims.of(&ip).map(|(claimant, _)| claimant);
            claimants.rfind(|(claimant, _)| *claimant == cluster).cloned()
        };
        ends.into_iter().map(|ip| (ip, node(ip))).collect()
    }

    /// The cluster that has a node of this address.
    pub(super) fn holder(&self, ip: IpAddr) -> Option<u16> {
        self.accepted.get(&ip).map(|value| value.cluster)
    }

    /// What tables call the node that has an address at which no tunnel ends.
    pub(super) fn node_beside(&self, ip: IpAddr) -> Option<[u8; 4]> {
        let number = self.accepted.get(&ip)?.number;
        Some(number.to_ne_bytes()).filter(|node_ip| *node_ip != [0; 4])
    }

    /// Further addresses of the node that tables call so.
    pub(super) fn beside(&self, node_ip: [u8; 4]) -> impl Iterator<Item = IpAddr> {
        let first = (node_ip, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        self.beside.range(first..).take_while(move |(node, _)| *node == node_ip).map(|(_, ip)| *ip)
    }

    /// Accepted ones, and what is to be installed for them.
    pub(super) fn accepted(&self) -> &BTreeMap<IpAddr, NodeValue> {
        &self.accepted
    }

    fn resolve_one(&mut self, ip: IpAddr, underlay: &Underlay, ruling: &mut Ruling<'_>) {
        self.claims.forget_refused(ip, |refused| refused == ip);
        let claims = self.claims.of(&ip);
        let claimants: BTreeMap<u16, Speaker> =
            claims.map(|((cluster, _), speaker)| (*cluster, *speaker)).collect();
        let value = self.accepted.get(&ip).copied();
        let before = value.map(|value| value.cluster);
        let preferred = [Some(ruling.own), before].into_iter().flatten();
        let preferred = preferred.filter_map(|cluster| claimants.get_key_value(&cluster)).next();
        let holder =
            preferred.or_else(|| claimants.first_key_value()).map(|(cluster, speaker)| (*cluster, *speaker));
        if holder.map(|(cluster, _)| cluster) != before {
            ruling.lost.extend(before.map(|cluster| (cluster, Lost::Address(ip))));
        }
        let wanted = holder.map(|(cluster, speaker)| NodeValue {
            cluster,
            flags: speaker.flags() | self.encryption.flags(ruling.own, cluster, ip),
            number: number(underlay, ip, speaker),
        });
        if wanted != value {
            self.accept(ip, wanted, underlay);
            ruling.changes.node.push((wire_key::node_key(ip), wanted));
        }
        for cluster in claimants.into_keys() {
            if let Some((holder, _)) = holder.filter(|(holder, _)| *holder != cluster) {
                self.claims.refuse(ip, cluster, holder);
            }
        }
    }

    fn accept(&mut self, ip: IpAddr, value: Option<NodeValue>, underlay: &Underlay) {
        let before = match value {
            Some(value) => self.accepted.insert(ip, value),
            None => self.accepted.remove(&ip),
        };
        if !underlay.protocol().takes(ip) {
            let beside = |value: NodeValue| (value.number.to_ne_bytes(), ip);
            if let Some(before) = before {
                self.beside.remove(&beside(before));
            }
            self.beside.extend(value.map(beside));
        }
    }
}

impl Speaker {
    fn flags(self) -> u16 {
        if self.is_virtual { NODE_VIRTUAL } else { 0 }
    }
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

/// What tables call the node that has an address, unless the address says that itself.
fn number(underlay: &Underlay, ip: IpAddr, speaker: Speaker) -> u32 {
    let node_ip = match ip {
        _ if !underlay.protocol().takes(ip) => speaker.node_ip,
        IpAddr::V4(_) => return 0,
        IpAddr::V6(_) => underlay.find(ip).unwrap_or_default(),
    };
    u32::from_ne_bytes(node_ip)
}
