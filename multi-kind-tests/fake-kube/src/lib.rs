//! An API server for tests and benches: discovery, lists in pages, watches with bookmarks and with what
//! there is at the start, history that expires. It does not check what it is given, and everybody may
//! read everything unless told otherwise.
//!
//! [`Cluster`] is what it serves: objects, and the faults that it is to show. [`Server`] serves it.

mod answer;
mod cluster;
mod load;
mod server;
mod watch;

pub use cluster::{Cluster, Faults, Gone};
pub use load::Load;
pub use server::Server;
