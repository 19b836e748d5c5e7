//! The core against a model of etcd that does to it all that can happen, in an order drawn from a seed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::core::{Change, Core, Effect, Failure, Input, Ticket, Timing};
use super::generation::Generations;
use super::{Prune, ReflectorSpec};
use crate::etcd::{KeyRange, KeyValue, Page, WatchEvent, WatchMessage};

const PREFIX: &str = "p/";
const CANARY: &str = "synced/p";
const PAGE: usize = 2;

/// One history of an etcd; a re-created, wiped or restored one has another.
#[derive(Clone, Default)]
struct History {
    cluster_id: u64,
    revision: i64,
    compacted: i64,
    /// All writes: revision, key, value or delete.
    log: Vec<(i64, String, Option<String>)>,
    canary_was_there: bool,
}

impl History {
    fn write(&mut self, key: &str, value: Option<String>) {
        self.revision += 1;
        self.canary_was_there |= key == CANARY && value.is_some();
        self.log.push((self.revision, key.to_owned(), value));
    }

    fn at(&self, revision: i64) -> BTreeMap<String, KeyValue> {
        let mut keys = BTreeMap::new();
        for (mod_revision, key, value) in self.log.iter().filter(|(at, ..)| *at <= revision) {
            match value {
                Some(value) => {
                    let value = value.clone().into_bytes();
                    let kv =
                        KeyValue { key: key.clone().into(), value, mod_revision: *mod_revision, lease: 0 };
                    drop(keys.insert(key.clone(), kv));
                }
                None => drop(keys.remove(key)),
            }
        }
        keys
    }
}

struct Watch {
    ticket: Ticket,
    range: KeyRange,
    next: i64,
    created: bool,
    asked: bool,
}

