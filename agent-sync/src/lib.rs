//! The node agent: follows the etcds of all clusters of a mesh and makes the kernel's tables follow.
//!
//! Facts go in one direction: [`config_dir`] and [`peers`] (edges) to [`engine`], which passes each
//! record through [`import_policy`] into [`mesh`] (plain), whose differences [`reconcile`] (plain)
//! writes to the tables. [`netlink`] looks after devices and routes; [`serve`] answers questions.
#![forbid(unsafe_code)]

pub mod agent;
pub mod config_dir;
pub mod desired;
pub mod engine;
pub mod import_policy;
pub mod mesh;
pub mod netlink;
pub mod peers;
pub mod reconcile;
pub mod serve;
pub mod wire_key;
