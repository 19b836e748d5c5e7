//! The kernel side of the mesh: eBPF programs, their loader, and typed access to their maps.
//!
//! * [`abi`]: layouts shared with the programs.
//! * [`table`]: one trait over every map that the agent writes, and a table in memory for tests and
//!   machines without eBPF.
#![deny(unsafe_code)]

pub mod table;

mod error;
mod options;

pub use ebpf_global_svc_abi as abi;
pub use error::DatapathError;
pub use options::DatapathOptions;
pub use table::{MapSizes, Tables};
