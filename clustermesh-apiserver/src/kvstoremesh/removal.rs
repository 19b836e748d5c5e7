//! Takes the mirror of one cluster out of the local etcd.
//!
//! In Cilium's order: the config first, so that no agent begins on what is about to go; after a while, in
//! which agents are told that the cluster is theirs no more, the canaries; the data last.

use std::collections::BTreeSet;
use std::time::Duration;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::{KeyRange, SessionError};
use clustermesh_kvstore::key::{Layout, cluster_config_key, data_prefix, digest_key};
use clustermesh_kvstore::record::ClusterConfig;
use clustermesh_kvstore::reflector::{Backoff, Connection};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio::time::sleep;

use super::mirror::KINDS;

/// The waits between attempts at the local etcd.
pub(super) const fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(200), Duration::from_secs(5))
}

/// Removes what is mirrored of `name`, however long the local etcd takes to allow it.
pub(super) async fn remove(local: &Connection, name: &ClusterName, grace: Duration) {
    delete(local, name, &KeyRange::Key(cluster_config_key(name))).await;
    sleep(grace).await;
    delete(local, name, &KeyRange::Prefix(canaries(name))).await;
    for kind in KINDS {
        delete(local, name, &KeyRange::Key(digest_key(kind, name, Layout::Cache))).await;
        delete(local, name, &KeyRange::Prefix(data_prefix(kind, name, Layout::Cache))).await;
    }
}

async fn delete(local: &Connection, name: &ClusterName, range: &KeyRange) {
    let mut backoff = backoff();
    let mut rng = SmallRng::from_os_rng();
    loop {
        let session = local.session().await;
        let Err(error) = session.delete_range(range).await else { return };
        tracing::warn!(cluster = %name, range = range.start(), %error, "cannot remove from the local etcd, trying again");
        sleep(backoff.wait(&mut rng)).await;
    }
}

/// Clusters that the local etcd mirrors, by what earlier runs have written.
///
/// # Errors
/// The local etcd does not answer.
pub(super) async fn mirrored(local: &Connection) -> Result<BTreeSet<ClusterName>, SessionError> {
    let session = local.session().await;
    let configs = KeyRange::of("cilium/cluster-config/");
    let canaries = KeyRange::of("cilium/synced/");
    let mut names = BTreeSet::new();
    for kv in session.list_page(&configs, None, 0, 0).await?.kvs {
        let cached = ClusterConfig::decode(&kv.value).is_ok_and(|config| config.cached);
        let name = configs.suffix(&kv.key).and_then(|name| name.parse().ok());
        names.extend(name.filter(|_| cached));
    }
    // Of a removal that was cut short only these may be left.
    for kv in session.list_page(&canaries, None, 0, 0).await?.kvs {
        let place = canaries.suffix(&kv.key).and_then(|suffix| suffix.split_once('/'));
        if let Some((name, prefix)) = place
            && prefix.starts_with("cilium/cache/")
        {
            names.extend(name.parse::<ClusterName>());
        }
    }
    Ok(names)
}

fn canaries(name: &ClusterName) -> String {
    format!("cilium/synced/{name}/")
}
