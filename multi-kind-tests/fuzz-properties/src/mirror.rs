//! The mirror of one cluster that writes whatever it likes, and the keys that follow in the local etcd.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use clustermesh_apiserver::kvstoremesh::admit::{Gate, Record, Verdict};
use clustermesh_apiserver::kvstoremesh::mirror::{Effect, KINDS, Mesh, Mirror};
use clustermesh_kvstore::accept::Accepted;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::import_policy::{PeerPolicy, PolicyFile, Rules};
use clustermesh_kvstore::key::{Kind, Layout, cluster_config_key, data_prefix};
use clustermesh_kvstore::record::ClusterConfig;
use clustermesh_kvstore::reflector::ReflectorEvent;

use crate::claims::{Claim, claim, digest, revision};

const MAX: MaxConnectedClusters = MaxConnectedClusters::C255;
const MOST: usize = 96;

static POLICIES: LazyLock<[PolicyFile; 3]> = LazyLock::new(|| {
    [
        "",
        "default: {pod-cidrs: [10.2.0.0/16], node-cidrs: [172.18.0.0/16], services: {deny: ['*/secret*']}}",
        "default: {quotas: {ip: 2, nodes: 1, services: 1, identities: 1, serviceexports: 1}}",
    ]
    .map(|text| PolicyFile::parse(text).unwrap())
});

pub(crate) fn run(input: &[u8]) {
    let mut choices = Unstructured::new(input);
    let Ok(mut bed) = Bed::new(&mut choices) else { return };
    for _ in 0..MOST {
        if choices.is_empty() || bed.step(&mut choices).is_err() {
            break;
        }
    }
}

struct Bed {
    name: ClusterName,
    mirror: Mirror,
    rules: Arc<Rules>,
    now: Instant,
    /// As whom it is judged: who it said to be last, now or to an earlier run.
    id: Option<ClusterId>,
    /// The cluster's.
    etcd: BTreeMap<(Kind, String), Vec<u8>>,
    /// What the publisher was told to write.
    local: BTreeMap<String, Vec<u8>>,
    effects: Vec<Effect>,
}

impl Bed {
    fn new(choices: &mut Unstructured<'_>) -> Result<Self> {
        let name: ClusterName = "beta".parse().unwrap();
        let (rules, now) = (choices.choose(&*POLICIES)?.rules_for(&name), Instant::now());
        let mesh = Mesh {
            own: ClusterId::new(1, MAX).unwrap(),
            max: MAX,
            cache_ttl: choices.arbitrary::<bool>()?.then_some(Duration::from_secs(60)),
            census: None,
        };
        let mirror = Mirror::new(name.clone(), mesh, rules.clone(), now);
        let (etcd, local, effects) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut bed = Self { name, mirror, rules, now, id: None, etcd, local, effects };
        if choices.arbitrary()? {
            let config = config(choices)?;
            bed.id = Accepted::check(&bed.name, &config, MAX).ok().map(|accepted| accepted.id);
            bed.mirror.inherit_config(config, &mut bed.effects);
            for _ in 0..choices.int_in_range(0..=3)? {
                let kind = *choices.choose(&KINDS)?;
                let Claim { suffix, value } = claim(kind, &bed.name, bed.id(), choices)?;
                bed.mirror.inherit(kind, &suffix, value, &mut bed.effects);
            }
            KINDS.iter().for_each(|kind| bed.mirror.inherited(*kind, true, &mut bed.effects));
            bed.carry_out();
        }
        Ok(bed)
    }

    fn id(&self) -> ClusterId {
        self.id.unwrap_or_else(|| ClusterId::new(2, MAX).unwrap())
    }

    fn step(&mut self, choices: &mut Unstructured<'_>) -> Result<()> {
        match choices.int_in_range(0..=15)? {
            0..=7 => {
                let kind = *choices.choose(&KINDS)?;
                let Claim { suffix, value } = claim(kind, &self.name, self.id(), choices)?;
                self.etcd.insert((kind, suffix.clone()), value.clone());
                self.put(kind, suffix, value, revision(choices)?);
            }
            8 => {
                let keys: Vec<_> = self.etcd.keys().cloned().collect();
                if !keys.is_empty() {
                    let (kind, suffix) = choices.choose(&keys)?.clone();
                    self.etcd.remove(&(kind, suffix.clone()));
                    self.tell(kind, ReflectorEvent::Delete { suffix, revision: revision(choices)? });
                }
            }
            9 | 10 => {
                let kind = *choices.choose(&KINDS)?;
                self.list(kind, revision(choices)?);
            }
            11 => {
                // Whether it is taken or not, what stands stays.
                let config = config(choices)?;
                if self.mirror.config(&config, &mut self.effects).is_ok() {
                    self.id = self.mirror.id();
                }
            }
            12 => self.mirror.reached(&mut self.effects),
            13 => self.mirror.lost(self.now),
            14 => {
                self.now += Duration::from_secs(choices.int_in_range(0..=90)?);
                self.mirror.tick(self.now, &mut self.effects);
            }
            _ => {
                let Claim { suffix, value } = digest(*choices.choose(&Kind::ALL)?, choices)?;
                let event = ReflectorEvent::Upsert { suffix, value, revision: revision(choices)? };
                self.mirror.stated(&event, &mut self.effects);
            }
        }
        self.carry_out();
        Ok(())
    }

