//! The wire of a cluster mesh: what stands in etcd, how to read it, how to write it.
//!
//! * [`cluster`], [`labels`], [`key`], [`record`]: names, numbers, keys and values. Byte-compatible
//!   with Cilium ClusterMesh; whatever was decoded is checked.
//! * [`config_dir`], [`accept`]: which remote clusters there are, and how each is read.
//! * [`digest`]: the sum over a prefix by which both ends find out that they differ.
//! * [`etcd`]: configuration file and session. The only module that speaks gRPC.
//! * [`reflector`]: follows prefixes of one etcd (in).
//! * [`import_policy`]: what a cluster may say (in).
//! * [`publisher`]: keeps owned keys of one etcd at their desired values (out).
//!
//! Reflector and publisher each have a `core` without I/O, clock or randomness of its own, and a thin
//! `driver` that feeds it from etcd; see there for what goes in and what comes out.
#![forbid(unsafe_code)]

pub mod accept;
pub mod cluster;
pub mod config_dir;
pub mod digest;
pub mod etcd;
pub mod import_policy;
pub mod key;
pub mod labels;
pub mod publisher;
pub mod record;
pub mod reflector;
pub mod virtual_cidrs;
