//! Tells this node's public key to the own cluster's exporter, by a key in the own etcd.

use std::time::Duration;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::{Session, SessionError, WriteOp};
use clustermesh_kvstore::key::announcement_prefix;
use clustermesh_kvstore::record::{NodeAnnouncement, WireguardKey};
use clustermesh_kvstore::reflector::Connection;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::peers::Directory;

/// The key is looked at again this often, and whenever there is another session: an etcd may come back empty.
const CHECK: Duration = Duration::from_secs(30);
/// After a failure.
const RETRY: Duration = Duration::from_secs(2);
/// Until the own cluster is in the directory.
const SOON: Duration = Duration::from_millis(50);

/// What a node says of itself.
#[derive(Clone, Debug)]
pub struct Announcer {
    /// Its cluster.
    pub cluster: ClusterName,
    /// Its name.
    pub node: String,
    /// By which the own etcd is reached.
    pub directory: Directory,
}

impl Announcer {
    /// Keeps the announcement at `wireguard`, for good.
    pub async fn keep(self, mut wireguard: watch::Receiver<WireguardKey>) {
        let etcd = self.etcd().await;
        let mut told = String::new();
        loop {
            let key = *wireguard.borrow_and_update();
            let session = etcd.session().await;
            match self.write(&session, Some(key)).await {
                Ok(written) => {
                    if written {
                        info!(key = %key, "announced this node's WireGuard key");
                    }
                    told.clear();
                    tokio::select! {
                        // Whose sender ends with the agent.
                        Ok(()) = wireguard.changed() => {}
                        _ = session.ended() => {}
                        () = sleep(CHECK) => {}
                    }
                }
                Err(error) => {
                    let error = explain(&error);
                    if told != error {
                        warn!(
                            error,
                            "cannot announce this node's WireGuard key; others send in clear. Retrying"
                        );
                        told = error;
                    }
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// Takes back what an earlier life may have announced.
    pub async fn withdraw(self) {
        let etcd = self.etcd().await;
        loop {
            match self.write(&etcd.session().await, None).await {
                Ok(written) => {
                    if written {
                        info!("took back this node's WireGuard key");
                    }
                    return;
                }
                Err(SessionError::PermissionDenied { .. }) => {
                    debug!("this etcd takes no announcements, so it has none");
                    return;
                }
                Err(error) => debug!(%error, "cannot look for an announcement of an earlier life; retrying"),
            }
            sleep(RETRY).await;
        }
    }

    /// Tells whether it was something else before.
    async fn write(&self, session: &Session, wireguard: Option<WireguardKey>) -> Result<bool, SessionError> {
        let key = format!("{}{}", announcement_prefix(&self.cluster), self.node);
        let announcement =
            NodeAnnouncement { cluster: self.cluster.clone(), node: self.node.clone(), wireguard };
        let value = announcement.encode();
        let before = session.get(&key).await?;
        let same = before.as_ref().is_some_and(|before| before.value == value);
        // Who never said anything has nothing to take back.
        if same || (before.is_none() && wireguard.is_none()) {
            return Ok(false);
        }
        session.txn(vec![WriteOp::Put { key, value, lease: 0 }]).await?;
        Ok(true)
    }

    async fn etcd(&self) -> Connection {
        loop {
            if let Some(view) = self.directory.snapshot().remove(&self.cluster) {
                return view.etcd;
            }
            sleep(SOON).await;
        }
    }
}

fn explain(error: &SessionError) -> String {
    match error {
        SessionError::PermissionDenied { .. } => {
            format!(
                "{error}: prepare the etcd again (`clustermesh-apiserver etcdinit`), agents have a new right"
            )
        }
        error => error.to_string(),
    }
}