    /// A record is told: it is mirrored, or counted as refused.
    fn put(&mut self, kind: Kind, suffix: String, value: Vec<u8>, revision: i64) {
        let wanted = self.may_be_mirrored(kind, &suffix, &value);
        let before = self.refused();
        let key = self.key(kind, &suffix);
        self.tell(kind, ReflectorEvent::Upsert { suffix, value: value.clone(), revision });
        self.carry_out();
        let refused = self.refused() - before;
        match wanted {
            Some(true) if refused == 0 => assert_eq!(self.local.get(&key), Some(&value)),
            // Beyond the quota.
            Some(true) => assert_eq!(refused, 1),
            Some(false) => assert_eq!(refused, 1, "{key} is not counted"),
            None => assert_eq!(refused, 0),
        }
    }

    /// All of a kind is told anew; then exactly that is wanted which may be.
    fn list(&mut self, kind: Kind, revision: i64) {
        self.tell(kind, ReflectorEvent::Relisting);
        let records: Vec<_> = self
            .etcd
            .iter()
            .filter(|((of, _), _)| *of == kind)
            .map(|((_, suffix), value)| (suffix.clone(), value.clone()))
            .collect();
        let mut wanted = BTreeMap::new();
        for (suffix, value) in records {
            if self.may_be_mirrored(kind, &suffix, &value) == Some(true) {
                wanted.insert(self.key(kind, &suffix), value.clone());
            }
            self.put(kind, suffix, value, revision);
        }
        self.tell(kind, ReflectorEvent::Synced { revision });
        self.carry_out();
        if self.id.is_some() && self.rules.quotas.of(kind) > MOST {
            let prefix = data_prefix(kind, &self.name, Layout::Cache);
            let stands = self.local.iter().filter(|(key, _)| key.starts_with(&prefix));
            assert_eq!(
                stands.map(|(key, value)| (key.clone(), value.clone())).collect::<BTreeMap<_, _>>(),
                wanted
            );
        }
    }

    fn tell(&mut self, kind: Kind, event: ReflectorEvent) {
        self.mirror.event(kind, event, &mut self.effects);
    }

    /// As somebody finds who judges for the first time, but for the quota; none if nobody can judge.
    fn may_be_mirrored(&self, kind: Kind, suffix: &str, value: &[u8]) -> Option<bool> {
        let (name, rules) = (self.name.clone(), self.rules.clone());
        let peer = PeerPolicy { name, id: self.id?, max: MAX, is_own: false, rules };
        Some(Gate::default().judge(&peer, &Record { kind, suffix, value }, None) == Verdict::Take)
    }

    fn refused(&self) -> u64 {
        self.mirror.tallies().map(|(_, _, tally)| tally.refused).sum()
    }

    fn key(&self, kind: Kind, suffix: &str) -> String {
        data_prefix(kind, &self.name, Layout::Cache) + suffix
    }

    /// Nothing is written but below this cluster's own prefixes, and no more than it may have.
    fn carry_out(&mut self) {
        let config_key = cluster_config_key(&self.name);
        for effect in std::mem::take(&mut self.effects) {
            let Effect::Set { key, value, .. } = effect else { continue };
            let is_record = KINDS.iter().any(|kind| key.starts_with(&self.key(*kind, "")));
            assert!(is_record || key == config_key, "{key} is not a key of this mirror");
            match value {
                Some(value) => drop(self.local.insert(key, value)),
                None => drop(self.local.remove(&key)),
            }
        }
        for (kind, count) in self.mirror.counts() {
            let quota = self.rules.quotas.of(kind);
            assert!(count <= quota, "{count} of {kind}; at most {quota} may be");
            let prefix = data_prefix(kind, &self.name, Layout::Cache);
            assert_eq!(self.local.keys().filter(|key| key.starts_with(&prefix)).count(), count);
        }
    }
}

fn config(choices: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    if choices.ratio(1, 8)? {
        return choices.arbitrary();
    }
    let config = ClusterConfig {
        id: *choices.choose(&[2, 2, 2, 2, 3, 1, 0, 256])?,
        synced_canaries: choices.arbitrary()?,
        cached: choices.arbitrary()?,
        max_connected_clusters: *choices.choose(&[None, Some(255), Some(511)])?,
        service_exports_enabled: *choices.choose(&[None, Some(true), Some(false)])?,
    };
    Ok(config.encode())
}
