//! Who carries which pod prefix, and who may speak from which underlay address.
//!
//! Both follow from the nodes of all clusters, and both can be claimed by several clusters at once,
//! by mistake or on purpose. The own cluster always keeps what is its own; among others the first
//! holder keeps it, so that a newcomer cannot take traffic away by claiming an address.
//!
//! A change is decided anew only together with what it can touch: the claims to the same address, or
//! those inside the widest prefix around it. So a node costs the same in a mesh of any size.

mod claims;
mod prefixes;
mod speakers;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::IpAddr;

use ebpf_global_svc::abi::{NodeKey, NodeValue, PrefixKey, PrefixValue};
use ipnet::IpNet;

use self::claims::{Claimant, Claims};
use self::prefixes::{Carrier, Prefixes};
use self::speakers::{Speaker, Speakers};
use super::fact::NodeFact;
use super::underlay::Underlay;
use crate::desired::Changes;
use crate::tunnels::Scope;

/// All claims, and who holds what.
#[derive(Clone, Debug, Default)]
pub(super) struct Topology {
    /// What nodes are called.
    pub(super) underlay: Underlay,
    prefixes: Prefixes,
    speakers: Speakers,
    /// Claims were decided since this was asked last, perhaps against somebody.
    decided: bool,
    /// What clusters hold no more.
    lost: BTreeSet<(u16, Lost)>,
}

/// What is known when claims are decided, and what follows.
struct Ruling<'a> {
    own: u16,
    changes: &'a mut Changes,
    lost: &'a mut BTreeSet<(u16, Lost)>,
    /// There was something to decide.
    decided: bool,
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
        self.prefixes.restore(key, value)
    }

    /// An address that was installed before; false if it is none that we would install.
    pub(super) fn restore_address(&mut self, key: NodeKey, value: NodeValue) -> bool {
        self.speakers.restore(key, value, &self.underlay)
    }

    /// The cluster's nodes are all known: what was restored of it counts no more.
    pub(super) fn forget_restored(&mut self, cluster: u16) {
        self.prefixes.claims.forget_restored(cluster);
        self.speakers.claims.forget_restored(cluster);
    }

    /// A node says something else than before.
    pub(super) fn node_changed(
        &mut self,
        cluster: u16,
        name: &str,
        before: Option<&NodeFact>,
        after: Option<&NodeFact>,
    ) {
        let claimant: Claimant = (cluster, Some(name.into()));
        if let Some(before) = before {
            before.pod_cidrs.iter().for_each(|net| self.prefixes.claims.withdraw(net.trunc(), &claimant));
            before.internal_ips.iter().for_each(|ip| self.speakers.claims.withdraw(*ip, &claimant));
        }
        if let Some(after) = after {
            let tunnel_ip = after.tunnel_ip(self.underlay.protocol());
            let node_ip = tunnel_ip.map_or([0; 4], |ip| self.underlay.name(ip));
            for net in after.pod_cidrs.iter().map(IpNet::trunc) {
                let carrier = Carrier { node_ip, is_virtual: after.virtual_cidrs.is_virtual(net) };
                self.prefixes.claims.claim(net, claimant.clone(), carrier);
            }
            let speaker = Speaker { is_virtual: !after.virtual_cidrs.is_empty(), node_ip };
            for ip in &after.internal_ips {
                self.underlay.name(*ip);
                self.speakers.claims.claim(*ip, claimant.clone(), speaker);
            }
        }
    }

    /// Decides what changed.
    pub(super) fn resolve(&mut self, own: u16, changes: &mut Changes) {
        let mut ruling = Ruling { own, changes, lost: &mut self.lost, decided: false };
        self.prefixes.resolve(&mut ruling);
        self.speakers.resolve(&self.underlay, &mut ruling);
        self.decided |= ruling.decided;
    }

    /// What goes between nodes in `scope` has to be encrypted, as it is to `encrypted`.
    pub(super) fn require_encryption(&mut self, scope: Scope, encrypted: BTreeSet<IpAddr>) {
        self.speakers.require_encryption(scope, encrypted);
    }

    /// Addresses with perhaps another node than when this was asked last, and who it is: its cluster and, unless
    /// only an earlier life knew it, its name.
    pub(super) fn take_ends(&mut self) -> Vec<(IpAddr, Option<Claimant>)> {
        self.speakers.take_ends()
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
        let carriers = self.prefixes.claims.iter().map(|(_, carrier)| carrier.node_ip);
        let speakers = self.speakers.claims.iter();
        let speakers =
            speakers.flat_map(|(ip, speaker)| self.underlay.find(*ip).into_iter().chain([speaker.node_ip]));
        carriers.chain(speakers)
    }

    /// What tables call the node with this name: that of the address where its tunnels end. None if it has no record,
    /// or no tunnel.
    pub(super) fn tunnel_name(&self, name: [u8; 4]) -> Option<[u8; 4]> {
        match self.underlay.is_tunnel_end(name) {
            true => Some(name),
            false => self.speakers.node_beside(self.underlay.address(name)?),
        }
    }

    /// Addresses of the node that tables call so, at which no tunnel ends.
    pub(super) fn beside(&self, node_ip: [u8; 4]) -> impl Iterator<Item = IpAddr> {
        self.speakers.beside(node_ip)
    }

    /// Accepted pod prefixes, with the cluster and the node, as tables call it.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (IpNet, u16, [u8; 4])> {
        self.prefixes.iter()
    }

    /// The cluster that holds an address: by a pod prefix around it, or as a node's.
    pub(super) fn holder(&self, ip: IpAddr) -> Option<u16> {
        self.prefix_of(ip).map(|(_, cluster)| cluster).or_else(|| self.address_holder(ip))
    }

    /// The longest accepted pod prefix around an address, and its cluster.
    pub(super) fn prefix_of(&self, ip: IpAddr) -> Option<(IpNet, u16)> {
        self.prefixes.around(ip)
    }

    /// The cluster that has a node of this underlay address.
    pub(super) fn address_holder(&self, ip: IpAddr) -> Option<u16> {
        self.speakers.holder(ip)
    }

    /// What is to be installed for a prefix.
    pub(super) fn wanted_prefix(&self, net: &IpNet) -> Option<PrefixValue> {
        self.prefixes.wanted(net)
    }

    /// What is to be installed for an underlay address.
    pub(super) fn wanted_node(&self, ip: IpAddr) -> Option<NodeValue> {
        self.speakers.accepted().get(&ip).copied()
    }

    /// Underlay addresses of all nodes.
    pub(super) fn node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.speakers.accepted().keys().copied()
    }

    pub(super) fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        conflicts(&self.prefixes.claims).chain(conflicts(&self.speakers.claims))
    }
}

fn conflicts<K: Copy + Display + Ord, T>(claims: &Claims<K, T>) -> impl Iterator<Item = Conflict> {
    claims.refused().iter().map(|((claim, cluster), holder)| Conflict {
        cluster: *cluster,
        claim: claim.to_string(),
        holder: *holder,
    })
}
