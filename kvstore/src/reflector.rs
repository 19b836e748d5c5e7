//! Follows prefixes of one etcd through everything that can happen to it.
//!
//! [`core`] decides: what it hears (replies, watch messages, lost and new sessions, the time) goes into
//! [`core::Core::handle`], what is to be done (requests, changes to report) comes out. [`Connection`]
//! and its reflectors do it, over [`crate::etcd::Session`].
//!
//! What a consumer may rely on:
//! * after [`ReflectorEvent::Synced`] the keys it has been told about are those of etcd, but for changes
//!   on their way;
//! * nothing is deleted because etcd is away, empty, or another one: only once the canary of *this* etcd
//!   was seen and its list is complete, and after all upserts of that list.

mod backoff;
mod census;
mod connection;
pub mod core;
mod driver;
mod generation;
#[cfg(test)]
mod simulation;

pub use backoff::Backoff;
pub use connection::{Connection, ConnectionOptions, ConnectionStatus};
pub(crate) use connection::{Heard, LiveSession};
pub(crate) use driver::follow;
pub use generation::Generations;

/// What to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReflectorSpec {
    /// Ends in `/`: all keys that start with it. Otherwise: this one key, whose suffix is empty.
    pub prefix: String,
    /// The key that must exist in each new etcd before its list counts.
    pub canary: Option<String>,
    /// Keys in one reply to a list.
    pub page_size: i64,
    /// Who finds out which keys a list lacks.
    pub prune: Prune,
}

/// Who finds out which keys a new list lacks, after a compaction or for another etcd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prune {
    /// The reflector, which holds all keys and tells of deletes, and of no write twice.
    #[default]
    Reflector,
    /// The consumer, which holds them anyway: it is told of [`ReflectorEvent::Relisting`], and may hear
    /// of a write twice and of deletes of keys that it was never told of.
    Consumer,
}

impl ReflectorSpec {
    /// Cilium's page size.
    pub const PAGE_SIZE: i64 = 256;

    /// Follows `prefix`, which is listed once `canary` exists.
    pub fn new(prefix: impl Into<String>, canary: Option<String>) -> Self {
        Self { prefix: prefix.into(), canary, page_size: Self::PAGE_SIZE, prune: Prune::default() }
    }
}

/// What a reflector tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReflectorEvent {
    /// A key was created or changed, or is told again because etcd is another one.
    Upsert {
        /// The key without the prefix.
        suffix: String,
        /// Its value.
        value: Vec<u8>,
        /// Revision of the write.
        revision: i64,
    },
    /// A key is gone.
    Delete {
        /// The key without the prefix.
        suffix: String,
        /// Revision of the delete, or of the list that lacked it.
        revision: i64,
    },
    /// All keys are told now, up to [`Self::Synced`]: what is not among them is gone. Only with
    /// [`Prune::Consumer`].
    Relisting,
    /// Everything up to `revision` has been told. Comes after each list and after each resumption that
    /// follows a [`Self::Lost`].
    Synced {
        /// etcd's revision.
        revision: i64,
    },
    /// etcd is alive, though nothing changes.
    Progress {
        /// etcd's revision.
        revision: i64,
    },
    /// etcd cannot be followed now; what was told stays as it is.
    Lost {
        /// Why.
        reason: String,
    },
}

impl ReflectorEvent {
    /// What consumers need of a change; `None` if it is not for them.
    pub fn from_change(change: core::Change) -> Option<Self> {
        Some(match change {
            core::Change::Put { suffix, value, revision, .. } => Self::Upsert { suffix, value, revision },
            core::Change::Delete { suffix, revision } => Self::Delete { suffix, revision },
            core::Change::Relisting => Self::Relisting,
            core::Change::Synced { revision, .. } => Self::Synced { revision },
            core::Change::Progress { revision } => Self::Progress { revision },
            core::Change::Lost { reason } => Self::Lost { reason },
            core::Change::Restarted { .. } => return None,
        })
    }
}
