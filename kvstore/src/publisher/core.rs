//! What to write, and when: the publisher without I/O.
//!
//! In come desired values ([`Core::set`]), what stands in etcd ([`Core::observe`]), the fate of earlier
//! effects, and the time. Out come [`Effect`]s from [`Core::poll`]. Level-triggered: a key is looked at
//! again whenever its desired or its actual side changed, and written only if the two differ. So a
//! restart over an unchanged etcd writes nothing, and whatever somebody else changes is put right.
//!
//! Leases: every key is written with one. The leases found on keys that are as desired are adopted
//! (that is what makes restarts silent); new ones are granted when those are full.
//!
//! Canaries: the canary of a prefix is written when its desired state was declared complete and every
//! key of it stands in this etcd. A re-created etcd has neither keys nor canaries, so the same rule
//! fills it again in the right order.
//!
//! Digests: see `digests`. A digest is one more key with a desired value, written after all others.
//!
//! Here is what comes in, and when it is time for what. `streams` knows what is read of etcd, `batch` decides
//! what the next transaction writes, `outcome` takes in what became of effects, `progress` says how far it is.

mod batch;
mod outcome;
mod progress;
mod streams;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::digests::Digests;
use super::keys::{Actual, Class, Keys, Place, Trouble};
use super::leases::Leases;
use super::message::{Effect, Observed, Op};
use super::spec::{Origin, PublisherSpec, PublisherStatus};
use crate::digest::Timed;

use streams::Streams;

/// Transactions under way at once.
const TXNS_IN_FLIGHT: usize = 4;
/// A failed transaction is tried again after this, doubling up to [`RETRY_MAX`].
pub(super) const RETRY_MIN: Duration = Duration::from_millis(50);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);

/// State of a publisher; see the module's documentation.
pub struct Core {
    spec: PublisherSpec,
    streams: Streams,
    /// By owned prefix: its desired state was declared complete.
    complete: Vec<bool>,
    keys: Keys,
    digests: Digests,
    /// Where the changes come from that are yet to be written.
    origins: HashMap<Arc<str>, Origin>,
    in_flight: HashMap<u64, Vec<(Op, Option<Origin>)>>,
    next_txn: u64,
    leases: Leases,
    retry: Option<Retry>,
    heartbeat_due: Option<Instant>,
    status: PublisherStatus,
}

/// After a failure nothing is written for a while.
struct Retry {
    at: Instant,
    delay: Duration,
}

impl Core {
    /// A publisher that wants nothing yet and knows nothing of etcd.
    pub fn new(spec: PublisherSpec) -> Self {
        let prefixes = spec.owned.len();
        let mut core = Self {
            streams: Streams::new(&spec),
            complete: vec![false; prefixes],
            keys: Keys::new(prefixes),
            digests: Digests::new(&spec.owned),
            origins: HashMap::new(),
            in_flight: HashMap::new(),
            next_txn: 0,
            leases: Leases::new(spec.lease_ttl),
            retry: None,
            heartbeat_due: None,
            status: PublisherStatus::default(),
            spec,
        };
        for owned in &core.spec.owned {
            core.status.synced.insert(owned.prefix.clone(), false);
        }
        core
    }

    /// Wants `key` to have `value`, or (`None`) not to be there, because of `origin` if that is to be
    /// traced. A key outside of the owned prefixes is refused: `false`.
    pub fn set(&mut self, key: &str, value: Option<Arc<[u8]>>, origin: Option<Origin>) -> bool {
        let Some(class) = self.owned_class(key) else { return false };
        if value.is_none() && self.keys.get(key).is_none() {
            return true;
        }
        let state = self.keys.entry(key, class);
        if state.desired != value {
            state.desired = value;
            state.settled = false;
            self.keys.touch(key);
            match (origin, class) {
                (Some(origin), Class::Owned(index)) if self.digests.has(index) => {
                    self.origins.insert(key.into(), origin);
                }
                // Where the value before came from is of no interest any more.
                _ => drop(self.origins.remove(key)),
            }
        }
        true
    }

    /// What the etcd that the owned `prefix` mirrors states of the times of its newest revisions.
    pub fn source_stated(&mut self, prefix: &str, recent: &[Timed]) {
        if let Some(index) = self.spec.owned.iter().position(|o| o.prefix == prefix) {
            self.digests.source_stated(index, recent);
        }
    }

