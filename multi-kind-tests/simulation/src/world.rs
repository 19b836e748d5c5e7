//! A whole mesh, and what a step of a schedule does to it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use agent_sync::peers::OwnCluster;
use agent_sync::tunnels::UnderlayProtocol;
use clustermesh_kvstore::cluster::MaxConnectedClusters;
use clustermesh_kvstore::key::{Kind, Layout, canary_key, data_prefix};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::agent::{Agent, cluster_id};
use crate::etcd::Etcd;
use crate::exporter::{ExporterProcess, TTL};
use crate::faults::{Fault, Faults};
use crate::objects::{NAMES, Truth, Underlay};
use crate::place::Place;
use crate::step::{Action, Step};
use crate::{hostile, outcome};

/// What a process takes at least to start.
const RESTART: Duration = Duration::from_millis(100);

/// Clusters, their etcds and exporters, and some nodes with agents.
pub struct World {
    pub(crate) now: Instant,
    underlay: Underlay,
    pub(crate) places: Vec<Place>,
    pub(crate) truths: Vec<Truth>,
    pub(crate) exporters: Vec<Option<ExporterProcess>>,
    pub(crate) agents: Vec<Agent>,
    /// By place of a cluster with agents: the remote clusters of its directory.
    pub(crate) remotes: Vec<BTreeSet<usize>>,
    /// What has happened.
    pub faults: Faults,
    ids: Vec<u16>,
    wall: i64,
    etcds: u64,
}

