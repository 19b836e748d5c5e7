//! What the follower of one cluster decides, as plain code.
//!
//! In: what reflectors say of the cluster's config and records, and the time. Out: [`Effect`]s, to be
//! done in order: what the engine is told, and which reflectors run.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::accept::{Accepted, ConfigError};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::digest::Ticket;
use clustermesh_kvstore::import_policy::Rules;
use clustermesh_kvstore::key::{Kind, cluster_config_key, data_prefix, digest_prefix};
use clustermesh_kvstore::reflector::{Prune, ReflectorEvent, ReflectorSpec};
use tracing::{info, warn};

use super::OwnCluster;
use super::ids::Ids;
use crate::engine::Input;

/// Kinds that an agent reads of its own cluster.
pub(crate) const OWN_KINDS: [Kind; 7] = [
    Kind::Nodes,
    Kind::Identities,
    Kind::LocalIdentities,
    Kind::Ip,
    Kind::LocalIp,
    Kind::LocalServices,
    Kind::LocalPolicies,
];
/// Kinds that it reads of others.
pub(crate) const REMOTE_KINDS: [Kind; 4] = [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::Services];

/// An ID that another cluster holds may become free at any time.
const RETRY: Duration = Duration::from_secs(1);

/// Followed only after the cluster's nodes: an address whose node is not known yet would be installed
/// without it, and once more with it.
const BEHIND_NODES: [Kind; 2] = [Kind::Ip, Kind::LocalIp];

/// Where backends are and who they are. A cluster's services are followed only after these: a backend
/// that is chosen before the way to it is known makes calls fail.
const BEFORE_SERVICES: [Kind; 3] = [Kind::Nodes, Kind::Ip, Kind::LocalIp];

/// And this much later: two clusters that are being connected learn of each other at about the same time.
/// Calls that one of them sends before the other knows its nodes are dropped there as an unknown
/// sender's, and TCP tries again only after a second.
const MUTUAL: Duration = Duration::from_millis(300);

/// Follows one cluster; see the module.
#[derive(Debug)]
pub struct Core {
    own: OwnCluster,
    name: ClusterName,
    /// By which the engine judges; none: it was not told yet.
    rules: Option<Arc<Rules>>,
    has_config: bool,
    accepted: Option<Accepted>,
    refused: Option<Refused>,
    /// Of [`BEFORE_SERVICES`], those whose first list is not complete.
    awaited: Vec<Kind>,
    /// When the services of a remote cluster may be followed.
    services_at: Option<Instant>,
}

/// A config that could not be accepted.
#[derive(Debug)]
struct Refused {
    value: Vec<u8>,
    /// When it is looked at again.
    again: Instant,
}

/// What is to be done.
#[derive(Debug)]
pub enum Effect {
    /// Tell the engine.
    Tell(Input),
    /// Start the reflector of a kind, in place of the one that may be running.
    Follow(Kind, ReflectorSpec),
    /// Sum all records of a kind beside its reflector.
    Count {
        /// The kind.
        kind: Kind,
        /// For the result.
        ticket: Ticket,
        /// Of the records.
        prefix: String,
    },
    /// Stop the reflectors of all kinds; nothing that they said may be passed on any more.
    Unfollow,
    /// The engine knows that nothing of the cluster stands under this ID any more: others may have it.
    GiveUp(ClusterId),
    /// For status: the cluster is let in.
    Accepted(Accepted),
    /// For status: it is out again.
    Dropped,
    /// For status: something is wrong.
    Error(String),
}

impl Core {
    /// Nothing is known of the cluster yet.
    pub fn new(own: OwnCluster, name: ClusterName) -> Self {
        Self {
            own,
            name,
            rules: None,
            has_config: false,
            accepted: None,
            refused: None,
            awaited: Vec::new(),
            services_at: None,
        }
    }

    /// How the cluster's config is followed: for good, so that a cluster that changes its ID or layout
    /// is noticed at once.
    pub fn config_spec(&self) -> ReflectorSpec {
        ReflectorSpec::new(cluster_config_key(&self.name), None)
    }

