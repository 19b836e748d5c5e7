//! Mirrors all remote clusters into the local etcd, so that the agents of a cluster follow one etcd.
//!
//! ```text
//! config directory -> roster -> remote (edge) -> mirror -> Publisher (edge) -> local etcd
//!                           '-> removal (edge)                ---------------> local etcd
//! ```
//!
//! [`roster`] knows which clusters there are, [`mirror`] what is to stand in the local etcd of one of
//! them and (`copies`) whether that is what the cluster has, [`admit`] which records may, [`readiness`]
//! when agents may begin: plain code. [`remote`] and [`removal`] carry it out for one cluster, [`server`]
//! for all, and [`status`] tells of it.

pub mod admit;
mod copies;
pub mod mirror;
pub mod readiness;
mod remote;
mod removal;
pub mod report;
pub mod roster;
pub mod server;
pub mod status;

#[cfg(test)]
mod simulation;
