//! What stands in the local etcd of one remote cluster, as plain code.
//!
//! In: what an earlier run left ([`Mirror::inherit`]), the cluster's config, what reflectors tell of its
//! records, the time. Out: [`Effect`]s: keys to be published, and kinds to be followed.
//!
//! What an earlier run left is wanted until the cluster itself has told what it has: a restart writes
//! nothing and deletes nothing, also if the cluster cannot be reached then. Only what the operator's rules
//! do not allow any more goes at once; so a change of the rules is a restart of the cluster's mirror.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::accept::{Accepted, ConfigError};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::digest::{DigestRecord, Timed};
use clustermesh_kvstore::import_policy::{PeerPolicy, Reason, Rules, Tally};
use clustermesh_kvstore::key::{Kind, Layout, cluster_config_key, data_prefix, digest_prefix};
use clustermesh_kvstore::record::{ClusterConfig, RecordError};
use clustermesh_kvstore::reflector::{Prune, ReflectorEvent, ReflectorSpec};

use super::admit::{Gate, Record, Verdict};

/// What is mirrored, in the order in which it is removed.
pub const KINDS: [Kind; 5] = [Kind::Nodes, Kind::Services, Kind::ServiceExports, Kind::Identities, Kind::Ip];

/// What a cluster that cannot be reached for too long loses: calls have to go elsewhere. Its nodes and
/// addresses stay, for connections that still work.
const REVOKED: [Kind; 2] = [Kind::Services, Kind::ServiceExports];

/// The mesh as this process sees it.
#[derive(Clone, Debug)]
pub struct Mesh {
    /// The cluster whose agents read the mirror.
    pub own: ClusterId,
    /// The mesh's width.
    pub max: MaxConnectedClusters,
    /// How long a cluster may be away before its services are withdrawn; none: for ever.
    pub cache_ttl: Option<Duration>,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Follow a kind by a new reflector, instead of the one before.
    Follow(Kind, ReflectorSpec),
    /// Follow a kind no more.
    Leave(Kind),
    /// Follow the cluster's statements of its digests, instead of those before.
    FollowDigests(ReflectorSpec),
    /// The desired value of a key; none: it is to be gone.
    Set {
        /// In the local etcd.
        key: String,
        /// What the cluster wrote.
        value: Option<Vec<u8>>,
        /// The cluster's revision that changed it; none if it only was found to be so.
        origin: Option<i64>,
    },
    /// What the cluster says of the times of its newest revisions.
    Stated {
        /// That they are of, in the local etcd.
        prefix: String,
        /// Ascending by revision.
        recent: Vec<Timed>,
    },
    /// All of this prefix has been set.
    Done {
        /// In the local etcd.
        prefix: String,
    },
}

/// A config that cannot be mirrored.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The mesh does not take this cluster.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The config is no config.
    #[error("cannot read the cluster config of {name}: {source}")]
    Unreadable {
        /// The cluster.
        name: ClusterName,
        /// Why not.
        source: RecordError,
    },
    /// It would be mistaken for the own cluster.
    #[error(
        "cluster {name} has ID {id}, which is this cluster's own: give one of the two another cluster ID"
    )]
    OwnId {
        /// The cluster.
        name: ClusterName,
        /// Its ID.
        id: ClusterId,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Mirror {
    name: ClusterName,
    mesh: Mesh,
    rules: Arc<Rules>,
    /// Under the ID that the cluster says, or that an earlier run has left: without one nothing can be
    /// judged.
    peer: Option<PeerPolicy>,
    gate: Gate,
    followed: Option<Followed>,
    kinds: BTreeMap<Kind, Copies>,
    /// Since when the cluster cannot be reached.
    away: Option<Instant>,
    revocations: u64,
    revoked: bool,
}

/// How the records are read; another answer needs other reflectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Followed {
    accepted: Accepted,
    exports: bool,
}

/// The wanted records of a kind.
#[derive(Debug)]
struct Copies {
    prefix: String,
    /// By what follows the prefix: whether the present list has told of it, or what followed.
    told: HashMap<Box<str>, bool>,
    /// The present list is complete.
    listed: bool,
}

