//! What to write, and when: the publisher without I/O.
//!
//! In come desired values ([`Core::set`]), what stands in etcd ([`Core::observe`]), the fate of earlier
//! effects, and the time. Out come [`Effect`]s from [`Core::poll`]. Level-triggered: a key is looked at
//! again whenever its desired or its actual side changed, and written only if the two differ. So a
//! restart over an unchanged etcd writes nothing, and whatever somebody else changes is put right.
//!
//! Leases: every key is written with one. The leases found on keys that are as desired are adopted
//! (that is what makes restarts silent); new ones are granted when those are full. etcd's cost per
//! attached write grows with the keys of a lease (etcd issue 15993), hence [`KEYS_PER_LEASE`].
//!
//! Canaries: the canary of a prefix is written when its desired state was declared complete and every
//! key of it stands in this etcd. A re-created etcd has neither keys nor canaries, so the same rule
//! fills it again in the right order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::leases::{LeaseState, Leases};

/// Keys attached to one lease at most, as Cilium does.
pub const KEYS_PER_LEASE: usize = 1000;
/// Bytes of keys and values in one transaction; etcd refuses requests above 1.5 MiB.
const TXN_BYTES: usize = 512 * 1024;
/// Transactions under way at once.
const TXNS_IN_FLIGHT: usize = 4;
/// A failed transaction is tried again after this, doubling up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A key that somebody else keeps changing is repaired at most this often, doubling to [`RETRY_MAX`].
const REPAIR_MIN: Duration = Duration::from_millis(100);
/// A key left alone for this long is not fought over any more.
const REPAIR_CALM: Duration = Duration::from_secs(30);

/// What a publisher owns and how it writes.
#[derive(Clone, Debug)]
pub struct PublisherSpec {
    /// The prefixes and single keys that this publisher alone writes.
    pub owned: Vec<OwnedPrefix>,
    /// Time to live of the leases that it grants.
    pub lease_ttl: Duration,
    /// Keep [`crate::key::HEARTBEAT`] beating.
    pub heartbeat: Option<Duration>,
    /// Operations in one transaction, at most 128 (etcd's `--max-txn-ops`).
    pub batch: usize,
}

impl Default for PublisherSpec {
    /// Nothing owned; leases of 15 minutes and a heartbeat a minute, as Cilium's exporter has.
    fn default() -> Self {
        Self {
            owned: Vec::new(),
            lease_ttl: Duration::from_secs(900),
            heartbeat: Some(Duration::from_secs(60)),
            batch: 128,
        }
    }
}

/// A prefix (ends in `/`) or a single key (does not) that a publisher owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedPrefix {
    /// What the owned keys start with, or the one key.
    pub prefix: String,
    /// Key written once everything under the prefix has been.
    pub canary: Option<String>,
}

impl OwnedPrefix {
    /// Whether `key` belongs to it.
    pub fn covers(&self, key: &str) -> bool {
        if self.prefix.ends_with('/') { key.starts_with(&self.prefix) } else { key == self.prefix }
    }
}

/// What the driver has to do. Each `Txn`, `Grant` and `KeepAlive` must be answered once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write these in one transaction; answer with [`Core::txn_done`] or [`Core::txn_failed`].
    Txn {
        /// Names it in the answer.
        id: u64,
        /// No key occurs twice.
        ops: Vec<Op>,
    },
    /// Grant a lease of this time to live; answer with [`Core::granted`] or [`Core::grant_failed`].
    Grant {
        /// Time to live.
        ttl: Duration,
    },
    /// Refresh a lease; answer with [`Core::lease_alive`] or [`Core::lease_gone`], or
    /// [`Core::keep_alive_failed`] if nobody knows.
    KeepAlive {
        /// etcd's lease ID.
        lease: i64,
    },
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Put `value` under `lease`.
    Put {
        /// Key.
        key: Arc<str>,
        /// Value.
        value: Arc<[u8]>,
        /// Lease that the key is attached to.
        lease: i64,
    },
    /// Delete the key.
    Delete {
        /// Key.
        key: Arc<str>,
    },
}

