//! The agent of one node: the real followers and engine, and a driver like theirs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use agent_sync::engine::{Core as Engine, Input};
use agent_sync::mesh::Links;
use agent_sync::peers::core::{Core as Follower, Effect};
use agent_sync::peers::{Ids, OwnCluster};
use agent_sync::tunnels::{Tunnels, UnderlayProtocol};
use agent_sync::wire_key::ip_key;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::import_policy::Rules;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{IpRecord, Record as _};
use clustermesh_kvstore::reflector::ReflectorEvent;
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ebpf_global_svc::Tables;
use ebpf_global_svc::abi::{IpKey, IpValue};
use ipnet::IpNet;
use rand::Rng as _;
use rand::rngs::SmallRng;

use crate::broken::{self, Broken};
use crate::faults::Faults;
use crate::kernel::{Kernel, tables};
use crate::link::Link;
use crate::objects::node_name;
use crate::outcome::{check_dead, check_removals};
use crate::place::Place;

/// A node whose agent may run or not.
pub struct Agent {
    /// Who it belongs to.
    pub own: OwnCluster,
    /// Place of its own cluster.
    pub home: usize,
    /// What the kernel holds.
    pub kernel: Arc<Mutex<Kernel>>,
    /// The running agent.
    pub life: Option<Life>,
    /// What the world remembers of what this node was told, over all its lives.
    pub memory: Memory,
    /// Number of its node.
    pub node: u8,
    underlay: UnderlayProtocol,
    /// Places of clusters whose pods it knows by virtual addresses, as its directory says.
    pub virtual_places: BTreeSet<usize>,
    tables: Tables,
}

/// A running agent.
pub struct Life {
    /// Members, intake, mesh and reconciler.
    pub engine: Engine,
    /// What follows each configured cluster, by place.
    pub peers: BTreeMap<usize, Peer>,
    ids: Ids,
    inbox: VecDeque<Told>,
    all_configured: bool,
}

/// An input of the engine, and how many writes the cluster's etcd had seen when it was true.
struct Told {
    place: usize,
    input: Input,
    tick: u64,
}

/// A followed cluster.
pub struct Peer {
    name: ClusterName,
    follower: Follower,
    /// The connection; the reflector of the config has no kind.
    pub link: Link<Option<Kind>>,
    /// Its config is accepted.
    pub accepted: bool,
}

/// An independent account of what the engine was told.
#[derive(Default)]
pub struct Memory {
    /// Clusters that the engine knows, in this life: place and, once accepted, ID.
    pub members: BTreeMap<usize, Option<u16>>,
    /// All clusters of the directory were told, in this life.
    pub complete: bool,
    /// For each address (by ID of its cluster): the place that told of it, and when that was true.
    pub addresses: BTreeMap<(u16, String), (usize, u64)>,
    /// Kinds that were told anything but their beginning of, by ID, in this life.
    pub heard: BTreeSet<(u16, Kind)>,
    /// Clusters that liveness has judged, in this life.
    pub dead: BTreeMap<usize, bool>,
    /// IDs that were drained or found to be nobody's, in this life.
    pub drained: BTreeSet<u16>,
}

impl Memory {
    fn note(&mut self, told: &Told) {
        let place = told.place;
        match &told.input {
            Input::Configured(_) => drop(self.members.entry(place).or_default()),
            Input::AllConfigured => self.complete = true,
            Input::Policy { .. } | Input::Digest { .. } | Input::Counted { .. } | Input::Encrypted(_) => {}
            Input::Liveness { dead, .. } => {
                if self.members.contains_key(&place) {
                    self.dead.insert(place, *dead);
                }
            }
            Input::Accepted { id, .. } => {
                self.members.insert(place, Some(id.get()));
                // What an earlier life learned of the ID's last owner is not its new one's.
                self.addresses.retain(|(other, _), (owner, _)| *other != id.get() || *owner == place);
            }
            Input::Drained(_) => {
                let id = self.members.insert(place, None).flatten();
                self.drain(id);
            }
            Input::Removed(_) => {
                self.dead.remove(&place);
                let id = self.members.remove(&place).flatten();
                self.drain(id);
            }
            Input::Record { kind, event, .. } => {
                let Some(Some(id)) = self.members.get(&place).copied() else { return };
                match event {
                    ReflectorEvent::Upsert { suffix, value, .. } if *kind == Kind::Ip => {
                        // A record that is refused takes the place of the one before all the same.
                        match IpRecord::decode(suffix, value) {
                            Ok(record) if is_plausible(&record, id) => {
                                self.addresses.insert((id, suffix.clone()), (place, told.tick));
                            }
                            _ => drop(self.addresses.remove(&(id, suffix.clone()))),
                        }
                    }
                    ReflectorEvent::Lost { .. } | ReflectorEvent::Progress { .. } => return,
                    _ => {}
                }
                self.heard.insert((id, *kind));
            }
        }
        let ids: Option<BTreeSet<u16>> = self.members.values().copied().collect();
        if let (true, Some(ids)) = (self.complete, ids) {
            // What is nobody's may go.
            self.drained.extend((1..=16).filter(|id| !ids.contains(id)));
            self.addresses.retain(|(id, _), _| ids.contains(id));
        }
    }

