//! Whole meshes in virtual time: two to four clusters, each with objects, an exporter and an etcd, and
//! some nodes with agents and kernel maps. Exporter, publisher, reflectors, followers and engine are the
//! real ones; etcd, connections and the kernel are models ([`etcd`], [`link`], [`kernel`]).
//!
//! A schedule is a list of [`step::Step`]s drawn from a seed: the world changes, faults happen, and
//! everybody gets to do something, in any order. After every step nothing may have happened that must
//! never happen; at the end, without further faults, the mesh comes to rest and is as its objects say
//! ([`outcome`]). See `docs/testing.md`.
#![forbid(unsafe_code)]

pub mod agent;
pub mod broken;
pub mod etcd;
pub mod exporter;
pub mod faults;
mod hostile;
pub mod kernel;
pub mod link;
pub mod objects;
mod outcome;
pub mod place;
pub mod schedule;
pub mod step;
pub mod world;
