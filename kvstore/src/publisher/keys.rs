//! The keys that a publisher knows, and where each stands on its way to being as desired.
//!
//! A key is clean (as desired, as far as is known), dirty (to be looked at), waiting (to be looked at
//! later, or when its lease is known to live) or in a transaction. [`Keys::place`] alone moves it, so that
//! the order in which dirty keys are written and the count of unsettled ones always fit. No step costs
//! more the more keys there are, but those that concern all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::core::{RETRY_MAX, RETRY_MIN};

/// A key that somebody else keeps changing is repaired at most this often, doubling to [`RETRY_MAX`].
const REPAIR_MIN: Duration = Duration::from_millis(100);
/// A key left alone for this long is not fought over any more.
const REPAIR_CALM: Duration = Duration::from_secs(30);

/// In this order keys are written: configuration first, canaries after all data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Owned(usize),
    Canary(usize),
    Heartbeat,
    /// Last: what is stated of a prefix never delays what stands in it.
    Digest(usize),
}

/// All keys with something desired, standing or unknown.
pub(super) struct Keys {
    known: HashMap<Arc<str>, KeyState>,
    /// Keys to look at, in the order in which they are to be written: by class, then by age.
    dirty: BTreeMap<Class, VecDeque<Arc<str>>>,
    /// Keys that wait until a time.
    waiting: BTreeSet<(Instant, Arc<str>)>,
    /// By owned prefix: keys dirty, waiting or in flight.
    unsettled: Vec<usize>,
    /// By owned prefix: keys of which nobody can tell right now what stands in etcd.
    open: Vec<usize>,
}

pub(super) struct KeyState {
    pub(super) class: Class,
    pub(super) desired: Option<Arc<[u8]>>,
    pub(super) actual: Option<Actual>,
    /// Revision of the newest thing known of this key.
    pub(super) revision: i64,
    /// The last word of its stream is that it stands there.
    pub(super) told: bool,
    /// Hash of the value that stands there by our will; none if we want none, or have not written it yet.
    pub(super) ours: Option<u64>,
    /// A write of it may or may not have been committed: only another write makes sure.
    uncertain: bool,
    place: Place,
    /// It was as desired once: a later difference is somebody else's doing unless `set` made it.
    pub(super) settled: bool,
    /// A failing or contended key is not written before its time.
    pub(super) trouble: Option<Trouble>,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) struct Actual {
    pub(super) value: Arc<[u8]>,
    pub(super) lease: i64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// As desired, as far as is known.
    Clean,
    Dirty,
    Waiting(Instant),
    /// As desired, if its lease lives; looked at again when that is known.
    Asking,
    /// In a transaction; looked at again when that is answered.
    InFlight,
}

/// Why a key is held back.
#[derive(Clone, Copy)]
pub(super) struct Trouble {
    delay: Duration,
    last: Instant,
    /// It goes into a transaction of its own.
    pub(super) alone: bool,
}

impl Keys {
    /// None yet; `prefixes` are owned.
    pub(super) fn new(prefixes: usize) -> Self {
        Self {
            known: HashMap::new(),
            dirty: BTreeMap::new(),
            waiting: BTreeSet::new(),
            unsettled: vec![0; prefixes],
            open: vec![0; prefixes],
        }
    }

    pub(super) fn entry(&mut self, key: &str, class: Class) -> &mut KeyState {
        self.known.entry(key.into()).or_insert(KeyState {
            class,
            desired: None,
            actual: None,
            revision: 0,
            told: false,
            ours: None,
            uncertain: false,
            place: Place::Clean,
            settled: false,
            trouble: None,
        })
    }

    pub(super) fn get_mut(&mut self, key: &str) -> Option<&mut KeyState> {
        self.known.get_mut(key)
    }

    /// Looks at a key again.
    pub(super) fn touch(&mut self, key: &str) {
        let Some((name, state)) = self.known.get_key_value(key) else { return };
        if matches!(state.place, Place::Clean | Place::Asking) {
            let name = name.clone();
            self.place(&name, Place::Dirty);
        }
    }

    /// Looks again at all keys of which `which` holds.
    pub(super) fn touch_all(&mut self, which: impl Fn(&KeyState) -> bool) {
        for key in self.names(which) {
            self.touch(&key);
        }
    }

    /// A key came back from a transaction.
    pub(super) fn landed(&mut self, key: &Arc<str>) {
        if self.known.get(key).is_some_and(|s| s.place == Place::InFlight) {
            self.place(key, Place::Dirty);
        }
    }

