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

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::digests::Digests;
use super::keys::{Actual, Class, Keys, Place, Trouble};
use super::leases::{LeaseState, Leases};
use super::message::{Effect, Observed, Op};
use super::spec::{Origin, PublisherSpec, PublisherStatus};
use crate::digest::Timed;

/// Bytes of keys and values in one transaction; etcd refuses requests above 1.5 MiB.
const TXN_BYTES: usize = 512 * 1024;
/// Transactions under way at once.
const TXNS_IN_FLIGHT: usize = 4;
/// A failed transaction is tried again after this, doubling up to [`RETRY_MAX`].
pub(super) const RETRY_MIN: Duration = Duration::from_millis(50);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(5);

/// State of a publisher; see the module's documentation.
pub struct Core {
    spec: PublisherSpec,
    /// One for each owned prefix, then one for all canaries, then those of the digests' folders.
    streams: Vec<Stream>,
    generation: u64,
    /// By owned prefix: its desired state was declared complete.
    complete: Vec<bool>,
    keys: Keys,
    digests: Digests,
    /// By owned prefix: the stream of its digest's folder.
    digest_streams: Vec<usize>,
    /// Where the changes come from that are yet to be written.
    origins: HashMap<Arc<str>, Origin>,
    in_flight: HashMap<u64, Vec<(Op, Option<Origin>)>>,
    next_txn: u64,
    leases: Leases,
    retry: Option<Retry>,
    heartbeat_due: Option<Instant>,
    status: PublisherStatus,
}

struct Stream {
    prefix: String,
    generation: u64,
    listed: bool,
    /// Revision of its last list.
    listed_at: i64,
}

struct Retry {
    at: Instant,
    delay: Duration,
}

