//! Clusters by name, and the way of their records into the mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::digest::{DigestRecord, SourceTime, record_hash};
use clustermesh_kvstore::import_policy::{Mode, PeerPolicy, PodCidrs, Rules};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::ReflectorEvent;
use tracing::{debug, info, warn};

use super::Input;
use super::intake::{self, Intake, Verdict};
use crate::digest::{self, KindDigest};
use crate::mesh::{Mesh, PlacementRules};
use crate::peers::{OWN_KINDS, OwnCluster, REMOTE_KINDS, Wish};

/// Pause between two comparisons of digests.
const CHECK: Duration = Duration::from_millis(250);

/// All configured clusters.
#[derive(Debug)]
pub(super) struct Members {
    own: OwnCluster,
    /// The config directory has been read once.
    complete: bool,
    by_name: BTreeMap<ClusterName, Member>,
    /// Changes that are not installed yet.
    traced: BTreeSet<(ClusterName, Kind)>,
    /// When digests are compared next; none: nothing has come in that could make a difference.
    check_at: Option<Instant>,
    /// Something has come in since.
    heard: bool,
    /// When the next census is due.
    census_at: Option<Instant>,
    census: CensusPlan,
}

/// How often a census is taken, and by whom.
#[derive(Debug, Default)]
struct CensusPlan {
    interval: Option<Duration>,
    node: String,
}

/// A configured cluster.
#[derive(Debug, Default)]
pub(super) struct Member {
    pub(super) id: Option<ClusterId>,
    pub(super) rules: Arc<Rules>,
    pub(super) intake: BTreeMap<Kind, Intake>,
    /// Kinds whose connection is lost.
    pub(super) lost: BTreeSet<Kind>,
    /// What liveness said last; none: nothing yet, and what was restored counts.
    dead: Option<bool>,
    pub(super) digests: BTreeMap<Kind, KindDigest>,
}

impl Members {
    pub(super) fn new(own: OwnCluster) -> Self {
        Self {
            own,
            complete: false,
            by_name: BTreeMap::new(),
            traced: BTreeSet::new(),
            check_at: None,
            heard: false,
            census_at: None,
            census: CensusPlan::default(),
        }
    }

    /// Of clusters that are configured from now on.
    pub(super) fn take_census(&mut self, interval: Option<Duration>, node: &str) {
        self.census = CensusPlan { interval, node: node.to_owned() };
    }