    /// Looks again at the keys that have waited long enough.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some((at, key)) = self.waiting.first().cloned() {
            if at > now {
                break;
            }
            self.place(&key, Place::Dirty);
        }
    }

    /// The only place where a key moves between sets. A clean key that neither stands nor should is forgotten.
    pub(super) fn place(&mut self, key: &Arc<str>, to: Place) {
        let Some(state) = self.known.get_mut(key) else { return };
        if state.place == to {
            return;
        }
        let class = state.class;
        let was_open = state.is_open();
        let from = std::mem::replace(&mut state.place, to);
        let forgotten = to == Place::Clean && state.desired.is_none() && state.actual.is_none();
        let is_open = state.is_open() && !forgotten;
        match from {
            Place::Dirty => self.take_from_queue(class, key),
            Place::Waiting(at) => drop(self.waiting.remove(&(at, key.clone()))),
            Place::Clean | Place::Asking | Place::InFlight => {}
        }
        match to {
            Place::Dirty => self.dirty.entry(class).or_default().push_back(key.clone()),
            Place::Waiting(at) => drop(self.waiting.insert((at, key.clone()))),
            Place::Clean | Place::Asking | Place::InFlight => {}
        }
        if let Class::Owned(index) = class {
            let change = isize::from(to != Place::Clean) - isize::from(from != Place::Clean);
            self.unsettled[index] = self.unsettled[index].saturating_add_signed(change);
        }
        self.count_open(class, was_open, is_open);
        if forgotten {
            self.known.remove(key);
        }
    }

    /// Whether a write of the key may or may not have been committed.
    pub(super) fn set_uncertain(&mut self, key: &str, uncertain: bool) {
        let Some(state) = self.known.get_mut(key) else { return };
        let was_open = state.is_open();
        state.uncertain = uncertain;
        let (class, is_open) = (state.class, state.is_open());
        self.count_open(class, was_open, is_open);
    }

    fn take_from_queue(&mut self, class: Class, key: &Arc<str>) {
        let Some(queue) = self.dirty.get_mut(&class) else { return };
        if queue.front() == Some(key) {
            queue.pop_front();
        } else if let Some(at) = queue.iter().position(|queued| queued == key) {
            // Nobody looks at keys out of turn.
            queue.remove(at);
        }
        if queue.is_empty() {
            // With its memory: what a first list needed is not needed again.
            self.dirty.remove(&class);
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&KeyState> {
        self.known.get(key)
    }

    /// The names of all keys of which `which` holds.
    pub(super) fn names(&self, which: impl Fn(&KeyState) -> bool) -> Vec<Arc<str>> {
        self.known.iter().filter(|(_, state)| which(state)).map(|(name, _)| name.clone()).collect()
    }

    /// The dirty key to be written first, of the classes that `may` be written.
    pub(super) fn first_dirty(&self, may: impl Fn(Class) -> bool) -> Option<(Class, Arc<str>)> {
        let (class, queue) = self.dirty.iter().find(|(class, _)| may(**class))?;
        Some((*class, queue.front()?.clone()))
    }

    /// Keys to look at.
    pub(super) fn dirty(&self) -> usize {
        self.dirty.values().map(VecDeque::len).sum()
    }

    /// When the next key has waited long enough.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        self.waiting.first().map(|(at, _)| *at)
    }

    /// Keys of an owned prefix that are not clean.
    pub(super) fn unsettled(&self, prefix: usize) -> usize {
        self.unsettled[prefix]
    }

    /// Whether it is known of all keys of an owned prefix what stands in etcd by our own hand.
    pub(super) fn all_known(&self, prefix: usize) -> bool {
        self.open[prefix] == 0
    }

    /// Keys of all owned prefixes that are not clean.
    pub(super) fn pending(&self) -> usize {
        self.unsettled.iter().sum()
    }

    fn count_open(&mut self, class: Class, was_open: bool, is_open: bool) {
        if let Class::Owned(index) = class {
            let change = isize::from(is_open) - isize::from(was_open);
            self.open[index] = self.open[index].saturating_add_signed(change);
        }
    }
}

impl KeyState {
    /// As desired, as far as is known.
    pub(super) fn is_clean(&self) -> bool {
        self.place == Place::Clean
    }

    /// A write of it may or may not have been committed, and only another write makes sure.
    pub(super) fn is_uncertain(&self) -> bool {
        self.uncertain
    }

    /// Something else than is known may stand in etcd by our own hand.
    fn is_open(&self) -> bool {
        self.uncertain || self.place == Place::InFlight
    }
}

impl Trouble {
    /// Somebody else changed the key, again if there was trouble a short while ago.
    pub(super) fn contended(before: Option<Self>, now: Instant) -> Self {
        let delay = match before {
            Some(t) if now.duration_since(t.last) < REPAIR_CALM => (t.delay * 2).min(RETRY_MAX),
            _ => REPAIR_MIN / 2,
        };
        Self { delay, last: now, alone: false }
    }

    /// etcd refused a transaction with the key in it. One bad key must not hold back its neighbours: from
    /// now on each goes alone, and the one that fails alone waits longer and longer.
    pub(super) fn refused(before: Option<Self>, alone: bool, now: Instant) -> Self {
        let delay = match before {
            Some(t) if alone => (t.delay * 2).min(RETRY_MAX),
            _ => RETRY_MIN,
        };
        Self { delay, last: now, alone: true }
    }

    /// The key is not to be written before then.
    pub(super) fn holds_until(self, now: Instant) -> Option<Instant> {
        let at = self.last + self.delay;
        (at > now).then_some(at)
    }
}
