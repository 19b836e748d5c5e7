//! What is to be encrypted, and the next steps to there. No I/O, no clock.
//!
//! The order of steps loses nothing. A peer is there before packets are steered to it, and they are steered to it
//! once a handshake has shown that the other end knows this one; from then on they never go in clear again while
//! the node has a key. What goes, goes in the other order.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use clustermesh_kvstore::record::WireguardKey;

use super::claims::{Claims, NodeName};
use super::{EndChanges, Refused, Scope, TunnelEnd};
use crate::netlink::{PeerChange, Steering, WireguardState};

/// Who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Our cluster.
    pub cluster: u16,
    /// Our node's name.
    pub node: String,
    /// Our public key.
    pub key: WireguardKey,
}

/// What the kernel has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// The device's peers.
    pub peers: BTreeMap<WireguardKey, WireguardState>,
    /// The table.
    pub steering: BTreeMap<Ipv4Addr, Steering>,
}

/// Something to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// At the device.
    Peers(Vec<PeerChange>),
    /// In the table: what becomes of tunnel packets to an address; none: they go as they are.
    Steer(Ipv4Addr, Option<Steering>),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Core {
    own: Own,
    scope: Scope,
    strict: bool,
    port: u16,
    ends: BTreeMap<Ipv4Addr, TunnelEnd>,
    installed: Installed,
    claims: Claims,
}

/// A peer as it is to be.
#[derive(Debug, Default)]
struct Wanted {
    /// None: as it is.
    endpoint: Option<Ipv4Addr>,
    allowed: BTreeSet<Ipv4Addr>,
}

impl Core {
    /// Knows no ends yet. `port` is that of WireGuard on all nodes.
    pub fn new(own: Own, scope: Scope, strict: bool, port: u16, installed: Installed) -> Self {
        Self { own, scope, strict, port, ends: BTreeMap::new(), installed, claims: Claims::default() }
    }

    /// The mesh has changed.
    pub fn apply(&mut self, changes: EndChanges) {
        for (ip, end) in changes {
            match end {
                Some(end) => drop(self.ends.insert(ip, end)),
                None => drop(self.ends.remove(&ip)),
            }
        }
        self.decide();
    }

    /// The kernel was read.
    pub fn observe(&mut self, installed: Installed) {
        self.installed = installed;
        self.decide();
    }

    /// A step was done.
    pub fn done(&mut self, step: &Step) {
        match step {
            Step::Steer(ip, Some(steering)) => drop(self.installed.steering.insert(*ip, *steering)),
            Step::Steer(ip, None) => drop(self.installed.steering.remove(ip)),
            Step::Peers(changes) => changes.iter().for_each(|change| self.changed(change)),
        }
    }

    /// What to do next; nothing: all is as it should be, as far as it is known.
    pub fn plan(&self) -> Vec<Step> {
        let wanted = self.wanted_peers();
        let (mut set, mut greet) = (Vec::new(), Vec::new());
        for (key, peer) in &wanted {
            let state = self.installed.peers.get(key);
            if let Some(change) = self.difference(key, peer, state) {
                set.push(change);
            }
            if state.is_none() {
                greet.push(PeerChange::Greet(*key));
            }
        }
        let gone = self.installed.peers.keys().filter(|key| !wanted.contains_key(*key));
        let remove: Vec<_> = gone.map(|key| PeerChange::Remove(*key)).collect();
        let steer = self.steer();
        let peers = |changes: Vec<_>| (!changes.is_empty()).then_some(Step::Peers(changes));
        let mut steps = Vec::new();
        steps.extend(peers(set));
        steps.extend(steer);
        steps.extend(peers(remove));
        // Last: answers to it come while nothing else is to be done.
        steps.extend(peers(greet));
        steps
    }

    /// Peers that have never answered.
    pub fn waiting(&self) -> impl Iterator<Item = WireguardKey> {
        let peers = self.installed.peers.iter().filter(|(_, state)| state.handshake == 0);
        peers.map(|(key, _)| *key).filter(|key| self.claims.holders.contains_key(key))
    }

    /// Addresses to which tunnel packets are encrypted.
    pub fn encrypted(&self) -> BTreeSet<Ipv4Addr> {
        let steering = self.installed.steering.iter();
        steering.filter(|(_, steering)| **steering == Steering::Encrypted).map(|(ip, _)| *ip).collect()
    }

    /// Where this node's own tunnels end, and so begin.
    pub fn own_ip(&self) -> Option<Ipv4Addr> {
        self.ends.values().find(|end| self.is_own(end)).and_then(|end| end.node.as_ref()?.tunnel_ip)
    }

    /// Ends that are to be encrypted.
    pub fn ends(&self) -> impl Iterator<Item = (Ipv4Addr, &TunnelEnd)> {
        self.ends.iter().filter(|(_, end)| self.is_in_scope(end)).map(|(ip, end)| (*ip, end))
    }

