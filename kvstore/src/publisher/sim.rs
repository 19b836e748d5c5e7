//! Seeded schedules of the publisher's core against a model of etcd.
//!
//! Faults: lost answers of committed and uncommitted transactions, refused values, expired leases,
//! foreign writes and deletes, re-lists, re-created etcds, restarts of the publisher. After each
//! schedule the faults stop and etcd must become exactly what is desired. Each digest that is stated is
//! compared with the history of etcd: it has to be that of the revision that it names, and the times of
//! its changes those of the events that they came from.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::leases::KEYS_PER_LEASE;
use super::{Core, Effect, Observed, Op, Origin, OwnedPrefix, PublisherSpec};
use crate::digest::{Digest, DigestRecord, SourceTime, Timed};

const TTL: Duration = Duration::from_secs(30);
const POISON: &[u8] = b"too large";

#[derive(Clone, Debug, PartialEq, Eq)]
struct Value {
    value: Vec<u8>,
    lease: i64,
    revision: i64,
}

/// A key, and its new value and lease, or that it goes.
type Change = (String, Option<(Vec<u8>, i64)>);

/// One etcd: keys, leases, and the history that watches read.
struct Etcd {
    generation: u64,
    revision: i64,
    keys: BTreeMap<String, Value>,
    leases: BTreeMap<i64, Instant>,
    history: Vec<(i64, String, Option<Value>)>,
}

impl Etcd {
    fn new(generation: u64) -> Self {
        Self { generation, revision: 1, keys: BTreeMap::new(), leases: BTreeMap::new(), history: Vec::new() }
    }

    fn write(&mut self, changes: Vec<Change>) -> i64 {
        self.revision += 1;
        for (key, value) in changes {
            let value = value.map(|(value, lease)| Value { value, lease, revision: self.revision });
            match &value {
                Some(v) => drop(self.keys.insert(key.clone(), v.clone())),
                None => drop(self.keys.remove(&key)),
            }
            self.history.push((self.revision, key, value));
        }
        self.revision
    }

    /// Of what stood under `prefix` at `revision`.
    fn digest(&self, prefix: &str, revision: i64) -> Digest {
        let mut keys = BTreeMap::new();
        for (_, key, value) in self.history.iter().filter(|(at, ..)| *at <= revision) {
            match (key.strip_prefix(prefix), value) {
                (Some(suffix), Some(value)) => drop(keys.insert(suffix, &*value.value)),
                (Some(suffix), None) => drop(keys.remove(suffix)),
                (None, _) => {}
            }
        }
        keys.into_iter().collect()
    }

    fn expire(&mut self, now: Instant) {
        let dead: Vec<i64> = self.leases.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for lease in dead {
            self.leases.remove(&lease);
            let gone = self.keys.iter().filter(|(_, v)| v.lease == lease).map(|(k, _)| (k.clone(), None));
            let gone: Vec<_> = gone.collect();
            if !gone.is_empty() {
                self.write(gone);
            }
        }
    }
}

/// What a reflector of one prefix does: list, then history from there.
#[derive(Default)]
struct Stream {
    prefix: String,
    generation: u64,
    listed: bool,
    read_to: i64,
    /// With the revision that was told.
    known: BTreeMap<String, i64>,
}

struct World {
    rng: StdRng,
    now: Instant,
    etcd: Etcd,
    core: Core,
    streams: Vec<Stream>,
    effects: VecDeque<Effect>,
    /// Transactions that are committed, but the publisher has not heard of it: number and revision.
    answers: Vec<(u64, i64)>,
    /// Nobody else writes and leases do not end, so that each digest has to be exact.
    undisturbed: bool,
    /// What the process wants, and which prefixes it declared complete.
    desired: BTreeMap<String, Vec<u8>>,
    complete: BTreeSet<String>,
    /// Keys that a foreign hand touched: a canary may overtake their repair.
    foreign: BTreeSet<String>,
    /// Something else than the publisher changed etcd.
    tampered: bool,
    /// By origin, its number: the key and the value that was set.
    origins: Vec<(String, Option<Vec<u8>>)>,
    next_lease: i64,
    writes: usize,
    stated: usize,
}