    /// An address with an identity that is not its cluster's to give.
    fn forged(&self, told: &Told) -> Option<(IpKey, IpValue)> {
        let Input::Record { kind: Kind::Ip, event: ReflectorEvent::Upsert { suffix, value, .. }, .. } =
            &told.input
        else {
            return None;
        };
        let id = self.members.get(&told.place).copied().flatten()?;
        let record = IpRecord::decode(suffix, value).ok().filter(|record| !is_plausible(record, id))?;
        let value = IpValue { identity: record.identity.0, node_ip: [0; 4], key: 0, flags: 0, pad: 0 };
        Some((ip_key(id, record.prefix.addr()), value))
    }

    fn drain(&mut self, id: Option<u16>) {
        self.drained.extend(id);
        self.addresses.retain(|(other, _), _| Some(*other) != id);
        self.heard.retain(|(other, _)| Some(*other) != id);
    }

    fn begin_life(&mut self) {
        let addresses = std::mem::take(&mut self.addresses);
        *self = Self { addresses, ..Self::default() };
    }
}

impl Agent {
    /// A node with an empty kernel, on which nothing runs.
    pub fn new(own: OwnCluster, home: usize, node: u8, underlay: UnderlayProtocol, now: Instant) -> Self {
        let kernel = Kernel::new(own.id.get(), now);
        let tables = tables(&kernel);
        let virtual_places = BTreeSet::new();
        let memory = Memory::default();
        Self { own, home, kernel, life: None, memory, tables, node, underlay, virtual_places }
    }

    /// Starts the agent with a directory of remote clusters.
    pub fn start(
        &mut self,
        places: &[Place],
        remotes: &BTreeSet<usize>,
        now: Instant,
        rng: &mut SmallRng,
    ) -> Result<(), String> {
        if broken::is(Broken::FlushesOnStart) {
            self.kernel().flush();
        }
        let tunnels = Tunnels { protocol: self.underlay, node_ip: None };
        let mut engine = Engine::restore(self.own.clone(), &node_name(self.node), tunnels, now, &self.tables)
            .map_err(|error| format!("cannot restore: {error}"))?;
        engine.set_links(Links::Absent);
        self.memory.begin_life();
        let mut life = Life {
            engine,
            peers: BTreeMap::new(),
            ids: Ids::new(self.own.name.clone(), self.own.id),
            inbox: VecDeque::new(),
            all_configured: false,
        };
        life.configure(self.home, &places[self.home], &self.own, VirtualCidrs::default(), now, rng);
        // What is not configured now is as soon as somebody looks at the directory.
        let configured = remotes.iter().filter(|_| !broken::is(Broken::ForgetsStrangersEarly));
        for place in configured {
            life.configure(*place, &places[*place], &self.own, self.virtual_cidrs(*place), now, rng);
        }
        life.tell(self.home, Input::AllConfigured, 0);
        life.all_configured = true;
        self.life = Some(life);
        Ok(())
    }

    /// Ends the agent at once; the kernel keeps what it has.
    pub fn kill(&mut self) {
        self.life = None;
    }

