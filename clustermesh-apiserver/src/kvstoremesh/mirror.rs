//! What stands in the local etcd of one remote cluster, as plain code.
//!
//! In: what an earlier run left ([`Mirror::inherit`]), the cluster's config, what reflectors tell of its
//! records, the time. Out: [`Effect`]s: keys to be published, and kinds to be followed.
//!
//! What an earlier run left is wanted until the cluster itself has told what it has: a restart writes
//! nothing and deletes nothing, also if the cluster cannot be reached then. Only what the operator's rules
//! do not allow any more goes at once; so a change of the rules is a restart of the cluster's mirror.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::accept::{Accepted, ConfigError};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::digest::{self, DigestRecord, Stage, Ticket, Timed, record_hash};
use clustermesh_kvstore::import_policy::{Ledger, PeerPolicy, Reason, Rules, Tally};
use clustermesh_kvstore::key::{Kind, Layout, cluster_config_key, data_prefix, digest_prefix};
use clustermesh_kvstore::record::{ClusterConfig, RecordError};
use clustermesh_kvstore::reflector::{Prune, ReflectorEvent, ReflectorSpec};

use super::admit::{Gate, Record, Verdict};
use super::copies::Copies;

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
    /// From one census of a kind of which a cluster states nothing to the next; none: never.
    pub census: Option<Duration>,
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
    /// Sum all records of a kind beside its reflector.
    Count {
        /// The kind.
        kind: Kind,
        /// For the result.
        ticket: Ticket,
        /// Of the records, in the cluster's etcd.
        prefix: String,
    },
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

/// How what is wanted of a kind compares with what the cluster has.
#[derive(Clone, Copy, Debug)]
pub struct Compared {
    /// The kind.
    pub kind: Kind,
    /// The same, or not.
    pub verdict: digest::Verdict,
    /// Differences found so far, by where they arose.
    pub mismatches: [(Stage, u64); 2],
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
    /// When copies were compared last.
    looked: Instant,
    /// Something may come of comparing them again.
    unsettled: bool,
}

/// Pause between two comparisons.
const LOOK: Duration = Duration::from_millis(250);

/// How the records are read; another answer needs other reflectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Followed {
    accepted: Accepted,
    exports: bool,
}

