//! What is to be encrypted, and the next steps to there. No I/O, no clock.
//!
//! The order of steps loses nothing. A peer is there before packets are steered to it, and they are steered to it
//! once a handshake has shown that the other end knows this one; from then on they never go in clear again while
//! the node has a key. What goes, goes in the other order.
//!
//! A new key, of either end, has another lane: another device, and so another peer, for the same address. Packets go
//! on in the old lane until the new one has answered. The old peer stays for what the other end still sends, and
//! goes when nothing has come from it for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clustermesh_kvstore::record::WireguardKey;

use super::claims::{Claims, NodeName};
use super::{Lane, Refused, Slot, merge};
use crate::netlink::{PeerChange, Steering, WireguardState};
use crate::tunnels::{EndChanges, Scope, TunnelEnd};

/// An old peer goes when nothing has come from it for so long: the other end has moved, too.
const QUIET: Duration = Duration::from_secs(30);
/// And after so long in any case. Until then a node that does not hear of a new key is spoken to by the old one.
pub(super) const PATIENCE: Duration = Duration::from_secs(3600);

/// A peer of a device.
pub type PeerId = (Lane, WireguardKey);

/// Who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Our cluster.
    pub cluster: u16,
    /// Our node's name.
    pub node: String,
    /// Our public key, as it is announced.
    pub key: WireguardKey,
    /// The one before it, if it is still in use; it is in the other slot.
    pub previous: Option<WireguardKey>,
}

/// What the kernel has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Devices that are up.
    pub open: BTreeSet<Lane>,
    /// Their peers.
    pub peers: BTreeMap<PeerId, WireguardState>,
    /// The table.
    pub steering: BTreeMap<IpAddr, Steering>,
}

/// Something to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A device gets its key and comes up.
    Open(Lane),
    /// At a device.
    Peers(Lane, Vec<PeerChange>),
    /// In the table: what becomes of tunnel packets to an address; none: they go as they are.
    Steer(IpAddr, Option<Steering>),
    /// A device without peers goes down.
    Close(Lane),
}

/// What has to come before packets to an address can be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// Word of the node there; an earlier life knew one.
    Node,
    /// Its answer.
    Answer,
    /// Nothing: they are, or will not be.
    Nothing,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Core {
    own: Own,
    scope: Scope,
    strict: bool,
    port: u16,
    ends: BTreeMap<IpAddr, TunnelEnd>,
    installed: Installed,
    claims: Claims,
    old: BTreeMap<PeerId, Old>,
    /// Addresses that IPsec encrypts to: nothing is steered there.
    elsewhere: BTreeSet<IpAddr>,
    /// Addresses that it encrypts to until this one does: they are not blocked.
    yielding: BTreeSet<IpAddr>,
    now: Duration,
}

/// A peer whose own or other key is not the present one any more.
#[derive(Clone, Copy, Debug)]
struct Old {
    since: Duration,
    /// When it was in use last: we spoke by it, or something came.
    used: Duration,
    /// Bytes that have come in all.
    received: u64,
}

/// A peer as it is to be.
#[derive(Debug, Default)]
struct Wanted {
    /// None: as it is.
    endpoint: Option<IpAddr>,
    allowed: BTreeSet<IpAddr>,
}

impl Core {
    /// Knows no ends yet. `port` is the lowest of the four of WireGuard on all nodes.
    pub fn new(own: Own, scope: Scope, strict: bool, port: u16, installed: Installed) -> Self {
        Self {
            own,
            scope,
            strict,
            port,
            ends: BTreeMap::new(),
            installed,
            claims: Claims::default(),
            old: BTreeMap::new(),
            elsewhere: BTreeSet::new(),
            yielding: BTreeSet::new(),
            now: Duration::ZERO,
        }
    }

    /// The mesh has changed.
    pub fn apply(&mut self, changes: EndChanges) {
        merge(&mut self.ends, changes);
        self.decide();
    }

    /// The kernel was read, `now` after the start.
    pub fn observe(&mut self, installed: Installed, now: Duration) {
        (self.installed, self.now) = (installed, now);
        self.decide();
    }

