//! Which associations and policies there are to be, and the next steps to there. No I/O, no clock.
//!
//! The order of steps loses nothing. An association is there before its other end can know that it is; what goes to a
//! node moves to a new one when a packet has come by the new one of the other direction, and never into clear
//! text while the node has a key. What came before stays for what the other end still sends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use clustermesh_kvstore::record::IpsecKey;

use super::super::claims::NodeName;
use super::super::merge;
use super::old::{OldStates, QUIET};
use super::peer::Peer;
use super::{Agree, Association, Hello, Installed, Own, Pair, StateId, StateUse, Step, Way};
use crate::tunnels::{EndChanges, EndNode, Scope, TunnelEnd};

/// A node that does not announce a key for IPsec any more is sent to by it for so long, if WireGuard can take over.
pub(super) const HANDOVER: Duration = Duration::from_secs(20);
/// Addresses of a node, from its tunnel's on; others of it are not encrypted to.
const ADDRESSES: usize = 4;
/// Associations of one key. Only nodes that come and go all the time make as many.
const MAX_SPENT: usize = 65_536;
/// At first others are asked as often as there is a look, and for so long.
pub(super) const EAGER: Duration = Duration::from_secs(10);
/// And after that so often.
const ASK: Duration = Duration::from_secs(5);

/// See the module.
pub struct Core {
    own: Own,
    agree: Box<dyn Agree>,
    scope: Scope,
    strict: bool,
    ends: BTreeMap<IpAddr, TunnelEnd>,
    /// Addresses that WireGuard encrypts to; none: this node does not use it.
    wireguard: Option<BTreeSet<IpAddr>>,
    installed: Installed,
    peers: BTreeMap<NodeName, Peer>,
    /// By the own address and the other one. None: the key is a bad one.
    agreed: BTreeMap<(IpAddr, IpAddr), (IpsecKey, Option<Pair>)>,
    /// What was installed by the present key, in this life.
    spent: BTreeSet<StateId>,
    old: OldStates,
    /// Nodes from which nothing has come by the present agreement: since when, and when they were asked last.
    silent: BTreeMap<NodeName, (Duration, Option<Duration>)>,
    /// When a node's address asked last, and whether it has its answer.
    asked: BTreeMap<IpAddr, (Duration, bool)>,
    /// Since when an address that is encrypted to has no key any more.
    withdrawn: BTreeMap<IpAddr, Duration>,
    now: Duration,
}

impl Core {
    /// Knows no ends yet. `wireguard`: this node can encrypt by that, too.
    pub fn new(
        own: Own,
        agree: Box<dyn Agree>,
        scope: Scope,
        strict: bool,
        wireguard: bool,
        installed: Installed,
    ) -> Self {
        Self {
            own,
            agree,
            scope,
            strict,
            ends: BTreeMap::new(),
            wireguard: wireguard.then(BTreeSet::new),
            installed,
            peers: BTreeMap::new(),
            agreed: BTreeMap::new(),
            spent: BTreeSet::new(),
            old: OldStates::default(),
            silent: BTreeMap::new(),
            asked: BTreeMap::new(),
            withdrawn: BTreeMap::new(),
            now: Duration::ZERO,
        }
    }

    /// The mesh has changed.
    pub fn apply(&mut self, changes: EndChanges) {
        merge(&mut self.ends, changes);
        self.decide();
    }

    /// It is `now` after the start.
    pub fn pass(&mut self, now: Duration) {
        self.now = now;
    }

    /// The kernel was read.
    pub fn observe(&mut self, installed: Installed) {
        self.installed = installed;
        self.decide();
    }

    /// WireGuard encrypts to these addresses by now.
    pub fn set_wireguard(&mut self, encrypted: &BTreeSet<IpAddr>) {
        if let Some(known) = &mut self.wireguard {
            known.clone_from(encrypted);
        }
    }

    /// The node at an address has not heard of this one by the present agreement. Anybody may say so.
    pub fn asked(&mut self, ip: IpAddr) {
        if self.peers.values().any(|peer| peer.tunnel_ip == ip) {
            self.asked.insert(ip, (self.now, false));
        }
    }

    /// This node has a new key; the one before it is forgotten, what came of it stays.
    pub fn rotate(&mut self, agree: Box<dyn Agree>) {
        self.agree = agree;
        self.spent.clear();
        self.agreed.clear();
        self.silent.clear();
        self.decide();
    }

