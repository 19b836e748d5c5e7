//! What must hold for any bytes that come from outside, as functions that panic if it does not.
//!
//! Each [`Target`] takes an input of the fuzzer (`fuzz/`, which calls it under libFuzzer) or of the corpus
//! (`fuzz/corpus/`, which `tests/corpus.rs` replays). Texts are read as they stand; where the order of
//! events counts, the bytes are choices out of which [`arbitrary`] makes a story.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a panic is the finding")]

mod agent;
mod claims;
mod keys;
mod mirror;
mod objects;
mod operator_files;
mod records;
mod reflector;
mod service_reader;

/// Something that reads what others wrote, and what must hold of it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Of the program in `fuzz/fuzz_targets/` and the folder in `fuzz/corpus/`.
    pub name: &'static str,
    /// Panics if it does not hold.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 9] = [
    Target { name: "records", run: records::run },
    Target { name: "service_reader", run: service_reader::run },
    Target { name: "keys", run: keys::run },
    Target { name: "reflector", run: reflector::run },
    Target { name: "agent", run: agent::run },
    Target { name: "mirror", run: mirror::run },
    Target { name: "import_policy", run: operator_files::policy },
    Target { name: "configurations", run: operator_files::configurations },
    Target { name: "objects", run: objects::run },
];

/// Runs the target of this name.
///
/// # Panics
/// If there is none, or if what it says does not hold for `input`.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("no such target").run)(input);
}
