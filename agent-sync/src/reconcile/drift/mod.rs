//! Do the kernel's tables still hold what is wanted of them? Plain code.
//!
//! Whoever may write to the tables beside the agent (an operator's hand, another program, a bug) is not
//! heard of otherwise: the agent writes differences and keeps no copy. So a [`Scan`] walks each table in
//! both directions, a bounded number of entries at a time: what is installed against what is wanted
//! (foreign and altered entries), and what is wanted against what is installed (missing ones). What waits
//! to be written is no difference.
//!
//! In: mesh, reconciler, tables and the time, between two rounds of writes. Out: writes of what differed,
//! and counts. A write that fails is left to the next scan.

mod scan;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

pub use scan::Scan;

/// How an entry differs from what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DriftKind {
    /// It is wanted and not there.
    Missing,
    /// It is there and not wanted.
    Foreign,
    /// Its value is another one.
    Altered,
}

/// What is to be in a table under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want<V> {
    /// This.
    Value(V),
    /// Nothing.
    Nothing,
    /// It is about to change, or nobody knows.
    Unsettled,
}

/// What scans found.
#[derive(Clone, Debug, Default)]
pub struct Drift {
    /// Entries found and written again, by table and kind.
    pub found: BTreeMap<(&'static str, DriftKind), u64>,
    /// When the last of them was found.
    pub last: Option<Instant>,
    /// Scans that saw all tables from end to end.
    pub scans: u64,
    /// Why a table could not be read in the last scan.
    pub error: Option<String>,
}

impl DriftKind {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Foreign => "foreign",
            Self::Altered => "altered",
        }
    }
}

impl fmt::Display for DriftKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Drift {
    /// Entries that were found so far.
    pub fn total(&self) -> u64 {
        self.found.values().sum()
    }
}