struct World {
    seed: u64,
    rng: SmallRng,
    now: Instant,
    core: Core,
    has_canary: bool,
    etcd: History,
    ids: u64,
    /// The session: its number, and whether etcd answers on it.
    session: Option<u64>,
    sessions: u64,
    generations: Generations,
    stalled: bool,
    /// Requests on their way to etcd, replies on their way back.
    requests: Vec<Effect>,
    replies: Vec<Input>,
    watch: Option<Watch>,
    consumer: HashMap<String, String>,
    /// What the consumer has not heard of since the list began, if it is to prune.
    unseen: HashSet<String>,
    prune: Prune,
    synced: bool,
    ended: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let now = Instant::now();
        let has_canary = rng.random_bool(0.7);
        let canary = has_canary.then(|| CANARY.to_owned());
        let prune = if rng.random_bool(0.5) { Prune::Reflector } else { Prune::Consumer };
        let spec = ReflectorSpec { prefix: PREFIX.into(), canary, page_size: 2, prune };
        Self {
            seed,
            core: Core::new(&spec, Timing::default(), now, seed),
            rng,
            now,
            has_canary,
            etcd: History { cluster_id: 1, revision: 1, ..History::default() },
            ids: 1,
            session: None,
            sessions: 0,
            generations: Generations::default(),
            stalled: false,
            requests: Vec::new(),
            replies: Vec::new(),
            watch: None,
            consumer: HashMap::new(),
            unseen: HashSet::new(),
            prune,
            synced: false,
            ended: false,
        }
    }

    fn run(&mut self) {
        for _ in 0..self.rng.random_range(20..300) {
            self.step();
        }
        self.settle();
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..25 => self.mutate(),
            25..40 => self.serve(),
            40..65 => self.deliver(),
            65..80 => self.watch_on(),
            80..84 => {
                let wait = self.rng.random_range(0..12_000);
                self.pass(Duration::from_millis(wait));
            }
            84..88 => self.disconnect(),
            88..93 => self.connect(),
            93 => self.compact(),
            94 => self.replace_etcd(),
            95 => self.stalled = !self.stalled,
            96 => self.fail(),
            _ => self.write_canary(),
        }
    }

    fn mutate(&mut self) {
        let key = format!("{PREFIX}{}", self.rng.random_range(0..7));
        let value = self.rng.random_bool(0.65).then(|| self.rng.random_range(0..100).to_string());
        if value.is_none() && !self.etcd.at(self.etcd.revision).contains_key(&key) {
            // Next to the range, and no delete of what is not there.
            return self.etcd.write("p0", Some("not ours".into()));
        }
        self.etcd.write(&key, value);
    }

    fn write_canary(&mut self) {
        if !self.etcd.canary_was_there || self.rng.random_bool(0.1) {
            // As its writer does: with a time, which differs from etcd to etcd.
            let value = format!("{} {}", self.ids, self.etcd.revision);
            self.etcd.write(CANARY, Some(value));
        } else if self.rng.random_bool(0.1) {
            self.etcd.write(CANARY, None);
        }
    }

    fn compact(&mut self) {
        self.etcd.compacted = self.rng.random_range(self.etcd.compacted..=self.etcd.revision);
    }

    fn replace_etcd(&mut self) {
        self.disconnect();
        self.ids += 1;
        match self.rng.random_range(0..3) {
            // Restored from a backup, and found before it outgrew what it was.
            0 => {
                let to = self.rng.random_range(self.etcd.compacted.max(1)..=self.etcd.revision);
                self.etcd.log.retain(|(revision, ..)| *revision <= to);
                self.etcd.revision = to;
                self.connect();
            }
            // Wiped, but with the same ID. Without canary nothing can show that if it grows fast.
            1 if self.has_canary => {
                self.etcd = History { cluster_id: self.etcd.cluster_id, revision: 1, ..History::default() };
            }
            _ => self.etcd = History { cluster_id: self.ids, revision: 1, ..History::default() },
        }
    }

    fn connect(&mut self) {
        if self.session.is_none() {
            self.sessions += 1;
            self.session = Some(self.sessions);
            self.stalled = false;
            let generation = self.generations.of(self.etcd.cluster_id, self.etcd.revision);
            self.input(Input::Connected { generation });
        }
    }

    fn disconnect(&mut self) {
        if self.session.take().is_some() {
            self.requests.clear();
            self.watch = None;
            self.input(Input::Disconnected { reason: "cut".into() });
            // What was on its way back may still come; all of it is of the past.
        }
    }

    /// etcd answers one of the requests.
    fn serve(&mut self) {
        if self.stalled || self.requests.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.requests.len());
        let now = self.etcd.revision;
        let reply = match self.requests.remove(at) {
            Effect::Get(ticket, key) => Input::Got(ticket, self.etcd.at(now).remove(&key), now),
            Effect::List { ticket, revision, .. } if revision != 0 && revision < self.etcd.compacted => {
                Input::Failed(ticket, Failure::Compacted)
            }
            Effect::List { ticket, after, revision } => {
                let keys = self.etcd.at(if revision == 0 { now } else { revision });
                let after = after.unwrap_or_default();
                let mut kvs = keys.into_values().filter(|kv| kv.key.starts_with(PREFIX.as_bytes()));
                let mut page: Vec<_> = kvs.by_ref().filter(|kv| kv.key > after).take(PAGE + 1).collect();
                let more = page.len() > PAGE;
                page.truncate(PAGE);
                Input::Page(ticket, Page { kvs: page, more, revision: now })
            }
            other => unreachable!("{other:?} is no request"),
        };
        self.replies.push(reply);
    }

    /// One reply, not always the oldest, reaches the core.
    fn deliver(&mut self) {
        if !self.replies.is_empty() {
            let at = self.rng.random_range(0..self.replies.len());
            let reply = self.replies.swap_remove(at);
            self.input(reply);
        }
    }

    fn fail(&mut self) {
        if let Some(Effect::Get(ticket, _) | Effect::List { ticket, .. }) = self.requests.pop() {
            self.replies.push(Input::Failed(ticket, Failure::Other("no leader".into())));
        } else if let Some(watch) = self.watch.take() {
            let reason = "etcd has other things to do".into();
            self.input(Input::Watch(watch.ticket, WatchMessage::Canceled { reason }));
        }
    }

    /// The watch delivers its next message.
    fn watch_on(&mut self) {
        let Some(watch) = self.watch.as_mut().filter(|_| !self.stalled) else { return };
        let revision = self.etcd.revision;
        let message = if !watch.created {
            watch.created = true;
            WatchMessage::Created { revision }
        } else if watch.next <= self.etcd.compacted {
            WatchMessage::Compacted
        } else {
            let events = self
                .etcd
                .log
                .iter()
                .filter(|(at, key, _)| *at >= watch.next && watch.range.suffix(key.as_bytes()).is_some());
            let events: Vec<_> = events.take(2).map(event).collect();
            match events.last() {
                Some(WatchEvent::Put(KeyValue { mod_revision: last, .. }))
                | Some(WatchEvent::Delete { revision: last, .. }) => {
                    watch.next = last + 1;
                    WatchMessage::Events { revision, events }
                }
                None if std::mem::take(&mut watch.asked) => WatchMessage::Progress { revision },
                None => return,
            }
        };
        let ticket = watch.ticket;
        if matches!(message, WatchMessage::Compacted) {
            self.watch = None;
        }
        self.input(Input::Watch(ticket, message));
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(deadline) = self.core.deadline().filter(|deadline| *deadline <= until) {
            self.now = self.now.max(deadline);
            self.input(Input::Tick);
            // A sign of life that was asked for comes at once, unless etcd is stalled.
            self.watch_on();
        }
        self.now = until;
    }

    fn input(&mut self, input: Input) {
        input.revision().into_iter().for_each(|revision| self.generations.saw(revision));
        let mut effects = Vec::new();
        self.core.handle(self.now, input, &mut effects);
        for effect in effects {
            match effect {
                Effect::Get(..) | Effect::List { .. } => self.requests.push(effect),
                Effect::Watch { ticket, range, revision } => {
                    let next = revision;
                    self.watch = Some(Watch { ticket, range, next, created: false, asked: false });
                }
                Effect::RequestProgress => {
                    if let Some(watch) = &mut self.watch {
                        watch.asked = true;
                    }
                }
                Effect::EndSession(_) => self.ended = true,
                Effect::Emit(change) => self.consume(change),
            }
        }
        if std::mem::take(&mut self.ended) {
            assert!(self.stalled, "seed {}: a session that answers was ended", self.seed);
            self.disconnect();
        }
    }

    fn consume(&mut self, change: Change) {
        let seed = self.seed;
        match change {
            Change::Put { suffix, value, .. } => {
                assert!(self.session.is_some(), "seed {seed}: told without session");
                let value = String::from_utf8(value).unwrap();
                assert_ne!(value, "not ours", "seed {seed}: told of a key next to the range");
                self.unseen.remove(&suffix);
                self.consumer.insert(suffix, value);
            }
            Change::Delete { suffix, revision } => {
                assert!(self.session.is_some(), "seed {seed}: deleted without session");
                assert!(
                    !self.has_canary || self.etcd.canary_was_there,
                    "seed {seed}: {suffix} deleted before the canary of this etcd"
                );
                let key = format!("{PREFIX}{suffix}");
                assert!(
                    !self.etcd.at(revision).contains_key(&key),
                    "seed {seed}: {suffix} deleted, but etcd has it at {revision}"
                );
                self.unseen.remove(&suffix);
                let had = self.consumer.remove(&suffix).is_some();
                assert!(
                    had || self.prune == Prune::Consumer,
                    "seed {seed}: {suffix} deleted, but was never told"
                );
            }
            Change::Relisting => {
                assert_eq!(self.prune, Prune::Consumer, "seed {seed}");
                assert!(
                    !self.has_canary || self.etcd.canary_was_there,
                    "seed {seed}: listed before the canary of this etcd"
                );
                self.unseen = self.consumer.keys().cloned().collect();
            }
            Change::Synced { .. } => {
                assert!(self.session.is_some(), "seed {seed}: synced without session");
                for suffix in self.unseen.drain() {
                    self.consumer.remove(&suffix);
                }
                self.synced = true;
            }
            Change::Lost { .. } => self.synced = false,
            Change::Progress { .. } | Change::Restarted { .. } => {}
        }
    }

    /// etcd is well and quiet: within a few seconds the consumer has what etcd has.
    fn settle(&mut self) {
        self.disconnect();
        self.replies.clear();
        self.connect();
        if self.has_canary && !self.etcd.at(self.etcd.revision).contains_key(CANARY) {
            let value = format!("{} last", self.ids);
            self.etcd.write(CANARY, Some(value));
        }
        for _ in 0..30 {
            while !self.requests.is_empty() || !self.replies.is_empty() {
                self.serve();
                self.deliver();
            }
            for _ in 0..400 {
                self.watch_on();
            }
            self.pass(Duration::from_millis(500));
        }
        let seed = self.seed;
        assert!(self.synced, "seed {seed}: not synced");
        let etcd: BTreeMap<_, _> = self.etcd.at(self.etcd.revision).into_iter().collect();
        let etcd: BTreeMap<_, _> = etcd
            .into_values()
            .filter_map(|kv| {
                let suffix = String::from_utf8(kv.key).unwrap().strip_prefix(PREFIX)?.to_owned();
                Some((suffix, String::from_utf8(kv.value).unwrap()))
            })
            .collect();
        let told: BTreeMap<_, _> = self.consumer.clone().into_iter().collect();
        assert_eq!(told, etcd, "seed {seed}: the consumer's state (left) is not etcd's (right)");
    }
}

fn event((revision, key, value): &(i64, String, Option<String>)) -> WatchEvent {
    let (key, mod_revision) = (key.clone().into_bytes(), *revision);
    match value {
        Some(value) => WatchEvent::Put(KeyValue { key, value: value.clone().into(), mod_revision, lease: 0 }),
        None => WatchEvent::Delete { key, revision: mod_revision },
    }
}

#[test]
fn state_follows_etcd_whatever_happens() {
    for seed in 0..2_000 {
        World::new(seed).run();
    }
}

/// A silent etcd is given up after the two waits, not before.
#[test]
fn silence_ends_the_session() {
    let mut world = World::new(0);
    world.write_canary();
    world.connect();
    for _ in 0..20 {
        world.serve();
        world.deliver();
        world.watch_on();
    }
    assert!(world.synced);
    world.stalled = true;
    world.pass(Timing::default().idle + Timing::default().answer - Duration::from_millis(1));
    assert!(world.session.is_some());
    world.pass(Duration::from_millis(1));
    assert!(world.session.is_none() && !world.synced);
}