    /// The directory's state reaches the agent: one file that is new or gone.
    pub fn read_directory(
        &mut self,
        places: &[Place],
        remotes: &BTreeSet<usize>,
        now: Instant,
        rng: &mut SmallRng,
    ) -> bool {
        if self.life.is_none() {
            return false;
        }
        let known = |life: &Life, place: &usize| life.peers.contains_key(place);
        let new =
            remotes.iter().copied().find(|place| !self.life.as_ref().is_some_and(|life| known(life, place)));
        let virtual_cidrs = new.map(|place| self.draw_virtual_cidrs(place, rng));
        let Some(life) = &mut self.life else { return false };
        let gone = life.peers.keys().copied().find(|place| *place != self.home && !remotes.contains(place));
        if let Some(place) = gone {
            life.remove(place, &places[place].name);
            return true;
        }
        if let Some((place, virtual_cidrs)) = new.zip(virtual_cidrs) {
            life.configure(place, &places[place], &self.own, virtual_cidrs, now, rng);
        }
        new.is_some()
    }

    /// A file was written again: its cluster is followed anew.
    pub fn rewrite(&mut self, place: usize, places: &[Place], now: Instant, rng: &mut SmallRng) -> bool {
        if !self.life.as_ref().is_some_and(|life| life.peers.contains_key(&place)) {
            return false;
        }
        let virtual_cidrs = self.draw_virtual_cidrs(place, rng);
        let Some(life) = &mut self.life else { return false };
        life.peers.remove(&place);
        life.configure(place, &places[place], &self.own, virtual_cidrs, now, rng);
        true
    }

    /// By which addresses it knows the pods of a cluster.
    pub fn virtual_cidrs(&self, place: usize) -> VirtualCidrs {
        if !self.virtual_places.contains(&place) {
            return VirtualCidrs::default();
        }
        let cidr = |first: u8| -> Option<IpNet> { format!("{first}.{}.0.0/16", place + 1).parse().ok() };
        cidr(10).zip(cidr(240)).and_then(|pair| VirtualCidrs::new([pair]).ok()).unwrap_or_default()
    }

    /// A file that is written says so, or not.
    fn draw_virtual_cidrs(&mut self, place: usize, rng: &mut SmallRng) -> VirtualCidrs {
        match place != self.home && rng.random_bool(0.4) {
            true => self.virtual_places.insert(place),
            false => self.virtual_places.remove(&place),
        };
        self.virtual_cidrs(place)
    }

    /// Liveness has judged a cluster.
    pub fn judge(&mut self, place: &Place, index: usize, dead: bool) -> bool {
        let Some(life) = self.life.as_mut().filter(|life| life.peers.contains_key(&index)) else {
            return false;
        };
        life.tell(index, Input::Liveness { name: place.name.clone(), dead }, 0);
        true
    }

    /// One thing happens in it, chosen at random; false if that had nothing to do.
    pub fn advance(
        &mut self,
        places: &[Place],
        now: Instant,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        if rng.random_range(0..4) == 0 {
            let batch = rng.random_range(1..6);
            return self.work(batch, places, now, rng.random());
        }
        let Some(life) = &mut self.life else { return Ok(false) };
        let nth = rng.random_range(0..life.peers.len());
        let Some((place, peer)) = life.peers.iter_mut().nth(nth) else { return Ok(false) };
        let index = rng.random_range(0..peer.link.reflectors.len());
        let mut effects = Vec::new();
        if broken::is(Broken::SharesIds) {
            life.ids = Ids::new(self.own.name.clone(), self.own.id);
        }
        let mut moved = peer.link.connect(&places[*place], now);
        moved |= peer.link.advance(index, &places[*place], now, rng, faults)?;
        moved |= peer.hear(index, now, &mut life.ids, &mut effects);
        let place = *place;
        life.perform(place, effects, now, rng);
        Ok(moved | life.tick(place, now, rng))
    }

    /// Everything happens that can; false if that was nothing.
    pub fn exhaust(
        &mut self,
        places: &[Place],
        now: Instant,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        let mut moved = false;
        if let Some(life) = &mut self.life {
            if broken::is(Broken::SharesIds) {
                life.ids = Ids::new(self.own.name.clone(), self.own.id);
            }
            let followed: Vec<usize> = life.peers.keys().copied().collect();
            for place in followed {
                moved |= life.exhaust(place, &places[place], now, rng, faults)?;
            }
        }
        Ok(self.work(usize::MAX, places, now, rng.random())? || moved)
    }

