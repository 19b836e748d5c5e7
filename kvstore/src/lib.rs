//! The wire of a cluster mesh.
#![forbid(unsafe_code)]

pub mod cluster;
