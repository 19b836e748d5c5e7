use ebpf_global_svc::abi::{Event, read_event};
use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::observe::End;

/// The `n`-th one.
fn flow(n: u64) -> Flow {
    let event = Event { time: n, ..read_event(&[0; 128]).unwrap() };
    let (source, destination) = (End::default(), End::default());
    Flow { time: Timestamp::UNIX_EPOCH, event, source, destination, service: None, rule: None }
}

fn numbers(flows: &[Arc<Flow>]) -> Vec<u64> {
    flows.iter().map(|flow| flow.event.time).collect()
}

/// An observer, what it knows, and from where on it has to know all.
struct Watcher {
    observer: Observer,
    since: u64,
    seen: Vec<u64>,
    lost: u64,
}

impl Watcher {
    fn read(&mut self, most: usize) {
        for _ in 0..most {
            match self.observer.try_next() {
                Some(Received::Flow(flow)) => self.seen.push(flow.event.time),
                Some(Received::Lost(lost)) => self.lost += lost,
                None => return,
            }
        }
    }
}

proptest! {
    /// Whoever comes, goes, reads or does not: what is remembered are the newest, and what an observer saw and lost is
    /// all there was since it came.
    #[test]
    fn observers_see_everything_or_know_how_much_they_lost(
        steps in prop::collection::vec((0_u8..5, 0_usize..6000), 1..40),
        history in 0_usize..600,
    ) {
        let hub = Hub::new(Limits { history, ..Limits::default() });
        let (mut published, mut watchers) = (0_u64, Vec::<Watcher>::new());
        for (step, size) in steps {
            match step {
                0 | 1 => {
                    hub.publish((published..).take(size).map(flow));
                    published += size as u64;
                }
                2 => {
                    let (known, observer) = hub.observe(Demand { events: 1, sample: 1 });
                    prop_assert_eq!(numbers(&known), numbers(&hub.history()));
                    watchers.push(Watcher { observer, since: published, seen: Vec::new(), lost: 0 });
                }
                3 => if let Some(watcher) = watchers.get_mut(size % 7) { watcher.read(size) },
                _ => if !watchers.is_empty() { drop(watchers.swap_remove(size % watchers.len())) },
            }
            let first = published.saturating_sub(history as u64);
            prop_assert_eq!(numbers(&hub.history()), (first..published).collect::<Vec<_>>());
        }
        for mut watcher in watchers {
            watcher.read(usize::MAX);
            prop_assert!(watcher.seen.is_sorted());
            prop_assert!(watcher.seen.iter().all(|n| (watcher.since..published).contains(n)));
            prop_assert_eq!(watcher.seen.len() as u64 + watcher.lost, published - watcher.since);
        }
    }
}

#[test]
fn programs_are_told_what_is_wanted_as_long_as_it_is() {
    let limits = Limits { idle_rate: 10, rate: 1000, history: 1 };
    let hub = Hub::new(limits);
    let mut rules = hub.rules();
    let idle = EventRule::new(10, 100, 1);
    let kinds = |rules: &EventRules| rules.iter().map(Option::is_some).collect::<Vec<_>>();
    assert_eq!(*rules.borrow_and_update(), [Some(idle), Some(idle), None, None, None]);

    let (_, traces) = hub.observe(Demand { events: 1 << event_kind::TRACE, sample: 8 });
    assert_eq!(
        rules.borrow_and_update()[usize::from(event_kind::TRACE)],
        Some(EventRule::new(1000, 1000, 8))
    );
    let (_, all) = hub.observe(Demand { events: 0b11111, sample: 2 });
    assert_eq!(*rules.borrow_and_update(), {
        let (whole, part) = (Some(EventRule::new(1000, 1000, 1)), Some(EventRule::new(1000, 1000, 2)));
        [whole, whole, part, part, part]
    });
    drop(traces);
    assert!(!rules.has_changed().unwrap(), "nothing has, for the programs");
    drop(all);
    assert_eq!(kinds(&rules.borrow_and_update()), [true, true, false, false, false]);
    let silent = Hub::new(Limits { idle_rate: 0, ..limits });
    assert_eq!(kinds(&silent.rules().borrow()), [false; KINDS]);
}