    /// IPsec encrypts to the first addresses by now, and to the second ones until this does. Peers stay for what they
    /// still send.
    pub fn set_elsewhere(&mut self, encrypted: BTreeSet<IpAddr>, yielding: BTreeSet<IpAddr>) {
        (self.elsewhere, self.yielding) = (encrypted, yielding);
    }

    /// What has to come before packets to an address can be encrypted.
    pub fn awaited(&self, ip: IpAddr) -> Awaited {
        let is_taken_over = matches!(self.installed.steering.get(&ip), Some(Steering::Encrypted(_)));
        match self.present(ip) {
            _ if self.is_unconfirmed(ip) => Awaited::Node,
            Some(_) if !is_taken_over => Awaited::Answer,
            _ => Awaited::Nothing,
        }
    }

    /// This node has a new key; the one that it had is the previous one.
    pub fn rotate(&mut self, key: WireguardKey) {
        self.own.previous = Some(std::mem::replace(&mut self.own.key, key));
        self.decide();
    }

    /// Nobody uses the previous key any more.
    pub fn retire(&mut self) {
        self.own.previous = None;
        self.decide();
    }

    /// A step was done.
    pub fn done(&mut self, step: &Step) {
        match step {
            Step::Open(lane) => drop(self.installed.open.insert(*lane)),
            Step::Close(lane) => drop(self.installed.open.remove(lane)),
            Step::Steer(ip, Some(steering)) => drop(self.installed.steering.insert(*ip, *steering)),
            Step::Steer(ip, None) => drop(self.installed.steering.remove(ip)),
            Step::Peers(lane, changes) => {
                changes.iter().for_each(|change| self.changed(*lane, change));
                self.note_old();
            }
        }
    }

    /// What to do next; nothing: all is as it should be, as far as it is known.
    pub fn plan(&self) -> Vec<Step> {
        let wanted = self.wanted_peers();
        let mut changes: BTreeMap<Lane, [Vec<PeerChange>; 3]> = BTreeMap::new();
        for (id, peer) in &wanted {
            let state = self.installed.peers.get(id);
            let [set, _, greet] = changes.entry(id.0).or_default();
            set.extend(self.difference(id, peer, state));
            if state.is_none() {
                greet.push(PeerChange::Greet(id.1));
            }
        }
        for (lane, key) in self.installed.peers.keys().filter(|id| !wanted.contains_key(*id)) {
            changes.entry(*lane).or_default()[1].push(PeerChange::Remove(*key));
        }
        let lanes: BTreeSet<Lane> = wanted.keys().map(|(lane, _)| *lane).collect();
        let [mut set, mut remove, mut greet] = [const { Vec::new() }; 3];
        for (lane, [sets, removes, greets]) in changes {
            for (steps, changes) in [(&mut set, sets), (&mut remove, removes), (&mut greet, greets)] {
                steps.extend((!changes.is_empty()).then_some(Step::Peers(lane, changes)));
            }
        }
        let mut steps: Vec<_> =
            lanes.difference(&self.installed.open).map(|lane| Step::Open(*lane)).collect();
        steps.extend(set);
        steps.extend(self.steer(&wanted));
        steps.extend(remove);
        steps.extend(self.installed.open.difference(&lanes).map(|lane| Step::Close(*lane)));
        // Last: answers to it come while nothing else is to be done.
        steps.extend(greet);
        steps
    }

    /// Peers that have never answered.
    pub fn waiting(&self) -> impl Iterator<Item = PeerId> {
        let peers = self.installed.peers.iter().filter(|(_, state)| state.handshake == 0);
        peers.map(|(id, _)| *id).filter(|id| self.is_present(id) && self.claims.holders.contains_key(&id.1))
    }

    /// Whether something is left of keys that are not the present ones, of this node or of others.
    pub fn has_old(&self) -> bool {
        !self.old.is_empty()
    }

    /// The own previous key, and whether it can go: nothing is sent or expected by it.
    pub fn previous(&self) -> Option<(WireguardKey, bool)> {
        let previous = self.own.previous?;
        let used = self.installed.peers.keys().any(|(lane, _)| lane.own() == Slot::of(&previous));
        Some((previous, !used))
    }

