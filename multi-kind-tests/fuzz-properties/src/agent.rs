//! The agent's engine, told by two clusters whatever they like, and by its own.
//!
//! The etcd of each is remembered, so that it is known what a new list tells and what may be held after it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use agent_sync::engine::{Core, Input};
use agent_sync::mesh::Links;
use agent_sync::peers::{OwnCluster, Wish};
use agent_sync::tunnels::Tunnels;
use arbitrary::{Result, Unstructured};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, MaxConnectedClusters};
use clustermesh_kvstore::import_policy::{PeerPolicy, PolicyFile, Refusal, Rules, admit};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::ReflectorEvent;
use ebpf_global_svc::{MapSizes, Tables};

use crate::claims::{Claim, claim, digest, revision};

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
/// The own cluster first.
const CLUSTERS: [&str; 3] = ["alpha", "beta", "gamma"];
const OWN_KINDS: [Kind; 7] = [
    Kind::Nodes,
    Kind::Identities,
    Kind::LocalIdentities,
    Kind::Ip,
    Kind::LocalIp,
    Kind::LocalServices,
    Kind::LocalPolicies,
];
const REMOTE_KINDS: [Kind; 4] = [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::Services];
const MOST: usize = 96;

static POLICIES: LazyLock<[PolicyFile; 4]> = LazyLock::new(|| {
    [
        "",
        "default: {pod-cidrs: [10.2.0.0/16], node-cidrs: [172.18.0.0/16], services: {deny: ['*/secret*']}}",
        "default: {mode: audit, pod-cidrs: nodes, quotas: {ip: 1, nodes: 1}, namespaces: {allow: [shop]}}",
        "default: {pod-cidrs: nodes, quotas: {ip: 2, nodes: 1, services: 1, identities: 1}, max-backends: 1}",
    ]
    .map(|text| PolicyFile::parse(text).unwrap())
});

pub(crate) fn run(input: &[u8]) {
    let mut choices = Unstructured::new(input);
    let mut bed = Bed::new();
    for _ in 0..MOST {
        if choices.is_empty() || bed.step(&mut choices).is_err() {
            break;
        }
    }
    bed.end();
}

struct Bed {
    core: Core,
    tables: Tables,
    now: Instant,
    clusters: [Cluster; 3],
}

struct Cluster {
    name: ClusterName,
    id: Option<ClusterId>,
    rules: Arc<Rules>,
    etcd: BTreeMap<(Kind, String), Vec<u8>>,
}

impl Cluster {
    fn is_own(&self) -> bool {
        self.name.as_str() == CLUSTERS[0]
    }

    fn kinds(&self) -> &'static [Kind] {
        if self.is_own() { &OWN_KINDS } else { &REMOTE_KINDS }
    }

    fn peer(&self, id: ClusterId) -> PeerPolicy {
        PeerPolicy { name: self.name.clone(), id, max: MAX, is_own: self.is_own(), rules: self.rules.clone() }
    }
}

impl Bed {
    fn new() -> Self {
        let id = ClusterId::new(1, MAX).unwrap();
        let own = OwnCluster { name: CLUSTERS[0].parse().unwrap(), id, max: MAX };
        let (tables, now) = (Tables::memory(&MapSizes::default()), Instant::now());
        let mut core = Core::restore(own, "n1", Tunnels::default(), now, &tables).unwrap();
        core.set_links(Links::Absent);
        let cluster = |name: &str| Cluster {
            name: name.parse().unwrap(),
            id: None,
            rules: Arc::default(),
            etcd: BTreeMap::new(),
        };
        let mut bed = Self { core, tables, now, clusters: CLUSTERS.map(cluster) };
        for at in 0..CLUSTERS.len() {
            bed.configure(at);
            bed.accept(at, at + 1);
        }
        bed.core.apply(Input::AllConfigured);
        bed
    }