impl Mirror {
    /// A mirror of which nothing is known, of a cluster that is not reached yet.
    pub fn new(name: ClusterName, mesh: Mesh, rules: Arc<Rules>, now: Instant) -> Self {
        let copies = |kind| {
            let prefix = data_prefix(kind, &name, Layout::Cache);
            (kind, Copies { prefix, told: HashMap::new(), listed: false })
        };
        Self {
            kinds: KINDS.map(copies).into(),
            name,
            mesh,
            rules,
            peer: None,
            gate: Gate::default(),
            followed: None,
            away: Some(now),
            revocations: 0,
            revoked: false,
        }
    }

    /// A record that stands in the local etcd since an earlier run; after the config. Without a config it is
    /// left as it stands until the cluster says what it has.
    pub fn inherit(&mut self, kind: Kind, suffix: &str, value: Vec<u8>, out: &mut Vec<Effect>) {
        self.put(kind, suffix, value, None, out);
    }

    /// All records of a kind were inherited; `complete` if their canary stands, too. Without it the earlier
    /// run had not got to the end, and more may be missing.
    pub fn inherited(&self, kind: Kind, complete: bool, out: &mut Vec<Effect>) {
        if complete && let Some(copies) = self.kinds.get(&kind) {
            out.push(Effect::Done { prefix: copies.prefix.clone() });
        }
    }

    /// The config that stands in the local etcd since an earlier run.
    pub fn inherit_config(&mut self, value: Vec<u8>, out: &mut Vec<Effect>) {
        if let Ok(accepted) = Accepted::check(&self.name, &value, self.mesh.max) {
            self.identify(accepted.id);
        }
        self.publish_config(value, out);
    }

    /// The cluster says who it is, for the first time or anew.
    ///
    /// # Errors
    /// It cannot be mirrored like this. What is mirrored stays as it is.
    pub fn config(&mut self, value: &[u8], out: &mut Vec<Effect>) -> Result<(), MirrorError> {
        let accepted = Accepted::check(&self.name, value, self.mesh.max)?;
        if accepted.id == self.mesh.own {
            return Err(MirrorError::OwnId { name: self.name.clone(), id: accepted.id });
        }
        let config = ClusterConfig::decode(value)
            .map_err(|source| MirrorError::Unreadable { name: self.name.clone(), source })?;
        let exports = config.service_exports_enabled.is_some();
        let mirrored = ClusterConfig { cached: true, synced_canaries: true, ..config };
        self.publish_config(mirrored.encode(), out);
        self.identify(accepted.id);
        let followed = Followed { accepted, exports };
        if self.followed.replace(followed) != Some(followed) {
            // All kinds that are mirrored have theirs in one folder.
            let digests = digest_prefix(Kind::Nodes, &self.name, followed.accepted.layout);
            out.push(Effect::FollowDigests(ReflectorSpec::new(digests, None)));
            for kind in KINDS {
                self.follow(kind, out);
            }
        }
        Ok(())
    }

    /// The cluster answers.
    pub fn reached(&mut self, out: &mut Vec<Effect>) {
        self.away = None;
        if std::mem::take(&mut self.revoked) && self.followed.is_some() {
            // Reflectors do not tell again what they have told.
            for kind in REVOKED {
                self.follow(kind, out);
            }
        }
    }

    /// The cluster does not answer any more.
    pub fn lost(&mut self, now: Instant) {
        self.away.get_or_insert(now);
    }

