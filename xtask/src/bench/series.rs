//! One figure per round, and what is said about all rounds.

use serde::Serialize;

/// The figure of each round.
#[derive(Clone, Debug, Default)]
pub(super) struct Series(Vec<f64>);

/// What is printed. The median is robust against a round that something disturbed; the extremes
/// show how much there was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Series {
    /// Adds the figure of a round.
    pub(super) fn push(&mut self, figure: f64) {
        self.0.push(figure);
    }

    /// None if there was no round.
    pub(super) fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Some(Summary { median, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(figures: &[f64]) -> Option<Summary> {
        Series(figures.to_vec()).summary()
    }

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(summary(&[9.0, 1.0, 2.0]), Some(Summary { median: 2.0, min: 1.0, max: 9.0 }));
        assert_eq!(summary(&[4.0, 1.0, 2.0, 9.0]), Some(Summary { median: 3.0, min: 1.0, max: 9.0 }));
        assert_eq!(summary(&[]), None);
    }
}
