//! Where the engine leaves what has changed about the ends of tunnels, and their keeper finds it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::tunnels::{EndChanges, TunnelEnd};

/// Shared between both. What changes again before it was looked at is told once: it holds no more than there are
/// nodes.
#[derive(Clone, Debug, Default)]
pub struct TunnelBoard(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    changed: Mutex<BTreeMap<IpAddr, Option<TunnelEnd>>>,
    news: Notify,
}

impl TunnelBoard {
    /// The engine's part.
    pub fn write(&self, changes: EndChanges) {
        if changes.is_empty() {
            return;
        }
        self.lock().extend(changes);
        self.0.news.notify_one();
    }

    /// Waits until something may have changed.
    pub(super) async fn changed(&self) {
        self.0.news.notified().await;
    }

    /// What has changed since this was asked last.
    pub(super) fn take(&self) -> EndChanges {
        std::mem::take(&mut *self.lock()).into_iter().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Option<TunnelEnd>>> {
        // Nothing panics while it is held.
        self.0.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