    pub(super) fn own_kinds(&self) -> &'static [Kind] {
        &OWN_KINDS
    }

    pub(super) fn kinds(&self, name: &ClusterName) -> &'static [Kind] {
        if *name == self.own.name { &OWN_KINDS } else { &REMOTE_KINDS }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&ClusterName, &Member)> {
        self.by_name.iter()
    }

    pub(super) fn apply(&mut self, input: Input, mesh: &mut Mesh) {
        match input {
            Input::Configured(name) => drop(self.by_name.entry(name).or_default()),
            Input::AllConfigured => {
                self.complete = true;
                self.forget_strangers(mesh);
            }
            Input::Policy { name, rules } => {
                if name != self.own.name {
                    self.by_name.entry(name).or_default().rules = rules;
                }
            }
            Input::Accepted { name, id } => {
                let kinds = self.kinds(&name);
                let member = self.by_name.entry(name.clone()).or_default();
                member.id = Some(id);
                member.lost.clear();
                if let Some(dead) = member.dead {
                    mesh.set_dead(id, dead);
                }
                mesh.set_name(id, &name);
                member.digests.values_mut().for_each(KindDigest::listing);
                kinds.iter().for_each(|kind| mesh.begin_list(id, *kind));
                mesh.set_placement(id, placement(&member.rules));
                mesh.set_virtual_cidrs(id, &member.rules.virtual_cidrs);
                self.forget_strangers(mesh);
            }
            Input::Record { name, kind, event } => self.record(&name, kind, event, mesh),
            Input::Liveness { name, dead } => {
                // One that was removed meanwhile is gone with its state.
                let Some(member) = self.by_name.get_mut(&name) else { return };
                member.dead = Some(dead);
                if let Some(id) = member.id {
                    mesh.set_dead(id, dead);
                }
            }
            // The engine's own.
            Input::Encrypted(_) => {}
            Input::Digest { name, event } => self.stated(&name, event),
            Input::Counted { name, kind, ticket, revision, sum } => {
                let member = self.by_name.get_mut(&name);
                if let Some(digest) = member.and_then(|member| member.digests.get_mut(&kind)) {
                    self.heard = true;
                    digest.counted(ticket, revision, sum);
                }
            }
            Input::Drained(name) => {
                if let Some(id) = self.by_name.get_mut(&name).and_then(|member| member.id.take()) {
                    mesh.drain(id);
                }
            }
            Input::Removed(name) => {
                if let Some(id) = self.by_name.remove(&name).and_then(|member| member.id) {
                    mesh.drain(id);
                }
                self.forget_strangers(mesh);
            }
        }
    }

    fn record(&mut self, name: &ClusterName, kind: Kind, event: ReflectorEvent, mesh: &mut Mesh) {
        let Some(member) = self.by_name.get_mut(name) else { return };
        let Some(id) = member.id else { return };
        let digest = member.digests.entry(kind).or_insert_with(|| self.census.digest(name, kind));
        self.heard = true;
        match event {
            ReflectorEvent::Upsert { suffix, value, revision } => {
                let peer = PeerPolicy {
                    name: name.clone(),
                    id,
                    max: self.own.max,
                    is_own: *name == self.own.name,
                    rules: member.rules.clone(),
                };
                let intake = member.intake.entry(kind).or_default();
                let hash = record_hash(&suffix, &value);
                match intake.admit(&peer, kind, &suffix, &value, mesh) {
                    Verdict::Take(fact) => {
                        mesh.upsert(id, fact, hash);
                        digest.taken(&suffix);
                    }
                    Verdict::Keep => {
                        if let Some(key) = intake::key(&member.rules, kind, &suffix) {
                            mesh.disown(id, &key);
                        }
                        digest.refused(&suffix, hash);
                    }
                    Verdict::Drop(key) => {
                        mesh.delete(id, &key);
                        digest.refused(&suffix, hash);
                    }
                }
                digest.told(revision, mesh.digest(id, kind));
                self.traced.insert((name.clone(), kind));
            }
            ReflectorEvent::Delete { suffix, revision } => {
                if let Some(intake) = member.intake.get_mut(&kind) {
                    intake.forget(&suffix);
                }
                if let Some(key) = intake::key(&member.rules, kind, &suffix) {
                    mesh.delete(id, &key);
                }
                digest.taken(&suffix);
                digest.told(revision, mesh.digest(id, kind));
                self.traced.insert((name.clone(), kind));
            }
            ReflectorEvent::Relisting => {
                mesh.begin_list(id, kind);
                digest.listing();
            }
            ReflectorEvent::Synced { revision } => {
                member.lost.remove(&kind);
                if !mesh.is_synced(id, kind) {
                    info!(cluster = %name, %kind, records = mesh.count(id, kind), "synced");
                    mesh.finish_list(id, kind);
                }
                digest.synced(revision, mesh.digest(id, kind));
            }
            ReflectorEvent::Lost { reason } => {
                member.lost.insert(kind);
                digest.lost();
                debug!(cluster = %name, %kind, reason, "lost; its state stays");
            }
            // Signs of life, which the connection's status shows.
            _ => {}
        }
    }

    /// What the exporter states. A record that cannot be read states nothing.
    fn stated(&mut self, name: &ClusterName, event: ReflectorEvent) {
        let (suffix, record) = match event {
            ReflectorEvent::Upsert { suffix, value, .. } => (suffix, DigestRecord::decode(&value).ok()),
            ReflectorEvent::Delete { suffix, .. } => (suffix, None),
            // What still stands there is told again.
            ReflectorEvent::Relisting => {
                let member = self.by_name.get_mut(name);
                return member.into_iter().flat_map(|m| m.digests.values_mut()).for_each(|d| d.stated(None));
            }
            _ => return,
        };
        let kind = Kind::named(&suffix).filter(|kind| self.kinds(name).contains(kind));
        if let (Some(kind), Some(member)) = (kind, self.by_name.get_mut(name)) {
            self.heard = true;
            let digest = member.digests.entry(kind).or_insert_with(|| self.census.digest(name, kind));
            digest.stated(record.as_ref());
        }
    }

    /// All that was told is installed.
    pub(super) fn installed(&mut self, at: SourceTime) {
        for (name, kind) in std::mem::take(&mut self.traced) {
            let digest = self.by_name.get_mut(&name).and_then(|member| member.digests.get_mut(&kind));
            if let Some(digest) = digest {
                digest.installed(at);
            }
        }
    }

    /// Compares what is held with what is stated, now and then. Gives the kinds to be read again.
    pub(super) fn check_digests(&mut self, now: Instant, mesh: &Mesh) -> Vec<(ClusterName, Kind, Wish)> {
        if std::mem::take(&mut self.heard) {
            self.check_at.get_or_insert(now + CHECK);
        }
        if self.digests_deadline().is_none_or(|at| now < at) {
            return Vec::new();
        }
        let (mut wishes, mut settled) = (Vec::new(), true);
        self.census_at = None;
        for (name, member) in &mut self.by_name {
            let Some(id) = member.id else { continue };
            for (kind, digest) in &mut member.digests {
                let before = digest.compare().verdict();
                if digest.check(now, mesh.digest(id, *kind)) {
                    wishes.push((name.clone(), *kind, Wish::Relist));
                }
                if let Some(ticket) = digest.census_due(now) {
                    wishes.push((name.clone(), *kind, Wish::Census(ticket)));
                }
                let next = digest.compare().census_deadline();
                self.census_at = self.census_at.into_iter().chain(next).min();
                let verdict = digest.compare().verdict();
                if verdict == digest::Verdict::Differs && verdict != before {
                    warn!(cluster = %name, %kind, "what is held differs from what its exporter states; listing it again");
                }
                settled &= digest.compare().is_settled();
            }
        }
        self.check_at = (!settled).then_some(now + CHECK);
        wishes
    }

    /// When [`Self::check_digests`] has something to do.
    pub(super) fn digests_deadline(&self) -> Option<Instant> {
        [self.check_at, self.census_at].into_iter().flatten().min()
    }

    /// Once the IDs of all configured clusters are known, an ID that nobody has is a stranger's: what
    /// was restored of it goes. Until then it might be that of a cluster which cannot be reached.
    fn forget_strangers(&self, mesh: &mut Mesh) {
        let ids: Option<BTreeSet<u16>> =
            self.by_name.values().map(|member| member.id.map(ClusterId::get)).collect();
        if let (true, Some(ids)) = (self.complete, ids) {
            mesh.keep_only(&ids);
        }
    }
}

impl CensusPlan {
    fn digest(&self, name: &ClusterName, kind: Kind) -> KindDigest {
        // Nodes that have started together, and the kinds of a cluster, do not come all at once.
        let spread = record_hash(&self.node, format!("{name}/{kind}").as_bytes()) % 1000;
        let jitter = |interval: Duration| interval.mul_f64(0.75 + f64::from(spread as u16) / 2000.0);
        KindDigest::with_census(self.interval.map(jitter))
    }
}

/// The rules that only the mesh can apply, for they depend on the cluster's nodes.
fn placement(rules: &Rules) -> PlacementRules {
    PlacementRules {
        hosts: rules.node_cidrs.clone().unwrap_or_default(),
        at_own_nodes: rules.mode == Mode::Enforce && rules.pod_cidrs == PodCidrs::Nodes,
    }
}
