//! The agent's whole view as one message.

use std::time::Duration;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::import_policy::{RefusedKey, Tally};

use super::{Gone, Source};
use crate::engine::{DigestView, Fill, KindView, Overview};
use crate::histogram::Histogram;
use crate::liveness::Standing;
use crate::mesh::Conflict;
use crate::peers::PeerView;
use crate::reconcile::drift::Drift;

impl Source {
    /// `with_refused`: with the keys that were refused lately.
    pub(super) async fn status(&self, with_refused: bool) -> Result<v1::StatusResponse, Gone> {
        let overview = self.overview().await?;
        let fills = self.fills().await?;
        let mut views = self.directory.snapshot();
        let own = views.remove(&self.own.name);
        let own = own.map(|view| peer(&self.own.name, &view, &overview, with_refused));
        let remotes = views.iter().map(|(name, view)| {
            let standing = self.board.standing(name);
            v1::Peer { liveness: standing.map(liveness), ..peer(name, view, &overview, with_refused) }
        });
        let remotes = remotes.collect();
        let conflicts = overview.conflicts.iter();
        Ok(v1::StatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            cluster_name: self.own.name.to_string(),
            cluster_id: self.own.id.get().into(),
            node_name: self.node_name.clone(),
            max_connected_clusters: self.max().get().into(),
            datapath: self.datapath.into(),
            ready: overview.ready,
            own,
            remotes,
            local: Some(local(&overview)),
            tables: fills.iter().map(table_fill).collect(),
            resident_bytes: resident_bytes(),
            uptime_seconds: overview.uptime.as_secs(),
            pending_changes: overview.pending as u64,
            datapath_error: overview.error.clone().unwrap_or_default(),
            conflicts: conflicts.map(|(conflict, age)| self.conflict(conflict, *age, &overview)).collect(),
            backend_conflicts: overview.left_out.conflicts,
            clusters_left_out: overview.left_out.clusters,
            import_policy_error: self.policy.borrow().error.clone().unwrap_or_default(),
            kernel_drift: overview.drift.as_ref().map(kernel_drift),
            work: Some(work(&overview)),
            encryption: self.encryption(&overview),
        })
    }
}

fn table_fill(fill: &Fill) -> v1::TableFill {
    v1::TableFill { name: fill.name.into(), entries: fill.entries, max_entries: fill.capacity }
}

impl Source {
    fn conflict(&self, conflict: &Conflict, age: Duration, overview: &Overview) -> v1::Conflict {
        v1::Conflict {
            cluster_id: conflict.cluster.into(),
            claim: conflict.claim.clone(),
            holder_id: conflict.holder.into(),
            cluster: self.name_of(conflict.cluster, overview),
            holder: self.name_of(conflict.holder, overview),
            age_ms: millis(age),
        }
    }

    /// The name of a configured cluster; empty if there is none of that ID.
    pub(super) fn name_of(&self, id: u16, overview: &Overview) -> String {
        let named = overview.ids.iter().find(|(_, other)| other.get() == id);
        named.map_or_else(String::new, |(name, _)| name.to_string())
    }
}

fn kernel_drift(drift: &Drift) -> v1::KernelDrift {
    let counts = drift.found.iter().map(|((table, kind), count)| v1::DriftCount {
        table: (*table).into(),
        kind: kind.to_string(),
        count: *count,
    });
    v1::KernelDrift {
        scans: drift.scans,
        repaired: drift.total(),
        counts: counts.collect(),
        last_age_ms: drift.last.map_or(0, |last| millis(last.elapsed()).max(1)),
        error: drift.error.clone().unwrap_or_default(),
    }
}

fn local(overview: &Overview) -> v1::LocalCounts {
    let counts = overview.counts;
    v1::LocalCounts {
        identities: counts.identities as u64,
        endpoints: counts.endpoints as u64,
        services: counts.services as u64,
        global_services: counts.global_services as u64,
        nodes: counts.nodes as u64,
        backends: counts.backends as u64,
    }
}