impl Core {
    /// A publisher that wants nothing yet and knows nothing of etcd.
    pub fn new(spec: PublisherSpec) -> Self {
        let prefixes = spec.owned.len();
        let leases = Leases::new(spec.lease_ttl);
        let canaries = spec.owned.iter().filter_map(|o| o.canary.as_deref());
        let mut folders: Vec<String> =
            spec.owned.iter().map(|o| o.prefix.clone()).chain(common_folder(canaries)).collect();
        let digest_streams = add_digest_folders(&spec, &mut folders);
        let stream = |prefix| Stream { prefix, generation: 0, listed: false, listed_at: 0 };
        let streams = folders.into_iter().map(stream).collect();
        let mut core = Self {
            streams,
            generation: 0,
            complete: vec![false; prefixes],
            keys: Keys::new(prefixes),
            digests: Digests::new(&spec.owned),
            digest_streams,
            origins: HashMap::new(),
            in_flight: HashMap::new(),
            next_txn: 0,
            leases,
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
    pub fn set(&mut self, key: &str, value: Option<Vec<u8>>, origin: Option<Origin>) -> bool {
        let Some(class) = self.owned_class(key) else { return false };
        if value.is_none() && self.keys.get(key).is_none() {
            return true;
        }
        let value: Option<Arc<[u8]>> = value.map(Into::into);
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
        self.streams.iter().map(|s| s.prefix.as_str())
    }

    /// Takes in what stream `stream` says. What a stream that lags behind says of an earlier etcd is dropped.
    pub fn observe(&mut self, stream: usize, observed: Observed, now: Instant) {
        let Some(state) = self.streams.get_mut(stream) else { return };
        if let Observed::Etcd { generation } = observed {
            state.generation = generation;
            state.listed = false;
            state.listed_at = 0;
            if generation > self.generation {
                self.generation = generation;
                self.start_over();
            }
            return;
        }
        if state.generation != self.generation {
            return;
        }
        match observed {
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
                state.listed = true;
                state.listed_at = revision;
                self.forget_untold(stream, revision, now);
                self.digests.listed(stream, revision);
                for index in 0..self.complete.len() {
                    if index == stream {
                        self.keys.touch_all(|key| key.class == Class::Owned(index));
                    }
                    self.check_canary(index);
                }
            }
            Observed::Etcd { .. } => {}
        }
    }

    /// A key that we wrote and that vanished before its stream ever saw it is in no list and no deletion:
    /// what stands there the stream has told.
    fn forget_untold(&mut self, stream: usize, revision: i64, now: Instant) {
        let gone = self.keys.names(|key| {
            self.stream_of(key.class) == Some(stream)
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

    /// A transaction was committed at `revision`.
    pub fn txn_done(&mut self, id: u64, revision: i64) {
        let Some(ops) = self.in_flight.remove(&id) else { return };
        self.retry = None;
        self.status.last_error.clear();
        for (op, origin) in ops {
            let written = match &op {
                Op::Put { value, lease, .. } => Some(Actual { value: value.clone(), lease: *lease }),
                Op::Delete { .. } => None,
            };
            match written {
                Some(_) => self.status.written += 1,
                None => self.status.deleted += 1,
            }
            let key = op.key().clone();
            if let Op::Put { lease, .. } = &op {
                self.leases.unreserve(*lease);
            }
            let class = self.keys.get(&key).map(|state| state.class);
            let listed = class.and_then(|class| self.streams.get(self.stream_of(class)?));
            let listed_at = listed.map_or(0, |stream| stream.listed_at);
            if let Some(state) = self.keys.get_mut(&key) {
                if let Class::Owned(index) = state.class {
                    let value = written.as_ref().map(|written| &*written.value);
                    self.digests.confirm(index, &key, &mut state.ours, value, revision);
                    if let Some(origin) = origin {
                        self.digests.changed(index, revision, origin);
                    }
                }
                // A watch may have told of something newer before this answer came; a newer list that had
                // nothing to tell of the key, that it is gone again.
                if revision > state.revision.max(listed_at) {
                    Self::move_lease(&mut self.leases, state.actual.as_ref(), written.as_ref());
                    state.actual = written;
                    state.revision = revision;
                }
                state.trouble = state.trouble.filter(|t| !t.alone);
            }
            self.keys.set_uncertain(&key, false);
            self.keys.landed(&key);
        }
    }

    /// A transaction failed, or nobody knows whether it was committed; `lease_missing` if etcd said that a
    /// lease of it does not exist; `refused` if etcd will refuse the same request again (too large ...).
    pub fn txn_failed(&mut self, id: u64, error: &str, lease_missing: bool, refused: bool, now: Instant) {
        let Some(ops) = self.in_flight.remove(&id) else { return };
        self.status.last_error = error.to_string();
        let is_digest = |key: &str| matches!(self.class_of(key), Some(Class::Digest(_)));
        let only_digests = ops.iter().all(|(op, _)| is_digest(op.key()));
        if lease_missing {
            let used: BTreeSet<i64> = ops
                .iter()
                .filter_map(|(op, _)| match op {
                    Op::Put { lease, .. } => Some(*lease),
                    Op::Delete { .. } => None,
                })
                .collect();
            for lease in used {
                self.lease_gone(lease);
            }
        } else if !refused && !only_digests {
            let delay = self.retry.as_ref().map_or(RETRY_MIN, |r| (r.delay * 2).min(RETRY_MAX));
            self.retry = Some(Retry { at: now + delay, delay });
        }
        let alone = ops.len() == 1;
        for (op, origin) in ops {
            let (key, written) = match op {
                Op::Put { key, value, lease } => {
                    self.leases.unreserve(lease);
                    (key, Some(value))
                }
                Op::Delete { key } => (key, None),
            };
            let still_wanted = self.keys.get(&key).is_some_and(|state| state.desired == written);
            if let Some(origin) = origin.filter(|_| still_wanted) {
                self.origins.entry(key.clone()).or_insert(origin);
            }
            if !refused && !lease_missing {
                self.keys.set_uncertain(&key, true);
            }
            let Some(state) = self.keys.get_mut(&key) else { continue };
            // A digest that cannot be written must not hold back the data.
            if refused || (only_digests && !lease_missing) {
                state.trouble = Some(Trouble::refused(state.trouble, alone, now));
            }
            self.keys.landed(&key);
        }
    }

    /// A lease was granted.
    pub fn granted(&mut self, lease: i64, ttl: Duration, now: Instant) {
        self.leases.granted(lease, ttl, now);
    }

    /// Granting failed; it is asked for again after a while.
    pub fn grant_failed(&mut self, error: &str, now: Instant) {
        self.status.last_error = error.to_string();
        self.leases.grant_failed();
        let delay = self.retry.as_ref().map_or(RETRY_MIN, |r| (r.delay * 2).min(RETRY_MAX));
        self.retry = Some(Retry { at: now + delay, delay });
    }

    /// A lease was refreshed.
    pub fn lease_alive(&mut self, lease: i64, ttl: Duration, now: Instant) {
        if self.leases.alive(lease, ttl, now) {
            // Adopted: keys that hang on it are as they should be.
            self.touch_lease(lease);
        }
    }

    /// A lease does not exist any more; its keys are written again under another.
    pub fn lease_gone(&mut self, lease: i64) {
        if self.leases.gone(lease) {
            self.touch_lease(lease);
        }
    }

    /// Whether a lease lives is unknown; it is asked again soon.
    pub fn keep_alive_failed(&mut self, lease: i64, now: Instant) {
        self.leases.unknown(lease, now);
    }

    /// Progress so far.
    pub fn status(&self) -> PublisherStatus {
        let mut status = self.status.clone();
        self.update(&mut status);
        status
    }

    /// Brings `status`, which is of this publisher or new, up to date; tells whether that changed it. It is
    /// asked for all the time, so it copies nothing that is the same.
    pub fn update(&self, status: &mut PublisherStatus) -> bool {
        let sizes = [self.keys.pending(), self.leases.len()];
        let sums = [self.status.written, self.status.deleted, self.status.repaired];
        let mut changed = sizes != [status.pending, status.leases]
            || sums != [status.written, status.deleted, status.repaired];
        [status.pending, status.leases] = sizes;
        [status.written, status.deleted, status.repaired] = sums;
        if status.last_error != self.status.last_error {
            status.last_error.clone_from(&self.status.last_error);
            changed = true;
        }
        for (index, owned) in self.spec.owned.iter().enumerate() {
            let now = self.is_synced(index);
            match status.synced.get_mut(&owned.prefix) {
                Some(known) => changed |= std::mem::replace(known, now) != now,
                None => {
                    status.synced.insert(owned.prefix.clone(), now);
                    changed = true;
                }
            }
        }
        changed
    }

    /// Everything owned is complete, written, and its canaries are too.
    pub fn is_flushed(&self) -> bool {
        (0..self.complete.len()).all(|index| self.is_synced(index))
    }

    /// Nothing is left to state.
    #[cfg(test)]
    pub(super) fn all_stated(&self) -> bool {
        let stands = |index: &usize| {
            let key = self.spec.owned[*index].digest.as_deref().and_then(|key| self.keys.get(key));
            key.is_some_and(|key| key.desired.is_some() && key.is_clean())
        };
        self.digests.active().is_empty()
            && (0..self.complete.len()).filter(|index| self.digests.has(*index)).all(|index| stands(&index))
    }

    /// Stream `index` has listed the present etcd.
    fn is_listed(&self, index: usize) -> bool {
        self.streams.get(index).is_some_and(|s| s.listed && s.generation == self.generation)
    }

    /// Everything of the prefix but its canary is as desired.
    fn is_settled(&self, index: usize) -> bool {
        self.complete[index] && self.keys.unsettled(index) == 0 && self.is_listed(index)
    }

    fn is_synced(&self, index: usize) -> bool {
        let canary = self.spec.owned[index].canary.as_deref();
        let canary_stands =
            canary.is_none_or(|c| self.keys.get(c).is_some_and(|k| k.actual.is_some() && k.is_clean()));
        self.is_settled(index) && canary_stands
    }

    /// The stream that tells of keys of a class.
    fn stream_of(&self, class: Class) -> Option<usize> {
        match class {
            Class::Owned(index) => Some(index),
            Class::Canary(_) => Some(self.complete.len()),
            Class::Digest(index) => Some(self.digest_streams[index]),
            Class::Heartbeat => None,
        }
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

    fn touch_lease(&mut self, lease: i64) {
        self.keys.touch_all(|key| key.actual.as_ref().is_some_and(|a| a.lease == lease));
    }

    /// Wants the canary of a prefix once everything else of it is settled.
    fn check_canary(&mut self, index: usize) {
        let Some(canary) = self.spec.owned[index].canary.clone() else { return };
        if self.is_settled(index) && self.is_listed(self.complete.len()) {
            self.keys.entry(&canary, Class::Canary(index));
            self.keys.touch(&canary);
        }
    }

    fn beat(&mut self, now: Instant, wall: &str) {
        let Some(every) = self.spec.heartbeat else { return };
        let listed = (0..self.complete.len()).all(|index| self.is_listed(index));
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
            if !self.is_listed(index) || !self.is_listed(self.digest_streams[index]) {
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

    /// The next transaction: keys that truly differ, up to the limits of one request.
    fn batch(&mut self, now: Instant, wall: &str) -> Vec<Op> {
        let mut ops: Vec<Op> = Vec::new();
        let mut bytes = 0;
        let mut digests = false;
        while ops.len() < self.spec.batch.clamp(1, 128) {
            // Others are touched again when they are listed, or settled.
            let Some((class, key)) = self.keys.first_dirty(|class| self.may_write(class)) else { break };
            let trouble = self.keys.get(&key).and_then(|s| s.trouble);
            let held = trouble.and_then(|t| t.holds_until(now));
            match self.difference(class, &key, wall) {
                Difference::None => {
                    if let Some(state) = self.keys.get_mut(&key) {
                        state.settled = true;
                        if let Class::Owned(index) = class {
                            let (desired, revision) = (state.desired.as_deref(), state.revision);
                            self.digests.confirm(index, &key, &mut state.ours, desired, revision);
                        }
                    }
                    self.origins.remove(&key);
                    self.keys.place(&key, Place::Clean);
                    if let Class::Owned(index) = class {
                        self.check_canary(index);
                    }
                }
                Difference::Asking => self.keys.place(&key, Place::Asking),
                // All others would wait for it, too.
                Difference::NoLease => break,
                Difference::Write(_) if held.is_some() => {
                    if let Some(at) = held {
                        self.keys.place(&key, Place::Waiting(at));
                    }
                }
                Difference::Write(op) => {
                    let alone = trouble.is_some_and(|t| t.alone);
                    // Should etcd not take digests, data must not fail with them.
                    let mixed = matches!(class, Class::Digest(_)) && !digests;
                    if !ops.is_empty() && (alone || mixed || bytes + op.bytes() > TXN_BYTES) {
                        break;
                    }
                    if let Op::Put { lease, .. } = &op {
                        self.leases.reserve(*lease);
                    }
                    bytes += op.bytes();
                    digests = matches!(class, Class::Digest(_));
                    self.keys.place(&key, Place::InFlight);
                    ops.push(op);
                    if alone {
                        break;
                    }
                }
            }
        }
        ops
    }

    /// Before a prefix is listed nobody knows what differs; a canary waits for its prefix.
    fn may_write(&self, class: Class) -> bool {
        match class {
            Class::Owned(index) => self.is_listed(index),
            Class::Canary(index) => self.is_settled(index) && self.is_listed(self.complete.len()),
            Class::Digest(index) => self.is_listed(self.digest_streams[index]),
            Class::Heartbeat => true,
        }
    }

    fn difference(&mut self, class: Class, key: &Arc<str>, wall: &str) -> Difference {
        let Some(state) = self.keys.get(key) else { return Difference::None };
        let desired = match class {
            // Any value will do: it says "since then", and a standing one was written by the same rule.
            Class::Canary(_) => {
                let standing = state.actual.as_ref().map(|a| a.value.clone());
                Some(standing.unwrap_or_else(|| wall.as_bytes().into()))
            }
            Class::Owned(_) | Class::Heartbeat | Class::Digest(_) => state.desired.clone(),
        };
        let Some(value) = desired else {
            let complete = match class {
                Class::Owned(index) => self.complete[index],
                Class::Canary(_) | Class::Heartbeat | Class::Digest(_) => false,
            };
            return match &state.actual {
                actual if complete && (actual.is_some() || state.is_uncertain()) => {
                    Difference::Write(Op::Delete { key: key.clone() })
                }
                _ => Difference::None,
            };
        };
        let same = state.actual.as_ref().filter(|a| a.value == value && !state.is_uncertain());
        if let Some(actual) = same {
            match self.leases.state(actual.lease) {
                LeaseState::Ours => return Difference::None,
                LeaseState::Asked => return Difference::Asking,
                LeaseState::Unknown => {
                    self.leases.adopt(actual.lease);
                    return Difference::Asking;
                }
                LeaseState::Gone => {}
            }
        }
        match self.leases.pick(state.actual.as_ref().map(|a| a.lease), self.keys.dirty()) {
            Some(lease) => Difference::Write(Op::Put { key: key.clone(), value, lease }),
            None => Difference::NoLease,
        }
    }
}

/// The longest common prefix of `keys` that ends in `/`.
fn common_folder<'a>(mut keys: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut common = keys.next()?.to_string();
    for key in keys {
        let same = common.bytes().zip(key.bytes()).take_while(|(a, b)| a == b).count();
        common.truncate(same);
    }
    common.truncate(common.rfind('/')? + 1);
    Some(common)
}

/// Adds the folders of all digests to `folders`; gives for each owned prefix the index of its digest's.
fn add_digest_folders(spec: &PublisherSpec, folders: &mut Vec<String>) -> Vec<usize> {
    let mut index_of = |key: &str| {
        let folder = &key[..key.rfind('/').map_or(0, |at| at + 1)];
        folders.iter().position(|known| known == folder).unwrap_or_else(|| {
            folders.push(folder.to_owned());
            folders.len() - 1
        })
    };
    // Of a prefix without digest nobody asks.
    spec.owned.iter().map(|owned| owned.digest.as_deref().map_or(0, &mut index_of)).collect()
}

enum Difference {
    None,
    Write(Op),
    /// None if its lease is found alive.
    Asking,
    /// Differs, but waits for a lease to be granted.
    NoLease,
}
