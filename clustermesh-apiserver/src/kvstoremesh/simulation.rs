//! A mirror between a model of a remote etcd and one of the local etcd, through thousands of histories:
//! the source is cut off, wiped, refilled, changes its form, tells what it must not; the operator changes his
//! mind about that; the local etcd is wiped; the mirror is killed between any two writes.

mod policy;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::accept::Accepted;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::import_policy::Rules;
use clustermesh_kvstore::key::{Kind, Layout, canary_key, cluster_config_key, data_prefix};
use clustermesh_kvstore::record::ClusterConfig;
use clustermesh_kvstore::reflector::ReflectorEvent;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::admit::Verdict;
use super::mirror::{Effect, KINDS, Mesh, Mirror};

const TTL: Duration = Duration::from_secs(60);

type Keys = BTreeMap<String, Vec<u8>>;

/// The remote etcd, by kind.
#[derive(Default)]
struct Source {
    connected: bool,
    config: Option<ClusterConfig>,
    data: BTreeMap<Kind, Keys>,
    canaries: BTreeSet<Kind>,
}

/// A reflector as the mirror sees it: it tells lists after canaries, then changes.
#[derive(Default)]
struct Reflector {
    told: Keys,
    phase: Phase,
    synced_once: bool,
}

#[derive(Default)]
enum Phase {
    #[default]
    Waiting,
    /// The rest of a list.
    Listing(Vec<(String, Vec<u8>)>),
    Following,
}

/// The publisher and the local etcd.
#[derive(Default)]
struct Local {
    desired: Keys,
    done: BTreeSet<String>,
    stands: Keys,
    writes: u64,
}

