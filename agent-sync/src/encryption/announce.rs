//! Tells this node's public keys to the own cluster's exporter, by a key in the own etcd.

use std::time::Duration;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::{Session, SessionError, WriteOp};
use clustermesh_kvstore::key::announcement_prefix;
use clustermesh_kvstore::record::{IpsecKey, NodeAnnouncement, WireguardKey};
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

/// What others encrypt by; none: they must not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublicKeys {
    /// By WireGuard.
    pub wireguard: Option<WireguardKey>,
    /// By IPsec.
    pub ipsec: Option<IpsecKey>,
}

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
    /// Keeps the announcement at `keys`, for good.
    pub async fn keep(self, mut keys: watch::Receiver<PublicKeys>) {
        let etcd = self.etcd().await;
        let mut told = String::new();
        loop {
            let said = *keys.borrow_and_update();
            let session = etcd.session().await;
            match self.write(&session, said).await {
                Ok(written) => {
                    if written {
                        info!(wireguard = ?said.wireguard, ipsec = ?said.ipsec, "announced this node's keys");
                    }
                    told.clear();
                    tokio::select! {
                        // Whose sender ends with the agent.
                        Ok(()) = keys.changed() => {}
                        _ = session.ended() => {}
                        () = sleep(CHECK) => {}
                    }
                }
                Err(error) => {
                    let error = explain(&error);
                    if told != error {
                        warn!(error, "cannot announce this node's keys; others send in clear. Retrying");
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
            match self.write(&etcd.session().await, PublicKeys::default()).await {
                Ok(written) => {
                    if written {
                        info!("took back this node's keys");
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
    async fn write(&self, session: &Session, keys: PublicKeys) -> Result<bool, SessionError> {
        let PublicKeys { wireguard, ipsec } = keys;
        let key = format!("{}{}", announcement_prefix(&self.cluster), self.node);
        let announcement =
            NodeAnnouncement { cluster: self.cluster.clone(), node: self.node.clone(), wireguard, ipsec };
        let value = announcement.encode();
        let before = session.get(&key).await?;
        let same = before.as_ref().is_some_and(|before| before.value == value);
        // Who never said anything has nothing to take back.
        if same || (before.is_none() && keys == PublicKeys::default()) {
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
