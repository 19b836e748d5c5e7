//! Exports a cluster into its etcd, where the agents of all connected clusters read it; and, as
//! [`kvstoremesh`], mirrors the etcds of other clusters into its own.
//!
//! ```text
//! source (edge)  ->  objects  ->  endpoints, identity  ->  export (keys)  ->  Publisher (edge)
//! ```
//!
//! [`source`] turns a directory of manifests into checked [`objects`]; [`export`] keeps them and works
//! out which keys follow, with the help of [`endpoints`] (which backends a service has) and
//! [`identity`] (what number stands for a pod's labels); [`server`] connects both ends with etcd and
//! serves [`status`] over [`http`]. Everything between the edges is plain code without I/O.
//!
//! [`etcdinit`] prepares an etcd: it sets the [`rights`] of its readers and writers.
#![forbid(unsafe_code)]

mod announcements;
pub mod args;
mod connection_log;
pub mod endpoints;
pub mod etcdinit;
pub mod export;
pub mod http;
pub mod identity;
pub mod kvstoremesh;
mod metrics;
pub mod objects;
pub mod rights;
pub mod server;
pub mod source;
pub mod status;

#[cfg(test)]
mod fixtures;