    /// The engine takes some inputs and writes.
    fn work(&mut self, batch: usize, places: &[Place], now: Instant, salt: u64) -> Result<bool, String> {
        let Some(life) = &mut self.life else { return Ok(false) };
        let due = life.engine.deadline().is_some_and(|at| at <= now);
        if life.inbox.is_empty() && !due {
            return Ok(false);
        }
        let mut forged = Vec::new();
        for told in life.inbox.drain(..batch.min(life.inbox.len())) {
            self.memory.note(&told);
            forged.extend(
                self.memory.forged(&told).into_iter().filter(|_| broken::is(Broken::TrustsIdentities)),
            );
            let unheard = match &told.input {
                Input::Liveness { dead, .. } => {
                    broken::is(if *dead { Broken::DeathIgnored } else { Broken::DeathStays })
                }
                Input::Removed(_) | Input::Drained(_) => broken::is(Broken::DrainsNever),
                Input::Record { kind: Kind::LocalPolicies, event: ReflectorEvent::Delete { .. }, .. } => {
                    broken::is(Broken::KeepsPolicies)
                }
                _ => false,
            };
            if !unheard {
                life.engine.apply(told.input);
            }
        }
        {
            let mut kernel = lock(&self.kernel);
            kernel.now = now;
            kernel.salt = salt;
        }
        life.engine.step(now, &mut self.tables);
        self.trust(forged)?;
        check_removals(self, places)?;
        check_dead(self)?;
        Ok(true)
    }

    /// Installs addresses as hostile records say.
    fn trust(&mut self, forged: Vec<(IpKey, IpValue)>) -> Result<(), String> {
        self.tables.ipcache.upsert(&forged).map_err(|error| error.to_string())
    }

    /// The kernel's side.
    pub fn kernel(&self) -> MutexGuard<'_, Kernel> {
        lock(&self.kernel)
    }
}

impl Life {
    /// When something happens by itself.
    pub fn deadline(&self) -> Option<Instant> {
        let peers = self.peers.values().flat_map(|peer| [peer.link.deadline(), peer.follower.deadline()]);
        peers.flatten().chain(self.engine.deadline()).min()
    }

    /// Everything was told, is installed, and nothing is to be done later.
    pub fn is_at_rest(&self, places: &[Place]) -> bool {
        self.inbox.is_empty()
            && self.all_configured
            && self.engine.pending() == 0
            && self.engine.deadline().is_none()
            && self.peers.iter().all(|(place, peer)| {
                peer.accepted
                    && peer.link.is_with(&places[*place])
                    && peer.follower.deadline().is_none()
                    && peer.follows_services()
                    && peer
                        .link
                        .reflectors
                        .iter()
                        .all(|reflector| reflector.live && reflector.said.is_empty())
            })
    }

    fn configure(
        &mut self,
        index: usize,
        place: &Place,
        own: &OwnCluster,
        virtual_cidrs: VirtualCidrs,
        now: Instant,
        rng: &mut SmallRng,
    ) {
        self.tell(index, Input::Configured(place.name.clone()), 0);
        let mut follower = Follower::new(own.clone(), place.name.clone());
        let mut link = Link::new(now);
        link.reflect(None, &follower.config_spec(), now, rng);
        let mut effects = Vec::new();
        follower.policy(Arc::new(Rules { virtual_cidrs, ..Rules::default() }), &mut effects);
        self.peers.insert(index, Peer { name: place.name.clone(), follower, link, accepted: false });
        if !broken::is(Broken::KeepsVirtualCidrs) {
            self.perform(index, effects.into_iter().map(|effect| (effect, 0)).collect(), now, rng);
        }
    }

    fn remove(&mut self, index: usize, name: &ClusterName) {
        self.peers.remove(&index);
        self.tell(index, Input::Removed(name.clone()), 0);
        self.ids.release(name);
    }

    fn tell(&mut self, place: usize, input: Input, tick: u64) {
        self.inbox.push_back(Told { place, input, tick });
    }

