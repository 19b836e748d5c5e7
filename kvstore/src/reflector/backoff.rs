use std::time::Duration;

use rand::Rng;

/// Waiting times between attempts: doubling, each shortened at random by up to a half, so that many
/// readers of an etcd that comes back do not come all at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `min`, never exceeds `max`.
    pub const fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, next: min }
    }

    /// The time to wait before the next attempt.
    pub fn wait(&mut self, rng: &mut impl Rng) -> Duration {
        let wait = self.next.mul_f64(rng.random_range(0.5..=1.0));
        self.next = (self.next * 2).min(self.max);
        wait
    }

    /// An attempt succeeded.
    pub const fn reset(&mut self) {
        self.next = self.min;
    }
}
