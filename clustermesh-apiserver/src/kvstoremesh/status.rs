//! What the mirror knows about itself: for `/readyz`, `/metrics` and `/status`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::digest::Verdict;
use clustermesh_kvstore::import_policy::{CurrentPolicy, Reason, RefusedKey, Tally};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::publisher::PublisherStatus;
use clustermesh_kvstore::reflector::ConnectionStatus;
use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use tokio::sync::watch;

use super::mirror::{Compared, Mirror};
use super::readiness::{Readiness, Stage};
use super::report::{KindReport, MirrorReport, RefusedReport, RemoteReport};
use crate::http::Subject;
use crate::metrics::{Families, number};

/// Shared between the mirror, which writes, and HTTP, which reads.
#[derive(Debug)]
pub struct Status {
    own: ClusterName,
    local: watch::Receiver<ConnectionStatus>,
    policy: watch::Receiver<CurrentPolicy>,
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
    compared: Vec<Compared>,
    /// The newest refused keys by kind, as of so many refusals.
    refused: (u64, Vec<(Kind, Vec<RefusedKey>)>),
    revocations: u64,
    failures: u64,
    /// Seconds since 1970.
    last_failure: Option<f64>,
    /// The failure that is not over yet.
    failing: Option<String>,
}

impl Status {
    /// The status of a mirror that has not begun.
    pub fn new(
        own: ClusterName,
        local: watch::Receiver<ConnectionStatus>,
        policy: watch::Receiver<CurrentPolicy>,
        readiness: Readiness,
    ) -> Self {
        Self { own, local, policy, readiness: Mutex::new(readiness), remotes: Mutex::default() }
    }

    /// All of it, for whoever operates the mesh.
    pub fn report(&self) -> MirrorReport {
        let (remotes, removing) = {
            let remotes = lock(&self.remotes);
            (remotes.configured.clone(), remotes.removing)
        };
        let not_ready = self.unready();
        MirrorReport {
            version: env!("CARGO_PKG_VERSION").into(),
            ready: not_ready.is_none(),
            not_ready: not_ready.unwrap_or_default(),
            etcd_connected: self.local.borrow().connected,
            import_policy_error: self.policy.borrow().error.clone().unwrap_or_default(),
            removing,
            remotes: remotes.iter().map(|(name, remote)| remote.report(name)).collect(),
        }
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
        progress.compared.clear();
        progress.compared.extend(mirror.compared());
        progress.revocations = mirror.revocations();
        let refusals = progress.tallies.iter().map(|(_, _, tally)| tally.refused + tally.audited).sum();
        // There are few, but records come by the thousand.
        if progress.refused.0 != refusals {
            let newest =
                mirror.ledgers().iter().map(|(kind, ledger)| (*kind, ledger.newest().cloned().collect()));
            progress.refused = (refusals, newest.collect());
        }
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

    fn report(&self, name: &ClusterName) -> RemoteReport {
        let mirrored = self.stage().mirrored;
        let progress = lock(&self.progress).clone();
        let kind = |(kind, records): &(Kind, usize)| {
            let tallies = || progress.tallies.iter().filter(|(of, ..)| of == kind);
            let counts = |count: fn(&Tally) -> u64| {
                let counts = tallies().map(|(_, reason, tally)| (reason.to_string(), count(tally)));
                counts.filter(|(_, count)| *count > 0).collect()
            };
            let newest = progress.refused.1.iter().find(|(of, _)| of == kind);
            KindReport {
                kind: kind.to_string(),
                records: *records,
                refused_by_reason: counts(|tally| tally.refused),
                audited_by_reason: counts(|tally| tally.audited),
                newest_refused: newest
                    .into_iter()
                    .flat_map(|(_, keys)| keys)
                    .map(RefusedReport::from)
                    .collect(),
            }
        };
        RemoteReport {
            name: name.to_string(),
            connected: self.is_connected(),
            accepted: progress.accepted,
            mirrored,
            pending_keys: self.publisher.get().map_or(0, |publisher| publisher.borrow().pending),
            error: progress.failing.clone().unwrap_or_default(),
            kinds: progress.keys.iter().map(kind).collect(),
        }
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

    fn certificate_expires(&self) -> Option<Timestamp> {
        self.connection.get()?.borrow().certificate_expires
    }

    fn is_connected(&self) -> bool {
        self.connection.get().is_some_and(|connection| connection.borrow().connected)
    }
}

impl Subject for Status {
    fn unready(&self) -> Option<String> {
        self.unready()
    }

    fn report(&self) -> Option<String> {
        serde_json::to_string(&self.report()).ok()
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
        // As the exporter calls it; the local etcd is one more cluster's.
        let ends = std::iter::once((self.own.as_str(), local.certificate_expires))
            .chain(remotes.iter().map(|(name, remote)| (name.as_str(), remote.certificate_expires())));
        let now = Timestamp::now();
        out.reals(
            "certificate_expiry_seconds",
            "Time until the client certificate for the cluster's etcd ends",
            ends.filter_map(|(name, ends)| {
                Some(([("target_cluster", name)], ends?.duration_since(now).as_secs_f64()))
            }),
        )?;

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
        out.prefix = "clustermesh_digest";
        let compared = || {
            progress.iter().flat_map(|(name, progress)| progress.compared.iter().map(move |of| (*name, of)))
        };
        out.gauges(
            "in_sync",
            "What is mirrored and what was refused is what the cluster has",
            compared().map(|(name, of)| {
                ([("cluster", name), ("kind", of.kind.as_str())], i64::from(of.verdict == Verdict::InSync))
            }),
        )?;
        out.counters(
            "mismatch",
            "Differences between what is mirrored and what the cluster has, by where they arose",
            compared().flat_map(|(name, of)| {
                of.mismatches.iter().map(move |(stage, count)| {
                    ([("cluster", name), ("kind", of.kind.as_str()), ("stage", stage.as_str())], *count)
                })
            }),
        )?;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::kvstoremesh::readiness::Patience;

    fn connection(ends: Option<Timestamp>) -> watch::Receiver<ConnectionStatus> {
        watch::Sender::new(ConnectionStatus {
            connected: true,
            etcd_cluster_id: None,
            etcd_version: None,
            last_error: None,
            reconnects: 0,
            last_event: tokio::time::Instant::now(),
            endpoints: Vec::new(),
            certificate_expires: ends,
        })
        .subscribe()
    }

    #[test]
    fn certificates_count_down_by_cluster() {
        let hour = Timestamp::now() + jiff::SignedDuration::from_hours(1);
        let [own, beta, plain] = ["alpha", "beta", "plain"].map(|name| name.parse::<ClusterName>().unwrap());
        let patience = Patience { per_cluster: Duration::ZERO, global: Duration::ZERO };
        let readiness = Readiness::new(Default::default(), patience, Instant::now());
        let policy = watch::Sender::new(CurrentPolicy::default()).subscribe();
        let status = Status::new(own, connection(Some(hour)), policy, readiness);
        status.add(&beta).set_connection(connection(Some(hour)));
        status.add(&plain).set_connection(connection(None));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(status));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        let left = |cluster: &str| {
            let begin = format!(
                r#"clustermesh_kvstoremesh_certificate_expiry_seconds{{target_cluster="{cluster}"}} "#
            );
            text.lines().find_map(|line| line.strip_prefix(&begin)?.parse::<f64>().ok())
        };
        for cluster in ["alpha", "beta"] {
            assert!(left(cluster).is_some_and(|left| (3590.0..=3600.0).contains(&left)), "{text}");
        }
        assert_eq!(left("plain"), None, "{text}");
    }
}
