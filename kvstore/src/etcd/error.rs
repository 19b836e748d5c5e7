use std::time::Duration;

use super::EtcdConfigError;

/// What went wrong with an etcd, whose fault it is and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The operator's: see there.
    #[error(transparent)]
    Config(#[from] EtcdConfigError),
    /// The operator's: a certificate or key file.
    #[error("{path}: {reason}")]
    File {
        /// Which file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The network's or the server's: nobody answers at any endpoint.
    #[error("cannot reach etcd at {endpoints}: {reason}")]
    Unreachable {
        /// What was tried.
        endpoints: String,
        /// What the system said, with a hint.
        reason: String,
    },
    /// One side does not accept the other's certificate.
    #[error("TLS with {endpoint} failed: {reason}")]
    Tls {
        /// The endpoint.
        endpoint: String,
        /// Which side refused what, and what to do.
        reason: String,
    },
    /// The server knows us but does not let us.
    #[error(
        "etcd permits this client no access to {what}: grant its user a role for it, or use another client certificate"
    )]
    PermissionDenied {
        /// What we asked for.
        what: String,
    },
    /// The server does not know us.
    #[error("etcd does not accept this client's user: {reason}")]
    Unauthenticated {
        /// What it said.
        reason: String,
    },
    /// Another etcd answers at the same address: it was re-created, or several stand behind it.
    #[error("another etcd answers at this address: its cluster ID is {now:x}, it was {was:x}")]
    ClusterIdChanged {
        /// The pinned ID.
        was: u64,
        /// The ID of the last reply.
        now: u64,
    },
    /// No answer in time.
    #[error("etcd did not answer {what} within {after:?}")]
    Timeout {
        /// What we asked for.
        what: String,
        /// How long we waited.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to etcd broke: {0}")]
    Lost(String),
    /// The revision we asked for has been compacted away.
    #[error("revision {revision} is compacted")]
    Compacted {
        /// What we asked for.
        revision: i64,
    },
    /// The lease is gone.
    #[error("the lease does not exist (any more)")]
    LeaseNotFound,
    /// The request is one that etcd will never take, such as one that is too large.
    #[error("etcd refuses the request: {0}")]
    Refused(String),
    /// etcd cannot do it now: no leader, out of space, too many requests.
    #[error("etcd cannot do it now: {0}")]
    Unavailable(String),
}

impl SessionError {
    /// Whether a session that saw this error can go on.
    pub const fn is_fatal(&self) -> bool {
        !matches!(
            self,
            Self::PermissionDenied { .. }
                | Self::Compacted { .. }
                | Self::LeaseNotFound
                | Self::Refused(_)
                | Self::Unavailable(_)
        )
    }
}