impl Mirror {
    /// A mirror of which nothing is known, of a cluster that is not reached yet.
    pub fn new(name: ClusterName, mesh: Mesh, rules: Arc<Rules>, now: Instant) -> Self {
        let copies = |kind| {
            let prefix = data_prefix(kind, &name, Layout::Cache);
            // The kinds of a cluster do not come all at once.
            let spread = f64::from((record_hash(&prefix, b"") % 1000) as u16) / 2000.0;
            (kind, Copies::new(prefix, mesh.census.map(|interval| interval.mul_f64(0.75 + spread))))
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
            looked: now,
            unsettled: false,
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
            // Of the keys that stand there, however many, only those of the kinds are kept.
            let spec = ReflectorSpec { prune: Prune::Consumer, ..ReflectorSpec::new(digests, None) };
            out.push(Effect::FollowDigests(spec));
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
        self.unsettled = true;
        match event {
            ReflectorEvent::Upsert { suffix, value, revision } => {
                self.put(kind, &suffix, value, Some(revision), out);
            }
            ReflectorEvent::Delete { suffix, revision } => {
                self.gate.forget(kind, &suffix);
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.remove(&suffix, revision, out);
                }
            }
            ReflectorEvent::Relisting => {
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.begin();
                }
            }
            ReflectorEvent::Synced { revision } => {
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.complete(out);
                    copies.synced(revision);
                }
            }
            ReflectorEvent::Lost { .. } => {
                if let Some(copies) = self.kinds.get_mut(&kind) {
                    copies.compare.lost();
                }
            }
            ReflectorEvent::Progress { .. } => {}
        }
    }

    /// What the reflector of the cluster's digests tells. What is no digest states nothing.
    pub fn stated(&mut self, event: &ReflectorEvent, out: &mut Vec<Effect>) {
        let (suffix, record) = match event {
            ReflectorEvent::Upsert { suffix, value, .. } => (suffix, DigestRecord::decode(value).ok()),
            ReflectorEvent::Delete { suffix, .. } => (suffix, None),
            // What still stands there is told again.
            ReflectorEvent::Relisting => {
                self.unsettled = true;
                return self.kinds.values_mut().for_each(|copies| copies.compare_with(None));
            }
            _ => return,
        };
        let copies = self.kinds.iter_mut().find(|(kind, _)| kind.as_str() == suffix);
        let Some((_, copies)) = copies else { return };
        self.unsettled = true;
        copies.compare_with(record.as_ref());
        if let Some(record) = record.filter(|record| !record.recent.is_empty()) {
            out.push(Effect::Stated { prefix: copies.prefix.clone(), recent: record.recent });
        }
    }

    /// A census of a kind has found `sum` at `revision`.
    pub fn counted(&mut self, kind: Kind, ticket: Ticket, revision: i64, sum: u64) {
        if let Some(copies) = self.kinds.get_mut(&kind) {
            self.unsettled = true;
            copies.compare.counted(ticket, revision, sum);
        }
    }

    /// When to call [`Self::tick`].
    pub fn deadline(&self) -> Option<Instant> {
        let look = self.unsettled.then_some(self.looked + LOOK);
        let census = self.kinds.values().filter_map(|copies| copies.compare.census_deadline()).min();
        [self.revocation(), look, census].into_iter().flatten().min()
    }

    /// Looks at the time.
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.revocation().is_some_and(|at| at <= now) {
            self.revoke(out);
        }
        if self.looked + LOOK <= now {
            self.look(now, out);
        }
    }

    fn revocation(&self) -> Option<Instant> {
        if self.revoked { None } else { Some(self.away? + self.mesh.cache_ttl?) }
    }

    fn revoke(&mut self, out: &mut Vec<Effect>) {
        self.revoked = true;
        self.revocations += 1;
        for kind in REVOKED {
            out.push(Effect::Leave(kind));
            if let Some(copies) = self.kinds.get_mut(&kind) {
                copies.clear(out);
            }
        }
    }

    /// Compares what is wanted of each kind with what the cluster has. What differs is listed again; nothing
    /// goes before that list's end.
    fn look(&mut self, now: Instant, out: &mut Vec<Effect>) {
        self.looked = now;
        self.unsettled = false;
        for kind in KINDS {
            let Some(copies) = self.kinds.get_mut(&kind) else { continue };
            let looked = copies.look(now);
            self.unsettled |= !copies.compare.is_settled();
            if let (Some(ticket), Some(followed)) = (looked.census, self.followed) {
                let prefix = data_prefix(kind, &self.name, followed.accepted.layout);
                out.push(Effect::Count { kind, ticket, prefix });
            }
            if looked.relist {
                tracing::warn!(cluster = %self.name, %kind, "what is mirrored differs from what the cluster has; listing it again");
                self.follow(kind, out);
            }
        }
    }

    /// All records of the cluster have been told since the start.
    pub fn is_synced(&self) -> bool {
        self.kinds.values().all(Copies::is_listed)
    }

    /// The cluster's ID, once it is accepted.
    pub fn id(&self) -> Option<ClusterId> {
        self.followed.map(|followed| followed.accepted.id)
    }

    /// Records by kind.
    pub fn counts(&self) -> [(Kind, usize); KINDS.len()] {
        KINDS.map(|kind| (kind, self.kinds.get(&kind).map_or(0, |copies| copies.len())))
    }

    /// How each kind compares with what the cluster has, and how many differences were found so far.
    pub fn compared(&self) -> impl Iterator<Item = Compared> + '_ {
        self.kinds.iter().map(|(kind, Copies { compare, .. })| Compared {
            kind: *kind,
            verdict: compare.verdict(),
            mismatches: Stage::ALL.map(|stage| (stage, compare.mismatches(stage))),
        })
    }

    /// What was refused lately, by kind.
    pub fn ledgers(&self) -> &BTreeMap<Kind, Ledger> {
        self.gate.ledgers()
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
        let beside = (!copies.contains(suffix)).then_some(copies.len());
        let hash = record_hash(suffix, &value);
        match self.gate.judge(peer, &Record { kind, suffix, value: &value }, beside) {
            Verdict::Take => copies.take(suffix, value, hash, revision, out),
            Verdict::Keep => copies.keep(suffix, hash, revision),
            Verdict::Drop => copies.drop(suffix, hash, revision, out),
        }
    }
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
