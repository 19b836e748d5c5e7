//! Counts of times, in buckets.

/// How many observations fell into each bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// Not cumulative; the last one has no upper bound.
    buckets: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// Of buckets with these upper bounds in seconds, ascending, and one more.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, buckets: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Counts `seconds`.
    pub fn observe(&mut self, seconds: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.buckets[bucket] += 1;
        self.sum += seconds;
    }

    /// Upper bounds of all buckets but the last, in seconds.
    pub fn bounds(&self) -> &'static [f64] {
        self.bounds
    }

    /// Observations in each bucket.
    pub fn buckets(&self) -> &[u64] {
        &self.buckets
    }

    /// Of all observations, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// Observations.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The value in seconds that the part `q` (0 to 1) of all observations does not exceed, in a straight
    /// line between the bounds of its bucket; none without observations.
    #[allow(clippy::cast_precision_loss)]
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let rank = q * self.count() as f64;
        let mut below = 0.0;
        for (index, in_bucket) in self.buckets.iter().enumerate().filter(|(_, n)| **n > 0) {
            let in_bucket = *in_bucket as f64;
            if below + in_bucket >= rank {
                let lower = index.checked_sub(1).map_or(0.0, |index| self.bounds[index]);
                let upper = self.bounds.get(index).copied().unwrap_or(lower);
                return Some(lower + (upper - lower) * (rank - below) / in_bucket);
            }
            below += in_bucket;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_in_their_bucket() {
        let mut histogram = Histogram::new(&[0.001, 0.003, 0.005, 60.0]);
        assert_eq!(histogram.quantile(0.5), None);
        (0..99).for_each(|_| histogram.observe(0.004));
        histogram.observe(100.0);
        let p50 = histogram.quantile(0.5).unwrap();
        assert!((0.003..=0.005).contains(&p50), "{p50}");
        assert!(histogram.quantile(0.999).unwrap() >= 60.0);
    }
}