    fn step(&mut self, choices: &mut Unstructured<'_>) -> Result<()> {
        let at = *choices.choose(&[1, 1, 1, 2, 0])?;
        match choices.int_in_range(0..=19)? {
            0..=9 => {
                let kind = *choices.choose(self.clusters[at].kinds())?;
                let id = self.clusters[at].id.unwrap_or_else(|| ClusterId::new(9, MAX).unwrap());
                let claim = claim(kind, &self.clusters[at].name, id, choices)?;
                self.put(at, kind, claim, revision(choices)?);
            }
            10 | 11 => {
                let keys: Vec<_> = self.clusters[at].etcd.keys().cloned().collect();
                if !keys.is_empty() {
                    let (kind, suffix) = choices.choose(&keys)?.clone();
                    self.clusters[at].etcd.remove(&(kind, suffix.clone()));
                    self.tell(at, kind, ReflectorEvent::Delete { suffix, revision: revision(choices)? });
                }
            }
            12 => {
                let kind = *choices.choose(self.clusters[at].kinds())?;
                self.list(at, kind, revision(choices)?);
            }
            13 => {
                let kind = *choices.choose(self.clusters[at].kinds())?;
                self.tell(at, kind, ReflectorEvent::Lost { reason: "cut".into() });
            }
            14 => {
                let rules = choices.choose(&*POLICIES)?.rules_for(&self.clusters[at].name);
                self.allow(at, rules, revision(choices)?);
            }
            15 => self.come_or_go(at, choices)?,
            16 => {
                let (name, dead) = (self.clusters[at].name.clone(), choices.arbitrary()?);
                self.core.apply(Input::Liveness { name, dead });
            }
            17 => {
                let name = self.clusters[at].name.clone();
                let Claim { suffix, value } = digest(*choices.choose(&Kind::ALL)?, choices)?;
                let revision = revision(choices)?;
                let event = match choices.ratio(7, 8)? {
                    true => ReflectorEvent::Upsert { suffix, value, revision },
                    false => ReflectorEvent::Delete { suffix, revision },
                };
                self.core.apply(Input::Digest { name, event });
            }
            _ => {
                self.now += Duration::from_millis(choices.int_in_range(0..=20_000)?);
                self.settle();
            }
        }
        Ok(())
    }

    fn put(&mut self, at: usize, kind: Kind, Claim { suffix, value }: Claim, revision: i64) {
        self.clusters[at].etcd.insert((kind, suffix.clone()), value.clone());
        self.told(at, kind, suffix, value, revision);
    }

    /// The engine hears of a record: either it counts for something or it is counted as refused.
    fn told(&mut self, at: usize, kind: Kind, suffix: String, value: Vec<u8>, revision: i64) {
        let verdict =
            self.clusters[at].id.map(|id| judge(&self.clusters[at].peer(id), kind, &suffix, &value));
        let before = self.refused(at, kind);
        self.tell(at, kind, ReflectorEvent::Upsert { suffix: suffix.clone(), value, revision });
        let grown = self.refused(at, kind) - before;
        match verdict {
            Some(Err(refusal)) => assert_eq!(grown, 1, "{kind} {suffix:?} is not counted: {refusal}"),
            // Beyond a quota it may still be refused.
            Some(Ok(())) => assert!(grown <= 1),
            None => assert_eq!(grown, 0),
        }
    }

    /// All of a kind is told anew; then exactly that is held which may be.
    fn list(&mut self, at: usize, kind: Kind, revision: i64) {
        self.tell(at, kind, ReflectorEvent::Relisting);
        let records: Vec<_> = self.clusters[at].etcd.iter().filter(|((of, _), _)| *of == kind).collect();
        let records: Vec<_> =
            records.into_iter().map(|((_, suffix), value)| (suffix.clone(), value.clone())).collect();
        let mut fine = 0;
        for (suffix, value) in records {
            if let Some(id) = self.clusters[at].id {
                fine += usize::from(judge(&self.clusters[at].peer(id), kind, &suffix, &value).is_ok());
            }
            self.told(at, kind, suffix, value, revision);
        }
        self.tell(at, kind, ReflectorEvent::Synced { revision });
        if let Some(id) = self.clusters[at].id {
            // Under a small quota, what was held before takes the place of what is told now.
            if self.clusters[at].rules.quotas.of(kind) > MOST {
                assert_eq!(self.core.mesh().count(id, kind), fine, "{kind}");
            }
        }
    }

    fn allow(&mut self, at: usize, rules: Arc<Rules>, revision: i64) {
        if self.clusters[at].is_own() {
            return;
        }
        self.clusters[at].rules = rules.clone();
        let name = self.clusters[at].name.clone();
        self.core.apply(Input::Policy { name, rules });
        self.list_all(at, revision);
    }

