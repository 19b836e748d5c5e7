//! The process that exports a cluster: the real exporter and publisher, and a driver like theirs.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clustermesh_apiserver::export::{Cluster, Exporter, Rules};
use clustermesh_apiserver::identity::Allocator;
use clustermesh_apiserver::objects::Change as ObjectChange;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::key::{self, Kind, Layout};
use clustermesh_kvstore::publisher::{Core, Effect, Observed, Op, OwnedPrefix, PublisherSpec};
use clustermesh_kvstore::record::{ClusterConfig, IdentityRecord, Record as _};
use clustermesh_kvstore::reflector::ReflectorSpec;
use clustermesh_kvstore::reflector::core::Change;
use rand::Rng as _;
use rand::rngs::SmallRng;

use crate::broken::{self, Broken};
use crate::etcd::Write;
use crate::faults::{Fault, Faults};
use crate::link::{Link, Reflector};
use crate::objects::Truth;
use crate::place::Place;

/// Time to live of leases.
pub const TTL: Duration = Duration::from_secs(900);
/// Time for which unused identities are kept.
const IDENTITY_GRACE: Duration = Duration::from_secs(60);
const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;

/// A running exporter.
pub struct ExporterProcess {
    /// What it computes from the objects.
    pub exporter: Exporter,
    /// What it writes.
    pub publisher: Core,
    /// Its connection; reflectors are tagged with the publisher's stream.
    pub link: Link<usize>,
    id: ClusterId,
    prefixes: Vec<String>,
    /// The etcd that the publisher knows of, and that each stream speaks of.
    generation: u64,
    streams: Vec<(String, u64)>,
    /// What is under way, each on the session that it began on.
    running: VecDeque<(Effect, u64)>,
    /// Changes that the source has not handed on yet.
    objects: VecDeque<ObjectChange>,
    /// How many of them are the list at the start.
    initial: usize,
    complete: bool,
    /// Its source takes its time.
    slow: bool,
    /// Addresses that have been there since its start.
    lasting: BTreeSet<IpAddr>,
}

impl ExporterProcess {
    /// Starts it over whatever etcd holds; the objects come one by one.
    pub fn start(place: &Place, id: ClusterId, truth: &Truth, now: Instant, rng: &mut SmallRng) -> Self {
        let spec = spec(&place.name);
        let prefixes = spec.owned.iter().map(|owned| owned.prefix.clone()).collect();
        let mut publisher = Core::new(spec);
        publisher.set(&key::cluster_config_key(&place.name), Some(config(id).into()), None);
        let streams: Vec<_> = publisher.streams().map(|prefix| (prefix.to_owned(), 0)).collect();
        let mut link = Link::new(now);
        for (index, (prefix, _)) in streams.iter().enumerate() {
            link.reflect(index, &ReflectorSpec::new(prefix.clone(), None), now, rng);
        }
        let cluster = Cluster { name: place.name.clone(), id };
        let objects: VecDeque<_> = truth.all().into();
        Self {
            exporter: Exporter::new(cluster, adopt(place, id, now), Rules::default()),
            publisher,
            link,
            id,
            prefixes,
            generation: 0,
            streams,
            running: VecDeque::new(),
            initial: objects.len(),
            objects,
            complete: false,
            slow: rng.random_bool(0.3),
            lasting: truth.addresses(),
        }
    }

    /// Its cluster's ID.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// Objects changed.
    pub fn objects_changed(&mut self, changes: Vec<ObjectChange>, truth: &Truth) {
        let now = truth.addresses();
        self.lasting.retain(|ip| now.contains(ip));
        self.objects.extend(changes);
    }

    /// Everything is written that can be.
    pub fn is_at_rest(&self, place: &Place) -> bool {
        let heard = |reflector: &Reflector<usize>| reflector.live && reflector.said.is_empty();
        self.link.is_with(place)
            && self.link.reflectors.iter().all(heard)
            && self.complete
            && self.objects.is_empty()
            && self.running.is_empty()
            && self.publisher.is_flushed()
    }

    /// When something happens by itself.
    pub fn deadline(&self) -> Option<Instant> {
        let publisher = self.link.generation().and_then(|_| self.publisher.next_deadline());
        self.link.deadline().into_iter().chain(publisher).min()
    }

