//! When the mirror may be read, as plain code.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::ClusterName;

/// How long a start waits for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// A cluster that is not connected by then is not waited for.
    pub per_cluster: Duration,
    /// Nothing is waited for any longer.
    pub global: Duration,
}

/// How far a cluster is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stage {
    /// It was connected at least once.
    pub connected: bool,
    /// All it had is in the local etcd, canaries included.
    pub mirrored: bool,
}

/// Waits for the clusters that were configured at the start. Once ready it stays so: clusters that come
/// later do not take the others away from the agents.
#[derive(Debug)]
pub struct Readiness {
    patience: Patience,
    started: Instant,
    waiting: BTreeSet<ClusterName>,
    ready: Option<Duration>,
}

impl Readiness {
    /// Waits for `clusters` from now on.
    pub fn new(clusters: BTreeSet<ClusterName>, patience: Patience, now: Instant) -> Self {
        Self { patience, started: now, waiting: clusters, ready: None }
    }

    /// Looks at the clusters again; `stage` knows those that are configured. Nothing is ready before the
    /// local etcd is.
    pub fn update(&mut self, now: Instant, local: bool, stage: impl Fn(&ClusterName) -> Option<Stage>) {
        if self.ready.is_some() {
            return;
        }
        let waited = now.duration_since(self.started);
        let patience = self.patience;
        self.waiting.retain(|name| {
            let Some(stage) = stage(name) else { return false };
            !stage.mirrored && (stage.connected || waited < patience.per_cluster)
        });
        if local && (self.waiting.is_empty() || waited >= patience.global) {
            self.ready = Some(waited);
        }
    }

    /// How long it took to become ready.
    pub fn took(&self) -> Option<Duration> {
        self.ready
    }

    /// Clusters that are waited for.
    pub fn waiting(&self) -> impl Iterator<Item = &ClusterName> {
        self.waiting.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience =
        Patience { per_cluster: Duration::from_secs(15), global: Duration::from_secs(600) };
    const NOT_REACHED: Stage = Stage { connected: false, mirrored: false };
    const LISTING: Stage = Stage { connected: true, mirrored: false };
    const MIRRORED: Stage = Stage { connected: true, mirrored: true };

    fn readiness(now: Instant) -> Readiness {
        let names = ["alpha", "beta"].map(|name| name.parse().unwrap());
        Readiness::new(names.into(), PATIENCE, now)
    }

    fn update(readiness: &mut Readiness, now: Instant, local: bool, stages: [Option<Stage>; 2]) -> bool {
        readiness.update(now, local, |name| stages[usize::from(name.as_str() == "beta")]);
        readiness.took().is_some()
    }

    #[test]
    fn a_cluster_that_is_not_reached_is_given_up_and_one_that_is_slow_is_not() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut it = readiness(start);
        let stages = [Some(NOT_REACHED), Some(LISTING)];
        assert!(!update(&mut it, after(14), true, stages));
        assert!(!update(&mut it, after(15), true, stages));
        assert_eq!(it.waiting().count(), 1);
        // Reached after all: it was not waited for, and is not again.
        assert!(!update(&mut it, after(16), true, [Some(LISTING), Some(LISTING)]));
        assert!(update(&mut it, after(20), true, [Some(LISTING), Some(MIRRORED)]));
        assert_eq!(it.took(), Some(Duration::from_secs(20)));
    }

    #[test]
    fn the_start_ends_in_any_case_but_not_without_the_local_etcd() {
        let start = Instant::now();
        let stages = [Some(LISTING), Some(LISTING)];
        let mut it = readiness(start);
        assert!(!update(&mut it, start + Duration::from_secs(599), true, stages));
        assert!(!update(&mut it, start + PATIENCE.global, false, stages));
        assert!(update(&mut it, start + PATIENCE.global, true, stages));
    }

    #[test]
    fn a_cluster_that_is_removed_is_not_waited_for_and_ready_is_for_good() {
        let start = Instant::now();
        let mut it = readiness(start);
        assert!(update(&mut it, start, true, [None, Some(MIRRORED)]));
        assert!(update(&mut it, start, false, [Some(NOT_REACHED); 2]));
    }
}