    /// Addresses that are still spoken to by the own previous key.
    pub fn behind(&self) -> BTreeSet<IpAddr> {
        let Some(previous) = self.own.previous else { return BTreeSet::new() };
        let by_it = |steering: &Steering| match steering {
            Steering::Encrypted(lane) => lane.own() == Slot::of(&previous),
            Steering::Blocked => false,
        };
        let steering = self.installed.steering.iter();
        steering.filter(|(_, steering)| by_it(steering)).map(|(ip, _)| *ip).collect()
    }

    /// Addresses to which tunnel packets are encrypted.
    pub fn encrypted(&self) -> BTreeSet<IpAddr> {
        let steering = self.installed.steering.iter();
        steering.filter(|(_, steering)| **steering != Steering::Blocked).map(|(ip, _)| *ip).collect()
    }

    /// Where this node's own tunnels end, and so begin.
    pub fn own_ip(&self) -> Option<IpAddr> {
        self.ends.values().find(|end| self.is_own(end)).and_then(|end| end.node.as_ref()?.tunnel_ip)
    }

    /// Ends that are to be encrypted.
    pub fn ends(&self) -> impl Iterator<Item = (IpAddr, &TunnelEnd)> {
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
        let installed = |key: &WireguardKey, ip| {
            let mut states = Lane::all().filter_map(|lane| peers.get(&(lane, *key)));
            states.any(|peer| peer.allowed.contains(&ip))
        };
        let own_keys: Vec<_> = [Some(self.own.key), self.own.previous].into_iter().flatten().collect();
        self.claims = Claims::decide(self.ends(), self.own.cluster, &own_keys, installed);
        self.note_old();
    }

    /// Keeps account of peers that are there though they are not the present ones.
    fn note_old(&mut self) {
        let now = self.now;
        let mut noted = BTreeMap::new();
        for (id, state) in &self.installed.peers {
            if self.is_present(id) && self.claims.holders.contains_key(&id.1) {
                continue;
            }
            let known = self.old.get(id).copied();
            let mut old = known.unwrap_or(Old { since: now, used: now, received: state.received });
            if old.received != state.received || state.allowed.iter().any(|ip| self.speaks_by(id.0, *ip)) {
                (old.used, old.received) = (now, state.received);
            }
            noted.insert(*id, old);
        }
        self.old = noted;
    }

    /// Whether the peer is in the lane of its key and the own present one.
    fn is_present(&self, (lane, key): &PeerId) -> bool {
        *lane == Lane::of(&self.own.key, key)
    }

    /// The present peer of the node at `ip`, if its key counts.
    fn present(&self, ip: IpAddr) -> Option<PeerId> {
        let key = self.ends.get(&ip).filter(|end| self.is_in_scope(end))?.node.as_ref()?.key?;
        let holder = self.claims.holders.get(&key).filter(|holder| holder.ips.contains(&ip));
        holder.map(|_| (Lane::of(&self.own.key, &key), key))
    }

    fn wanted_peers(&self) -> BTreeMap<PeerId, Wanted> {
        let mut wanted: BTreeMap<PeerId, Wanted> = BTreeMap::new();
        for (key, holder) in &self.claims.holders {
            let tunnel_ip = holder.tunnel_ip.filter(|ip| holder.ips.contains(ip));
            let endpoint = tunnel_ip.or_else(|| holder.ips.first().copied());
            let peer = Wanted { endpoint, allowed: holder.ips.clone() };
            wanted.insert((Lane::of(&self.own.key, key), *key), peer);
        }
        for (id, peer) in &self.installed.peers {
            // What an earlier life knew stays until its cluster's nodes are told; what is old while it is used.
            let stays = |ip: &IpAddr| self.is_unconfirmed(*ip) || self.is_used_at(id, *ip);
            for ip in peer.allowed.iter().filter(|ip| self.has_key_for(id.0) && stays(ip)) {
                wanted.entry(*id).or_default().allowed.insert(*ip);
            }
        }
        wanted
    }