    fn come_or_go(&mut self, at: usize, choices: &mut Unstructured<'_>) -> Result<()> {
        let name = self.clusters[at].name.clone();
        if self.clusters[at].is_own() {
            return Ok(());
        }
        match choices.int_in_range(0..=2)? {
            0 => {
                self.core.apply(Input::Removed(name));
                let cluster = &mut self.clusters[at];
                (cluster.id, cluster.rules) = (None, Arc::default());
            }
            1 => {
                self.core.apply(Input::Drained(name));
                self.clusters[at].id = None;
            }
            _ => {
                self.configure(at);
                let id = choices.int_in_range(2..=4)?;
                if self
                    .clusters
                    .iter()
                    .all(|cluster| cluster.id.is_none_or(|held| usize::from(held.get()) != id))
                {
                    if self.clusters[at].id.is_some() {
                        self.core.apply(Input::Drained(name));
                    }
                    self.accept(at, id);
                    self.list_all(at, 1);
                }
            }
        }
        Ok(())
    }

    fn configure(&mut self, at: usize) {
        self.core.apply(Input::Configured(self.clusters[at].name.clone()));
    }

    fn accept(&mut self, at: usize, id: usize) {
        let id = ClusterId::new(u32::try_from(id).unwrap(), MAX).unwrap();
        self.clusters[at].id = Some(id);
        self.core.apply(Input::Accepted { name: self.clusters[at].name.clone(), id });
    }

    fn list_all(&mut self, at: usize, revision: i64) {
        self.clusters[at].kinds().iter().for_each(|kind| self.list(at, *kind, revision));
    }

    fn tell(&mut self, at: usize, kind: Kind, event: ReflectorEvent) {
        self.core.apply(Input::Record { name: self.clusters[at].name.clone(), kind, event });
    }

    fn refused(&self, at: usize, kind: Kind) -> u64 {
        self.core.refused(&self.clusters[at].name, kind).map_or(0, |ledger| ledger.refused())
    }

    fn settle(&mut self) {
        self.core.step(self.now, &mut self.tables);
        for (name, kind, wish) in self.core.check_digests(self.now) {
            let at = self.clusters.iter().position(|cluster| cluster.name == name).unwrap();
            if matches!(wish, Wish::Relist) {
                self.list(at, kind, 1);
            }
        }
        self.check();
    }

    /// What must hold of the kernel's tables whenever something was written.
    fn check(&self) {
        let ids: BTreeMap<u16, &Cluster> =
            self.clusters.iter().filter_map(|cluster| Some((cluster.id?.get(), cluster))).collect();
        for (key, value) in self.tables.ipcache.dump().unwrap() {
            let cluster = ids.get(&key.cluster).expect("an address of nobody");
            let identity = Identity(value.identity);
            let id = ClusterId::new(key.cluster.into(), MAX).unwrap();
            assert!(identity.is_reserved() || identity.belongs_to(id, MAX), "{identity} of {}", cluster.name);
            assert!(identity != Identity::HOST || cluster.is_own(), "{} has our host", cluster.name);
        }
        let backends: BTreeSet<u32> =
            self.tables.backend.dump().unwrap().into_iter().map(|(id, _)| id).collect();
        for (_, backend) in self.tables.slot.dump().unwrap() {
            assert!(backends.contains(&backend), "a slot without its backend");
        }
        for cluster in &self.clusters {
            let Some(id) = cluster.id else { continue };
            for kind in cluster.kinds() {
                let (held, told) = (self.core.mesh().count(id, *kind), cluster.etcd.keys());
                let told = told.filter(|(of, _)| of == kind).count();
                assert!(held <= told, "{} of {kind} are held, {} has {told}", held, cluster.name);
            }
        }
    }

    /// Nothing stays of who is gone.
    fn end(&mut self) {
        self.settle();
        for at in 1..CLUSTERS.len() {
            self.core.apply(Input::Removed(self.clusters[at].name.clone()));
            self.clusters[at].id = None;
        }
        // What drains is kept for a moment: times of reconcilers pass.
        for _ in 0..3 {
            self.now += Duration::from_secs(600);
            self.core.step(self.now, &mut self.tables);
        }
        self.check();
        assert_eq!(self.core.pending(), 0);
    }
}

fn judge(peer: &PeerPolicy, kind: Kind, suffix: &str, value: &[u8]) -> std::result::Result<(), Refusal> {
    admit(kind, suffix, value, peer).map(drop)
}
