//! Whole kinds as they stand in etcd now: for questions about what the engine does not keep, such as the
//! names of pods and records that were refused.
//!
//! Nothing passes through the engine. Records come page by page and only as fast as they are looked at;
//! one question at a time is answered so, each for a limited time.

use std::sync::Arc;
use std::time::Duration;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::reflector::{Prune, ReflectorEvent, ReflectorSpec};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tonic::Status;

use crate::peers::PeerView;

/// Longest time for a list of one kind.
const LIMIT: Duration = Duration::from_secs(20);

/// Clusters that are listed at the same time.
pub(super) const ABREAST: usize = 4;

/// Where those wait, or do not, who want lists.
#[derive(Clone, Debug)]
pub struct Desk(Arc<Semaphore>);

impl Default for Desk {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Desk {
    /// The right to list, as long as it is held.
    pub(super) fn take(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.0.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(
                "another question that lists etcds is being answered; ask again when it is done",
            )
        })
    }
}

/// A record as it stands in etcd.
pub(super) struct Listed {
    /// Key without its prefix.
    pub(super) suffix: String,
    pub(super) value: Vec<u8>,
    pub(super) revision: i64,
}

/// Shows all records of a kind to `look`.
///
/// # Errors
/// Why the list is not complete, in words.
pub(super) async fn each(
    view: &PeerView,
    name: &ClusterName,
    kind: Kind,
    mut look: impl FnMut(Listed),
) -> Result<(), String> {
    if !view.connection.borrow().connected {
        return Err("its etcd is not connected".into());
    }
    let layout = if view.state.borrow().cached { Layout::Cache } else { Layout::State };
    // Whoever looks keeps what is to be kept.
    let spec =
        ReflectorSpec { prune: Prune::Consumer, ..ReflectorSpec::new(data_prefix(kind, name, layout), None) };
    let mut events = view.etcd.reflect(spec);
    let listing = async {
        let mut begun = false;
        while let Some(event) = events.recv().await {
            match event {
                ReflectorEvent::Upsert { suffix, value, revision } => {
                    begun = true;
                    look(Listed { suffix, value, revision });
                }
                ReflectorEvent::Synced { .. } => return Ok(()),
                ReflectorEvent::Lost { reason } => return Err(reason),
                ReflectorEvent::Relisting if begun => {
                    return Err("its etcd changed too much meanwhile; try again".into());
                }
                _ => {}
            }
        }
        Err("the agent is shutting down".into())
    };
    let ended = timeout(LIMIT, listing).await;
    ended.unwrap_or_else(|_| Err(format!("its {kind} could not be read to the end within {LIMIT:?}")))
}
