//! Tells an operator how the process's own etcd is.

use clustermesh_kvstore::reflector::ConnectionStatus;
use tokio::sync::watch;

/// Logs when etcd comes and goes, for as long as the process runs.
pub(crate) async fn log_connection(mut status: watch::Receiver<ConnectionStatus>) {
    let mut connected = false;
    let mut told = None;
    loop {
        let now = status.borrow_and_update().clone();
        if now.connected && !connected {
            tracing::info!(endpoints = ?now.endpoints, "etcd is connected");
        }
        connected = now.connected;
        let failure = now.failure();
        if failure != told {
            if let Some(error) = &failure {
                tracing::warn!(error, "etcd is not connected");
            }
            told = failure;
        }
        if status.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
