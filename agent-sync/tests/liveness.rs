//! The state machines of liveness under seeded worlds: clusters whose nodes and etcds come and go, and
//! what is really so beside what is concluded.
#![allow(clippy::unwrap_used, reason = "a world that cannot be made fails its test")]

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use agent_sync::liveness::core::{ANSWER, Core, Member};
use agent_sync::liveness::judge::{EtcdEvidence, MIRRORED, RETURN_MAX, ROUNDS};
use agent_sync::liveness::{Health, LivenessOptions};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

const SCHEDULES: usize = 1_500;
const MINUTES: u64 = 12;
const STEP: Duration = Duration::from_millis(500);
/// etcd is heard this often while it is there.
const ETCD_EVERY: Duration = Duration::from_secs(10);
/// What the slowest round and step add to the configured times.
const SLACK: Duration = Duration::from_secs(3);

/// A cluster as it really is.
struct World {
    name: ClusterName,
    options: LivenessOptions,
    begin: Instant,
    now: Instant,
    /// Behind a firewall: they answer nobody.
    firewalled: bool,
    mirrored: bool,
    nodes_up: bool,
    etcd_up: bool,
    nodes_changed: Instant,
    etcd_changed: Instant,
    etcd_heard: Option<Instant>,
    etcd_due: Instant,
    last_answer: Option<Instant>,
    on_their_way: VecDeque<(Instant, IpAddr)>,
    core: Core,
    deaths: Vec<Instant>,
    /// How bad it was then, and when.
    transitions: Vec<(usize, Instant)>,
}

impl World {
    fn new(rng: &mut SmallRng) -> Self {
        let now = Instant::now();
        let options = LivenessOptions {
            dead_after: Duration::from_secs(rng.random_range(5..30)),
            return_after: Duration::from_secs(rng.random_range(1..10)),
            probe_interval: Duration::from_secs(rng.random_range(1..3)),
            ..LivenessOptions::default()
        };
        let nodes = (1..=rng.random_range(1..=30)).map(|n| IpAddr::from([192, 0, 2, n])).collect();
        let name: ClusterName = "beta".parse().unwrap();
        let id = ClusterId::new(2, MaxConnectedClusters::C255).unwrap();
        let mut core = Core::new(options, now);
        core.set_members(BTreeMap::from([(name.clone(), Member { id: Some(id), dead: false, nodes })]), now);
        Self {
            name,
            options,
            begin: now,
            now,
            firewalled: rng.random_bool(0.2),
            mirrored: rng.random_bool(0.2),
            nodes_up: true,
            etcd_up: true,
            nodes_changed: now,
            etcd_changed: now,
            etcd_heard: None,
            etcd_due: now,
            last_answer: None,
            on_their_way: VecDeque::new(),
            core,
            deaths: Vec::new(),
            transitions: Vec::new(),
        }
    }

    fn set_nodes(&mut self, up: bool) {
        if self.nodes_up != up {
            (self.nodes_up, self.nodes_changed) = (up, self.now);
        }
    }

    fn set_etcd(&mut self, up: bool) {
        if self.etcd_up != up {
            (self.etcd_up, self.etcd_changed) = (up, self.now);
        }
    }

    fn step(&mut self, rng: &mut SmallRng) {
        self.now += STEP;
        if self.etcd_up && self.etcd_due <= self.now {
            self.etcd_heard = Some(self.now);
            self.etcd_due = self.now + ETCD_EVERY.min(self.options.dead_after / 2);
        }
        let heard = if self.mirrored { None } else { self.etcd_heard };
        let etcd = EtcdEvidence { connected: self.etcd_up || self.mirrored, heard, mirrored: self.mirrored };
        self.core.set_etcd(&self.name, etcd);
        while self.on_their_way.front().is_some_and(|(at, _)| *at <= self.now) {
            let Some((_, ip)) = self.on_their_way.pop_front() else { break };
            self.last_answer = Some(self.now);
            self.core.answered(ip, self.now);
        }
        let before = self.health();
        let (ask, transitions) = self.core.step(self.now);
        for ip in ask {
            // One in twenty is lost on the way.
            if self.nodes_up && !self.firewalled && rng.random_bool(0.95) {
                self.on_their_way.push_back((self.now + STEP, ip));
            }
        }
        for transition in &transitions {
            assert_eq!((Some(transition.from), Some(transition.to)), (before, self.health()));
            let badness = Health::ALL.iter().position(|health| *health == transition.to).unwrap();
            self.transitions.push((badness, self.now));
            if transition.to == Health::Dead {
                self.deaths.push(self.now);
                self.check_death();
            }
        }
        self.check_state();
    }

    fn health(&self) -> Option<Health> {
        self.core.judges().next().map(|(_, judge)| judge.health())
    }

    fn dead_after(&self) -> Duration {
        if self.mirrored { self.options.dead_after * MIRRORED } else { self.options.dead_after }
    }

    /// Nothing was heard for long enough, of nodes that used to answer.
    fn check_death(&self) {
        assert!(!self.firewalled, "nodes that never answered are no evidence");
        let last_answer = self.last_answer.expect("somebody had answered");
        assert!(self.now - last_answer >= self.dead_after(), "its nodes answered a moment ago");
        if !self.mirrored {
            let heard = self.etcd_heard.unwrap_or(self.begin);
            assert!(self.now - heard >= self.options.dead_after, "its etcd was heard a moment ago");
        }
    }

