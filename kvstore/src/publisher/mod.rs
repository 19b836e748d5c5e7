//! Keeps the keys that a process owns in one etcd at their desired values.
//!
//! * [`core`]: the decisions, without I/O. In: desired values, what stands in etcd, the fate of writes,
//!   the time. Out: transactions, lease grants and refreshes.
//! * `keys`, `leases`, `digests`: what it remembers; `spec`: what it is asked for; `message`: what it and the driver say.
//! * `driver` (tokio, etcd): feeds the core from a [`crate::reflector::Connection`] and carries out its effects.

pub mod core;
mod digests;
mod driver;
mod keys;
mod leases;
mod message;
mod spec;

#[cfg(test)]
mod sim;

pub use core::Core;
pub use driver::Publisher;
pub use message::{Effect, Observed, Op};
pub use spec::{Origin, OwnedPrefix, PublisherSpec, PublisherStatus};