fn spec() -> PublisherSpec {
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

impl World {
    fn new(seed: u64) -> Self {
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

    fn step(&mut self) {
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

    fn set(&mut self, key: String, value: Option<Vec<u8>>) {
        let origin = match self.rng.random_range(0..3) {
            0 => None,
            1 => Some(Origin::Event(SourceTime(self.origins.len() as i64))),
            _ => Some(Origin::Revision(self.origins.len() as i64)),
        };
        self.origins.push((key.clone(), value.clone()));
        assert!(self.core.set(&key, value.clone(), origin));
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

    fn advance(&mut self, by: Duration) {
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

    fn restart(&mut self) {
        self.core = Core::new(spec());
        self.effects.clear();
        self.answers.clear();
        self.attach();
        for (key, value) in &self.desired {
            self.core.set(key, Some(value.clone()), None);
        }
        for prefix in &self.complete {
            self.core.initial_done(prefix);
        }
    }

    fn poll(&mut self) {
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

    /// A canary may only be written over a complete prefix.
    fn check_canary(&self, op: &Op) {
        let Op::Put { key, .. } = op else { return };
        let Some(prefix) = key.strip_prefix("synced/alpha/") else { return };
        let prefix = format!("{prefix}/");
        assert!(self.complete.contains(&prefix), "canary of {prefix} before its desired state was complete");
        for (key, value) in self.desired.iter().filter(|(k, _)| k.starts_with(&prefix)) {
            let stands = self.etcd.keys.get(key).map(|v| &v.value);
            let excused = self.foreign.contains(key) || stands.is_none();
            // Absent is excused only by a lease that expired meanwhile: its deletion is in the history.
            let was_there = self.etcd.history.iter().any(|(_, k, v)| k == key && v.is_some());
            assert!(
                stands == Some(value) || (excused && was_there),
                "canary of {prefix} before {key}: wanted {value:?}, stands {stands:?}, was there: {was_there}"
            );
        }
    }

    fn execute(&mut self, faults: bool) {
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

    fn check_statement(&mut self, prefix: &str, value: &[u8]) {
        self.stated += 1;
        let record = DigestRecord::decode(value).unwrap();
        assert!(record.revision <= self.etcd.revision, "{record:?} is of a revision to come");
        if !self.tampered {
            assert_eq!(record.digest, self.etcd.digest(prefix, record.revision), "{prefix} at {record:?}");
        }
        for timed in record.recent {
            let (key, value) = &self.origins[usize::try_from(timed.at.0).unwrap()];
            let is_it = |(revision, k, v): &(i64, String, Option<Value>)| {
                *revision == timed.revision && k == key && v.as_ref().map(|v| &v.value) == value.as_ref()
            };
            assert!(self.etcd.history.iter().any(is_it), "{timed:?} is not of {key} = {value:?}");
        }
    }

    /// One stream moves on: notices a new etcd, lists, or reads the next revision of the history.
    fn deliver(&mut self) {
        let index = self.rng.random_range(0..self.streams.len());
        self.deliver_on(index);
    }

    fn deliver_on(&mut self, index: usize) -> bool {
        let now = self.now;
        let stream = &mut self.streams[index];
        let mut said = Vec::new();
        if stream.generation != self.etcd.generation {
            stream.generation = self.etcd.generation;
            stream.listed = false;
            stream.known.values_mut().for_each(|told| *told = 0);
            said.push(Observed::Etcd { generation: stream.generation });
        } else if !stream.listed {
            let mut gone = std::mem::take(&mut stream.known);
            for (key, v) in self.etcd.keys.iter().filter(|(k, _)| k.starts_with(&stream.prefix)) {
                // As a reflector does: what was told already is not told again.
                if gone.remove(key) != Some(v.revision) {
                    said.push(present(key, v));
                }
                stream.known.insert(key.clone(), v.revision);
            }
            let revision = self.etcd.revision;
            said.extend(gone.into_keys().map(|key| Observed::Absent { key, revision }));
            said.push(Observed::Listed { revision });
            (stream.listed, stream.read_to) = (true, revision);
        } else {
            let next = self
                .etcd
                .history
                .iter()
                .filter(|(r, k, _)| *r > stream.read_to && k.starts_with(&stream.prefix))
                .map(|(r, ..)| *r)
                .next();
            let Some(revision) = next else { return false };
            for (_, key, value) in self.etcd.history.iter().filter(|(r, ..)| *r == revision) {
                if !key.starts_with(&stream.prefix) {
                    continue;
                }
                match value {
                    Some(v) => {
                        stream.known.insert(key.clone(), v.revision);
                        said.push(present(key, v));
                    }
                    None => {
                        stream.known.remove(key);
                        said.push(Observed::Absent { key: key.clone(), revision });
                    }
                }
            }
            stream.read_to = revision;
        }
        for event in said {
            self.core.observe(index, event, now);
        }
        true
    }

    /// No more faults: runs until nothing is left to do.
    fn quiesce(&mut self) {
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

    fn check_final(&self) {
        for key in ["a/", "b/", "config/alpha"] {
            let in_etcd =
                self.etcd.keys.iter().filter(|(k, _)| k.starts_with(key)).map(|(k, v)| (k, &v.value));
            let wanted = self.desired.iter().filter(|(k, _)| k.starts_with(key));
            assert_eq!(in_etcd.collect::<Vec<_>>(), wanted.collect::<Vec<_>>());
        }
        for canary in ["synced/alpha/a", "synced/alpha/b"] {
            assert!(self.etcd.keys.contains_key(canary), "{canary} is missing");
        }
        for prefix in ["a/", "b/"] {
            let stated = &self.etcd.keys[&format!("digests/{prefix}d")].value;
            let digest = DigestRecord::decode(stated).unwrap().digest;
            assert_eq!(digest, self.etcd.digest(prefix, i64::MAX), "the last word on {prefix}");
        }
        for (key, v) in &self.etcd.keys {
            assert!(self.etcd.leases.contains_key(&v.lease), "{key} hangs on no living lease");
        }
    }
}

fn timed(revision: i64, at: i64) -> Timed {
    Timed { revision, at: SourceTime(at) }
}

fn present(key: &str, v: &Value) -> Observed {
    Observed::Present { key: key.into(), value: v.value.clone(), lease: v.lease, revision: v.revision }
}

fn op_key(op: &Op) -> &str {
    match op {
        Op::Put { key, .. } | Op::Delete { key } => key,
    }
}

fn finish(world: &mut World) {
    let poisoned: Vec<_> =
        world.desired.iter().filter(|(_, v)| **v == *POISON).map(|(k, _)| k.clone()).collect();
    for key in poisoned {
        world.set(key, Some(b"fits".to_vec()));
    }
    for prefix in ["config/alpha", "a/", "b/"] {
        world.complete.insert(prefix.into());
        world.core.initial_done(prefix);
    }
    world.quiesce();
    world.check_final();

    // At rest nothing is written, whatever time passes; and leases are kept alive.
    let writes = world.writes;
    for _ in 0..20 {
        world.advance(TTL / 6);
        world.quiesce();
    }
    world.check_final();
    assert_eq!(world.writes, writes, "writes at rest");

    // A restart over what stands there writes nothing either.
    world.restart();
    world.quiesce();
    world.check_final();
    assert_eq!(world.writes, writes, "a restart wrote keys that were as desired");
}

#[test]
fn etcd_becomes_what_is_desired_after_any_schedule() {
    let seeds = match std::env::var("CLUSTERMESH_SIM_SEED") {
        Ok(seed) => seed.parse().map(|s: u64| s..s + 1).unwrap(),
        Err(_) => 0..3000,
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..world.rng.random_range(20..400) {
                world.step();
            }
            finish(&mut world);
        });
        assert!(run.is_ok(), "failed with CLUSTERMESH_SIM_SEED={seed}");
    }
}

#[test]
fn no_lease_gets_more_keys_than_it_may() {
    let mut world = World::new(1);
    for n in 0..2 * KEYS_PER_LEASE + 500 {
        world.set(format!("a/{n}"), Some(vec![1]));
    }
    finish(&mut world);
    let mut keys = BTreeMap::<i64, usize>::new();
    for v in world.etcd.keys.values() {
        *keys.entry(v.lease).or_default() += 1;
    }
    assert!(keys.values().all(|n| *n <= KEYS_PER_LEASE), "{keys:?}");
    assert_eq!(keys.len(), 3, "{keys:?}");
}

#[test]
fn keys_outside_of_what_is_owned_are_refused() {
    let mut core = Core::new(spec());
    for key in ["c/1", "config/alpha2", "config/alph", "a"] {
        assert!(!core.set(key, Some(vec![1]), None), "{key}");
    }
}

#[test]
fn a_steady_stream_of_changes_is_stated_five_times_a_second() {
    let mut world = World::new(1);
    finish(&mut world);
    world.stated = 0;
    for n in 0..1000 {
        world.set("a/1".into(), Some(vec![(n % 250) as u8]));
        for _ in 0..2 {
            world.poll();
            while !world.effects.is_empty() {
                world.execute(false);
            }
        }
        world.advance(Duration::from_millis(10));
    }
    assert!((45..=51).contains(&world.stated), "{} statements in 10 s", world.stated);
}