    /// One thing happens in it, chosen at random; false if that had nothing to do.
    pub fn advance(
        &mut self,
        place: &mut Place,
        now: Instant,
        wall: &str,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        match rng.random_range(0..10) {
            0 => Ok(self.connect(place, now)),
            1..=2 => Ok((!self.slow || rng.random_bool(0.05)) && self.feed(now)),
            3..=5 => {
                let index = rng.random_range(0..self.link.reflectors.len());
                let moved = self.link.advance(index, place, now, rng, faults)?;
                Ok(self.hear(index, now) || moved)
            }
            6..=7 => Ok(self.poll(now, wall)),
            _ => self.execute(place, now, rng, faults),
        }
    }

    /// Everything happens that can; false if that was nothing.
    pub fn exhaust(
        &mut self,
        place: &mut Place,
        now: Instant,
        wall: &str,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        let mut moved = self.connect(place, now);
        while self.feed(now) {
            moved = true;
            if self.slow && !faults.calm {
                break;
            }
        }
        for index in 0..self.link.reflectors.len() {
            while self.link.advance(index, place, now, rng, faults)? {
                moved = true;
            }
            while self.hear(index, now) {
                moved = true;
            }
        }
        moved |= self.poll(now, wall);
        while self.execute(place, now, rng, faults)? {
            moved = true;
        }
        Ok(moved)
    }

    /// Ends the session and opens another one at once.
    pub fn reconnect(&mut self, place: &Place, now: Instant) {
        self.link.reconnect(place, now);
        if let Some(generation) = self.link.generation() {
            self.enter(generation, now);
        }
    }

    fn connect(&mut self, place: &Place, now: Instant) -> bool {
        let connected = self.link.connect(place, now);
        if let Some(generation) = self.link.generation().filter(|_| connected) {
            self.enter(generation, now);
        }
        connected
    }

    /// As the publisher's driver does: the core hears of another etcd at once.
    fn enter(&mut self, generation: u64, now: Instant) {
        if self.generation < generation && !(self.generation > 0 && broken::is(Broken::IgnoresNewEtcd)) {
            self.generation = generation;
            self.publisher.observe(0, Observed::Etcd { generation }, now);
        }
    }

    /// The source hands on an object.
    fn feed(&mut self, now: Instant) -> bool {
        let Some(change) = self.objects.pop_front() else { return false };
        for change in self.exporter.apply(vec![change], now) {
            if change.value.is_some() || !broken::is(Broken::ForgetsToWithdraw) {
                self.publisher.set(&change.key, change.value, None);
            }
        }
        self.initial = match broken::is(Broken::CanaryTooEarly) {
            true => 0,
            false => self.initial.saturating_sub(1),
        };
        if self.initial == 0 && !self.complete {
            self.complete = true;
            self.prefixes.iter().for_each(|prefix| self.publisher.initial_done(prefix));
        }
        true
    }

    /// The publisher hears the next thing that a stream said.
    fn hear(&mut self, index: usize, now: Instant) -> bool {
        let Some((change, _)) = self.link.reflectors[index].said.pop_front() else { return false };
        if let Change::Restarted { generation } = change {
            self.enter(generation, now);
            self.streams[index].1 = generation;
        }
        let (prefix, generation) = &self.streams[index];
        if *generation != self.generation {
            return true;
        }
        let key = |suffix: String| format!("{prefix}{suffix}");
        let observed = match change {
            Change::Restarted { generation } => Observed::Etcd { generation },
            Change::Put { suffix, value, revision, lease } => {
                Observed::Present { key: key(suffix), value, lease, revision }
            }
            Change::Delete { suffix, revision } => Observed::Absent { key: key(suffix), revision },
            Change::Synced { revision, listed: true } => Observed::Listed { revision },
            Change::Synced { .. } | Change::Relisting | Change::Progress { .. } | Change::Lost { .. } => {
                return true;
            }
        };
        let foreign = matches!(observed, Observed::Present { .. } | Observed::Absent { .. });
        if !(foreign && self.publisher.is_flushed() && broken::is(Broken::IgnoresForeignWrites)) {
            self.publisher.observe(index, observed, now);
        }
        true
    }

    fn poll(&mut self, now: Instant, wall: &str) -> bool {
        if self.link.generation().is_none() {
            return false;
        }
        let effects = self.publisher.poll(now, wall);
        let moved = !effects.is_empty();
        let session = self.link.session_number();
        self.running.extend(effects.into_iter().map(|effect| (effect, session)));
        moved
    }