    /// The reflector of the config says something.
    pub fn config(&mut self, now: Instant, event: ReflectorEvent, ids: &mut Ids, out: &mut Vec<Effect>) {
        match event {
            ReflectorEvent::Upsert { value, .. } => {
                self.has_config = true;
                self.consider(now, value, ids, out);
            }
            // Its lease ran out, or its etcd was re-created: no reason to let go of its state.
            ReflectorEvent::Delete { .. } => self.has_config = false,
            ReflectorEvent::Synced { .. } if !self.has_config => out.push(Effect::Error(format!(
                "etcd has no config of cluster {0}: is it that cluster's etcd, and does its apiserver run with --cluster-name {0}?",
                self.name
            ))),
            ReflectorEvent::Lost { reason } => out.push(Effect::Error(reason)),
            ReflectorEvent::Synced { .. } | ReflectorEvent::Progress { .. } | ReflectorEvent::Relisting => {}
        }
    }

    /// The reflector of a kind says something.
    pub fn record(&mut self, now: Instant, kind: Kind, event: ReflectorEvent, out: &mut Vec<Effect>) {
        let is_complete = matches!(event, ReflectorEvent::Synced { .. });
        // The engine gets it first: what it gets of services comes after.
        out.push(Effect::Tell(Input::Record { name: self.name.clone(), kind, event }));
        if is_complete {
            self.note_complete(now, kind, out);
        }
    }

    /// The operator's rules for the cluster. What the engine took or refused by others is told again: the
    /// list's end removes what is not allowed any more, and nothing else. The own cluster has none.
    pub fn policy(&mut self, rules: Arc<Rules>, out: &mut Vec<Effect>) {
        // The first time in any case: the engine may have others of a follower before this one.
        if self.rules.as_ref() == Some(&rules) || self.name == self.own.name {
            return;
        }
        self.rules = Some(rules.clone());
        out.push(Effect::Tell(Input::Policy { name: self.name.clone(), rules }));
        if let Some(accepted) = self.accepted {
            info!(cluster = %self.name, "the import policy changed; listing the cluster again");
            self.follow_records(accepted, out);
        }
    }

    /// A kind that is followed is to be listed again.
    pub fn relist(&self, kind: Kind, out: &mut Vec<Effect>) {
        if let Some(accepted) = self.accepted {
            out.push(Effect::Follow(kind, self.spec(accepted, kind)));
        }
    }

    /// A kind that is followed is to be summed.
    pub fn count(&self, kind: Kind, ticket: Ticket, out: &mut Vec<Effect>) {
        if let Some(accepted) = self.accepted {
            let prefix = data_prefix(kind, &self.name, accepted.layout);
            out.push(Effect::Count { kind, ticket, prefix });
        }
    }

    /// The time of [`Self::deadline`] has come.
    pub fn tick(&mut self, now: Instant, ids: &mut Ids, out: &mut Vec<Effect>) {
        if self.services_at.is_some_and(|at| at <= now) {
            self.services_at = None;
            if let Some(accepted) = self.accepted {
                self.follow_kinds(accepted, is_service, out);
            }
        }
        if let Some(refused) = self.refused.take_if(|refused| refused.again <= now) {
            self.consider(now, refused.value, ids, out);
        }
    }

    /// When to call [`Self::tick`].
    pub fn deadline(&self) -> Option<Instant> {
        self.services_at.into_iter().chain(self.refused.as_ref().map(|refused| refused.again)).min()
    }

    /// Looks at a cluster config, new or refused before.
    fn consider(&mut self, now: Instant, value: Vec<u8>, ids: &mut Ids, out: &mut Vec<Effect>) {
        let accepted = match Accepted::check(&self.name, &value, self.own.max) {
            Ok(accepted) => accepted,
            // Nobody can tell what it means; what was accepted before still holds.
            Err(error @ ConfigError::Unreadable { .. }) => {
                return out.push(Effect::Error(error.to_string()));
            }
            Err(error) => return self.refuse(now, value, error.to_string(), ids, out),
        };
        if self.accepted == Some(accepted) {
            self.refused = None;
            return;
        }
        // Not only what this follower let in: one that its file was taken from may have left some.
        if ids.of(&self.name).is_some_and(|before| before != accepted.id) {
            warn!(cluster = %self.name, id = %accepted.id, "the cluster has another ID; draining it first");
            self.drain(ids, out);
        }
        if let Err(error) = ids.reserve(&self.name, accepted.id) {
            return self.refuse(now, value, error.to_string(), ids, out);
        }
        info!(cluster = %self.name, id = %accepted.id, layout = ?accepted.layout, "cluster config accepted");
        self.refused = None;
        self.accepted = Some(accepted);
        out.push(Effect::Accepted(accepted));
        self.follow_records(accepted, out);
    }

