//! End-to-end scenarios: what must hold of a mesh, written once, run on the lab.
//!
//! * [`scenario`]: the format. A file names a topology and a list of steps.
//! * [`evidence`]: what calls and streams report, and whether that meets an expectation. Plain code.
//! * [`lab`]: drives the `clustermesh` command line, as an operator would; nothing is reached into.
//! * [`pace`]: how long a second is on a slow machine.
//! * [`runner`]: carries out the steps, in a lab that is taken down whatever happens.
//!
//! A scenario waits for conditions with deadlines; it never sleeps a guess.
#![forbid(unsafe_code)]

pub mod evidence;
pub mod interrupt;
pub mod lab;
pub mod needs;
pub mod pace;
pub mod process;
pub mod runner;
pub mod scenario;