fn peer(name: &ClusterName, view: &PeerView, overview: &Overview, with_refused: bool) -> v1::Peer {
    let connection = view.connection.borrow();
    let state = view.state.borrow();
    let kinds: Vec<v1::KindStatus> =
        overview.kinds.get(name).into_iter().flatten().map(|view| kind(view, with_refused)).collect();
    let config_retrieved = state.id.is_some();
    let synced = !kinds.is_empty() && kinds.iter().all(|kind| kind.synced);
    let (last_error, age) = match &state.last_error {
        Some((error, at)) => (error.clone(), at.elapsed()),
        None => (String::new(), Duration::ZERO),
    };
    v1::Peer {
        name: name.to_string(),
        cluster_id: state.id.map_or(0, |id| id.get().into()),
        connected: connection.connected,
        config_retrieved,
        ready: connection.connected && config_retrieved && synced,
        kinds,
        last_error,
        last_error_age_ms: millis(age),
        last_event_age_ms: millis(connection.last_event.elapsed()),
        reconnects: connection.reconnects,
        etcd_cluster_id: connection.etcd_cluster_id.map_or_else(String::new, |id| format!("{id:x}")),
        endpoints: connection.endpoints.clone(),
        cached: state.cached,
        liveness: None,
        certificate_expires: connection.certificate_expires.map_or(0, jiff::Timestamp::as_second),
    }
}

fn liveness(standing: Standing) -> v1::Liveness {
    v1::Liveness {
        health: standing.health.to_string(),
        reason: standing.findings.to_string(),
        age_ms: millis(standing.since.elapsed()),
        transitions: standing.transitions,
    }
}

fn kind(view: &KindView, with_refused: bool) -> v1::KindStatus {
    let by_reason = |count: fn(Tally) -> u64| {
        let counts = view.refused.by_reason().map(|(reason, tally)| (reason.to_string(), count(tally)));
        counts.filter(|(_, count)| *count > 0).collect()
    };
    let newest = view.refused.newest().next();
    v1::KindStatus {
        kind: view.kind.to_string(),
        synced: view.synced,
        records: view.records as u64,
        refused: view.refused.refused(),
        refused_by_reason: by_reason(|tally| tally.refused),
        last_refused: newest.map_or_else(String::new, |key| format!("{}: {}", key.key, key.detail)),
        audited_by_reason: by_reason(|tally| tally.audited),
        misplaced: view.misplaced as u64,
        newest_refused: view.refused.newest().filter(|_| with_refused).map(refused_key).collect(),
        digest: Some(digest(&view.digest)),
        propagation: view.digest.propagation.as_ref().and_then(propagation),
        lists: view.digest.lists,
    }
}

fn digest(view: &DigestView) -> v1::Digest {
    let hex = |sum: u64| format!("{sum:016x}");
    let [source_mismatches, state_mismatches] = view.mismatches;
    v1::Digest {
        verdict: view.verdict.to_string(),
        held: view.held.map_or_else(String::new, hex),
        stated: view.stated.map_or_else(String::new, |(sum, _)| hex(sum)),
        stated_revision: view.stated.map_or(0, |(_, revision)| revision),
        source_mismatches,
        state_mismatches,
    }
}

fn propagation(histogram: &Histogram) -> Option<v1::Propagation> {
    Some(v1::Propagation {
        count: histogram.count(),
        sum_seconds: histogram.sum(),
        p50_seconds: histogram.quantile(0.5)?,
        p99_seconds: histogram.quantile(0.99)?,
        buckets: histogram.buckets().to_vec(),
        bounds_seconds: histogram.bounds().to_vec(),
    })
}

fn work(overview: &Overview) -> v1::Work {
    let batches = &overview.batches;
    v1::Work {
        batches: batches.count(),
        batch_seconds: batches.sum(),
        batch_buckets: batches.buckets().to_vec(),
        batch_bounds_seconds: batches.bounds().to_vec(),
        table_writes: overview.writes.iter().map(|(table, writes)| ((*table).into(), *writes)).collect(),
    }
}

fn refused_key(key: &RefusedKey) -> v1::RefusedKey {
    v1::RefusedKey {
        key: key.key.clone(),
        reason: key.reason.to_string(),
        detail: key.detail.clone(),
        audited: key.audited,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Resident memory of this process; 0 if the kernel does not say.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
