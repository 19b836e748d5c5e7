//! Clusters by name, and the way of their records into the mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::import_policy::{Mode, PeerPolicy, PodCidrs, Rules};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::ReflectorEvent;
use tracing::{debug, info};

use super::Input;
use super::intake::{self, Intake, Verdict};
use crate::mesh::{Mesh, PlacementRules};
use crate::peers::{OWN_KINDS, OwnCluster, REMOTE_KINDS};

/// All configured clusters.
#[derive(Debug)]
pub(super) struct Members {
    own: OwnCluster,
    /// The config directory has been read once.
    complete: bool,
    by_name: BTreeMap<ClusterName, Member>,
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
}

impl Members {
    pub(super) fn new(own: OwnCluster) -> Self {
        Self { own, complete: false, by_name: BTreeMap::new() }
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
                let member = self.by_name.entry(name).or_default();
                member.id = Some(id);
                member.lost.clear();
                if let Some(dead) = member.dead {
                    mesh.set_dead(id, dead);
                }
                kinds.iter().for_each(|kind| mesh.begin_list(id, *kind));
                mesh.set_placement(id, placement(&member.rules));
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
        match event {
            ReflectorEvent::Upsert { suffix, value, .. } => {
                let peer = PeerPolicy {
                    name: name.clone(),
                    id,
                    max: self.own.max,
                    is_own: *name == self.own.name,
                    rules: member.rules.clone(),
                };
                let intake = member.intake.entry(kind).or_default();
                match intake.admit(&peer, kind, &suffix, &value, mesh) {
                    Verdict::Take(fact) => mesh.upsert(id, fact, 0),
                    Verdict::Keep => {}
                    Verdict::Drop(key) => mesh.delete(id, &key),
                }
            }
            ReflectorEvent::Delete { suffix, .. } => {
                if let Some(intake) = member.intake.get_mut(&kind) {
                    intake.forget(&suffix);
                }
                if let Some(key) = intake::key(kind, &suffix) {
                    mesh.delete(id, &key);
                }
            }
            ReflectorEvent::Relisting => mesh.begin_list(id, kind),
            ReflectorEvent::Synced { .. } => {
                member.lost.remove(&kind);
                if !mesh.is_synced(id, kind) {
                    info!(cluster = %name, %kind, records = mesh.count(id, kind), "synced");
                    mesh.finish_list(id, kind);
                }
            }
            ReflectorEvent::Lost { reason } => {
                member.lost.insert(kind);
                debug!(cluster = %name, %kind, reason, "lost; its state stays");
            }
            // Signs of life, which the connection's status shows.
            _ => {}
        }
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

/// The rules that only the mesh can apply, for they depend on the cluster's nodes.
fn placement(rules: &Rules) -> PlacementRules {
    PlacementRules {
        hosts: rules.node_cidrs.clone().unwrap_or_default(),
        at_own_nodes: rules.mode == Mode::Enforce && rules.pod_cidrs == PodCidrs::Nodes,
    }
}