    /// One of the effects under way comes to its end.
    fn execute(
        &mut self,
        place: &mut Place,
        now: Instant,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        if self.running.is_empty() || place.stalled && place.up {
            return Ok(false);
        }
        let at = rng.random_range(0..self.running.len());
        let Some((effect, session)) = self.running.remove(at) else { return Ok(false) };
        let publisher = &mut self.publisher;
        if !self.link.is_with(place) || session != self.link.session_number() {
            match effect {
                Effect::Grant { .. } => publisher.grant_failed("not connected", now),
                Effect::KeepAlive { lease } => publisher.keep_alive_failed(lease, now),
                Effect::Txn { id, .. } => publisher.txn_failed(id, "not connected", false, false, now),
            }
            return Ok(true);
        }
        let fails = faults.chance(rng, 0.06);
        match effect {
            Effect::Grant { .. } if fails => publisher.grant_failed("timeout", now),
            Effect::Grant { ttl } => {
                let lease = place.etcd.grant(now, ttl);
                publisher.granted(lease, ttl, now);
            }
            Effect::KeepAlive { lease } if fails => publisher.keep_alive_failed(lease, now),
            Effect::KeepAlive { lease } => match place.etcd.keep_alive(lease, now, TTL) {
                true => publisher.lease_alive(lease, TTL, now),
                false if broken::is(Broken::IgnoresLostLeases) => publisher.lease_alive(lease, TTL, now),
                false => publisher.lease_gone(lease),
            },
            Effect::Txn { id, ops } => {
                check_deletes(&ops, &self.lasting)?;
                let made = !fails || rng.random_bool(0.5);
                if !made && broken::is(Broken::TakesTimeoutForSuccess) {
                    publisher.txn_done(id, place.etcd.revision + 1);
                } else if !made {
                    faults.note(Fault::WriteLost);
                    publisher.txn_failed(id, "timeout", false, false, now);
                } else if ops
                    .iter()
                    .any(|op| matches!(op, Op::Put { lease, .. } if !place.etcd.has_lease(*lease)))
                {
                    let noticed = !broken::is(Broken::IgnoresLostLeases);
                    publisher.txn_failed(id, "requested lease not found", noticed, false, now);
                } else {
                    let revision = place.etcd.write(ops.into_iter().map(write).collect());
                    if !fails {
                        self.link.saw(revision);
                    }
                    if fails {
                        faults.note(Fault::AnswerLost);
                        publisher.txn_failed(id, "timeout", false, false, now);
                    } else {
                        publisher.txn_done(id, revision);
                    }
                }
            }
        }
        Ok(true)
    }
}

/// I4: what has been there all the time is never withdrawn, however far the exporter has come to know it.
fn check_deletes(ops: &[Op], lasting: &BTreeSet<IpAddr>) -> Result<(), String> {
    for op in ops {
        let Op::Delete { key } = op else { continue };
        let ip = key.strip_prefix("cilium/state/ip/v1/default/").and_then(|ip| ip.parse().ok());
        if ip.is_some_and(|ip| lasting.contains(&ip)) {
            return Err(format!("I4: the exporter withdraws {key}, which has been there all the time"));
        }
    }
    Ok(())
}

fn write(op: Op) -> Write {
    match op {
        Op::Put { key, value, lease } => (key.to_string(), Some((Rc::from(&*value), lease))),
        Op::Delete { key } => (key.to_string(), None),
    }
}

/// The assignments that etcd holds.
fn adopt(place: &Place, id: ClusterId, now: Instant) -> Allocator {
    let mut allocator = Allocator::new(id, MAX, IDENTITY_GRACE);
    let prefix = key::data_prefix(Kind::Identities, &place.name, Layout::State);
    for (key, value) in place.etcd.below(&prefix) {
        if let Ok(record) = IdentityRecord::decode(&key[prefix.len()..], value) {
            // One that is not ours any more is dropped.
            let _ = allocator.adopt_record(&record, &place.name, now);
        }
    }
    allocator
}

fn config(id: ClusterId) -> Vec<u8> {
    ClusterConfig {
        id: id.get().into(),
        synced_canaries: true,
        cached: false,
        max_connected_clusters: Some(255),
        service_exports_enabled: Some(false),
    }
    .encode()
}

fn spec(name: &ClusterName) -> PublisherSpec {
    let mut owned: Vec<OwnedPrefix> =
        Exporter::KINDS.map(|kind| OwnedPrefix::of_kind(kind, name, Layout::State)).into();
    owned.push(OwnedPrefix::new(key::cluster_config_key(name)));
    PublisherSpec { owned, lease_ttl: TTL, batch: 3, ..PublisherSpec::default() }
}