    /// A step was done.
    pub fn done(&mut self, step: &Step) {
        match step {
            Step::Add { association, .. } => {
                self.spent.insert(association.id);
                self.installed.states.insert(association.id, StateUse::default());
            }
            Step::Greet(ip, Some(spi)) => drop(self.installed.hellos.insert(*ip, *spi)),
            Step::Greet(ip, None) => drop(self.installed.hellos.remove(ip)),
            Step::Steer(ip, Some(way)) => drop(self.installed.ways.insert(*ip, *way)),
            Step::Steer(ip, None) => drop(self.installed.ways.remove(ip)),
            Step::Remove(id) => {
                self.installed.states.remove(id);
                self.old.forget(id);
            }
        }
    }

    /// Somebody else on this node has an association of that name: there will be none by the present key.
    pub fn taken(&mut self, id: StateId) {
        self.spent.insert(id);
    }

    /// What to do next; nothing: all is as it should be, as far as it is known.
    pub fn plan(&self) -> Vec<Step> {
        let mut steps: Vec<_> =
            self.missing().filter(|(_, is_possible)| *is_possible).map(|(step, _)| step).collect();
        let added = steps.iter().filter_map(|step| match step {
            Step::Add { association, .. } => Some(association.id),
            _ => None,
        });
        let added: BTreeSet<_> = added.collect();
        let there = |id: &StateId| self.installed.states.contains_key(id) || added.contains(id);
        let out = self.peers.values().filter_map(|peer| self.hello_id(peer)).filter(there);
        let hellos: BTreeMap<_, _> = out.map(|id| (id.destination, id.spi)).collect();
        let ways: BTreeMap<_, _> =
            self.ends().filter_map(|(ip, end)| Some((ip, self.way_of(ip, end)?))).collect();
        differences(&self.installed.hellos, &hellos, |ip, spi| steps.push(Step::Greet(ip, spi)));
        differences(&self.installed.ways, &ways, |ip, way| steps.push(Step::Steer(ip, way)));
        let stays = |id: &StateId| {
            let other = if id.source == self.own.ip { id.destination } else { id.source };
            let is_unconfirmed = self.ends.get(&other).is_some_and(|end| end.node.is_none());
            is_unconfirmed || ways.get(&id.destination) == Some(&Way::Encrypted(id.spi))
        };
        steps.extend(self.old.unused(stays, self.now).into_iter().map(Step::Remove));
        steps
    }

    /// Hellos that are due.
    pub fn hellos(&mut self) -> Vec<Hello> {
        let mut hellos = Vec::new();
        for (name, peer) in &self.peers {
            let installed = self.hello_id(peer).filter(|id| self.installed.states.contains_key(id));
            let Some(StateId { destination: to, spi, .. }) = installed else { continue };
            if self.installed.hellos.get(&to) != Some(&spi) {
                continue;
            }
            let is_due = self.silent.get_mut(name).is_some_and(|(since, asked)| {
                let is_due = asked.is_none_or(|at| self.now < *since + EAGER || self.now >= at + ASK);
                *asked = if is_due { Some(self.now) } else { *asked };
                is_due
            });
            let is_asked =
                self.asked.get_mut(&to).is_some_and(|(_, answered)| !std::mem::replace(answered, true));
            if is_due || is_asked {
                hellos.push(Hello { to, asks: self.silent.contains_key(name) });
            }
        }
        hellos
    }

    /// A new key is needed: what this one had agreed on is lost, or its name is another's.
    pub fn needs_key(&self) -> bool {
        self.spent.len() > MAX_SPENT || self.missing().any(|(_, is_possible)| !is_possible)
    }

    /// Nodes that have not been heard since a short time, and any at all.
    pub fn waits(&self) -> (bool, bool) {
        let young = self.silent.values().any(|(since, _)| self.now < *since + EAGER);
        (young, !self.silent.is_empty())
    }

    /// Whether something is left that is not of present agreements.
    pub fn has_old(&self) -> bool {
        !self.old.is_empty()
    }

    /// Addresses that are still sent to by what an earlier key agreed on.
    pub fn behind(&self) -> BTreeSet<IpAddr> {
        let ways = self.installed.ways.iter();
        let behind = ways.filter(|(ip, way)| match way {
            Way::Encrypted(spi) => self.present(**ip).is_none_or(|(_, id)| id.spi != *spi),
            Way::Blocked => false,
        });
        behind.map(|(ip, _)| *ip).collect()
    }

    /// Addresses to which tunnel packets are encrypted.
    pub fn encrypted(&self) -> BTreeSet<IpAddr> {
        let ways = self.installed.ways.iter();
        ways.filter(|(_, way)| **way != Way::Blocked).map(|(ip, _)| *ip).collect()
    }