    /// Starts a reflector for each kind that waits for none, in place of those that ran before.
    fn follow_records(&mut self, accepted: Accepted, out: &mut Vec<Effect>) {
        out.push(Effect::Unfollow);
        self.awaited = BEFORE_SERVICES.into_iter().filter(|kind| self.kinds().contains(kind)).collect();
        self.services_at = None;
        out.push(Effect::Tell(Input::Accepted { name: self.name.clone(), id: accepted.id }));
        self.follow_kinds(accepted, |kind| !is_address(kind) && !is_service(kind), out);
    }

    /// The list of a kind is complete. Addresses follow after nodes, services after the last of those that
    /// they wait for.
    fn note_complete(&mut self, now: Instant, kind: Kind, out: &mut Vec<Effect>) {
        let Some(at) = self.awaited.iter().position(|awaited| *awaited == kind) else { return };
        self.awaited.swap_remove(at);
        if let (Kind::Nodes, Some(accepted)) = (kind, self.accepted) {
            self.follow_kinds(accepted, is_address, out);
        }
        if self.awaited.is_empty() {
            let wait = if self.name == self.own.name { Duration::ZERO } else { MUTUAL };
            self.services_at = Some(now + wait);
        }
    }

    fn kinds(&self) -> &'static [Kind] {
        if self.name == self.own.name { &OWN_KINDS } else { &REMOTE_KINDS }
    }

    fn follow_kinds(&self, accepted: Accepted, wanted: fn(Kind) -> bool, out: &mut Vec<Effect>) {
        for kind in self.kinds().iter().copied().filter(|kind| wanted(*kind)) {
            out.push(Effect::Follow(kind, self.spec(accepted, kind)));
        }
    }

    fn spec(&self, accepted: Accepted, kind: Kind) -> ReflectorSpec {
        // The mesh holds all records and sees what a list lacks: no need to hold their keys twice.
        ReflectorSpec { prune: Prune::Consumer, ..accepted.reflector(kind, &self.name) }
    }

    /// Where the exporter states its digests.
    pub fn digest_specs(&self, accepted: Accepted) -> Vec<ReflectorSpec> {
        let folders: BTreeSet<_> =
            self.kinds().iter().map(|kind| digest_prefix(*kind, &self.name, accepted.layout)).collect();
        // Of the keys that a remote cluster puts there, however many, only those of the kinds are kept. The own
        // cluster has several folders, whose lists begin and end apart.
        let prune = if folders.len() == 1 { Prune::Consumer } else { Prune::Reflector };
        let spec = |folder| ReflectorSpec { prune, ..ReflectorSpec::new(folder, None) };
        folders.into_iter().map(spec).collect()
    }

    fn refuse(&mut self, now: Instant, value: Vec<u8>, error: String, ids: &Ids, out: &mut Vec<Effect>) {
        out.push(Effect::Error(error));
        self.drain(ids, out);
        self.refused = Some(Refused { value, again: now + RETRY });
    }

    /// Lets go of everything that was accepted. The own cluster has nothing that could take its place:
    /// its state stays until it is right again.
    ///
    /// Its ID becomes free only behind the drain: who takes it over must find it empty. And it does become
    /// free, although the cluster may get no other: two that swap their IDs would wait for each other.
    fn drain(&mut self, ids: &Ids, out: &mut Vec<Effect>) {
        out.push(Effect::Unfollow);
        self.services_at = None;
        self.accepted = None;
        if let Some(id) = ids.of(&self.name) {
            out.push(Effect::Dropped);
            out.push(Effect::Tell(Input::Drained(self.name.clone())));
            out.push(Effect::GiveUp(id));
        }
    }
}

fn is_address(kind: Kind) -> bool {
    BEHIND_NODES.contains(&kind)
}

fn is_service(kind: Kind) -> bool {
    matches!(kind, Kind::Services | Kind::LocalServices)
}
