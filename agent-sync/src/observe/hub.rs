//! Who observes, what was seen lately, and what the programs are to tell because of that.
//!
//! Plain but for the lock and the queue behind each observer: no I/O, no clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebpf_global_svc::abi::{EventRule, event_kind};
use ebpf_global_svc::{EventRules, KINDS};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, watch};

use super::flow::Flow;

/// Flows that wait for an observer. One that falls behind loses the oldest and is told how many.
const QUEUE: usize = 4096;

/// What is wanted when nobody looks: it is there when somebody comes to look why.
const ALWAYS: u32 = 1 << event_kind::DROP | 1 << event_kind::AUDIT;

/// How much is told, and remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Events per second, CPU and kind while nobody observes; 0: none at all.
    pub idle_rate: u32,
    /// The same while somebody does; 0: no limit.
    pub rate: u32,
    /// Flows that are remembered.
    pub history: usize,
}

/// Bursts while nobody observes, in seconds of their rate.
const IDLE_BURST: u32 = 10;

impl Default for Limits {
    fn default() -> Self {
        Self { idle_rate: 100, rate: 5000, history: 4096 }
    }
}

impl Limits {
    /// What the programs are to tell. `demand`: what each observer wants.
    pub fn rules(&self, demand: impl IntoIterator<Item = Demand>) -> EventRules {
        let (mut wanted, mut sample) = (0, None);
        for one in demand {
            wanted |= one.events;
            sample = Some(sample.map_or(one.sample, |other: u32| other.min(one.sample)));
        }
        let mut rules = [None; KINDS];
        for (kind, rule) in rules.iter_mut().enumerate() {
            *rule = match (wanted >> kind & 1 == 1, ALWAYS >> kind & 1 == 1 && self.idle_rate > 0) {
                // What is told always is told whole.
                (true, true) => Some(EventRule::new(self.rate, self.rate, 1)),
                (true, false) => Some(EventRule::new(self.rate, self.rate, sample.unwrap_or(1))),
                (false, true) => {
                    Some(EventRule::new(self.idle_rate, self.idle_rate.saturating_mul(IDLE_BURST), 1))
                }
                (false, false) => None,
            };
        }
        rules
    }
}

/// What an observer wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// A bit for each [`event_kind`].
    pub events: u32,
    /// One of so many of what passes.
    pub sample: u32,
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    state: Mutex<State>,
    rules: watch::Sender<EventRules>,
}

#[derive(Debug)]
struct State {
    history: VecDeque<Arc<Flow>>,
    observers: BTreeMap<u64, Demand>,
    next: u64,
    flows: broadcast::Sender<Arc<Flow>>,
}

impl Hub {
    /// Nobody observes yet.
    pub fn new(limits: Limits) -> Self {
        let state = State {
            history: VecDeque::new(),
            observers: BTreeMap::new(),
            next: 0,
            flows: broadcast::Sender::new(QUEUE),
        };
        let rules = watch::Sender::new(limits.rules([]));
        Self(Arc::new(Shared { limits, state: Mutex::new(state), rules }))
    }

    /// What the programs are to tell, now and later.
    pub fn rules(&self) -> watch::Receiver<EventRules> {
        self.0.rules.subscribe()
    }

    /// Remembers flows, the oldest first, and hands them out.
    pub fn publish(&self, flows: impl IntoIterator<Item = Flow>) {
        let mut state = self.lock();
        for flow in flows {
            let flow = Arc::new(flow);
            if self.0.limits.history > 0 {
                if state.history.len() == self.0.limits.history {
                    state.history.pop_front();
                }
                state.history.push_back(flow.clone());
            }
            // Nobody listening is fine.
            let _ = state.flows.send(flow);
        }
    }

    /// What is remembered, the oldest first.
    pub fn history(&self) -> Vec<Arc<Flow>> {
        self.lock().history.iter().cloned().collect()
    }

    /// What is remembered, and whatever comes after that until the observer goes.
    pub fn observe(&self, demand: Demand) -> (Vec<Arc<Flow>>, Observer) {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.observers.insert(number, demand);
        let observer = Observer { hub: self.clone(), number, flows: state.flows.subscribe() };
        let history = state.history.iter().cloned().collect();
        self.show_rules(&state);
        (history, observer)
    }

    fn show_rules(&self, state: &State) {
        let rules = self.0.limits.rules(state.observers.values().copied());
        self.0.rules.send_if_modified(|before| std::mem::replace(before, rules) != rules);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who looks on. Its demand ends when it is dropped.
#[derive(Debug)]
pub struct Observer {
    hub: Hub,
    number: u64,
    flows: broadcast::Receiver<Arc<Flow>>,
}

/// What an observer gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// The next one.
    Flow(Arc<Flow>),
    /// It was too slow: so many are gone, and the next ones follow.
    Lost(u64),
}

impl Observer {
    /// The next one, when there is one.
    pub async fn next(&mut self) -> Received {
        match self.flows.recv().await {
            Ok(flow) => Received::Flow(flow),
            Err(RecvError::Lagged(lost)) => Received::Lost(lost),
            // The hub, which this one holds, has the other end.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }

    /// The next one, if it is there.
    pub fn try_next(&mut self) -> Option<Received> {
        match self.flows.try_recv() {
            Ok(flow) => Some(Received::Flow(flow)),
            Err(TryRecvError::Lagged(lost)) => Some(Received::Lost(lost)),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        let mut state = self.hub.lock();
        state.observers.remove(&self.number);
        self.hub.show_rules(&state);
    }
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
