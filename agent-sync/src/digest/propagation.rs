//! The time from an event at the exporter to the write into this node's kernel.

use std::collections::VecDeque;

use clustermesh_kvstore::digest::{SourceTime, Timed};

use crate::histogram::Histogram;

/// Upper bounds in seconds.
const BUCKETS: [f64; 16] =
    [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Revisions and times that wait for each other. A storm that outgrows it is traced in parts.
const WAITING: usize = 1024;

/// Traces the changes of one kind of one cluster.
#[derive(Debug)]
pub struct Propagation {
    /// Revisions that were told, and when they were installed.
    told: VecDeque<(i64, Option<SourceTime>)>,
    /// Their events' times, as the exporter states them a little later.
    events: VecDeque<Timed>,
    histogram: Histogram,
}

impl Default for Propagation {
    fn default() -> Self {
        Self { told: VecDeque::new(), events: VecDeque::new(), histogram: Histogram::new(&BUCKETS) }
    }
}

impl Propagation {
    /// A change of `revision` was told.
    pub fn told(&mut self, revision: i64) {
        if self.told.back().is_none_or(|(last, _)| *last < revision) {
            push(&mut self.told, (revision, None));
        }
    }

    /// Everything told so far is installed.
    pub fn installed(&mut self, at: SourceTime) {
        for (_, installed) in self.told.iter_mut().rev().take_while(|(_, installed)| installed.is_none()) {
            *installed = Some(at);
        }
        self.settle();
    }

    /// The exporter states when the events of its newest revisions were.
    pub fn stated(&mut self, recent: &[Timed]) {
        recent.iter().for_each(|timed| push(&mut self.events, *timed));
        self.settle();
    }

    /// A list was or will be told: its revisions are not those of changes that just happened, or of
    /// another etcd.
    pub fn listing(&mut self) {
        self.told.clear();
        self.events.clear();
    }

    /// From event to kernel.
    pub fn histogram(&self) -> &Histogram {
        &self.histogram
    }

    /// Joins both sides by revision. Both ascend, so what lies before a match has none.
    fn settle(&mut self) {
        while let (Some((revision, Some(installed))), Some(event)) = (self.told.front(), self.events.front())
        {
            let (revision, installed, event) = (*revision, *installed, *event);
            if revision == event.revision {
                self.histogram.observe(event.at.seconds_until(installed));
            }
            if revision <= event.revision {
                self.told.pop_front();
            }
            if event.revision <= revision {
                self.events.pop_front();
            }
        }
    }
}

fn push<T>(queue: &mut VecDeque<T>, item: T) {
    if queue.len() >= WAITING {
        queue.pop_front();
    }
    queue.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1000;

    fn timed(revision: i64, ms: i64) -> Timed {
        Timed { revision, at: SourceTime(ms * MS) }
    }

    #[test]
    fn revisions_and_times_meet_in_any_order() {
        let mut trace = Propagation::default();
        trace.told(5);
        trace.told(5);
        trace.installed(SourceTime(14 * MS));
        trace.told(6);
        trace.told(8);
        // 4 was told by a list; 7 is of another kind's.
        trace.stated(&[timed(4, 1), timed(5, 10), timed(6, 11), timed(7, 11), timed(8, 12)]);
        assert_eq!(trace.histogram().count(), 1);
        trace.installed(SourceTime(20 * MS));
        assert_eq!(trace.histogram().count(), 3);
        assert!((trace.histogram().sum() - 0.021).abs() < 1e-9, "{:?}", trace.histogram());
    }
}