impl Op {
    fn key(&self) -> &Arc<str> {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

/// What a stream (see [`Core::streams`]) says of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// What follows comes from another etcd than before (or the first): revisions start over.
    Etcd {
        /// Counts the etcds behind the connection, the same number in all streams.
        generation: u64,
    },
    /// A key stands there.
    Present {
        /// Key.
        key: String,
        /// Value.
        value: Vec<u8>,
        /// Lease it is attached to, 0 if none.
        lease: i64,
        /// Revision of its last change.
        revision: i64,
    },
    /// A key is gone.
    Absent {
        /// Key.
        key: String,
        /// Revision of its deletion, or of the list that no longer had it.
        revision: i64,
    },
    /// The stream's prefix has been listed completely: every key that stands there was told since the
    /// last `Listed`.
    Listed {
        /// Revision of the list.
        revision: i64,
    },
}

/// Progress of a publisher.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublisherStatus {
    /// Keys that differ from etcd, or may.
    pub pending: usize,
    /// Keys put so far.
    pub written: u64,
    /// Keys deleted so far.
    pub deleted: u64,
    /// Of these, how many put right what somebody else did.
    pub repaired: u64,
    /// Leases in use.
    pub leases: usize,
    /// Newest failure, "" if none since the last success.
    pub last_error: String,
    /// By owned prefix: complete, flushed, and its canary (if it has one) written.
    pub synced: BTreeMap<String, bool>,
}

/// State of a publisher; see the module's documentation.
pub struct Core {
    spec: PublisherSpec,
    /// One for each owned prefix, then one for all canaries.
    streams: Vec<Stream>,
    generation: u64,
    prefixes: Vec<PrefixState>,
    keys: HashMap<Arc<str>, KeyState>,
    /// Keys to look at, in the order in which they are to be written: by class, then name.
    dirty: BTreeSet<(Class, Arc<str>)>,
    /// Keys that wait until a time.
    waiting: BTreeSet<(Instant, Arc<str>)>,
    in_flight: HashMap<u64, Vec<Op>>,
    next_txn: u64,
    leases: Leases,
    retry: Option<Retry>,
    heartbeat_due: Option<Instant>,
    status: PublisherStatus,
}

/// In this order keys are written: configuration first, canaries after all data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Owned(usize),
    Canary(usize),
    Heartbeat,
}

struct Stream {
    prefix: String,
    generation: u64,
    listed: bool,
    /// Lists completed so far.
    lists: u64,
}

#[derive(Default)]
struct PrefixState {
    /// The desired state was declared complete.
    complete: bool,
    /// Keys dirty, waiting or in flight.
    unsettled: usize,
}

struct KeyState {
    class: Class,
    desired: Option<Arc<[u8]>>,
    actual: Option<Actual>,
    /// Revision of the newest thing known of this key.
    revision: i64,
    /// [`Stream::lists`] when its stream last told of it.
    told: u64,
    /// A write of it may or may not have been committed: only another write makes sure.
    uncertain: bool,
    place: Place,
    /// It was as desired once: a later difference is somebody else's doing unless `set` made it.
    settled: bool,
    /// A failing or contended key is written alone and not before its time.
    trouble: Option<Trouble>,
}

#[derive(Clone, PartialEq, Eq)]
struct Actual {
    value: Arc<[u8]>,
    lease: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// As desired, as far as is known.
    Clean,
    Dirty,
    Waiting(Instant),
    /// In a transaction; looked at again when that is answered.
    InFlight,
}

#[derive(Clone, Copy)]
struct Trouble {
    delay: Duration,
    last: Instant,
    alone: bool,
}

struct Retry {
    at: Instant,
    delay: Duration,
}

