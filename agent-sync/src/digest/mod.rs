//! Is what this agent holds what the clusters export, and how long does a change take? Plain code.
//!
//! In: what reflectors tell of a kind (revisions, begin and end of lists), the digest of what is held of
//! it, what its exporter states, and the time. Out: a [`Verdict`], the wish to list the kind again, and
//! [`Propagation`]. `docs/anti-entropy.md` says what is compared and why.

mod kind;
mod propagation;

pub use clustermesh_kvstore::digest::{Compare, Stage, Verdict};
pub use kind::KindDigest;
pub use propagation::Propagation;
