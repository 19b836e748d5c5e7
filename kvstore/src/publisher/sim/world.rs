use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::etcd::{Etcd, Stream};
use crate::digest::{SourceTime, Timed};
use crate::publisher::{Core, Effect, Op, Origin, OwnedPrefix, PublisherSpec};

pub(super) const TTL: Duration = Duration::from_secs(30);
pub(super) const POISON: &[u8] = b"too large";

pub(super) struct World {
    pub(super) rng: StdRng,
    pub(super) now: Instant,
    pub(super) etcd: Etcd,
    pub(super) core: Core,
    pub(super) streams: Vec<Stream>,
    pub(super) effects: VecDeque<Effect>,
    /// Transactions that are committed, but the publisher has not heard of it: number and revision.
    pub(super) answers: Vec<(u64, i64)>,
    /// Nobody else writes and leases do not end, so that each digest has to be exact.
    pub(super) undisturbed: bool,
    /// What the process wants, and which prefixes it declared complete.
    pub(super) desired: BTreeMap<String, Vec<u8>>,
    pub(super) complete: BTreeSet<String>,
    /// Keys that a foreign hand touched: a canary may overtake their repair.
    pub(super) foreign: BTreeSet<String>,
    /// Something else than the publisher changed etcd.
    pub(super) tampered: bool,
    /// By origin, its number: the key and the value that was set.
    pub(super) origins: Vec<(String, Option<Vec<u8>>)>,
    pub(super) next_lease: i64,
    pub(super) writes: usize,
    pub(super) stated: usize,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            now: Instant::now(),
            etcd: Etcd::new(1),
            core: Core::new(spec()),
            streams: Vec::new(),
            effects: VecDeque::new(),
            answers: Vec::new(),
            undisturbed: seed.is_multiple_of(2),
            desired: BTreeMap::new(),
            complete: BTreeSet::new(),
            foreign: BTreeSet::new(),
            tampered: false,
            origins: Vec::new(),
            next_lease: 1,
            writes: 0,
            stated: 0,
        };
        world.attach();
        world
    }

    fn attach(&mut self) {
        self.streams =
            self.core.streams().map(|p| Stream { prefix: p.into(), ..Stream::default() }).collect();
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn key(&mut self) -> String {
        match self.rng.random_range(0..25) {
            0 if self.chance(20) => "digests/a/d".into(),
            0 => "config/alpha".into(),
            n if n < 13 => format!("a/{n}"),
            n => format!("b/{n}"),
        }
    }

    pub(super) fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..=19 => {
                let key = self.key();
                if key.starts_with("digests") {
                    return;
                }
                let value = match self.rng.random_range(0..10) {
                    0..=2 => None,
                    3 if self.chance(30) => Some(POISON.to_vec()),
                    n => Some(vec![n]),
                };
                self.set(key, value);
            }
            20..=22 => {
                let prefix = ["config/alpha", "a/", "b/"][self.rng.random_range(0..3)];
                self.complete.insert(prefix.into());
                self.core.initial_done(prefix);
            }
            23..=42 => self.poll(),
            43..=57 => self.execute(true),
            58..=61 => self.answer(),
            62 => self.tell_source(),
            63..=84 => self.deliver(),
            85..=91 => {
                let ms = self.rng.random_range(0..if self.undisturbed { 300 } else { 8000 });
                self.advance(Duration::from_millis(ms));
            }
            92..=95 if self.undisturbed => self.answer(),
            92..=95 => {
                let key = self.key();
                let value = self.chance(50).then(|| (b"foreign".to_vec(), 0));
                self.foreign.insert(key.clone());
                self.tampered = true;
                self.etcd.write(vec![(key, value)]);
            }
            96..=97 => {
                let stream = self.rng.random_range(0..self.streams.len());
                self.streams[stream].listed = false;
            }
            98 => self.recreate(),
            _ => self.restart(),
        }
    }

    pub(super) fn set(&mut self, key: String, value: Option<Vec<u8>>) {
        let origin = match self.rng.random_range(0..3) {
            0 => None,
            1 => Some(Origin::Event(SourceTime(self.origins.len() as i64))),
            _ => Some(Origin::Revision(self.origins.len() as i64)),
        };
        self.origins.push((key.clone(), value.clone()));
        assert!(self.core.set(&key, value.clone().map(Into::into), origin));
        match value {
            Some(value) => drop(self.desired.insert(key, value)),
            None => drop(self.desired.remove(&key)),
        }
    }

    /// The etcd that is mirrored tells the times of its revisions: here, both are the origin's number.
    fn tell_source(&mut self) {
        let from = self.rng.random_range(0..=self.origins.len() as i64);
        let recent: Vec<_> = (from..self.origins.len() as i64).map(|n| timed(n, n)).collect();
        self.core.source_stated("a/", &recent);
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.now += by;
        let before = self.etcd.revision;
        self.etcd.expire(self.now);
        self.tampered |= self.etcd.revision != before;
    }

    fn recreate(&mut self) {
        self.etcd = Etcd::new(self.etcd.generation + 1);
        self.tampered = false;
        self.answers.clear();
    }

    fn knows_etcd(&self) -> bool {
        self.streams.iter().any(|s| s.generation == self.etcd.generation)
    }

    pub(super) fn restart(&mut self) {
        self.core = Core::new(spec());
        self.effects.clear();
        self.answers.clear();
        self.attach();
        for (key, value) in &self.desired {
            self.core.set(key, Some(value.as_slice().into()), None);
        }
        for prefix in &self.complete {
            self.core.initial_done(prefix);
        }
    }

    pub(super) fn poll(&mut self) {
        for effect in self.core.poll(self.now, "2026-11-20T20:41:35Z") {
            if let Effect::Txn { ops, .. } = &effect {
                let keys: BTreeSet<_> = ops.iter().map(op_key).collect();
                assert_eq!(keys.len(), ops.len(), "a key twice in one transaction: {ops:?}");
                for op in ops.iter().filter(|_| self.knows_etcd()) {
                    self.check_canary(op);
                }
            }
            self.effects.push_back(effect);
        }
    }

    pub(super) fn execute(&mut self, faults: bool) {
        let Some(effect) = self.effects.pop_front() else { return };
        if !self.knows_etcd() {
            // A session is pinned to its etcd: everything fails until the streams found the new one.
            return match effect {
                Effect::Grant { .. } => self.core.grant_failed("another etcd", self.now),
                Effect::KeepAlive { lease } => self.core.keep_alive_failed(lease, self.now),
                Effect::Txn { id, .. } => self.core.txn_failed(id, "another etcd", false, false, self.now),
            };
        }
        let lost = faults && self.chance(15);
        match effect {
            Effect::Grant { ttl } if !lost => {
                let id = self.next_lease;
                self.next_lease += 1;
                self.etcd.leases.insert(id, self.now + ttl);
                self.core.granted(id, ttl, self.now);
            }
            Effect::Grant { .. } => self.core.grant_failed("timeout", self.now),
            Effect::KeepAlive { lease } if !lost => match self.etcd.leases.get_mut(&lease) {
                Some(at) => {
                    *at = self.now + TTL;
                    self.core.lease_alive(lease, TTL, self.now);
                }
                None => self.core.lease_gone(lease),
            },
            Effect::KeepAlive { lease } => self.core.keep_alive_failed(lease, self.now),
            Effect::Txn { id, ops } => self.transact(id, ops, lost, faults),
        }
    }

    fn transact(&mut self, id: u64, ops: Vec<Op>, lost: bool, faults: bool) {
        let poisoned = ops.iter().any(|op| matches!(op, Op::Put { value, .. } if **value == *POISON));
        let unleased =
            ops.iter().any(|op| matches!(op, Op::Put { lease, .. } if !self.etcd.leases.contains_key(lease)));
        if lost && self.chance(50) {
            return self.core.txn_failed(id, "timeout", false, false, self.now);
        }
        if poisoned {
            return self.core.txn_failed(id, "request is too large", false, true, self.now);
        }
        if unleased {
            return self.core.txn_failed(id, "requested lease not found", true, false, self.now);
        }
        self.writes += ops.len();
        let changes = ops.into_iter().map(|op| match op {
            Op::Put { key, value, lease } => (key.to_string(), Some((value.to_vec(), lease))),
            Op::Delete { key } => (key.to_string(), None),
        });
        let changes: Vec<_> = changes.collect();
        for (key, value) in &changes {
            if let (Some(prefix), Some((value, _))) = (key.strip_prefix("digests/"), value) {
                self.check_statement(prefix.trim_end_matches('d'), value);
            }
        }
        let revision = self.etcd.write(changes);
        match lost {
            true => self.core.txn_failed(id, "timeout", false, false, self.now),
            // It may be a while until the answer is read, and not in the order of the commits.
            false if faults && self.chance(50) => self.answers.push((id, revision)),
            false => self.core.txn_done(id, revision),
        }
    }

    fn answer(&mut self) {
        if !self.answers.is_empty() {
            let at = self.rng.random_range(0..self.answers.len());
            let (id, revision) = self.answers.swap_remove(at);
            self.core.txn_done(id, revision);
        }
    }

    /// One stream moves on: notices a new etcd, lists, or reads the next revision of the history.
    fn deliver(&mut self) {
        let index = self.rng.random_range(0..self.streams.len());
        self.deliver_on(index);
    }

    fn deliver_on(&mut self, index: usize) -> bool {
        let said = self.streams[index].read(&self.etcd);
        let any = !said.is_empty();
        for event in said {
            self.core.observe(index, event, self.now);
        }
        any
    }

    /// No more faults: runs until nothing is left to do.
    pub(super) fn quiesce(&mut self) {
        for _ in 0..2000 {
            self.poll();
            while !self.effects.is_empty() {
                self.execute(false);
            }
            while !self.answers.is_empty() {
                self.answer();
            }
            for index in 0..self.streams.len() {
                while self.deliver_on(index) {}
            }
            if self.core.is_flushed() && self.core.all_stated() {
                return;
            }
            let wait = self.core.next_deadline().map_or(Duration::from_millis(10), |at| {
                at.saturating_duration_since(self.now).clamp(Duration::from_millis(1), TTL / 4)
            });
            self.advance(wait);
        }
        panic!("does not come to rest: {:?}", self.core.status());
    }
}

pub(super) fn spec() -> PublisherSpec {
    let owned = |prefix: &str, canary: Option<&str>| OwnedPrefix {
        canary: canary.map(Into::into),
        digest: canary.map(|_| format!("digests/{prefix}d")),
        ..OwnedPrefix::new(prefix)
    };
    PublisherSpec {
        owned: vec![
            owned("config/alpha", None),
            owned("a/", Some("synced/alpha/a")),
            owned("b/", Some("synced/alpha/b")),
        ],
        lease_ttl: TTL,
        heartbeat: None,
        batch: 5,
    }
}

fn timed(revision: i64, at: i64) -> Timed {
    Timed { revision, at: SourceTime(at) }
}

fn op_key(op: &Op) -> &str {
    match op {
        Op::Put { key, .. } | Op::Delete { key } => key,
    }
}
