//! What calls and streams report, and whether it meets an expectation. No I/O.

mod expect;
mod timeline;

pub use expect::Expect;
pub use timeline::{CallEvent, Shifted, Timeline};

use serde::Deserialize;
use std::collections::BTreeMap;

/// `mesh-probe call -o json`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct CallReport {
    /// Calls made.
    pub calls: u64,
    /// Calls without an answer.
    pub failed: u64,
    /// Failed calls by reason.
    #[serde(default)]
    pub failures: BTreeMap<String, u64>,
    /// Answers by cluster.
    #[serde(default)]
    pub by_cluster: BTreeMap<String, u64>,
    /// Answers by pod.
    #[serde(default)]
    pub by_pod: BTreeMap<String, u64>,
    /// Calls whose socket showed another peer than the called address.
    #[serde(default)]
    pub peername_differs: u64,
    /// Latency, in microseconds.
    #[serde(default)]
    pub latency_us: Latency,
}

/// Percentiles in microseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl CallReport {
    /// One line for people.
    pub fn summary(&self) -> String {
        let mut text = format!("{} calls: {}", self.calls, join(&self.by_cluster));
        if self.failed > 0 {
            text += &format!("; {} failed ({})", self.failed, join(&self.failures));
        }
        text + &format!("; p50 {:.0} us", self.latency_us.p50)
    }
}

/// `mesh-probe stream -o json`.
#[derive(Clone, Debug, Deserialize)]
pub struct StreamReport {
    /// Frames sent.
    pub frames_sent: u64,
    /// Frames that did not come back.
    pub lost: u64,
    /// Frames that came back wrong or out of order.
    pub corrupted: u64,
    /// Longest time between two frames that came back.
    pub max_gap_ms: f64,
    /// How long it lasted.
    pub seconds: f64,
    /// What broke it.
    pub error: Option<String>,
}

impl StreamReport {
    /// One line for people.
    pub fn summary(&self) -> String {
        format!(
            "{:.0} s stream: {} frames, {} lost, {} corrupted, longest gap {:.0} ms",
            self.seconds, self.frames_sent, self.lost, self.corrupted, self.max_gap_ms
        )
    }

    /// What is wrong with it, if anything.
    pub fn flaw(&self, max_gap_ms: f64) -> Option<String> {
        let bad = self.lost > 0
            || self.corrupted > 0
            || self.error.is_some()
            || self.frames_sent == 0
            || self.max_gap_ms > max_gap_ms;
        bad.then(|| {
            format!("{}{}", self.summary(), self.error.as_ref().map_or(String::new(), |e| format!("; {e}")))
        })
    }
}

fn join(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "nobody answered".into();
    }
    counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}
