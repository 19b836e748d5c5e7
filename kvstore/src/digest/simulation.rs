//! Seeded schedules: an exporter that states, an agent that is told by two watches which lag at will.
//!
//! Without a fault, whatever the delays, no list is asked for. With one (a delete, a put or a value that
//! the agent never got, or one that etcd has and the exporter does not want) the difference is found, and
//! if a list can put it right, it is. The same with an exporter that states nothing, by a census.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::{Compare, Digest, DigestRecord, Stage, Ticket, Verdict, record_hash};

const TICK: Duration = Duration::from_millis(250);
const CENSUS: Duration = Duration::from_secs(60);

struct World {
    rng: SmallRng,
    now: Instant,
    revision: i64,
    etcd: BTreeMap<String, u64>,
    /// Events on their way: revision, key, hash. Those of one revision come apart.
    events: VecDeque<(i64, String, Option<u64>)>,
    statements: VecDeque<DigestRecord>,
    unstated: bool,
    /// Of an exporter that never states anything.
    silent: bool,
    /// Results on their way: when they arrive, and of what.
    census: VecDeque<(Instant, Ticket, i64, u64)>,
    censuses: u64,
    held: BTreeMap<String, u64>,
    compare: Compare,
    lists: u64,
}

fn sum(records: &BTreeMap<String, u64>) -> u64 {
    records.values().fold(0, |sum, hash| sum.wrapping_add(*hash))
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            rng: SmallRng::seed_from_u64(seed),
            now: Instant::now(),
            revision: 1,
            etcd: BTreeMap::new(),
            events: VecDeque::new(),
            statements: VecDeque::new(),
            unstated: true,
            silent: false,
            census: VecDeque::new(),
            censuses: 0,
            held: BTreeMap::new(),
            compare: Compare::default(),
            lists: 0,
        };
        world.list();
        world
    }

    fn silent(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.silent = true;
        world.compare = Compare::with_census(Some(CENSUS));
        world.list();
        world
    }

    fn change(&mut self) {
        self.revision += 1;
        for _ in 0..self.rng.random_range(1..4) {
            let key = format!("k{}", self.rng.random_range(0..20));
            let hash = self.rng.random_bool(0.7).then(|| record_hash(&key, &[self.rng.random_range(0..5)]));
            let before = match hash {
                Some(hash) => self.etcd.insert(key.clone(), hash),
                None => self.etcd.remove(&key),
            };
            if hash.is_some() || before.is_some() {
                self.events.push_back((self.revision, key, hash));
            }
        }
        self.unstated = true;
    }

    fn state(&mut self) {
        if std::mem::take(&mut self.unstated) && !self.silent {
            let digest = Digest { sum: sum(&self.etcd), count: self.etcd.len() as u64 };
            self.statements.push_back(DigestRecord { digest, revision: self.revision, recent: Vec::new() });
        }
    }

    fn deliver_event(&mut self) {
        let Some((revision, key, hash)) = self.events.pop_front() else { return };
        match hash {
            Some(hash) => drop(self.held.insert(key, hash)),
            None => drop(self.held.remove(&key)),
        }
        self.compare.told(revision, sum(&self.held));
    }

    fn deliver_statement(&mut self) {
        if let Some(record) = self.statements.pop_front() {
            self.compare.stated(&record);
        }
    }

    fn list(&mut self) {
        self.compare.listing();
        self.events.clear();
        self.held.clone_from(&self.etcd);
        self.compare.synced(self.revision, sum(&self.held));
    }

    fn check(&mut self) {
        let sum = sum(&self.held);
        if self.compare.check(self.now, Some(sum)) {
            self.lists += 1;
            self.list();
        }
        if let Some(ticket) = self.compare.census_due(self.now) {
            // Pages take their time, but are all of one revision.
            let takes = TICK * self.rng.random_range(0..40);
            self.census.push_back((self.now + takes, ticket, self.revision, self::sum(&self.etcd)));
            self.censuses += 1;
        }
        while let Some((_, ticket, revision, sum)) = self.census.pop_front_if(|(at, ..)| *at <= self.now) {
            self.compare.counted(ticket, revision, sum);
        }
    }

    /// Changes, lags of up to seconds on either watch, lost connections, lists for other reasons.
    fn live(&mut self, ticks: usize) {
        for _ in 0..ticks {
            for _ in 0..self.rng.random_range(0..4) {
                self.change();
            }
            if self.rng.random_bool(0.7) {
                self.state();
            }
            for _ in 0..self.rng.random_range(0..20) {
                self.deliver_event();
            }
            for _ in 0..self.rng.random_range(0..3) {
                self.deliver_statement();
            }
            match self.rng.random_range(0..200) {
                0 => self.list(),
                1 => {
                    self.compare.lost();
                    self.compare.synced(self.revision, sum(&self.held));
                }
                _ => {}
            }
            self.check();
            self.now += TICK;
        }
    }

    /// Nothing changes any more and all that is on its way arrives.
    fn settle(&mut self, time: Duration) {
        self.state();
        for _ in 0..time.as_millis() / TICK.as_millis() {
            while !self.events.is_empty() {
                self.deliver_event();
            }
            while !self.statements.is_empty() {
                self.deliver_statement();
            }
            self.check();
            self.now += TICK;
        }
    }

    /// Something that a correct agent would not do to what it holds.
    fn spoil(&mut self) -> &'static str {
        let keys: Vec<_> = self.held.keys().cloned().collect();
        let key = keys.get(self.rng.random_range(0..keys.len().max(1))).cloned().unwrap_or("k".into());
        let fault = self.rng.random_range(0..4);
        match fault {
            0 => drop(self.held.remove(&key)),
            1 => drop(self.held.insert("stale".into(), 77)),
            2 => *self.held.entry(key).or_default() ^= 1 << self.rng.random_range(0..64),
            _ => {
                // The next event, whatever it is, never arrives.
                self.change();
                self.events.pop_front();
            }
        }
        ["lost put", "lost delete", "altered value", "lost event"][fault]
    }
}