    /// Those of them that nobody else has to see to.
    pub fn kept(&self) -> BTreeSet<IpAddr> {
        let mut kept = self.encrypted();
        kept.retain(|ip| !self.withdrawn.contains_key(ip));
        kept
    }

    /// Ends that are to be encrypted.
    pub fn ends(&self) -> impl Iterator<Item = (IpAddr, &TunnelEnd)> {
        self.ends.iter().filter(|(_, end)| self.is_in_scope(end)).map(|(ip, end)| (*ip, end))
    }

    /// What the kernel has.
    pub fn installed(&self) -> &Installed {
        &self.installed
    }

    /// This node's public key.
    pub fn public(&self) -> IpsecKey {
        self.agree.public()
    }

    /// Whether the key that a node announces can be used.
    pub fn is_bad(&self, ip: IpAddr) -> bool {
        matches!(self.agreed.get(&(self.own.ip, ip)), Some((_, None)))
    }

    fn is_own(&self, end: &TunnelEnd) -> bool {
        end.cluster == self.own.cluster && end.node.as_ref().is_some_and(|node| node.name == self.own.node)
    }

    fn is_in_scope(&self, end: &TunnelEnd) -> bool {
        match self.scope {
            Scope::Clusters => end.cluster != self.own.cluster,
            Scope::Nodes => !self.is_own(end),
        }
    }

    fn decide(&mut self) {
        self.peers = Peer::all(self.ends(), ADDRESSES);
        let own = self.ends.iter().filter(|(ip, end)| self.is_own(end) && **ip != self.own.ip);
        let own_ips: Vec<_> =
            [self.own.ip].into_iter().chain(own.map(|(ip, _)| *ip)).take(ADDRESSES).collect();
        let mut agreed = BTreeMap::new();
        for peer in self.peers.values_mut() {
            let to_them = peer.ips.iter().map(|there| (self.own.ip, *there));
            let to_us = own_ips.iter().map(|here| (*here, peer.tunnel_ip));
            for (here, there) in to_them.chain(to_us) {
                let known = self.agreed.remove(&(here, there)).filter(|(key, _)| *key == peer.key);
                let compute = || (peer.key, self.agree.pair(&peer.key, here, there));
                agreed.entry((here, there)).or_insert_with(|| known.unwrap_or_else(compute));
            }
            peer.own_ips.clone_from(&own_ips);
        }
        self.agreed = agreed;
        self.note_silent();
        self.note_old();
        self.note_withdrawn();
    }

    fn note_silent(&mut self) {
        let heard = |peer: &Peer| self.is_heard(peer);
        let silent = self.peers.iter().filter(|(_, peer)| !heard(peer)).map(|(name, peer)| {
            let known = self.silent.get(name).copied().filter(|_| !self.is_new(peer));
            (name.clone(), known.unwrap_or((self.now, None)))
        });
        self.silent = silent.collect();
        let tunnels: BTreeSet<_> = self.peers.values().map(|peer| peer.tunnel_ip).collect();
        self.asked
            .retain(|ip, (at, answered)| tunnels.contains(ip) && (!*answered || self.now < *at + QUIET));
    }

    /// Nothing is installed of the present agreement.
    fn is_new(&self, peer: &Peer) -> bool {
        self.hello_id(peer).is_some_and(|id| !self.installed.states.contains_key(&id))
    }

    fn note_old(&mut self) {
        let wanted: BTreeSet<_> = self.wanted().map(|(association, _)| association.id).collect();
        // These may be waiting for us as we are for them, and send by what was before.
        let awaited = self.peers.values().filter(|peer| !self.is_heard(peer));
        let awaited: BTreeSet<_> = awaited.map(|peer| peer.tunnel_ip).collect();
        let ways = &self.installed.ways;
        let is_needed = |id: &StateId| {
            awaited.contains(&id.source) || ways.get(&id.destination) == Some(&Way::Encrypted(id.spi))
        };
        // So does who asks.
        let asked = |id: &StateId| self.asked.get(&id.source).map(|(at, _)| *at);
        let states = self.installed.states.iter().filter(|(id, _)| !wanted.contains(*id));
        self.old = self.old.noted(states, is_needed, asked, self.now);
    }

    fn note_withdrawn(&mut self) {
        let without = |end: &TunnelEnd| end.node.as_ref().is_some_and(|node| node.ipsec.is_none());
        let gone = self.encrypted().into_iter().filter(|ip| self.ends.get(ip).is_some_and(without));
        let gone = gone.map(|ip| (ip, self.withdrawn.get(&ip).copied().unwrap_or(self.now)));
        self.withdrawn = gone.collect();
    }