    fn check_state(&self) {
        let since = self.nodes_changed.max(if self.mirrored { self.begin } else { self.etcd_changed });
        let settled = self.now - since;
        let etcd_up = self.etcd_up && !self.mirrored;
        // Rounds of silence, after those that were still answered.
        let in_time = self.dead_after() + self.options.probe_interval + ANSWER * ROUNDS + SLACK;
        if !self.nodes_up && !etcd_up && self.last_answer.is_some() && settled > in_time {
            assert_eq!(self.health(), Some(Health::Dead), "gone for {settled:?}");
        }
        let nodes_up = self.nodes_up && !self.firewalled;
        // A round in which all questions to the nodes get lost begins anew; etcd is never unheard.
        let back = if etcd_up { RETURN_MAX } else { RETURN_MAX * 3 };
        if (nodes_up || etcd_up) && settled > back + SLACK + self.options.return_after {
            assert_ne!(self.health(), Some(Health::Dead), "back for {settled:?}");
        }
    }

    /// Whatever the cluster does, its state does not follow every beat.
    fn check_flaps(&self) {
        let ten_minutes = Duration::from_secs(600);
        for (n, at) in self.deaths.iter().enumerate() {
            let within = self.deaths[n..].iter().take_while(|death| **death - *at < ten_minutes).count();
            // Each return is held twice as long as the one before.
            let cycle = self.dead_after() + RETURN_MAX;
            let lower = 7 + ten_minutes.as_secs() / cycle.as_secs();
            assert!(within as u64 <= lower, "{within} deaths in ten minutes, at most {lower}");
        }
        for pair in self.transitions.windows(2) {
            let ((worse, at), (better, back)) = (pair[0], pair[1]);
            if worse > better {
                assert!(back - at >= self.options.return_after, "back after {:?}", back - at);
            }
        }
    }
}

fn run(seed: u64, mut fault: impl FnMut(&mut World, &mut SmallRng)) -> World {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut world = World::new(&mut rng);
    while world.now - world.begin < Duration::from_secs(60 * MINUTES) {
        fault(&mut world, &mut rng);
        world.step(&mut rng);
    }
    world.check_flaps();
    world
}

/// Prints the seed of a schedule that fails.
fn each_seed(seeds: usize, schedule: impl Fn(u64)) {
    struct Seed(u64);
    impl Drop for Seed {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("seed {}", self.0);
            }
        }
    }
    for seed in (0..seeds).map(|seed| seed as u64) {
        let _seed = Seed(seed);
        schedule(seed);
    }
}

#[test]
fn whatever_happens_a_death_has_its_reasons_and_a_return_its_time() {
    let total = std::cell::Cell::new(0);
    each_seed(SCHEDULES, |seed| {
        // Some worlds change every other second, some every other minute.
        let pace = [0.2, 0.02, 0.004][(seed % 3) as usize];
        let world = run(seed, |world, rng| {
            if rng.random_bool(pace) {
                match rng.random_range(0..4) {
                    0 => world.set_nodes(!world.nodes_up),
                    1 => world.set_etcd(!world.etcd_up),
                    _ => {
                        let up = rng.random_bool(0.5);
                        world.set_nodes(up);
                        world.set_etcd(up);
                    }
                }
            }
        });
        total.set(total.get() + world.deaths.len());
    });
    let deaths = total.get();
    assert!(deaths > SCHEDULES, "only {deaths} deaths: the worlds are too kind");
}

#[test]
fn etcd_alone_never_kills() {
    each_seed(SCHEDULES / 4, |seed| {
        let world = run(seed, |world, rng| {
            if rng.random_bool(0.01) {
                world.set_etcd(!world.etcd_up);
            }
        });
        assert!(world.deaths.is_empty(), "{:?}", world.deaths);
    });
}

#[test]
fn silent_nodes_alone_never_kill_while_etcd_is_heard() {
    each_seed(SCHEDULES / 4, |seed| {
        let world = run(seed, |world, rng| {
            world.mirrored = false;
            if rng.random_bool(0.01) {
                world.set_nodes(!world.nodes_up);
            }
        });
        assert!(world.deaths.is_empty(), "{:?}", world.deaths);
    });
}

#[test]
fn a_link_that_flaps_faster_than_a_death_takes_changes_nothing() {
    each_seed(SCHEDULES / 4, |seed| {
        let world = run(seed, |world, _| {
            let period = (world.options.dead_after / 2).as_secs().max(2);
            let up = (world.now - world.begin).as_secs() / period % 2 == 0;
            world.set_nodes(up);
            world.set_etcd(up);
        });
        assert!(world.deaths.is_empty(), "{:?}", world.deaths);
    });
}

#[test]
fn a_cluster_that_was_dead_before_the_restart_stays_dead_until_it_is_heard() {
    let options = LivenessOptions::default();
    let mut now = Instant::now();
    let mut core = Core::new(options, now);
    let name: ClusterName = "beta".parse().unwrap();
    let ip = IpAddr::from([192, 0, 2, 1]);
    let id = ClusterId::new(2, MaxConnectedClusters::C255).unwrap();
    let dead = Member { id: Some(id), dead: true, nodes: vec![ip] };
    core.set_members(BTreeMap::from([(name.clone(), Member::default())]), now);
    core.set_members(BTreeMap::from([(name, dead)]), now);
    let health = |core: &Core| core.judges().next().map(|(_, judge)| judge.health());
    for _ in 0..600 {
        now += ANSWER;
        assert_eq!(core.step(now).1, []);
    }
    assert_eq!(health(&core), Some(Health::Dead));
    let heard = now;
    while health(&core) == Some(Health::Dead) {
        now += ANSWER;
        core.step(now);
        core.answered(ip, now);
        assert!(now - heard < options.return_after + 3 * ANSWER);
    }
    assert!(now - heard >= options.return_after);
}
