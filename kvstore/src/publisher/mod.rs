//! Keeps the keys that a process owns in one etcd at their desired values.
//!
//! * [`core`]: the decisions, without I/O. In: desired values, what stands in etcd, the fate of writes,
//!   the time. Out: transactions, lease grants and refreshes.
//! * `driver` (tokio, etcd): feeds the core from a [`crate::reflector::Connection`] and carries out its effects.

pub mod core;
mod driver;
mod leases;

#[cfg(test)]
mod sim;

pub use core::{Core, Effect, Observed, Op, OwnedPrefix, PublisherSpec, PublisherStatus};
pub use driver::Publisher;