    /// Whether an old peer is still to be there for an address.
    fn is_used_at(&self, id: &PeerId, ip: IpAddr) -> bool {
        let (Some(old), Some(present)) = (self.old.get(id), self.present(ip)) else { return false };
        // Of two keys in one lane, the new one has the address.
        if id.0 == present.0 || self.now >= old.since + PATIENCE {
            return false;
        }
        self.now < old.used + QUIET
    }

    /// Whether this node still speaks in an old lane, or would have to.
    fn speaks_by(&self, lane: Lane, ip: IpAddr) -> bool {
        let steered = self.installed.steering.get(&ip) == Some(&Steering::Encrypted(lane));
        steered || !self.present(ip).is_some_and(|present| self.has_answered(&present))
    }

    fn has_answered(&self, id: &PeerId) -> bool {
        self.installed.peers.get(id).is_some_and(|state| state.handshake != 0)
    }

    fn has_key_for(&self, lane: Lane) -> bool {
        let keys = [Some(self.own.key), self.own.previous];
        keys.into_iter().flatten().any(|key| Slot::of(&key) == lane.own())
    }

    fn is_unconfirmed(&self, ip: IpAddr) -> bool {
        self.ends.get(&ip).is_some_and(|end| end.node.is_none() && self.is_in_scope(end))
    }

    /// How a peer is to be changed. One that roams among its own addresses may do so.
    fn difference(
        &self,
        (lane, key): &PeerId,
        wanted: &Wanted,
        state: Option<&WireguardState>,
    ) -> Option<PeerChange> {
        // The device at which the peer expects us.
        let port = self.port + u16::from(lane.reversed().number());
        let at_home = |state: &WireguardState| {
            state.endpoint.is_some_and(|at| at.port() == port && wanted.allowed.contains(&at.ip()))
        };
        let endpoint = wanted.endpoint.filter(|_| !state.is_some_and(at_home));
        let same = state.is_some_and(|state| state.allowed == wanted.allowed) && endpoint.is_none();
        (!same).then(|| PeerChange::Set {
            key: *key,
            endpoint: endpoint.map(|ip| SocketAddr::new(ip, port)),
            allowed: wanted.allowed.clone(),
        })
    }

    fn steer(&self, peers: &BTreeMap<PeerId, Wanted>) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut wanted = BTreeMap::new();
        let held = peers.iter().flat_map(|((lane, _), peer)| peer.allowed.iter().map(|ip| (*lane, *ip)));
        let held: BTreeSet<_> = held.collect();
        for (ip, end) in self.ends() {
            if let Some(steering) = self.steering_of(ip, end, &held) {
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

    fn steering_of(&self, ip: IpAddr, end: &TunnelEnd, held: &BTreeSet<(Lane, IpAddr)>) -> Option<Steering> {
        if self.elsewhere.contains(&ip) {
            return None;
        }
        let is_open = self.yielding.contains(&ip);
        let before = self.installed.steering.get(&ip).copied();
        let before = before.filter(|steering| !is_open || *steering != Steering::Blocked);
        let otherwise = (self.strict && !is_open).then_some(Steering::Blocked);
        if end.node.is_none() {
            return before.or(otherwise);
        }
        let Some(present) = self.present(ip) else { return otherwise };
        if self.has_answered(&present) {
            return Some(Steering::Encrypted(present.0));
        }
        match before {
            // By the old key until the new one has answered; never back into clear text.
            Some(Steering::Encrypted(lane)) => {
                Some(Steering::Encrypted(if held.contains(&(lane, ip)) { lane } else { present.0 }))
            }
            Some(Steering::Blocked) | None => otherwise,
        }
    }

    fn changed(&mut self, lane: Lane, change: &PeerChange) {
        let peers = &mut self.installed.peers;
        match change {
            PeerChange::Set { key, endpoint, allowed } => {
                // Who had the addresses before is changed in the same plan.
                let state = peers.entry((lane, *key)).or_default();
                state.allowed.clone_from(allowed);
                if let Some(endpoint) = endpoint {
                    state.endpoint = Some(*endpoint);
                }
            }
            PeerChange::Greet(_) => {}
            PeerChange::Remove(key) => drop(peers.remove(&(lane, *key))),
        }
    }
}

#[cfg(test)]
mod tests;
