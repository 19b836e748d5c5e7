//! The way of agents' announcements out of etcd to the exporter, and of those that nobody needs any more out
//! of the world.

use std::collections::BTreeMap;
use std::time::Duration;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::WriteOp;
use clustermesh_kvstore::key;
use clustermesh_kvstore::reflector::{Connection, Prune, ReflectorEvent, ReflectorSpec};
use tokio::sync::mpsc;

/// How often announcements without nodes are looked for.
pub(crate) const SWEEP: Duration = Duration::from_secs(60);
/// Removed at a time: operations of a transaction, see etcd's `--max-txn-ops`.
const BATCH: usize = 128;

/// All announcements from now on. A new list lacks what an empty etcd lacks, which means nothing: deletes are
/// only those that were seen.
pub(crate) fn follow(connection: &Connection, cluster: &ClusterName) -> mpsc::Receiver<ReflectorEvent> {
    let spec = ReflectorSpec::new(key::announcement_prefix(cluster), None);
    connection.reflect(ReflectorSpec { prune: Prune::Consumer, ..spec })
}

/// Waits for the first complete list.
pub(crate) async fn listed(events: &mut mpsc::Receiver<ReflectorEvent>) -> BTreeMap<String, Vec<u8>> {
    let mut listed = BTreeMap::new();
    while let Some(event) = events.recv().await {
        match event {
            ReflectorEvent::Upsert { suffix, value, .. } => drop(listed.insert(suffix, value)),
            ReflectorEvent::Delete { suffix, .. } => drop(listed.remove(&suffix)),
            ReflectorEvent::Synced { .. } => break,
            ReflectorEvent::Relisting => listed.clear(),
            ReflectorEvent::Progress { .. } | ReflectorEvent::Lost { .. } => {}
        }
    }
    listed
}

/// Removes announcements in the background. What does not work is found again by the next sweep.
pub(crate) fn remove(connection: &Connection, cluster: &ClusterName, mut nodes: Vec<String>) {
    nodes.truncate(BATCH);
    if nodes.is_empty() {
        return;
    }
    let prefix = key::announcement_prefix(cluster);
    let ops = nodes.iter().map(|node| WriteOp::Delete { key: format!("{prefix}{node}") }).collect();
    let connection = connection.clone();
    tokio::spawn(async move {
        match connection.session().await.txn(ops).await {
            Ok(_) => tracing::info!(?nodes, "removed announcements of nodes that are gone"),
            Err(error) => tracing::warn!(%error, "cannot remove announcements of nodes that are gone"),
        }
    });
}
