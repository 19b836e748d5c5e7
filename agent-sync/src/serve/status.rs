//! The agent's whole view as one message.

use std::time::Duration;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::ClusterName;

use super::{Gone, Source};
use crate::engine::{KindView, Overview};
use crate::peers::PeerView;

impl Source {
    pub(super) async fn status(&self) -> Result<v1::StatusResponse, Gone> {
        let overview = self.overview().await?;
        let mut views = self.directory.snapshot();
        let own = views.remove(&self.own.name);
        let own = own.map(|view| peer(&self.own.name, &view, &overview));
        let remotes = views.iter().map(|(name, view)| peer(name, view, &overview)).collect();
        let fills = overview.tables.iter();
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
            tables: fills
                .map(|(name, entries, max)| v1::TableFill {
                    name: (*name).into(),
                    entries: *entries,
                    max_entries: *max,
                })
                .collect(),
            resident_bytes: resident_bytes(),
            uptime_seconds: overview.uptime.as_secs(),
            pending_changes: overview.pending as u64,
            datapath_error: overview.error.clone().unwrap_or_default(),
            conflicts: conflicts
                .map(|conflict| v1::Conflict {
                    cluster_id: conflict.cluster.into(),
                    claim: conflict.claim.clone(),
                    holder_id: conflict.holder.into(),
                })
                .collect(),
            backend_conflicts: overview.left_out.conflicts,
            clusters_left_out: overview.left_out.clusters,
        })
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

fn peer(name: &ClusterName, view: &PeerView, overview: &Overview) -> v1::Peer {
    let connection = view.connection.borrow();
    let state = view.state.borrow();
    let kinds: Vec<v1::KindStatus> = overview.kinds.get(name).into_iter().flatten().map(kind).collect();
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
    }
}

fn kind(view: &KindView) -> v1::KindStatus {
    let by_reason = view.refused.by_reason.iter();
    v1::KindStatus {
        kind: view.kind.to_string(),
        synced: view.synced,
        records: view.records as u64,
        refused: view.refused.total(),
        refused_by_reason: by_reason.map(|(reason, n)| ((*reason).to_owned(), *n)).collect(),
        last_refused: view.refused.last.clone().unwrap_or_default(),
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
