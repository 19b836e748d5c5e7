//! Flows of several agents in the order in which they happened.
//!
//! Each waits a little, since another agent may tell of an earlier one a little later. Plain: the time comes in.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clustermesh_agent_api::v1::ObserveResponse;
use clustermesh_agent_api::v1::observe_response::What;

/// See the module.
pub(super) struct Merge {
    hold: Duration,
    /// When the command began, by the flows' clock: what is older was remembered.
    begin: i64,
    /// So many of what was remembered, the newest; none: all of it.
    most: Option<usize>,
    /// By time, and by the order in which they came.
    waiting: BTreeMap<(i64, u64), (Instant, ObserveResponse)>,
    next: u64,
}

impl Merge {
    pub(super) fn new(hold: Duration, begin: i64, most: Option<usize>) -> Self {
        Self { hold, begin, most, waiting: BTreeMap::new(), next: 0 }
    }

    pub(super) fn push(&mut self, told: ObserveResponse, now: Instant) {
        self.waiting.insert((time(&told), self.next), (now + self.hold, told));
        self.next += 1;
    }

    /// Those that have waited for long enough, or all if nobody is left to tell of others.
    pub(super) fn ready(&mut self, now: Instant, all: bool) -> Vec<ObserveResponse> {
        // An older one that came late must not wait behind nothing, nor a newer one pass it.
        let last =
            self.waiting.iter().rev().find(|(_, (until, _))| all || *until <= now).map(|(key, _)| *key);
        let Some(last) = last else { return Vec::new() };
        let later = self.waiting.split_off(&(last.0, last.1 + 1));
        let ready = std::mem::replace(&mut self.waiting, later);
        let known = ready.keys().filter(|(time, _)| *time < self.begin).count();
        let surplus = self.most.map_or(0, |most| known.saturating_sub(most));
        self.most = self.most.map(|most| most.saturating_sub(known));
        ready.into_values().skip(surplus).map(|(_, told)| told).collect()
    }

    /// When there will be something, unless more comes.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        self.waiting.values().map(|(until, _)| *until).min()
    }
}

/// When it happened, in nanoseconds since the Unix epoch.
pub(super) fn time(told: &ObserveResponse) -> i64 {
    match &told.what {
        Some(What::Flow(flow)) => flow.time_ns,
        Some(What::Lost(lost)) => lost.time_ns,
        None => 0,
    }
}