struct World {
    seed: u64,
    rng: SmallRng,
    now: Instant,
    name: ClusterName,
    mesh: Mesh,
    rules: Arc<Rules>,
    mirror: Mirror,
    source: Source,
    reflectors: BTreeMap<Kind, Reflector>,
    local: Local,
    /// Kinds whose canary stood when the present run began.
    inherited: BTreeSet<Kind>,
    /// What the present run was told of the config.
    config: Option<ClusterConfig>,
    revocations: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let max = MaxConnectedClusters::C255;
        let cache_ttl = rng.random_bool(0.3).then_some(TTL);
        let mesh = Mesh { own: ClusterId::new(1, max).unwrap(), max, cache_ttl, census: None };
        let name: ClusterName = "beta".parse().unwrap();
        let now = Instant::now();
        let rules = policy::rules(&mut rng);
        let mut world = Self {
            seed,
            rng,
            now,
            mirror: Mirror::new(name.clone(), mesh.clone(), rules.clone(), now),
            name,
            mesh,
            rules,
            source: Source::default(),
            reflectors: BTreeMap::new(),
            local: Local::default(),
            inherited: BTreeSet::new(),
            config: None,
            revocations: 0,
        };
        world.source.config = Some(world.a_config());
        world
    }

    fn run(&mut self) {
        for _ in 0..self.rng.random_range(50..400) {
            self.step();
        }
        self.settle();
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..25 => self.mutate(),
            25..60 => self.tell(),
            60..85 => drop(self.write_one()),
            85..88 => self.connect(),
            88..90 => self.disconnect(),
            90 => self.restart(),
            91 => self.local.stands.clear(),
            92 => self.wipe_source(),
            93 => {
                self.source.config = Some(self.a_config());
                self.hear_config();
            }
            94 => {
                self.rules = policy::rules(&mut self.rng);
                self.restart();
            }
            95 => self.pass(),
            _ => {
                let kind = self.a_kind();
                self.source.canaries.insert(kind);
            }
        }
    }

    fn a_kind(&mut self) -> Kind {
        KINDS[self.rng.random_range(0..KINDS.len())]
    }

    fn a_config(&mut self) -> ClusterConfig {
        ClusterConfig {
            id: 2,
            synced_canaries: true,
            cached: self.rng.random_bool(0.2),
            max_connected_clusters: Some(255),
            service_exports_enabled: self.rng.random_bool(0.8).then_some(true),
        }
    }

    fn mutate(&mut self) {
        let kind = self.a_kind();
        let n = self.rng.random_range(0..6);
        let suffix = match kind {
            // The last of each is a key that nobody may have.
            _ if n == 5 => "../x".to_owned(),
            Kind::Nodes => format!("n{n}"),
            Kind::Identities => (policy::FIRST_IDENTITY + n).to_string(),
            Kind::Ip => format!("10.0.0.{n}"),
            _ => format!("shop/s{n}"),
        };
        let data = self.source.data.entry(kind).or_default();
        if self.rng.random_bool(0.65) {
            data.insert(suffix, policy::a_value(&mut self.rng, kind, n));
        } else {
            data.remove(&suffix);
        }
    }

    /// Another etcd, empty. Its canaries come with its data.
    fn wipe_source(&mut self) {
        self.disconnect();
        self.source.data.clear();
        self.source.canaries.clear();
        for reflector in self.reflectors.values_mut() {
            reflector.phase = Phase::Waiting;
        }
    }

    fn connect(&mut self) {
        if !std::mem::replace(&mut self.source.connected, true) {
            self.hear_config();
            let mut effects = Vec::new();
            self.mirror.reached(&mut effects);
            self.carry_out(effects);
        }
    }

    fn disconnect(&mut self) {
        if std::mem::replace(&mut self.source.connected, false) {
            self.mirror.lost(self.now);
            for reflector in self.reflectors.values_mut() {
                if matches!(reflector.phase, Phase::Listing(..)) {
                    reflector.phase = Phase::Waiting;
                }
            }
        }
    }

    fn hear_config(&mut self) {
        if let Some(config) = self.source.config.clone().filter(|_| self.source.connected) {
            let mut effects = Vec::new();
            self.mirror.config(&config.encode(), &mut effects).unwrap();
            self.config = Some(config);
            self.carry_out(effects);
        }
    }

    /// One reflector tells its next thing.
    fn tell(&mut self) {
        let kind = self.a_kind();
        if !self.source.connected {
            return;
        }
        let Some(reflector) = self.reflectors.get_mut(&kind) else { return };
        let data = self.source.data.entry(kind).or_default();
        let mut events = Vec::new();
        let upsert = |suffix: &str, value: &[u8]| ReflectorEvent::Upsert {
            suffix: suffix.to_owned(),
            value: value.to_vec(),
            revision: 1,
        };
        match &mut reflector.phase {
            Phase::Waiting if self.source.canaries.contains(&kind) => {
                let rest = data.iter().map(|(suffix, value)| (suffix.clone(), value.clone())).collect();
                reflector.phase = Phase::Listing(rest);
                reflector.told.clear();
                events.push(ReflectorEvent::Relisting);
            }
            Phase::Waiting => {}
            Phase::Listing(rest) => match rest.pop() {
                Some((suffix, value)) => {
                    events.push(upsert(&suffix, &value));
                    reflector.told.insert(suffix, value);
                }
                None => {
                    reflector.phase = Phase::Following;
                    reflector.synced_once = true;
                    events.push(ReflectorEvent::Synced { revision: 1 });
                }
            },
            Phase::Following => {
                let news = data.iter().find(|(suffix, value)| reflector.told.get(*suffix) != Some(value));
                if let Some((suffix, value)) = news {
                    events.push(upsert(suffix, value));
                    reflector.told.insert(suffix.clone(), value.clone());
                } else if let Some(suffix) = reflector.told.keys().find(|suffix| !data.contains_key(*suffix))
                {
                    let suffix = suffix.clone();
                    reflector.told.remove(&suffix);
                    events.push(ReflectorEvent::Delete { suffix, revision: 1 });
                }
            }
        }
        for event in events {
            let mut effects = Vec::new();
            self.mirror.event(kind, event, &mut effects);
            self.carry_out(effects);
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Follow(kind, spec) => {
                    let layout = match self.config.as_ref().or(self.source.config.as_ref()) {
                        Some(config) if config.cached => Layout::Cache,
                        _ => Layout::State,
                    };
                    let id = ClusterId::new(2, self.mesh.max).unwrap();
                    let wanted = Accepted { id, layout, canaries: true }.reflector(kind, &self.name);
                    assert_eq!(spec.canary, wanted.canary, "seed {}", self.seed);
                    self.reflectors.insert(kind, Reflector::default());
                }
                Effect::Leave(kind) => drop(self.reflectors.remove(&kind)),
                Effect::Set { key, value: Some(value), .. } => drop(self.local.desired.insert(key, value)),
                Effect::Set { key, value: None, .. } => drop(self.local.desired.remove(&key)),
                Effect::FollowDigests(_) | Effect::Stated { .. } | Effect::Count { .. } => {}
                Effect::Done { prefix } => drop(self.local.done.insert(prefix)),
            }
        }
    }

    /// The publisher does one of the things that are to be done.
    fn write_one(&mut self) -> bool {
        let missing =
            self.local.desired.iter().find(|(key, value)| self.local.stands.get(*key) != Some(value));
        if let Some((key, value)) = missing.map(|(key, value)| (key.clone(), value.clone())) {
            assert!(!key.contains("local"), "seed {}: {key}", self.seed);
            self.local.stands.insert(key, value);
            self.local.writes += 1;
            return true;
        }
        for kind in KINDS {
            let prefix = data_prefix(kind, &self.name, Layout::Cache);
            if !self.local.done.contains(&prefix) {
                continue;
            }
            let stale = |key: &&String| key.starts_with(&prefix) && !self.local.desired.contains_key(*key);
            if let Some(key) = self.local.stands.keys().find(stale).cloned() {
                self.check_delete(kind, &key[prefix.len()..]);
                self.local.stands.remove(&key);
                self.local.writes += 1;
                return true;
            }
            let canary = canary_key(kind, &self.name, Layout::Cache);
            if !self.local.stands.contains_key(&canary) {
                self.check_canary(kind, &prefix);
                self.local.stands.insert(canary, b"now".to_vec());
                self.local.writes += 1;
                return true;
            }
        }
        false
    }

    fn check_delete(&self, kind: Kind, suffix: &str) {
        if self.may_lack(kind) {
            return;
        }
        let seed = self.seed;
        let reflector = self.reflectors.get(&kind);
        let told = reflector.and_then(|reflector| reflector.told.get(suffix));
        let refused = told.is_some_and(|value| {
            self.may_be_full(kind) || self.verdict(kind, suffix, value) != Verdict::Take
        });
        assert!(told.is_none() || refused, "seed {seed}: {kind} {suffix} deleted, but the cluster has it");
    }

    fn check_canary(&self, kind: Kind, prefix: &str) {
        if self.may_lack(kind) || self.inherited.contains(&kind) {
            return;
        }
        let seed = self.seed;
        let complete = self.local.stands.keys().filter(|key| key.starts_with(prefix)).count();
        let Some(reflector) = self.reflectors.get(&kind) else {
            panic!("seed {seed}: canary of {kind} without anything told")
        };
        // A list that began again tells what is wanted already.
        let told = &reflector.told;
        let wanted =
            |(suffix, value): &(&String, &Vec<u8>)| self.verdict(kind, suffix, value) == Verdict::Take;
        let wanted = told.iter().filter(wanted).count();
        let listing = matches!(reflector.phase, Phase::Listing(..) | Phase::Waiting);
        assert!(
            listing || (complete <= told.len() && (wanted <= complete || self.may_be_full(kind))),
            "seed {seed}: canary of {kind} before {wanted} records: {complete}"
        );
    }

    /// The records of a kind may be less than the cluster has: withdrawn, or not supported.
    fn may_lack(&self, kind: Kind) -> bool {
        let unsupported = self.config.as_ref().is_some_and(|config| config.service_exports_enabled.is_none());
        let withdrawn =
            self.mirror.revocations() > 0 && matches!(kind, Kind::Services | Kind::ServiceExports);
        (kind == Kind::ServiceExports && unsupported) || withdrawn
    }

    /// The process is killed and started again.
    fn restart(&mut self) {
        self.revocations += self.mirror.revocations();
        self.mirror = Mirror::new(self.name.clone(), self.mesh.clone(), self.rules.clone(), self.now);
        self.reflectors.clear();
        self.local.desired.clear();
        self.local.done.clear();
        self.inherited.clear();
        self.config = None;
        let mut effects = Vec::new();
        if let Some(config) = self.local.stands.get(&cluster_config_key(&self.name)) {
            self.mirror.inherit_config(config.clone(), &mut effects);
        }
        for kind in KINDS {
            let prefix = data_prefix(kind, &self.name, Layout::Cache);
            for (key, value) in self.local.stands.iter().filter(|(key, _)| key.starts_with(&prefix)) {
                self.mirror.inherit(kind, &key[prefix.len()..], value.clone(), &mut effects);
            }
            let canary = self.local.stands.contains_key(&canary_key(kind, &self.name, Layout::Cache));
            self.mirror.inherited(kind, canary, &mut effects);
            self.inherited.extend(canary.then_some(kind));
        }
        self.carry_out(effects);
        if std::mem::take(&mut self.source.connected) {
            self.connect();
        }
    }

    fn pass(&mut self) {
        self.now += TTL / 2;
        let mut effects = Vec::new();
        self.mirror.tick(self.now, &mut effects);
        self.carry_out(effects);
    }

    /// Everything is well and quiet: the mirror becomes what the source is.
    fn settle(&mut self) {
        self.source.canaries.extend(KINDS);
        self.connect();
        for _ in 0..4 {
            for _ in 0..150 {
                self.tell();
            }
            while self.write_one() {}
        }
        let seed = self.seed;
        let config = self.source.config.clone().unwrap();
        for kind in KINDS {
            let prefix = data_prefix(kind, &self.name, Layout::Cache);
            let supported = kind != Kind::ServiceExports || config.service_exports_enabled.is_some();
            let mut data = self.source.data.remove(&kind).unwrap_or_default();
            data.retain(|_, _| supported);
            self.check_mirrored(kind, &prefix, &data);
            let canary = canary_key(kind, &self.name, Layout::Cache);
            assert!(self.local.stands.contains_key(&canary), "seed {seed}: no canary of {kind}");
        }
        let mirrored = ClusterConfig { cached: true, ..config };
        let stands = self.local.stands.get(&cluster_config_key(&self.name));
        assert_eq!(stands, Some(&mirrored.encode()), "seed {seed}");
        assert!(self.mirror.is_synced(), "seed {seed}");
    }
}

