//! Which remote clusters are alive, as seen from this node.
//!
//! Evidence comes from two sides: the cluster's etcd (its connection and its heartbeat) and its nodes
//! (asked now and then whether they answer). A cluster of which nothing at all is heard for long enough
//! is dead: one write takes it out of load-balancing, and everything known of it is kept for its return.
//! Either side alone makes it degraded, which is shown and changes nothing.
//!
//! [`nodes`] chooses whom to ask and counts answers, [`judge`] is the state machine of one cluster,
//! [`core`] has all clusters: plain code that gets evidence and the time. [`watch`] and [`probe`] are the
//! edge: they ask, look at connections, and tell the engine. See `docs/liveness.md`.

pub mod core;
pub mod judge;
pub mod nodes;
mod probe;
mod watch;

use std::fmt;
use std::time::Duration;

pub use watch::{Board, Standing, Watch};

/// How a remote cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing speaks against it.
    Healthy,
    /// Its etcd or its nodes are not heard. It stays in load-balancing.
    Degraded,
    /// Neither is heard. Its backends are not chosen.
    Dead,
}

impl Health {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Healthy, Self::Degraded, Self::Dead];

    /// The name in status and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Dead => "dead",
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What the operator decides about liveness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LivenessOptions {
    /// A cluster is dead when neither its etcd nor any of its nodes was heard for so long. At least
    /// [`LivenessOptions::MIN_DEAD_AFTER`].
    pub dead_after: Duration,
    /// A dead cluster returns when it has been heard for so long without a break; each relapse within
    /// [`judge::STABLE`] doubles it, up to [`judge::RETURN_MAX`].
    pub return_after: Duration,
    /// From one question to a cluster's nodes to the next while they answer.
    pub probe_interval: Duration,
    /// TCP port that a node is asked on if it does not answer an echo request; a refusal is an answer.
    pub probe_port: u16,
}

impl LivenessOptions {
    /// Less would take one slow answer for a death.
    pub const MIN_DEAD_AFTER: Duration = Duration::from_secs(5);
}

impl Default for LivenessOptions {
    fn default() -> Self {
        Self {
            dead_after: Duration::from_secs(15),
            return_after: Duration::from_secs(5),
            probe_interval: Duration::from_secs(5),
            // Where Cilium's health endpoint of each node listens.
            probe_port: 4240,
        }
    }
}
