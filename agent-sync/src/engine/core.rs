//! The engine without its edges: what clusters say in, writes to the tables out.
//!
//! No channels and no clock, so a test can run it under any schedule. [`Core::apply`] takes what
//! happened, [`Core::step`] writes what follows from all of it; how many inputs are taken before a
//! step is the driver's choice and changes only how often a key is written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::digest::SourceTime;
use clustermesh_kvstore::import_policy::Ledger;
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::abi::ServiceKey;
use ebpf_global_svc::{DatapathError, Tables};
use tracing::{debug, info, warn};

use super::Input;
use super::intake::Intake;
use super::members::Members;
use crate::desired::RouteChanges;
use crate::liveness::core::Member;
use crate::liveness::nodes::candidates;
use crate::mesh::{Conflict, LetIn, Links, Mesh};
use crate::peers::{OwnCluster, Wish};
use crate::reconcile::Reconciler;
use crate::reconcile::drift::{Drift, Scan};
use crate::tunnels::{EndChanges, Scope, Tunnels};

/// Refused claims that are remembered to be shown.
const CONFLICTS: usize = 1000;
/// New ones that the log names at a time.
const TOLD: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Core {
    own: OwnCluster,
    members: Members,
    mesh: Mesh,
    reconciler: Reconciler,
    scan: Scan,
    /// Refused claims, and since when; at most [`CONFLICTS`] of them.
    conflicts: BTreeMap<Conflict, Instant>,
}

/// What a step touched beyond the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stepped {
    /// How the routes differ from before.
    pub routes: RouteChanges,
    /// Underlay addresses with another node, or whose node has another key.
    pub ends: EndChanges,
    /// Pods of this node came or went, or may have another interface.
    pub pods_moved: bool,
}

impl Core {
    /// Takes over what is installed.
    ///
    /// # Errors
    /// If the tables cannot be read.
    pub fn restore(
        own: OwnCluster,
        node_name: &str,
        tunnels: Tunnels,
        now: Instant,
        tables: &Tables,
    ) -> Result<Self, DatapathError> {
        let (reconciler, restored) = Reconciler::restore(tables, now)?;
        info!(
            services = restored.service.len(),
            ipcache = restored.ipcache.len(),
            "read back what is installed"
        );
        let mesh = Mesh::new(own.id, own.max, node_name, tunnels, restored);
        Ok(Self {
            members: Members::new(own.clone()),
            own,
            mesh,
            reconciler,
            scan: Scan::default(),
            conflicts: BTreeMap::new(),
        })
    }

    /// Services are reached from outside too: see [`Mesh::let_in`].
    pub fn let_in(&mut self, how: LetIn) {
        self.mesh.let_in(how);
    }

    /// Takes in what a peer's task tells.
    pub fn apply(&mut self, input: Input) {
        self.members.apply(input, &mut self.mesh);
    }

    /// Takes in what the network edge found out about this node's pods.
    pub fn set_links(&mut self, links: Links) {
        self.mesh.set_links(links);
    }

    /// Installs what is wanted by now, as far as the tables take it; the rest is tried again at
    /// [`Self::deadline`].
    pub fn step(&mut self, now: Instant, tables: &mut Tables) -> Stepped {
        let mut changes = self.mesh.compute();
        if !changes.is_empty() {
            debug!(changes = changes.len(), "writing");
        }
        if self.mesh.take_conflicts_decided() {
            self.note_conflicts(now);
        }
        let routes = std::mem::take(&mut changes.routes);
        let ends = std::mem::take(&mut changes.ends);
        let pods_moved = self.mesh.take_pods_moved();
        self.reconciler.accept(changes);
        let before = self.reconciler.last_error().map(str::to_owned);
        self.reconciler.run(now, tables);
        if let Some(error) = self.reconciler.last_error().filter(|error| Some(*error) != before.as_deref()) {
            warn!(%error, pending = self.reconciler.pending(), "cannot write all that is desired; retrying");
        }
        self.scan.run(now, &self.mesh, &self.reconciler, tables);
        Stepped { routes, ends, pods_moved }
    }

    /// Claims that another cluster's keep out, and since when. The list is bounded.
    pub fn conflicts(&self) -> impl Iterator<Item = (&Conflict, Instant)> {
        self.conflicts.iter().map(|(conflict, since)| (conflict, *since))
    }

    fn note_conflicts(&mut self, now: Instant) {
        let before = std::mem::take(&mut self.conflicts);
        let mut told = 0;
        // A backend is named again for each port of its service.
        for conflict in self.mesh.conflicts().take(4 * CONFLICTS) {
            if self.conflicts.len() == CONFLICTS {
                break;
            }
            if self.conflicts.contains_key(&conflict) {
                continue;
            }
            let since = before.get(&conflict).copied();
            if since.is_none() && told < TOLD {
                told += 1;
                let Conflict { cluster, claim, holder } = &conflict;
                info!(cluster, claim, holder, "refused a claim: another cluster holds it");
            }
            self.conflicts.insert(conflict, since.unwrap_or(now));
        }
    }