    /// Declares the desired state of an owned prefix complete: what else stands under it may go, and
    /// once all is written its canary follows.
    pub fn initial_done(&mut self, prefix: &str) {
        let Some(index) = self.spec.owned.iter().position(|o| o.prefix == prefix) else { return };
        if !std::mem::replace(&mut self.complete[index], true) {
            self.keys.touch_all(|key| key.class == Class::Owned(index));
            self.check_canary(index);
        }
    }

    /// The prefixes whose contents [`Self::observe`] must be told, by index.
    pub fn streams(&self) -> impl Iterator<Item = &str> {
        self.streams.prefixes()
    }

    /// Takes in what stream `stream` says. What a stream that lags behind says of an earlier etcd is dropped.
    pub fn observe(&mut self, stream: usize, observed: Observed, now: Instant) {
        match observed {
            Observed::Etcd { generation } => {
                if self.streams.enter(stream, generation) {
                    self.start_over();
                }
            }
            _ if !self.streams.is_present(stream) => {}
            Observed::Present { key, value, lease, revision } => {
                self.saw(&key, Some((value, lease)), revision, now);
                if let Some(key) = self.keys.get_mut(&key) {
                    key.told = true;
                }
            }
            Observed::Absent { key, revision } => {
                if let Some(key) = self.keys.get_mut(&key) {
                    key.told = false;
                }
                self.saw(&key, None, revision, now);
            }
            Observed::Listed { revision } => {
                self.streams.listed(stream, revision);
                self.forget_untold(stream, revision, now);
                self.digests.listed(stream, revision);
                for index in 0..self.complete.len() {
                    if index == stream {
                        self.keys.touch_all(|key| key.class == Class::Owned(index));
                    }
                    self.check_canary(index);
                }
            }
        }
    }

    /// A key that we wrote and that vanished before its stream ever saw it is in no list and no deletion:
    /// what stands there the stream has told.
    fn forget_untold(&mut self, stream: usize, revision: i64, now: Instant) {
        let gone = self.keys.names(|key| {
            self.streams.of(key.class) == Some(stream)
                && key.actual.is_some()
                && !key.told
                && key.revision < revision
        });
        for key in gone {
            self.saw(&key, None, revision, now);
        }
    }

    /// Nothing known of the old etcd counts in the new one: neither revisions nor leases nor writes under way.
    fn start_over(&mut self) {
        self.leases.forget_all();
        self.in_flight.clear();
        self.origins.clear();
        self.digests.start_over();
        self.retry = None;
        self.heartbeat_due = None;
        for key in self.keys.names(|_| true) {
            if let Some(state) = self.keys.get_mut(&key) {
                state.actual = None;
                state.ours = None;
                state.told = false;
                state.revision = 0;
                state.settled = false;
                state.trouble = None;
                if matches!(state.class, Class::Digest(_)) {
                    state.desired = None;
                }
            }
            self.keys.set_uncertain(&key, false);
            self.keys.place(&key, Place::Dirty);
        }
    }