impl World {
    /// A mesh in which nothing has happened yet. The layout is drawn from `seed`.
    ///
    /// # Errors
    /// What the code under test refused.
    pub fn new(seed: u64) -> Result<Self, String> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let now = Instant::now();
        let clusters = *[2, 2, 2, 3, 3, 4].choose(&mut rng).unwrap_or(&2);
        // By the seed alone, so that schedules stay what they were.
        let tunnels = if seed % 3 == 1 { UnderlayProtocol::Ipv6 } else { UnderlayProtocol::Ipv4 };
        let underlay = Underlay { tunnels, dual_stack: seed % 5 == 2 };
        let mut world = Self {
            now,
            underlay,
            places: Vec::new(),
            truths: Vec::new(),
            exporters: Vec::new(),
            agents: Vec::new(),
            remotes: Vec::new(),
            faults: Faults::default(),
            ids: Vec::new(),
            wall: 1_795_000_000,
            etcds: 10,
        };
        for (number, name) in (1..).zip(NAMES).take(clusters) {
            let Ok(name) = name.parse() else { continue };
            world.places.push(Place::new(name, number));
            world.truths.push(Truth::new(u8::try_from(number).unwrap_or(1), underlay, &mut rng));
            world.ids.push(u16::try_from(number).unwrap_or(1));
            world.exporters.push(None);
            world.remotes.push(
                (0..clusters).filter(|other| *other + 1 != usize::try_from(number).unwrap_or(0)).collect(),
            );
        }
        let homes: &[(usize, u8)] = match rng.random_range(0..4) {
            0 => &[(0, 1), (0, 2)],
            1 => &[(0, 1), (1, 1)],
            _ => &[(0, 1)],
        };
        for (home, node) in homes {
            world.add_agent(*home, *node);
        }
        for place in 0..clusters {
            world.start_exporter(place, &mut rng);
        }
        for agent in 0..world.agents.len() {
            world.start_agent(agent, &mut rng)?;
        }
        Ok(world)
    }

    /// Does a step, and checks all that must hold after it.
    ///
    /// # Errors
    /// What does not hold.
    pub fn step(&mut self, step: Step) -> Result<(), String> {
        let rng = &mut SmallRng::seed_from_u64(step.salt);
        self.act(step.action, rng)?;
        for place in &mut self.places {
            if place.up && place.etcd.expire(self.now) {
                self.faults.note(Fault::LeaseExpired);
            }
        }
        Ok(())
    }

    fn act(&mut self, action: Action, rng: &mut SmallRng) -> Result<(), String> {
        let place = rng.random_range(0..self.places.len());
        match action {
            Action::ChangeObjects => {
                for _ in 0..rng.random_range(1..4) {
                    let changes = self.truths[place].change(rng);
                    if let Some(exporter) = &mut self.exporters[place] {
                        exporter.objects_changed(changes, &self.truths[place]);
                    }
                }
            }
            Action::Run => {
                for _ in 0..rng.random_range(5..60) {
                    self.advance(rng)?;
                }
            }
            Action::RunAll => {
                self.exhaust(rng)?;
            }
            Action::PassTime => {
                let longest = if rng.random_bool(0.2) { 15_000 } else { 600 };
                self.now += Duration::from_millis(rng.random_range(1..longest));
                self.wall += 1;
            }
            Action::LoseRequests => self.lose_requests(rng),
            Action::CutConnection => self.cut(place, rng),
            Action::StopEtcd => {
                self.note(Fault::EtcdDown);
                self.places[place].up = false;
            }
            Action::SilenceEtcd => {
                self.note(Fault::EtcdStalled);
                self.places[place].stalled = true;
            }
            Action::HealEtcd => {
                self.places.iter_mut().for_each(|place| (place.up, place.stalled) = (true, false))
            }
            Action::CompactEtcd => {
                self.note(Fault::EtcdCompacted);
                let etcd = &mut self.places[place].etcd;
                let oldest = if rng.random_bool(0.5) { etcd.revision } else { etcd.compacted };
                etcd.compacted = rng.random_range(oldest..=etcd.revision);
            }
            Action::ReplaceEtcd => {
                self.note(Fault::EtcdNew);
                self.etcds += 1;
                let etcd = Etcd::new(self.etcds, self.places[place].etcd.tick());
                self.places[place].replace(etcd);
            }
            Action::WipeEtcd => {
                self.note(Fault::EtcdWiped);
                let before = &self.places[place].etcd;
                let etcd = Etcd::new(before.cluster_id, before.tick());
                self.places[place].replace(etcd);
                self.reconnect_all(place);
            }
            Action::RestoreEtcd => {
                self.note(Fault::EtcdRestored);
                let etcd = &self.places[place].etcd;
                let revision = rng.random_range(etcd.compacted.max(1)..=etcd.revision);
                self.places[place].restore(revision, self.now + TTL);
                self.reconnect_all(place);
            }
            Action::RevokeLease => {
                let etcd = &mut self.places[place].etcd;
                let leases: Vec<i64> = etcd.leases().collect();
                if let Some(lease) = leases.choose(rng) {
                    etcd.revoke(*lease);
                    self.note(Fault::LeaseLost);
                }
            }
            Action::KillExporter => {
                self.note(Fault::ExporterKilled);
                // Sometimes it stays away for a while.
                self.exporters[place] = None;
                if rng.random_bool(0.8) {
                    self.start_exporter(place, rng);
                }
            }
            Action::KillAgent => {
                self.note(Fault::AgentKilled);
                let agent = rng.random_range(0..self.agents.len());
                self.agents[agent].kill();
                if rng.random_bool(0.8) {
                    self.now += RESTART;
                    self.start_agent(agent, rng)?;
                }
            }
            Action::Disconnect | Action::Connect => self.change_directory(action, rng),
            Action::RewriteConfig => {
                let agent = &mut self.agents[0];
                let other = rng.random_range(1..self.places.len());
                if agent.rewrite(other, &self.places, self.now, rng) {
                    self.note(Fault::ConfigRewritten);
                }
            }
            Action::Judge => {
                let agent = rng.random_range(0..self.agents.len());
                let dead = rng.random_bool(0.5);
                let agent = &mut self.agents[agent];
                if place != agent.home && agent.judge(&self.places[place], place, dead) && dead {
                    self.note(Fault::JudgedDead);
                }
            }
            Action::ChangeId | Action::TakeOverId => self.change_ids(action, rng),
            Action::JumpClock => {
                self.note(Fault::ClockJumped);
                self.now += Duration::from_secs(rng.random_range(60..4000));
            }
            Action::SetWallBack => {
                self.note(Fault::ClockWentBack);
                self.wall -= rng.random_range(1..100_000);
            }
            Action::BreakTables => {
                let agent = rng.random_range(0..self.agents.len());
                self.agents[agent].kernel().failing = rng.random_range(1..10);
            }
            Action::FillTables => {
                let agent = rng.random_range(0..self.agents.len());
                self.agents[agent].kernel().capacity = rng.random_range(0..8);
            }
            Action::MendTables => self.mend_tables(),
            Action::WriteHostile => self.write_hostile(rng),
            Action::WriteForeign => {
                let prefixes = [
                    Kind::Nodes,
                    Kind::Ip,
                    Kind::Services,
                    Kind::Identities,
                    Kind::LocalServices,
                    Kind::LocalPolicies,
                ];
                let kind = *prefixes.choose(rng).unwrap_or(&Kind::Ip);
                let place = &mut self.places[place];
                let prefix = data_prefix(kind, &place.name, Layout::State);
                let keys: Vec<String> = place.etcd.below(&prefix).map(|(key, _)| key.to_owned()).collect();
                if let Some(key) = keys.choose(rng) {
                    let value = rng.random_bool(0.3).then(|| (b"{\"foreign\":1}".as_slice().into(), 0));
                    place.etcd.write(vec![(key.clone(), value)]);
                    self.note(Fault::ForeignWrite);
                }
            }
            Action::DeleteCanary => {
                let kind = *[Kind::Nodes, Kind::Ip, Kind::Services].choose(rng).unwrap_or(&Kind::Ip);
                let place = &mut self.places[place];
                let canary = canary_key(kind, &place.name, Layout::State);
                if place.etcd.contains(&canary) {
                    place.etcd.write(vec![(canary, None)]);
                    self.note(Fault::CanaryDeleted);
                }
            }
        }
        Ok(())
    }

    /// One thing happens somewhere.
    fn advance(&mut self, rng: &mut SmallRng) -> Result<(), String> {
        let (now, wall) = (self.now, self.wall());
        if rng.random_bool(0.4) {
            let place = rng.random_range(0..self.places.len());
            if let Some(exporter) = &mut self.exporters[place] {
                exporter.advance(&mut self.places[place], now, &wall, rng, &mut self.faults)?;
            }
            return Ok(());
        }
        let agent = rng.random_range(0..self.agents.len());
        if rng.random_bool(0.05) {
            self.read_directory(agent, rng);
        }
        self.agents[agent].advance(&self.places, now, rng, &mut self.faults)?;
        Ok(())
    }

    /// Everything happens that can; false if that was nothing.
    fn exhaust(&mut self, rng: &mut SmallRng) -> Result<bool, String> {
        let (now, wall) = (self.now, self.wall());
        let mut moved = false;
        for (exporter, place) in self.exporters.iter_mut().zip(&mut self.places) {
            if let Some(exporter) = exporter {
                moved |= exporter.exhaust(place, now, &wall, rng, &mut self.faults)?;
            }
        }
        for agent in 0..self.agents.len() {
            moved |= self.read_directory(agent, rng);
            moved |= self.agents[agent].exhaust(&self.places, now, rng, &mut self.faults)?;
        }
        Ok(moved)
    }

    fn read_directory(&mut self, agent: usize, rng: &mut SmallRng) -> bool {
        let agent = &mut self.agents[agent];
        agent.read_directory(&self.places, &self.remotes[agent.home], self.now, rng)
    }

    fn lose_requests(&mut self, rng: &mut SmallRng) {
        let mut lost = 0;
        for exporter in self.exporters.iter_mut().flatten() {
            let reflectors = exporter.link.reflectors.iter_mut();
            lost +=
                reflectors.filter(|_| rng.random_bool(0.5)).filter_map(|r| r.lose().then_some(())).count();
        }
        for life in self.agents.iter_mut().filter_map(|agent| agent.life.as_mut()) {
            let reflectors = life.peers.values_mut().flat_map(|peer| &mut peer.link.reflectors);
            lost +=
                reflectors.filter(|_| rng.random_bool(0.5)).filter_map(|r| r.lose().then_some(())).count();
        }
        (0..lost).for_each(|_| self.note(Fault::RequestLost));
    }

    fn cut(&mut self, place: usize, rng: &mut SmallRng) {
        self.note(Fault::ConnectionCut);
        if let Some(exporter) = self.exporters[place].as_mut().filter(|_| rng.random_bool(0.4)) {
            exporter.link.cut(self.now);
        }
        for life in self.agents.iter_mut().filter_map(|agent| agent.life.as_mut()) {
            if let Some(peer) = life.peers.get_mut(&place) {
                peer.link.cut(self.now);
            }
        }
    }

    /// All clients find the etcd of a place before it has outgrown what it was: nothing but its revision
    /// can tell them that it is another one.
    fn reconnect_all(&mut self, place: usize) {
        let now = self.now;
        self.places[place].up = true;
        let stands = &self.places[place];
        if let Some(exporter) = &mut self.exporters[place] {
            exporter.reconnect(stands, now);
        }
        for life in self.agents.iter_mut().filter_map(|agent| agent.life.as_mut()) {
            if let Some(peer) = life.peers.get_mut(&place) {
                peer.link.reconnect(stands, now);
            }
        }
    }

    fn change_directory(&mut self, action: Action, rng: &mut SmallRng) {
        let home = self.agents[rng.random_range(0..self.agents.len())].home;
        let other = rng.random_range(0..self.places.len());
        if other == home {
            return;
        }
        if action == Action::Connect && self.remotes[home].insert(other) {
            self.note(Fault::Connected);
        } else if action == Action::Disconnect && self.remotes[home].remove(&other) {
            self.note(Fault::Disconnected);
        }
    }

    /// Clusters without agents can change their ID: to a free one, or to that of another one which
    /// leaves it.
    fn change_ids(&mut self, action: Action, rng: &mut SmallRng) {
        let movable: Vec<usize> = (0..self.places.len())
            .filter(|place| self.agents.iter().all(|agent| agent.home != *place))
            .collect();
        let Some(place) = movable.choose(rng).copied() else { return };
        let free = (2..9).filter(|id| !self.ids.contains(id)).collect::<Vec<_>>();
        let Some(free) = free.choose(rng).copied() else { return };
        let left = std::mem::replace(&mut self.ids[place], free);
        self.note(Fault::IdChanged);
        self.start_exporter(place, rng);
        let heir = movable.iter().copied().find(|other| *other != place);
        if let Some(heir) = heir.filter(|_| action == Action::TakeOverId) {
            self.ids[heir] = left;
            self.note(Fault::IdReused);
            self.start_exporter(heir, rng);
        }
    }

    fn write_hostile(&mut self, rng: &mut SmallRng) {
        let agents = &self.agents;
        let foreign: Vec<usize> =
            (0..self.places.len()).filter(|place| agents.iter().all(|agent| agent.home != *place)).collect();
        let Some(place) = foreign.choose(rng).copied() else { return };
        let victim = (0..self.places.len()).filter(|other| *other != place).collect::<Vec<_>>();
        let victim = victim.choose(rng).copied().unwrap_or(0);
        let victim = (&self.truths[victim], self.ids[victim]);
        let write = hostile::record(&self.places[place], self.ids[place], &self.truths[place], victim, rng);
        self.places[place].etcd.write(vec![write]);
        self.places.iter_mut().for_each(|place| place.contested = true);
        self.note(Fault::HostileRecord);
    }

    fn mend_tables(&mut self) {
        for agent in &mut self.agents {
            let mut kernel = agent.kernel();
            (kernel.failing, kernel.capacity) = (0, usize::MAX);
            let faults: Vec<Fault> = kernel.faults.drain(..).collect();
            faults.into_iter().for_each(|fault| self.faults.note(fault));
        }
    }

    /// No more faults: within a while the mesh comes to rest, and everything is right.
    ///
    /// # Errors
    /// What is not.
    pub fn settle(&mut self, rng: &mut SmallRng) -> Result<(), String> {
        self.faults.calm = true;
        self.mend_tables();
        for place in 0..self.places.len() {
            (self.places[place].up, self.places[place].stalled) = (true, false);
            if self.exporters[place].is_none() {
                self.start_exporter(place, rng);
            }
        }
        for agent in 0..self.agents.len() {
            if self.agents[agent].life.is_none() {
                self.start_agent(agent, rng)?;
            }
        }
        self.come_to_rest(rng)?;
        outcome::check(self)
    }

    /// Killed and started again, neither agents nor exporters have anything to write.
    ///
    /// # Errors
    /// What they wrote.
    pub fn restart_silently(&mut self, rng: &mut SmallRng) -> Result<(), String> {
        let writes: Vec<u64> = self.agents.iter().map(|agent| agent.kernel().writes).collect();
        let revisions: Vec<_> = self.places.iter().map(|place| place.etcd.newest_data()).collect();
        for agent in 0..self.agents.len() {
            self.agents[agent].kill();
            self.now += RESTART;
            self.start_agent(agent, rng)?;
        }
        for place in 0..self.places.len() {
            self.start_exporter(place, rng);
        }
        self.come_to_rest(rng)?;
        let after: Vec<u64> = self.agents.iter().map(|agent| agent.kernel().writes).collect();
        if writes != after {
            return Err(format!("I4: restarted over what was right, agents wrote {writes:?} -> {after:?}"));
        }
        let after: Vec<_> = self.places.iter().map(|place| place.etcd.newest_data()).collect();
        if revisions != after {
            return Err(format!("restarted over what was right, exporters wrote {revisions:?} -> {after:?}"));
        }
        outcome::check(self)
    }

    fn come_to_rest(&mut self, rng: &mut SmallRng) -> Result<(), String> {
        for _ in 0..2000 {
            if self.exhaust(rng)? {
                continue;
            }
            let mut exporters = self.exporters.iter().zip(&self.places);
            let resting = exporters
                .all(|(exporter, place)| exporter.as_ref().is_some_and(|e| e.is_at_rest(place)))
                && self
                    .agents
                    .iter()
                    .all(|agent| agent.life.as_ref().is_some_and(|life| life.is_at_rest(&self.places)));
            if resting {
                return Ok(());
            }
            let exporters = self.exporters.iter().flatten().filter_map(ExporterProcess::deadline);
            let agents = self.agents.iter().filter_map(|agent| agent.life.as_ref()?.deadline());
            let next = exporters.chain(agents).min().unwrap_or(self.now);
            // As the drivers do: what is due but waits for something else is no busy loop.
            self.now = next.max(self.now + Duration::from_millis(20));
            for place in &mut self.places {
                place.etcd.expire(self.now);
            }
        }
        Err(format!("I1: does not come to rest: {}", outcome::unrest(self)))
    }

    fn add_agent(&mut self, home: usize, node: u8) {
        let max = MaxConnectedClusters::C255;
        if let Some(id) = cluster_id(self.ids[home]) {
            let own = OwnCluster { name: self.places[home].name.clone(), id, max };
            self.agents.push(Agent::new(own, home, node, self.underlay.tunnels, self.now));
        }
    }

    fn start_agent(&mut self, agent: usize, rng: &mut SmallRng) -> Result<(), String> {
        let agent = &mut self.agents[agent];
        agent.start(&self.places, &self.remotes[agent.home], self.now, rng)
    }

    fn start_exporter(&mut self, place: usize, rng: &mut SmallRng) {
        // One that cannot read which identities etcd holds does not start.
        if let (true, Some(id)) = (self.places[place].up, cluster_id(self.ids[place])) {
            let process = ExporterProcess::start(&self.places[place], id, &self.truths[place], self.now, rng);
            self.exporters[place] = Some(process);
        } else {
            self.exporters[place] = None;
        }
    }

    fn note(&mut self, fault: Fault) {
        self.faults.note(fault);
    }

    fn wall(&self) -> String {
        format!("{}Z", self.wall)
    }
}