impl Core {
    /// A publisher that wants nothing yet and knows nothing of etcd.
    pub fn new(spec: PublisherSpec) -> Self {
        let prefixes = spec.owned.iter().map(|_| PrefixState::default()).collect();
        let leases = Leases::new(spec.lease_ttl);
        let canaries = spec.owned.iter().filter_map(|o| o.canary.as_deref());
        let streams = spec
            .owned
            .iter()
            .map(|o| o.prefix.clone())
            .chain(common_folder(canaries))
            .map(|prefix| Stream { prefix, generation: 0, listed: false, lists: 0 })
            .collect();
        let mut core = Self {
            streams,
            generation: 0,
            prefixes,
            keys: HashMap::new(),
            dirty: BTreeSet::new(),
            waiting: BTreeSet::new(),
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

    /// Wants `key` to have `value`, or (`None`) not to be there. A key outside of the owned prefixes is
    /// refused: `false`.
    pub fn set(&mut self, key: &str, value: Option<Vec<u8>>) -> bool {
        let Some(class) = self.owned_class(key) else { return false };
        if value.is_none() && !self.keys.contains_key(key) {
            return true;
        }
        let value: Option<Arc<[u8]>> = value.map(Into::into);
        let state = self.entry(key, class);
        if state.desired != value {
            state.desired = value;
            state.settled = false;
            self.touch(key);
        }
        true
    }

    /// Declares the desired state of an owned prefix complete: what else stands under it may go, and
    /// once all is written its canary follows.
    pub fn initial_done(&mut self, prefix: &str) {
        let Some(index) = self.spec.owned.iter().position(|o| o.prefix == prefix) else { return };
        if !std::mem::replace(&mut self.prefixes[index].complete, true) {
            self.touch_prefix(index);
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
                let lists = state.lists;
                self.saw(&key, Some((value, lease)), revision, now);
                if let Some(key) = self.keys.get_mut(key.as_str()) {
                    key.told = lists;
                }
            }
            Observed::Absent { key, revision } => self.saw(&key, None, revision, now),
            Observed::Listed { revision } => {
                state.listed = true;
                state.lists += 1;
                let round = state.lists - 1;
                self.forget_untold(stream, round, revision, now);
                for index in 0..self.prefixes.len() {
                    if index == stream {
                        self.touch_prefix(index);
                    }
                    self.check_canary(index);
                }
            }
            Observed::Etcd { .. } => {}
        }
    }

    /// A key that we wrote and that vanished before its stream ever saw it is in no list and no deletion:
    /// what a complete list did not tell of is not there.
    fn forget_untold(&mut self, stream: usize, round: u64, revision: i64, now: Instant) {
        let canaries = self.prefixes.len();
        let of_stream = |class: Class| match class {
            Class::Owned(index) => index == stream,
            Class::Canary(_) => stream == canaries,
            Class::Heartbeat => false,
        };
        let gone: Vec<Arc<str>> = self
            .keys
            .iter()
            .filter(|(_, s)| {
                of_stream(s.class) && s.actual.is_some() && s.told != round && s.revision < revision
            })
            .map(|(k, _)| k.clone())
            .collect();
        for key in gone {
            self.saw(&key, None, revision, now);
        }
    }

    /// Nothing known of the old etcd counts in the new one: neither revisions nor leases nor writes under way.
    fn start_over(&mut self) {
        self.leases.forget_all();
        self.in_flight.clear();
        self.retry = None;
        self.heartbeat_due = None;
        let all: Vec<Arc<str>> = self.keys.keys().cloned().collect();
        for key in all {
            if let Some(state) = self.keys.get_mut(&key) {
                state.actual = None;
                state.revision = 0;
                state.settled = false;
                state.trouble = None;
                state.uncertain = false;
            }
            self.place(&key, Place::Dirty);
        }
    }

    /// What is to be done at `now`; `wall` is the wall clock as RFC 3339 (values of canaries and heartbeat).
    pub fn poll(&mut self, now: Instant, wall: &str) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.wake(now);
        for lease in self.leases.due(now) {
            effects.push(Effect::KeepAlive { lease });
        }
        self.beat(now, wall);
        if self.retry.as_ref().is_some_and(|r| r.at > now) {
            return effects;
        }
        while self.in_flight.len() < TXNS_IN_FLIGHT {
            let ops = self.batch(now, wall);
            if ops.is_empty() {
                break;
            }
            let id = self.next_txn;
            self.next_txn += 1;
            effects.push(Effect::Txn { id, ops: ops.clone() });
            self.in_flight.insert(id, ops);
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
        let waiting = self.waiting.first().map(|(at, _)| *at);
        [retry, waiting, self.leases.next_due(), self.heartbeat_due].into_iter().flatten().min()
    }

    /// A transaction was committed at `revision`.
    pub fn txn_done(&mut self, id: u64, revision: i64) {
        let Some(ops) = self.in_flight.remove(&id) else { return };
        self.retry = None;
        self.status.last_error.clear();
        for op in ops {
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
            if let Some(state) = self.keys.get_mut(&key) {
                // A watch may have told of something newer before this answer came.
                if revision > state.revision {
                    Self::move_lease(&mut self.leases, state.actual.as_ref(), written.as_ref());
                    state.actual = written;
                    state.revision = revision;
                }
                state.trouble = state.trouble.filter(|t| !t.alone);
                state.uncertain = false;
            }
            self.landed(&key);
        }
    }

    /// A transaction failed, or nobody knows whether it was committed; `lease_missing` if etcd said that a
    /// lease of it does not exist; `refused` if etcd will refuse the same request again (too large ...).
    pub fn txn_failed(&mut self, id: u64, error: &str, lease_missing: bool, refused: bool, now: Instant) {
        let Some(ops) = self.in_flight.remove(&id) else { return };
        self.status.last_error = error.to_string();
        if lease_missing {
            let used: BTreeSet<i64> = ops
                .iter()
                .filter_map(|op| match op {
                    Op::Put { lease, .. } => Some(*lease),
                    Op::Delete { .. } => None,
                })
                .collect();
            for lease in used {
                self.lease_gone(lease);
            }
        } else if !refused {
            let delay = self.retry.as_ref().map_or(RETRY_MIN, |r| (r.delay * 2).min(RETRY_MAX));
            self.retry = Some(Retry { at: now + delay, delay });
        }
        let alone = ops.len() == 1;
        for op in ops {
            let key = op.key().clone();
            if let Op::Put { lease, .. } = op {
                self.leases.unreserve(lease);
            }
            let Some(state) = self.keys.get_mut(&key) else { continue };
            state.uncertain |= !refused && !lease_missing;
            if refused {
                // One bad key must not hold back its neighbours: from now on each goes alone, and the
                // one that fails alone waits longer and longer.
                let delay = match state.trouble {
                    Some(t) if alone => (t.delay * 2).min(RETRY_MAX),
                    _ => RETRY_MIN,
                };
                state.trouble = Some(Trouble { delay, last: now, alone: true });
            }
            self.landed(&key);
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
        let pending = self.prefixes.iter().map(|p| p.unsettled).sum();
        let mut status = PublisherStatus { pending, leases: self.leases.len(), ..self.status.clone() };
        for (index, owned) in self.spec.owned.iter().enumerate() {
            status.synced.insert(owned.prefix.clone(), self.is_synced(index));
        }
        status
    }

    /// Everything owned is complete, written, and its canaries are too.
    pub fn is_flushed(&self) -> bool {
        (0..self.prefixes.len()).all(|index| self.is_synced(index))
    }

    /// Stream `index` has listed the present etcd.
    fn is_listed(&self, index: usize) -> bool {
        self.streams.get(index).is_some_and(|s| s.listed && s.generation == self.generation)
    }

    /// Everything of the prefix but its canary is as desired.
    fn is_settled(&self, index: usize) -> bool {
        let state = &self.prefixes[index];
        state.complete && state.unsettled == 0 && self.is_listed(index)
    }

    fn is_synced(&self, index: usize) -> bool {
        let canary = self.spec.owned[index].canary.as_deref();
        let canary_stands = canary
            .is_none_or(|c| self.keys.get(c).is_some_and(|k| k.actual.is_some() && k.place == Place::Clean));
        self.is_settled(index) && canary_stands
    }

    fn owned_class(&self, key: &str) -> Option<Class> {
        self.spec.owned.iter().position(|o| o.covers(key)).map(Class::Owned)
    }

    fn class_of(&self, key: &str) -> Option<Class> {
        let canary =
            || self.spec.owned.iter().position(|o| o.canary.as_deref() == Some(key)).map(Class::Canary);
        let heartbeat =
            || (self.spec.heartbeat.is_some() && key == crate::key::HEARTBEAT).then_some(Class::Heartbeat);
        self.owned_class(key).or_else(canary).or_else(heartbeat)
    }

    fn entry(&mut self, key: &str, class: Class) -> &mut KeyState {
        self.keys.entry(key.into()).or_insert(KeyState {
            class,
            desired: None,
            actual: None,
            revision: 0,
            told: 0,
            uncertain: false,
            place: Place::Clean,
            settled: false,
            trouble: None,
        })
    }

    fn saw(&mut self, key: &str, present: Option<(Vec<u8>, i64)>, revision: i64, now: Instant) {
        let Some(class) = self.class_of(key) else { return };
        if present.is_none() && !self.keys.contains_key(key) {
            return;
        }
        let state = self.entry(key, class);
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
            let delay = match state.trouble {
                Some(t) if now.duration_since(t.last) < REPAIR_CALM => (t.delay * 2).min(RETRY_MAX),
                _ => REPAIR_MIN / 2,
            };
            state.trouble = Some(Trouble { delay, last: now, alone: false });
            self.status.repaired += 1;
        }
        Self::move_lease(&mut self.leases, before.as_ref(), actual.as_ref());
        self.touch(key);
    }

    fn move_lease(leases: &mut Leases, before: Option<&Actual>, after: Option<&Actual>) {
        if let Some(lease) = after.map(|a| a.lease) {
            leases.attach(lease);
        }
        if let Some(lease) = before.map(|a| a.lease) {
            leases.detach(lease);
        }
    }

    /// Looks at a key again.
    fn touch(&mut self, key: &str) {
        let Some((name, state)) = self.keys.get_key_value(key) else { return };
        if state.place == Place::Clean {
            let name = name.clone();
            self.place(&name, Place::Dirty);
        }
    }

    fn touch_prefix(&mut self, index: usize) {
        let all: Vec<Arc<str>> = self
            .keys
            .iter()
            .filter(|(_, s)| s.class == Class::Owned(index))
            .map(|(k, _)| k.clone())
            .collect();
        for key in all {
            self.touch(&key);
        }
    }

    fn touch_lease(&mut self, lease: i64) {
        let all: Vec<Arc<str>> = self
            .keys
            .iter()
            .filter(|(_, s)| s.actual.as_ref().is_some_and(|a| a.lease == lease))
            .map(|(k, _)| k.clone())
            .collect();
        for key in all {
            self.touch(&key);
        }
    }

    /// The only place where a key moves between sets.
    fn place(&mut self, key: &Arc<str>, to: Place) {
        let Some(state) = self.keys.get_mut(key) else { return };
        let class = state.class;
        let from = std::mem::replace(&mut state.place, to);
        match from {
            Place::Dirty => drop(self.dirty.remove(&(class, key.clone()))),
            Place::Waiting(at) => drop(self.waiting.remove(&(at, key.clone()))),
            Place::Clean | Place::InFlight => {}
        }
        match to {
            Place::Dirty => drop(self.dirty.insert((class, key.clone()))),
            Place::Waiting(at) => drop(self.waiting.insert((at, key.clone()))),
            Place::Clean | Place::InFlight => {}
        }
        let change = isize::from(to != Place::Clean) - isize::from(from != Place::Clean);
        Self::count(&mut self.prefixes, class, change);
        if to == Place::Clean {
            let gone = state.desired.is_none() && state.actual.is_none();
            if gone {
                self.keys.remove(key);
            }
            if let Class::Owned(index) = class {
                self.check_canary(index);
            }
        }
    }

    fn count(prefixes: &mut [PrefixState], class: Class, change: isize) {
        if let Class::Owned(index) = class {
            prefixes[index].unsettled = prefixes[index].unsettled.saturating_add_signed(change);
        }
    }

    /// A key came back from a transaction.
    fn landed(&mut self, key: &Arc<str>) {
        if self.keys.get(key).is_some_and(|s| s.place == Place::InFlight) {
            self.place(key, Place::Dirty);
        }
    }

    fn wake(&mut self, now: Instant) {
        while let Some((at, key)) = self.waiting.first().cloned() {
            if at > now {
                break;
            }
            self.place(&key, Place::Dirty);
        }
    }

    /// Wants the canary of a prefix once everything else of it is settled.
    fn check_canary(&mut self, index: usize) {
        let Some(canary) = self.spec.owned[index].canary.clone() else { return };
        if self.is_settled(index) && self.is_listed(self.prefixes.len()) {
            self.entry(&canary, Class::Canary(index));
            self.touch(&canary);
        }
    }

    fn beat(&mut self, now: Instant, wall: &str) {
        let Some(every) = self.spec.heartbeat else { return };
        let listed = (0..self.prefixes.len()).all(|index| self.is_listed(index));
        if listed && self.heartbeat_due.is_none_or(|at| at <= now) {
            self.heartbeat_due = Some(now + every);
            let state = self.entry(crate::key::HEARTBEAT, Class::Heartbeat);
            state.desired = Some(wall.as_bytes().into());
            state.settled = false;
            self.touch(crate::key::HEARTBEAT);
        }
    }

    /// The next transaction: keys that truly differ, up to the limits of one request.
    fn batch(&mut self, now: Instant, wall: &str) -> Vec<Op> {
        let mut ops: Vec<Op> = Vec::new();
        let mut bytes = 0;
        let mut skipped = Vec::new();
        while ops.len() < self.spec.batch.clamp(1, 128) {
            let Some((class, key)) = self.dirty.first().cloned() else { break };
            let held = self.keys.get(&key).and_then(|s| s.trouble).and_then(|t| {
                let at = t.last + t.delay;
                (at > now).then_some(at)
            });
            if !self.may_write(class) {
                // Listed or settled later; then it is touched again.
                self.dirty.remove(&(class, key.clone()));
                skipped.push((class, key));
                continue;
            }
            match self.difference(class, &key, wall) {
                Difference::None => {
                    if let Some(state) = self.keys.get_mut(&key) {
                        state.settled = true;
                    }
                    self.place(&key, Place::Clean);
                }
                Difference::NoLease => {
                    self.dirty.remove(&(class, key.clone()));
                    skipped.push((class, key));
                }
                Difference::Write(_) if held.is_some() => {
                    if let Some(at) = held {
                        self.place(&key, Place::Waiting(at));
                    }
                }
                Difference::Write(op) => {
                    let alone = self.keys.get(&key).and_then(|s| s.trouble).is_some_and(|t| t.alone);
                    if !ops.is_empty() && (alone || bytes + op.bytes() > TXN_BYTES) {
                        break;
                    }
                    if let Op::Put { lease, .. } = &op {
                        self.leases.reserve(*lease);
                    }
                    bytes += op.bytes();
                    self.place(&key, Place::InFlight);
                    ops.push(op);
                    if alone {
                        break;
                    }
                }
            }
        }
        self.dirty.extend(skipped);
        ops
    }

    /// Before a prefix is listed nobody knows what differs; a canary waits for its prefix.
    fn may_write(&self, class: Class) -> bool {
        match class {
            Class::Owned(index) => self.is_listed(index),
            Class::Canary(index) => self.is_settled(index) && self.is_listed(self.prefixes.len()),
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
            Class::Owned(_) | Class::Heartbeat => state.desired.clone(),
        };
        let Some(value) = desired else {
            let complete = match class {
                Class::Owned(index) => self.prefixes[index].complete,
                Class::Canary(_) | Class::Heartbeat => false,
            };
            return match &state.actual {
                actual if complete && (actual.is_some() || state.uncertain) => {
                    Difference::Write(Op::Delete { key: key.clone() })
                }
                _ => Difference::None,
            };
        };
        let same = state.actual.as_ref().filter(|a| a.value == value && !state.uncertain);
        if let Some(actual) = same {
            match self.leases.state(actual.lease) {
                LeaseState::Ours => return Difference::None,
                LeaseState::Asked => return Difference::NoLease,
                LeaseState::Unknown => {
                    self.leases.adopt(actual.lease);
                    return Difference::NoLease;
                }
                LeaseState::Gone => {}
            }
        }
        match self.leases.pick(state.actual.as_ref().map(|a| a.lease)) {
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

enum Difference {
    None,
    Write(Op),
    /// Differs, but waits for a lease to be granted or to be found alive.
    NoLease,
}