    /// Associations of present agreements, and whether they are for what comes; these first.
    fn wanted(&self) -> impl Iterator<Item = (&Association, bool)> {
        let pair = |here, there| self.agreed.get(&(here, there)).and_then(|(_, pair)| pair.as_ref());
        let back = self.peers.values().flat_map(move |peer| {
            let pairs = peer.own_ips.iter().filter_map(move |here| pair(*here, peer.tunnel_ip));
            pairs.map(|pair| (&pair.back, true))
        });
        let out = self.peers.values().flat_map(move |peer| {
            let pairs = peer.ips.iter().filter_map(move |there| pair(self.own.ip, *there));
            pairs.map(|pair| (&pair.out, false))
        });
        back.chain(out)
    }

    /// Those that are not there, and whether they can be: an association is installed once, and has its SPI alone.
    fn missing(&self) -> impl Iterator<Item = (Step, bool)> {
        let states = self.installed.states.keys();
        let mut taken: BTreeMap<_, _> = states.map(|id| ((id.destination, id.spi), id.source)).collect();
        let missing =
            self.wanted().filter(|(association, _)| !self.installed.states.contains_key(&association.id));
        missing.map(move |(association, inbound)| {
            let id = association.id;
            let is_free = *taken.entry((id.destination, id.spi)).or_insert(id.source) == id.source;
            let step = Step::Add { association: association.clone(), inbound };
            (step, is_free && !self.spent.contains(&id))
        })
    }

    /// The peer with an address, and the present association to there.
    fn present(&self, ip: IpAddr) -> Option<(&Peer, StateId)> {
        let end = self.ends.get(&ip)?;
        let peer = self.peers.get(&(end.cluster, end.node.as_ref()?.name.clone()))?;
        let (_, pair) = self.agreed.get(&(self.own.ip, ip)).filter(|_| peer.ips.contains(&ip))?;
        Some((peer, pair.as_ref()?.out.id))
    }

    /// By which it is shown to a node that this one can receive.
    fn hello_id(&self, peer: &Peer) -> Option<StateId> {
        let (_, pair) = self.agreed.get(&(self.own.ip, peer.tunnel_ip))?;
        Some(pair.as_ref()?.out.id)
    }

    /// Something has come by the present agreement. So the other end has all that is for what comes to it.
    fn is_heard(&self, peer: &Peer) -> bool {
        let pair = self.agreed.get(&(self.own.ip, peer.tunnel_ip)).and_then(|(_, pair)| pair.as_ref());
        let state = pair.and_then(|pair| self.installed.states.get(&pair.back.id));
        state.is_some_and(|state| state.packets > 0)
    }

    fn way_of(&self, ip: IpAddr, end: &TunnelEnd) -> Option<Way> {
        let before = self.installed.ways.get(&ip).copied();
        let by_wireguard = self.wireguard.as_ref().is_some_and(|encrypted| encrypted.contains(&ip));
        let otherwise = (self.strict && !by_wireguard).then_some(Way::Blocked);
        let Some(node) = &end.node else { return before.or(otherwise) };
        let by_before = before.filter(|way| *way != Way::Blocked);
        if node.ipsec.is_none() {
            return by_before.filter(|_| self.is_handed_over(ip, node)).or(otherwise);
        }
        match self.present(ip) {
            Some((peer, id)) if self.is_heard(peer) && self.installed.states.contains_key(&id) => {
                Some(Way::Encrypted(id.spi))
            }
            // By the earlier one until the new one is known to be there; never back into clear text.
            _ => by_before.or(otherwise),
        }
    }

    /// WireGuard is about to take over.
    fn is_handed_over(&self, ip: IpAddr, node: &EndNode) -> bool {
        let lacks = self.wireguard.as_ref().is_some_and(|encrypted| !encrypted.contains(&ip));
        let since = self.withdrawn.get(&ip);
        lacks && node.key.is_some() && since.is_some_and(|since| self.now < *since + HANDOVER)
    }
}

/// Tells what leads from one table to the other.
fn differences<T: Copy + PartialEq>(
    before: &BTreeMap<IpAddr, T>,
    after: &BTreeMap<IpAddr, T>,
    mut tell: impl FnMut(IpAddr, Option<T>),
) {
    after
        .iter()
        .filter(|(ip, value)| before.get(*ip) != Some(*value))
        .for_each(|(ip, value)| tell(*ip, Some(*value)));
    before.keys().filter(|ip| !after.contains_key(*ip)).for_each(|ip| tell(*ip, None));
}

#[cfg(test)]
mod tests;