    /// Traces what was told as installed at the wall clock's `at`, unless some of it waits to be.
    pub fn installed(&mut self, at: SourceTime) {
        if self.pending() == 0 {
            self.members.installed(at);
        }
    }

    /// Takes a census of each kind of which nothing is stated, each `interval`; none (the default): never.
    pub fn take_census(&mut self, interval: Option<Duration>) {
        self.members.take_census(interval, self.mesh.node_name());
    }

    /// Compares what is held with what exporters state. Gives the kinds that are to be read again.
    pub fn check_digests(&mut self, now: Instant) -> Vec<(ClusterName, Kind, Wish)> {
        self.members.check_digests(now, &self.mesh)
    }

    /// When [`Self::check_digests`] has something to do even if nothing is applied before.
    pub fn digests_deadline(&self) -> Option<Instant> {
        self.members.digests_deadline()
    }

    /// When [`Self::step`] has something to do even if nothing is applied before.
    pub fn deadline(&self) -> Option<Instant> {
        [self.reconciler.deadline(), self.scan.deadline()].into_iter().flatten().min()
    }

    /// What goes between nodes in `scope` has to be encrypted, as it is to `encrypted` by now.
    pub fn require_encryption(&mut self, scope: Scope, encrypted: BTreeSet<IpAddr>) {
        self.mesh.require_encryption(scope, encrypted);
    }

    /// What policies would drop is counted and passes, from the next change on.
    pub fn audit_policies(&mut self, audit: bool) {
        self.mesh.audit_policies(audit);
    }

    /// Compares the tables with what is wanted each `interval`; none (the default): never.
    pub fn scan_tables(&mut self, interval: Option<Duration>, now: Instant) {
        self.scan.set_interval(interval, now);
    }

    /// What was found in the tables that is not of this agent; none if nobody looks.
    pub fn drift(&self) -> Option<&Drift> {
        self.scan.drift()
    }

    /// The own cluster is synced, and everything is installed.
    pub fn is_ready(&self) -> bool {
        let synced = self.members.own_kinds().iter().all(|kind| self.mesh.is_synced(self.own.id, *kind));
        synced && self.pending() == 0
    }

    /// Whether all addresses of the own cluster are known.
    pub fn knows_own_addresses(&self) -> bool {
        [Kind::Ip, Kind::LocalIp].into_iter().all(|kind| self.mesh.is_synced(self.own.id, kind))
    }

    /// Desired changes that are not installed.
    pub fn pending(&self) -> usize {
        self.reconciler.pending()
    }

    /// Why something is pending.
    pub fn last_error(&self) -> Option<&str> {
        self.reconciler.last_error()
    }

    /// Entries written or removed since the start, by table.
    pub fn writes(&self) -> &BTreeMap<&'static str, u64> {
        self.reconciler.writes()
    }

    /// How many services were taken out of the kernel since the start.
    pub(super) fn services_gone(&self) -> u64 {
        self.reconciler.services_gone()
    }

    /// Frontends of services that have these IDs in the kernel. Walks all services once.
    pub(super) fn frontends_of(&self, services: &BTreeSet<u32>) -> BTreeMap<u32, ServiceKey> {
        self.reconciler.frontends_of(services)
    }

    /// Who we are.
    pub fn own(&self) -> &OwnCluster {
        &self.own
    }

    /// The merged state of all clusters.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// What was refused of a kind of a cluster; none if nothing of it was told.
    pub fn refused(&self, name: &ClusterName, kind: Kind) -> Option<&Ledger> {
        let (_, member) = self.members.iter().find(|(known, _)| *known == name)?;
        member.intake.get(&kind).map(Intake::ledger)
    }

    /// Remote clusters, as liveness has to know them.
    pub(super) fn remotes(&self) -> BTreeMap<ClusterName, Member> {
        let remotes = self.members.iter().filter(|(name, _)| **name != self.own.name);
        let member = |id: Option<ClusterId>| Member {
            id,
            dead: id.is_some_and(|id| self.mesh.is_dead(id)),
            nodes: id.map_or_else(Vec::new, |id| candidates(self.mesh.tunnel_ips(id), self.mesh.node_name())),
        };
        remotes.map(|(name, remote)| (name.clone(), member(remote.id))).collect()
    }

    /// The configured clusters.
    pub(super) fn members(&self) -> &Members {
        &self.members
    }
}