    fn tick(&mut self, place: usize, now: Instant, rng: &mut SmallRng) -> bool {
        let Some(peer) = self.peers.get_mut(&place) else { return false };
        if peer.follower.deadline().is_none_or(|at| at > now) {
            return false;
        }
        let mut effects = Vec::new();
        peer.follower.tick(now, &mut self.ids, &mut effects);
        let effects = effects.into_iter().map(|effect| (effect, 0)).collect();
        self.perform(place, effects, now, rng);
        true
    }

    fn exhaust(
        &mut self,
        index: usize,
        place: &Place,
        now: Instant,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        let mut moved = false;
        let mut at = 0;
        loop {
            let Some(peer) = self.peers.get_mut(&index) else { return Ok(moved) };
            moved |= peer.link.connect(place, now);
            if at >= peer.link.reflectors.len() {
                return Ok(self.tick(index, now, rng) || moved);
            }
            let mut effects = Vec::new();
            let advanced = peer.link.advance(at, place, now, rng, faults)?;
            let heard = peer.hear(at, now, &mut self.ids, &mut effects);
            self.perform(index, effects, now, rng);
            moved |= advanced | heard;
            if !advanced && !heard {
                at += 1;
            }
        }
    }

    fn perform(&mut self, index: usize, mut effects: Vec<(Effect, u64)>, now: Instant, rng: &mut SmallRng) {
        if broken::is(Broken::DrainsTooLate) {
            effects.sort_by_key(|(effect, _)| matches!(effect, Effect::Tell(Input::Drained(_))));
        }
        for (effect, tick) in effects {
            match effect {
                Effect::Tell(input) => self.tell(index, input, tick),
                Effect::GiveUp(id) => self.ids.give_up(&self.peers[&index].name, id),
                other => {
                    if let Some(peer) = self.peers.get_mut(&index) {
                        peer.perform(other, now, rng);
                    }
                }
            }
        }
    }
}

impl Peer {
    /// Of all kinds, services are followed last.
    fn follows_services(&self) -> bool {
        let services = [Some(Kind::Services), Some(Kind::LocalServices)];
        self.link.reflectors.iter().any(|reflector| services.contains(&reflector.tag))
    }

    /// The follower hears the next thing that a reflector said.
    fn hear(&mut self, index: usize, now: Instant, ids: &mut Ids, out: &mut Vec<(Effect, u64)>) -> bool {
        let Some(reflector) = self.link.reflectors.get_mut(index) else { return false };
        let Some((change, tick)) = reflector.said.pop_front() else { return false };
        let Some(event) = ReflectorEvent::from_change(change) else { return true };
        let mut effects = Vec::new();
        match reflector.tag {
            Some(kind) => self.follower.record(now, kind, event, &mut effects),
            None => self.follower.config(now, event, ids, &mut effects),
        }
        out.extend(effects.into_iter().map(|effect| (effect, tick)));
        true
    }

    fn perform(&mut self, effect: Effect, now: Instant, rng: &mut SmallRng) {
        match effect {
            Effect::Follow(kind, mut spec) => {
                if broken::is(Broken::IgnoresCanary) {
                    spec.canary = None;
                }
                self.link.reflect(Some(kind), &spec, now, rng);
            }
            Effect::Unfollow => self.link.reflectors.retain(|reflector| reflector.tag.is_none()),
            Effect::Accepted(_) => self.accepted = true,
            Effect::Dropped => self.accepted = false,
            // Digests have a simulation of their own.
            Effect::Count { .. } | Effect::Tell(_) | Effect::GiveUp(_) | Effect::Error(_) => {}
        }
    }
}

fn is_plausible(record: &IpRecord, cluster: u16) -> bool {
    record.identity.is_reserved()
        || record.identity.cluster(clustermesh_kvstore::cluster::MaxConnectedClusters::C255) == cluster
}

/// The cluster ID as the mesh writes it.
pub fn cluster_id(id: u16) -> Option<ClusterId> {
    ClusterId::new(id.into(), clustermesh_kvstore::cluster::MaxConnectedClusters::C255).ok()
}

fn lock(kernel: &Mutex<Kernel>) -> MutexGuard<'_, Kernel> {
    kernel.lock().unwrap_or_else(PoisonError::into_inner)
}
