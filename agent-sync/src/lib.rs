//! The node agent: follows the etcds of all clusters of a mesh and makes the kernel's tables follow.
//!
//! Facts go in one direction: [`peers`] (edge) to [`engine`], which passes each
//! record through [`import_policy`] into [`mesh`] (plain), whose differences [`reconcile`] (plain)
//! writes to the tables; [`digest`] (plain) compares both ends. [`netlink`] looks after devices and routes,
//! [`encryption`] after what of the [`tunnels`] is encrypted; [`serve`] answers questions, lets [`trial`] (plain) say what
//! another import policy would do, and shows what [`observe`] gets to hear from the programs.
#![forbid(unsafe_code)]

pub mod acceleration;
pub mod agent;
pub mod cleanup;
pub mod desired;
pub mod digest;
pub mod encryption;
pub mod engine;
pub mod histogram;
pub mod liveness;
pub mod mesh;
pub mod netlink;
pub mod observe;
pub mod peers;
pub mod policy;
pub mod reconcile;
pub mod serve;
pub mod trial;
pub mod tunnels;
pub mod wire_key;
