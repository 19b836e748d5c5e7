//! What the mirror knows about itself: for `/readyz` and `/metrics`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::import_policy::{Reason, Tally};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::publisher::PublisherStatus;
use clustermesh_kvstore::reflector::ConnectionStatus;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::watch;

use super::mirror::Mirror;
use super::readiness::{Readiness, Stage};
use crate::http::Subject;
use crate::metrics::{Families, number};

/// Shared between the mirror, which writes, and HTTP, which reads.
#[derive(Debug)]
pub struct Status {
    local: watch::Receiver<ConnectionStatus>,
    readiness: Mutex<Readiness>,
    remotes: Mutex<Remotes>,
}

#[derive(Debug, Default)]
struct Remotes {
    configured: BTreeMap<ClusterName, Arc<RemoteStatus>>,
    removing: usize,
}

/// One remote cluster.
#[derive(Debug, Default)]
pub struct RemoteStatus {
    connection: OnceLock<watch::Receiver<ConnectionStatus>>,
    publisher: OnceLock<watch::Receiver<PublisherStatus>>,
    progress: Mutex<Progress>,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    accepted: bool,
    synced: bool,
    connected_once: bool,
    keys: Vec<(Kind, usize)>,
    tallies: Vec<(Kind, Reason, Tally)>,
    revocations: u64,
    failures: u64,
    /// Seconds since 1970.
    last_failure: Option<f64>,
    /// The failure that is not over yet.
    failing: Option<String>,
}

impl Status {
    /// The status of a mirror that has not begun.
    pub fn new(local: watch::Receiver<ConnectionStatus>, readiness: Readiness) -> Self {
        Self { local, readiness: Mutex::new(readiness), remotes: Mutex::default() }
    }

    /// Why agents should not read the mirror yet; `None` once they may.
    pub fn unready(&self) -> Option<String> {
        let readiness = lock(&self.readiness);
        if readiness.took().is_some() {
            return None;
        }
        if let Some(error) = self.local.borrow().failure() {
            return Some(format!("the local etcd is not connected: {error}"));
        }
        let waiting: Vec<_> = readiness.waiting().map(ClusterName::as_str).take(10).collect();
        Some(format!("{} clusters are not mirrored yet: {}", readiness.waiting().count(), waiting.join(", ")))
    }

    /// How long it took to become ready.
    pub(super) fn took(&self) -> Option<std::time::Duration> {
        lock(&self.readiness).took()
    }

    /// Looks whether the mirror has become ready.
    pub(super) fn look(&self, now: Instant) {
        let remotes = lock(&self.remotes);
        let local = self.local.borrow().connected;
        let stage = |name: &ClusterName| remotes.configured.get(name).map(|remote| remote.stage());
        lock(&self.readiness).update(now, local, stage);
    }

    pub(super) fn add(&self, name: &ClusterName) -> Arc<RemoteStatus> {
        let status = Arc::new(RemoteStatus::default());
        lock(&self.remotes).configured.insert(name.clone(), status.clone());
        status
    }

    pub(super) fn remove(&self, name: &ClusterName) {
        lock(&self.remotes).configured.remove(name);
    }

    pub(super) fn set_removing(&self, removing: usize) {
        lock(&self.remotes).removing = removing;
    }
}

impl RemoteStatus {
    pub(super) fn set_connection(&self, connection: watch::Receiver<ConnectionStatus>) {
        let _first = self.connection.set(connection);
    }

    pub(super) fn set_publisher(&self, publisher: watch::Receiver<PublisherStatus>) {
        let _first = self.publisher.set(publisher);
    }

    /// Takes over how far the mirror is.
    pub(super) fn progress(&self, mirror: &Mirror) {
        let mut progress = lock(&self.progress);
        progress.accepted = mirror.id().is_some();
        progress.synced = mirror.is_synced();
        progress.keys.clear();
        progress.keys.extend(mirror.counts());
        progress.tallies.clear();
        progress.tallies.extend(mirror.tallies());
        progress.revocations = mirror.revocations();
    }

    /// Something keeps the cluster from being mirrored. Told in the log when it is new.
    pub(super) fn failed(&self, name: &ClusterName, error: String) {
        let mut progress = lock(&self.progress);
        progress.failures += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        progress.last_failure = Some(now.as_secs_f64());
        if progress.failing.as_ref() != Some(&error) {
            tracing::warn!(cluster = %name, %error, "a cluster is not mirrored");
            progress.failing = Some(error);
        }
    }

