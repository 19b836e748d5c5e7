//! A directory of ordinary Kubernetes manifests as a cluster.
//!
//! `directory` looks at the file system; `settle` decides when a file is worth reading; `parse` turns
//! text into objects; `files` keeps the last good state of each file and tells which objects changed;
//! `watcher` is the thread that drives them. Only `directory` and `watcher` do I/O.

mod directory;
mod files;
mod parse;
mod settle;
mod watcher;

pub use files::{Conflict, Files, Problem};
pub use parse::{ManifestError, parse};
pub use watcher::{WatchError, watch};