    /// What the kernel has.
    pub fn installed(&self) -> &Installed {
        &self.installed
    }

    /// Nodes whose key does not count.
    pub fn refused(&self) -> &BTreeMap<NodeName, Refused> {
        &self.claims.refused
    }

    fn is_own(&self, end: &TunnelEnd) -> bool {
        let is_node = end.node.as_ref().is_some_and(|node| node.name == self.own.node);
        end.cluster == self.own.cluster && is_node
    }

    fn is_in_scope(&self, end: &TunnelEnd) -> bool {
        match self.scope {
            Scope::Clusters => end.cluster != self.own.cluster,
            Scope::Nodes => !self.is_own(end),
        }
    }

    fn decide(&mut self) {
        let peers = &self.installed.peers;
        let installed =
            |key: &WireguardKey, ip| peers.get(key).is_some_and(|peer| peer.allowed.contains(&ip));
        self.claims = Claims::decide(self.ends(), self.own.cluster, &self.own.key, installed);
    }

    fn wanted_peers(&self) -> BTreeMap<WireguardKey, Wanted> {
        let mut wanted: BTreeMap<WireguardKey, Wanted> = BTreeMap::new();
        for (key, holder) in &self.claims.holders {
            let tunnel_ip = holder.tunnel_ip.filter(|ip| holder.ips.contains(ip));
            let endpoint = tunnel_ip.or_else(|| holder.ips.first().copied());
            wanted.insert(*key, Wanted { endpoint, allowed: holder.ips.clone() });
        }
        // What an earlier life knew stays until its cluster's nodes are told.
        for (key, peer) in &self.installed.peers {
            for ip in peer.allowed.iter().filter(|ip| self.is_unconfirmed(**ip)) {
                wanted.entry(*key).or_default().allowed.insert(*ip);
            }
        }
        wanted
    }

    fn is_unconfirmed(&self, ip: Ipv4Addr) -> bool {
        self.ends.get(&ip).is_some_and(|end| end.node.is_none() && self.is_in_scope(end))
    }

    /// How a peer is to be changed. One that roams among its own addresses may do so.
    fn difference(
        &self,
        key: &WireguardKey,
        wanted: &Wanted,
        state: Option<&WireguardState>,
    ) -> Option<PeerChange> {
        let at_home = |state: &WireguardState| {
            state.endpoint.is_some_and(|at| match at.ip() {
                IpAddr::V4(ip) => at.port() == self.port && wanted.allowed.contains(&ip),
                IpAddr::V6(_) => false,
            })
        };
        let endpoint = wanted.endpoint.filter(|_| !state.is_some_and(at_home));
        let same = state.is_some_and(|state| state.allowed == wanted.allowed) && endpoint.is_none();
        (!same).then(|| PeerChange::Set {
            key: *key,
            endpoint: endpoint.map(|ip| SocketAddrV4::new(ip, self.port)),
            allowed: wanted.allowed.clone(),
        })
    }

    fn steer(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut wanted = BTreeMap::new();
        for (ip, end) in self.ends() {
            if let Some(steering) = self.steering_of(ip, end) {
                wanted.insert(ip, steering);
            }
        }
        for (ip, steering) in &wanted {
            if self.installed.steering.get(ip) != Some(steering) {
                steps.push(Step::Steer(*ip, Some(*steering)));
            }
        }
        let gone = self.installed.steering.keys().filter(|ip| !wanted.contains_key(*ip));
        steps.extend(gone.map(|ip| Step::Steer(*ip, None)));
        steps
    }

    fn steering_of(&self, ip: Ipv4Addr, end: &TunnelEnd) -> Option<Steering> {
        let present = self.installed.steering.get(&ip).copied();
        let otherwise = self.strict.then_some(Steering::Blocked);
        let Some(node) = &end.node else { return present.or(otherwise) };
        let holder = node.key.and_then(|key| Some((key, self.claims.holders.get(&key)?)));
        let Some((key, _)) = holder.filter(|(_, holder)| holder.ips.contains(&ip)) else { return otherwise };
        let answered = self.installed.peers.get(&key).is_some_and(|state| state.handshake != 0);
        match answered || present == Some(Steering::Encrypted) {
            true => Some(Steering::Encrypted),
            false => otherwise,
        }
    }

    fn changed(&mut self, change: &PeerChange) {
        let peers = &mut self.installed.peers;
        match change {
            PeerChange::Set { key, endpoint, allowed } => {
                // Who had the addresses before is changed in the same plan.
                let state = peers.entry(*key).or_default();
                state.allowed.clone_from(allowed);
                if let Some(endpoint) = endpoint {
                    state.endpoint = Some((*endpoint).into());
                }
            }
            PeerChange::Greet(_) => {}
            PeerChange::Remove(key) => drop(peers.remove(key)),
        }
    }
}

#[cfg(test)]
mod tests;
