//! The node agent: follows the etcds of all clusters of a mesh and makes the kernel's tables follow.
#![forbid(unsafe_code)]

pub mod config_dir;
pub mod desired;
pub mod mesh;
pub mod netlink;
pub mod reconcile;
pub mod wire_key;