#[test]
fn delays_are_no_differences() {
    for seed in 0..1_000 {
        let mut world = World::new(seed);
        world.live(200);
        world.settle(Duration::from_secs(1));
        assert_eq!(world.lists, 0, "seed {seed}: a list was asked for without reason");
        assert_eq!(world.compare.verdict(), Verdict::InSync, "seed {seed}");
    }
}

#[test]
fn whatever_is_lost_is_found_and_put_right() {
    for seed in 0..1_000 {
        let mut world = World::new(seed);
        world.live(50);
        let fault = world.spoil();
        if world.rng.random_bool(0.5) {
            // Under load, too.
            world.live(100);
        }
        world.settle(Duration::from_secs(15));
        assert_eq!(world.held, world.etcd, "seed {seed}: {fault} was not put right");
        assert_eq!(world.compare.verdict(), Verdict::InSync, "seed {seed}: {fault}");
        assert_eq!(world.compare.mismatches(Stage::State), world.lists.min(1), "seed {seed}: {fault}");
    }
}

#[test]
fn what_etcd_has_and_nobody_wants_is_told_but_not_listed_for_ever() {
    for seed in 0..300 {
        let mut world = World::new(seed);
        world.live(20);
        world.settle(Duration::from_secs(1));
        world.revision += 1;
        world.etcd.insert("foreign".into(), 99);
        world.events.push_back((world.revision, "foreign".into(), Some(99)));
        world.settle(Duration::from_secs(3600));
        assert_eq!(world.compare.verdict(), Verdict::Differs, "seed {seed}");
        assert_eq!(world.compare.mismatches(Stage::Source), 1, "seed {seed}");
        assert!((2..=15).contains(&world.lists), "seed {seed}: {} lists in an hour", world.lists);
        world.etcd.remove("foreign");
        world.revision += 1;
        world.events.push_back((world.revision, "foreign".into(), None));
        world.settle(Duration::from_secs(1));
        assert_eq!(world.compare.verdict(), Verdict::InSync, "seed {seed}");
        assert_eq!(world.compare.mismatches(Stage::State), 0, "seed {seed}");
    }
}

#[test]
fn a_census_finds_no_difference_where_there_is_none() {
    for seed in 0..500 {
        let mut world = World::silent(seed);
        world.live(1_000);
        world.settle(2 * CENSUS);
        assert_eq!(world.lists, 0, "seed {seed}: a list was asked for without reason");
        assert_eq!(world.compare.verdict(), Verdict::InSync, "seed {seed}");
        assert!((2..=8).contains(&world.censuses), "seed {seed}: {} censuses", world.censuses);
    }
}

#[test]
fn a_census_finds_whatever_is_lost() {
    for seed in 0..500 {
        let mut world = World::silent(seed);
        world.live(50);
        let fault = world.spoil();
        if world.rng.random_bool(0.5) {
            world.live(300);
        }
        world.settle(3 * CENSUS);
        assert_eq!(world.held, world.etcd, "seed {seed}: {fault} was not put right");
        assert_eq!(world.compare.verdict(), Verdict::InSync, "seed {seed}: {fault}");
        assert_eq!(world.compare.mismatches(Stage::State), world.lists.min(1), "seed {seed}: {fault}");
        assert_eq!(world.compare.mismatches(Stage::Source), 0, "seed {seed}: {fault}");
    }
}

#[test]
fn nobody_is_counted_who_states() {
    for seed in 0..100 {
        let mut world = World::new(seed);
        world.compare = Compare::with_census(Some(CENSUS));
        world.state();
        world.settle(Duration::from_secs(1));
        world.live(1_000);
        assert_eq!(world.censuses, 0, "seed {seed}");
    }
}