    /// The cluster's config was accepted.
    pub(super) fn succeeded(&self) {
        lock(&self.progress).failing = None;
    }

    fn stage(&self) -> Stage {
        let connected = self.is_connected();
        let mut progress = lock(&self.progress);
        progress.connected_once |= connected;
        // Empty: the publisher has not begun.
        let written = self.publisher.get().map(watch::Receiver::borrow).is_some_and(|publisher| {
            !publisher.synced.is_empty() && publisher.synced.values().all(|synced| *synced)
        });
        Stage { connected: progress.connected_once, mirrored: progress.synced && written }
    }

    fn is_connected(&self) -> bool {
        self.connection.get().is_some_and(|connection| connection.borrow().connected)
    }
}

impl Subject for Status {
    fn unready(&self) -> Option<String> {
        self.unready()
    }
}

impl Collector for Status {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Families { encoder, prefix: "clustermesh_kvstoremesh" };
        let (remotes, removing) = {
            let remotes = lock(&self.remotes);
            (remotes.configured.clone(), remotes.removing)
        };
        let progress: Vec<_> =
            remotes.iter().map(|(name, remote)| (name.as_str(), lock(&remote.progress).clone())).collect();
        out.gauge("remote_clusters", "Clusters that are mirrored", remotes.len())?;
        out.gauge("removals", "Clusters whose mirror is being removed", removing)?;
        if let Some(took) = self.took() {
            out.real("bootstrap_seconds", "Time from the start until agents could read", took.as_secs_f64())?;
        }
        out.gauge("ready", "Whether agents may read the mirror", usize::from(self.took().is_some()))?;
        let local = self.local.borrow().clone();
        out.gauge("etcd_connected", "Whether the local etcd is connected", usize::from(local.connected))?;

        let per_cluster = |value: fn(&RemoteStatus, &Progress) -> usize| {
            let progress = progress.iter().zip(remotes.values());
            progress.map(move |((name, progress), remote)| {
                ([("target_cluster", *name)], number(value(remote, progress)))
            })
        };
        out.gauges(
            "remote_cluster_readiness_status",
            "Whether the config of the cluster was accepted and its etcd is connected",
            per_cluster(|remote, progress| usize::from(progress.accepted && remote.is_connected())),
        )?;
        out.gauges(
            "remote_cluster_synced",
            "Whether everything of the cluster is in the local etcd",
            per_cluster(|remote, _| usize::from(remote.stage().mirrored)),
        )?;
        out.gauges(
            "remote_cluster_pending_keys",
            "Keys of the cluster that are yet to be written",
            per_cluster(|remote, _| remote.publisher.get().map_or(0, |publisher| publisher.borrow().pending)),
        )?;
        out.counters(
            "remote_cluster_failures",
            "Times that something kept the cluster from being mirrored",
            progress.iter().map(|(name, progress)| ([("target_cluster", *name)], progress.failures)),
        )?;
        out.reals(
            "remote_cluster_last_failure_ts",
            "When that was last, in seconds since 1970",
            progress
                .iter()
                .filter_map(|(name, progress)| Some(([("target_cluster", *name)], progress.last_failure?))),
        )?;
        out.counters(
            "remote_cluster_cache_revocations",
            "Times that the cluster's services were withdrawn because it was away for too long",
            progress.iter().map(|(name, progress)| ([("target_cluster", *name)], progress.revocations)),
        )?;
        out.gauges(
            "remote_cluster_keys",
            "Mirrored records of the cluster, by kind",
            progress.iter().flat_map(|(name, progress)| {
                progress.keys.iter().map(|(kind, count)| {
                    ([("target_cluster", *name), ("kind", kind.as_str())], number(*count))
                })
            }),
        )?;
        // As an agent calls them.
        out.prefix = "clustermesh_import";
        let tallies = |count: fn(&Tally) -> u64| {
            progress.iter().flat_map(move |(name, progress)| {
                progress.tallies.iter().map(move |(kind, reason, tally)| {
                    let labels = [("cluster", *name), ("kind", kind.as_str()), ("reason", reason.as_str())];
                    (labels, count(tally))
                })
            })
        };
        out.counters("refused", "Records that the import policy refused", tallies(|tally| tally.refused))?;
        out.counters(
            "audited",
            "Records let in only because the import policy is audited",
            tallies(|tally| tally.audited),
        )
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data: nothing is half done if somebody panicked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