    /// What the reflector of a kind tells.
    pub fn event(&mut self, kind: Kind, event: ReflectorEvent, out: &mut Vec<Effect>) {
        match event {
            ReflectorEvent::Upsert { suffix, value, revision } => {
                self.put(kind, &suffix, value, Some(revision), out);
            }
            ReflectorEvent::Delete { suffix, revision } => {
                self.gate.forget(kind, &suffix);
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.remove(&suffix, Some(revision), out);
                }
            }
            ReflectorEvent::Relisting => {
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.begin();
                }
            }
            ReflectorEvent::Synced { .. } => {
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.complete(out);
                }
            }
            // The reflector itself finds out what a list lacks.
            ReflectorEvent::Progress { .. } | ReflectorEvent::Lost { .. } => {}
        }
    }

    /// What the reflector of the cluster's digests tells. What is no digest is passed by: nothing but times
    /// hangs on it.
    pub fn stated(&self, event: &ReflectorEvent, out: &mut Vec<Effect>) {
        let ReflectorEvent::Upsert { suffix, value, .. } = event else { return };
        let copies = self.kinds.iter().find(|(kind, _)| kind.as_str() == suffix).map(|(_, copies)| copies);
        if let (Some(copies), Ok(record)) = (copies, DigestRecord::decode(value))
            && !record.recent.is_empty()
        {
            out.push(Effect::Stated { prefix: copies.prefix.clone(), recent: record.recent });
        }
    }

    /// When to call [`Self::tick`].
    pub fn deadline(&self) -> Option<Instant> {
        if self.revoked { None } else { Some(self.away? + self.mesh.cache_ttl?) }
    }

    /// Looks at the time.
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        self.revoked = true;
        self.revocations += 1;
        for kind in REVOKED {
            out.push(Effect::Leave(kind));
            if let Some(copies) = self.kinds.get_mut(&kind) {
                copies.clear(out);
            }
        }
    }

    /// All records of the cluster have been told since the start.
    pub fn is_synced(&self) -> bool {
        self.kinds.values().all(|copies| copies.listed)
    }

    /// The cluster's ID, once it is accepted.
    pub fn id(&self) -> Option<ClusterId> {
        self.followed.map(|followed| followed.accepted.id)
    }

    /// Records by kind.
    pub fn counts(&self) -> [(Kind, usize); KINDS.len()] {
        KINDS.map(|kind| (kind, self.kinds.get(&kind).map_or(0, |copies| copies.told.len())))
    }

    /// How many records were refused, or only audited, by kind and reason.
    pub fn tallies(&self) -> impl Iterator<Item = (Kind, Reason, Tally)> + '_ {
        self.gate.tallies()
    }

    /// How often services were withdrawn because the cluster was away for too long.
    pub fn revocations(&self) -> u64 {
        self.revocations
    }

    fn identify(&mut self, id: ClusterId) {
        let (name, max, rules) = (self.name.clone(), self.mesh.max, self.rules.clone());
        self.peer = Some(PeerPolicy { name, id, max, is_own: false, rules });
    }

    fn publish_config(&self, value: Vec<u8>, out: &mut Vec<Effect>) {
        let key = cluster_config_key(&self.name);
        out.push(Effect::Set { key: key.clone(), value: Some(value), origin: None });
        out.push(Effect::Done { prefix: key });
    }

    fn follow(&mut self, kind: Kind, out: &mut Vec<Effect>) {
        let (Some(followed), Some(copies)) = (self.followed, self.kinds.get_mut(&kind)) else { return };
        copies.begin();
        if kind == Kind::ServiceExports && !followed.exports {
            // The peer has none, and no canary for them. Readers of the mirror wait for ours.
            out.push(Effect::Leave(kind));
            return copies.complete(out);
        }
        let spec = followed.accepted.reflector(kind, &self.name);
        // The keys are held here anyway.
        out.push(Effect::Follow(kind, ReflectorSpec { prune: Prune::Consumer, ..spec }));
    }

    /// A record is as the cluster told it at `revision`, or (none) as an earlier run left it.
    fn put(
        &mut self,
        kind: Kind,
        suffix: &str,
        value: Vec<u8>,
        revision: Option<i64>,
        out: &mut Vec<Effect>,
    ) {
        let (Some(peer), Some(copies)) = (&self.peer, self.kinds.get_mut(&kind)) else { return };
        let beside = (!copies.told.contains_key(suffix)).then_some(copies.told.len());
        match self.gate.judge(peer, &Record { kind, suffix, value: &value }, beside) {
            Verdict::Take => {}
            Verdict::Keep => return,
            Verdict::Drop => return copies.remove(suffix, revision, out),
        }
        let told = revision.is_some();
        match copies.told.get_mut(suffix) {
            Some(known) => *known = told,
            None => drop(copies.told.insert(suffix.into(), told)),
        }
        // What a list tells did not just happen.
        let origin = revision.filter(|_| copies.listed);
        out.push(Effect::Set { key: [&copies.prefix, suffix].concat(), value: Some(value), origin });
    }
}