#[test]
fn the_mirror_becomes_the_source_whatever_happens() {
    for seed in 0..3_000 {
        World::new(seed).run();
    }
}

#[test]
fn a_restart_writes_nothing_with_or_without_the_cluster() {
    for seed in 0..300 {
        let mut world = World::new(seed);
        for _ in 0..100 {
            world.mutate();
        }
        world.source.canaries.extend(KINDS);
        let data = world.source.data.clone();
        world.settle();
        world.source.data = data;
        let writes = world.local.writes;
        world.disconnect();
        world.restart();
        while world.write_one() {}
        assert_eq!(world.local.writes, writes, "seed {seed}: wrote without having heard of the cluster");
        let data = world.source.data.clone();
        world.settle();
        world.source.data = data;
        assert_eq!(world.local.writes, writes, "seed {seed}: wrote although nothing has changed");
    }
}

#[test]
fn a_cluster_that_is_away_too_long_loses_its_services_until_it_is_back() {
    let mut world = World::new(1);
    world.mesh.cache_ttl = Some(TTL);
    world.rules = Arc::default();
    world.source.config =
        Some(ClusterConfig { service_exports_enabled: Some(true), ..world.source.config.clone().unwrap() });
    world.restart();
    for _ in 0..100 {
        world.mutate();
    }
    let data = world.source.data.clone();
    world.settle();
    world.source.data = data.clone();
    let count = |world: &World, kind| world.mirror.counts().iter().find(|(k, _)| *k == kind).unwrap().1;
    let (nodes, services) = (count(&world, Kind::Nodes), count(&world, Kind::Services));
    assert!(nodes > 0 && services > 0);
    world.disconnect();
    world.pass();
    assert_eq!(count(&world, Kind::Services), services);
    world.pass();
    assert_eq!((count(&world, Kind::Services), count(&world, Kind::Nodes)), (0, nodes));
    assert_eq!(world.mirror.deadline(), None);
    world.settle();
    assert_eq!(count(&world, Kind::Services), services);
}

#[test]
fn a_cluster_with_our_own_id_is_not_mirrored() {
    let mut world = World::new(2);
    let mut effects = Vec::new();
    let config = ClusterConfig { id: 1, ..world.a_config() };
    let error = world.mirror.config(&config.encode(), &mut effects).unwrap_err();
    assert!(error.to_string().contains("this cluster's own"), "{error}");
    assert!(effects.is_empty());
}