    /// What is to be done at `now`; `wall` is the wall clock as RFC 3339 (values of canaries and heartbeat).
    pub fn poll(&mut self, now: Instant, wall: &str) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.keys.wake(now);
        for lease in self.leases.due(now) {
            effects.push(Effect::KeepAlive { lease });
        }
        self.beat(now, wall);
        if self.retry.as_ref().is_some_and(|r| r.at > now) {
            return effects;
        }
        self.state_digests(now);
        while self.in_flight.len() < TXNS_IN_FLIGHT {
            let ops = self.batch(now, wall);
            if ops.is_empty() {
                break;
            }
            let id = self.next_txn;
            self.next_txn += 1;
            effects.push(Effect::Txn { id, ops: ops.clone() });
            let origins = |op: Op| (op.clone(), self.origins.remove(op.key()));
            self.in_flight.insert(id, ops.into_iter().map(origins).collect());
        }
        if self.leases.wants_grant() {
            self.leases.granting();
            effects.push(Effect::Grant { ttl: self.spec.lease_ttl });
        }
        effects
    }

    /// When [`Self::poll`] has something to do even if nothing comes in; `None`: not before then.
    pub fn next_deadline(&self) -> Option<Instant> {
        let retry = self.retry.as_ref().map(|r| r.at);
        let waiting = self.keys.next_wake();
        let others = [self.leases.next_due(), self.heartbeat_due, self.digests.next_due()];
        [retry, waiting].into_iter().chain(others).flatten().min()
    }

    fn owned_class(&self, key: &str) -> Option<Class> {
        self.spec.owned.iter().position(|o| o.covers(key)).map(Class::Owned)
    }

    fn class_of(&self, key: &str) -> Option<Class> {
        let canary =
            || self.spec.owned.iter().position(|o| o.canary.as_deref() == Some(key)).map(Class::Canary);
        let heartbeat =
            || (self.spec.heartbeat.is_some() && key == crate::key::HEARTBEAT).then_some(Class::Heartbeat);
        let digest =
            || self.spec.owned.iter().position(|o| o.digest.as_deref() == Some(key)).map(Class::Digest);
        self.owned_class(key).or_else(canary).or_else(heartbeat).or_else(digest)
    }

    fn saw(&mut self, key: &str, present: Option<(Vec<u8>, i64)>, revision: i64, now: Instant) {
        let Some(class) = self.class_of(key) else { return };
        if present.is_none() && self.keys.get(key).is_none() {
            return;
        }
        let state = self.keys.entry(key, class);
        if revision <= state.revision {
            return;
        }
        let desired = state.desired.clone();
        let actual = present.map(|(value, lease)| {
            // Share the bytes of a value that is as desired.
            let value = desired.filter(|d| **d == *value).unwrap_or_else(|| value.into());
            Actual { value, lease }
        });
        let changed = state.actual != actual;
        let foreign = changed && state.settled;
        state.revision = revision;
        let before = std::mem::replace(&mut state.actual, actual.clone());
        if foreign {
            state.settled = false;
            state.trouble = Some(Trouble::contended(state.trouble, now));
            self.status.repaired += 1;
        }
        Self::move_lease(&mut self.leases, before.as_ref(), actual.as_ref());
        self.keys.touch(key);
    }

    fn move_lease(leases: &mut Leases, before: Option<&Actual>, after: Option<&Actual>) {
        if let Some(lease) = after.map(|a| a.lease) {
            leases.attach(lease);
        }
        if let Some(lease) = before.map(|a| a.lease) {
            leases.detach(lease);
        }
    }

    /// Wants the canary of a prefix once everything else of it is settled.
    fn check_canary(&mut self, index: usize) {
        let Some(canary) = self.spec.owned[index].canary.clone() else { return };
        if self.is_settled(index) && self.streams.are_canaries_listed() {
            self.keys.entry(&canary, Class::Canary(index));
            self.keys.touch(&canary);
        }
    }

    fn beat(&mut self, now: Instant, wall: &str) {
        let Some(every) = self.spec.heartbeat else { return };
        let listed = (0..self.complete.len()).all(|index| self.streams.is_listed(index));
        if listed && self.heartbeat_due.is_none_or(|at| at <= now) {
            self.heartbeat_due = Some(now + every);
            let state = self.keys.entry(crate::key::HEARTBEAT, Class::Heartbeat);
            state.desired = Some(wall.as_bytes().into());
            state.settled = false;
            self.keys.touch(crate::key::HEARTBEAT);
        }
    }

    /// Wants the digests of prefixes in which something has changed to be stated, when their time has come.
    fn state_digests(&mut self, now: Instant) {
        for index in self.digests.active() {
            if !self.streams.is_listed(index) || !self.streams.is_digest_listed(index) {
                continue;
            }
            if self.is_settled(index) {
                self.digests.complete(index);
            }
            if self.keys.all_known(index) {
                self.digests.settled(index, now);
            }
            let standing = |key: &str| Some(self.keys.get(key)?.actual.as_ref()?.value.clone());
            if let Some((key, value)) = self.digests.take_due(index, now, standing) {
                let state = self.keys.entry(&key, Class::Digest(index));
                state.desired = Some(value);
                state.settled = false;
                self.keys.touch(&key);
            }
        }
    }
}
