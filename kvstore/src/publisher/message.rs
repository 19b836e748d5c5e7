//! What the core and its driver say to each other: effects out, observations of etcd in.

use std::sync::Arc;
use std::time::Duration;

/// What the driver has to do. Each `Txn`, `Grant` and `KeepAlive` must be answered once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write these in one transaction; answer with [`super::Core::txn_done`] or [`super::Core::txn_failed`].
    Txn {
        /// Names it in the answer.
        id: u64,
        /// No key occurs twice.
        ops: Vec<Op>,
    },
    /// Grant a lease of this time to live; answer with [`super::Core::granted`] or [`super::Core::grant_failed`].
    Grant {
        /// Time to live.
        ttl: Duration,
    },
    /// Refresh a lease; answer with [`super::Core::lease_alive`] or [`super::Core::lease_gone`], or
    /// [`super::Core::keep_alive_failed`] if nobody knows.
    KeepAlive {
        /// etcd's lease ID.
        lease: i64,
    },
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Put `value` under `lease`.
    Put {
        /// Key.
        key: Arc<str>,
        /// Value.
        value: Arc<[u8]>,
        /// Lease that the key is attached to.
        lease: i64,
    },
    /// Delete the key.
    Delete {
        /// Key.
        key: Arc<str>,
    },
}

impl Op {
    pub(super) fn key(&self) -> &Arc<str> {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

/// What a stream (see [`super::Core::streams`]) says of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// What follows comes from another etcd than before (or the first): revisions start over.
    Etcd {
        /// Counts the etcds behind the connection, the same number in all streams.
        generation: u64,
    },
    /// A key stands there.
    Present {
        /// Key.
        key: String,
        /// Value.
        value: Vec<u8>,
        /// Lease it is attached to, 0 if none.
        lease: i64,
        /// Revision of its last change.
        revision: i64,
    },
    /// A key is gone.
    Absent {
        /// Key.
        key: String,
        /// Revision of its deletion, or of the list that no longer had it.
        revision: i64,
    },
    /// The stream's prefix has been listed completely: what the stream has told by now, of this list or
    /// before, is what stood there.
    Listed {
        /// Revision of the list.
        revision: i64,
    },
}
