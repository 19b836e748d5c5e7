//! Latency figures.

use serde::Serialize;
use std::time::Duration;

/// Order statistics of a run, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Percentiles {
    /// Computes them from samples in any order; zeros if there are none.
    pub(crate) fn of(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        let at = |percent: usize| {
            // Nearest rank: the smallest sample that at least `percent` of all do not exceed.
            let rank = (samples.len() * percent).div_ceil(100).max(1) - 1;
            samples.get(rank).map_or(0.0, |sample| microseconds(*sample))
        };
        Self { p50: at(50), p99: at(99), max: at(100) }
    }
}

fn microseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e8).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let samples = (1..=200).rev().map(Duration::from_micros).collect();
        assert_eq!(Percentiles::of(samples), Percentiles { p50: 100.0, p99: 198.0, max: 200.0 });
    }

    #[test]
    fn nothing_measured() {
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }
}
