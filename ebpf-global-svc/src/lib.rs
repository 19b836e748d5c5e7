//! The kernel side of the mesh: eBPF programs, their loader, and typed access to their maps.
//!
//! * [`abi`]: layouts shared with the programs.
//! * [`Datapath`]: the programs (`programs/`, built by `build.rs`), loaded, attached and pinned.
//! * [`EventRing`]: what they tell of single packets and calls.
//! * [`table`]: one trait over every map that the agent writes, and a table in memory for tests and
//!   machines without eBPF.
#![deny(unsafe_code)]

pub mod table;

mod datapath;
mod error;
mod events;
mod options;
mod sys;

pub use datapath::{Acceleration, Arrival, Datapath, Migrated, ProgramInfo, Remains, Trial};
pub use ebpf_global_svc_abi as abi;
pub use error::DatapathError;
pub use events::{EventRing, EventRules, KINDS};
pub use options::DatapathOptions;
pub use sys::program_time;
pub use table::{MapSizes, Tables};