impl Copies {
    /// All records are told anew.
    fn begin(&mut self) {
        self.listed = false;
        self.told.values_mut().for_each(|told| *told = false);
    }

    /// The cluster has told all it has: whatever else is wanted has vanished meanwhile.
    fn complete(&mut self, out: &mut Vec<Effect>) {
        if std::mem::replace(&mut self.listed, true) {
            return;
        }
        let prefix = &self.prefix;
        self.told.retain(|suffix, told| {
            if !*told {
                out.push(Effect::Set { key: [prefix, &**suffix].concat(), value: None, origin: None });
            }
            *told
        });
        out.push(Effect::Done { prefix: prefix.clone() });
    }

    fn remove(&mut self, suffix: &str, revision: Option<i64>, out: &mut Vec<Effect>) {
        if self.told.remove(suffix).is_some() {
            let origin = revision.filter(|_| self.listed);
            out.push(Effect::Set { key: [&self.prefix, suffix].concat(), value: None, origin });
        }
    }

    fn clear(&mut self, out: &mut Vec<Effect>) {
        for (suffix, _) in self.told.drain() {
            out.push(Effect::Set { key: [&self.prefix, &*suffix].concat(), value: None, origin: None });
        }
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_kvstore::digest::{Digest, SourceTime};

    use super::*;

    fn a_mirror() -> Mirror {
        let max = MaxConnectedClusters::C255;
        let mesh = Mesh { own: ClusterId::new(1, max).unwrap(), max, cache_ttl: None };
        Mirror::new("beta".parse().unwrap(), mesh, Arc::default(), Instant::now())
    }

    fn upsert(suffix: &str, value: Vec<u8>, revision: i64) -> ReflectorEvent {
        ReflectorEvent::Upsert { suffix: suffix.to_owned(), value, revision }
    }

    fn origins(effects: &[Effect]) -> Vec<Option<i64>> {
        let origin = |effect: &Effect| match effect {
            Effect::Set { origin, .. } => Some(*origin),
            _ => None,
        };
        effects.iter().filter_map(origin).collect()
    }

    #[test]
    fn changes_carry_their_revision_and_lists_do_not() {
        let mut mirror = a_mirror();
        let mut effects = Vec::new();
        let node = |source: u8| {
            format!(r#"{{"Name":"n1","Cluster":"beta","ClusterID":2,"Source":"{source}"}}"#).into_bytes()
        };
        let config = ClusterConfig { id: 2, ..ClusterConfig::default() };
        mirror.config(&config.encode(), &mut effects).unwrap();
        effects.clear();
        mirror.event(Kind::Nodes, upsert("n1", node(1), 5), &mut effects);
        mirror.event(Kind::Nodes, ReflectorEvent::Synced { revision: 6 }, &mut effects);
        assert_eq!(origins(&effects), [None]);
        effects.clear();
        mirror.event(Kind::Nodes, upsert("n1", node(2), 7), &mut effects);
        mirror.event(Kind::Nodes, ReflectorEvent::Delete { suffix: "n1".into(), revision: 8 }, &mut effects);
        assert_eq!(origins(&effects), [Some(7), Some(8)]);
    }

    #[test]
    fn times_are_passed_on_for_the_mirrored_prefix() {
        let mirror = a_mirror();
        let recent = vec![Timed { revision: 7, at: SourceTime(11) }];
        let record = DigestRecord { digest: Digest::default(), revision: 7, recent: recent.clone() };
        let mut effects = Vec::new();
        for (suffix, value) in [
            ("ip", record.encode()),
            ("ip", b"no digest".to_vec()),
            ("localservices", record.encode()),
            ("else", record.encode()),
        ] {
            mirror.stated(&upsert(suffix, value, 9), &mut effects);
        }
        let prefix = "cilium/cache/ip/v1/beta/".to_owned();
        assert_eq!(effects, [Effect::Stated { prefix, recent }]);
    }
}
