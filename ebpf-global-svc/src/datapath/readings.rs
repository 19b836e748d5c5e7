//! What the programs count and tell, and what they are to tell.

use std::{collections::BTreeMap, os::fd::AsFd as _};

use super::{Datapath, maps};
use crate::{
    DatapathError,
    abi::{
        CallKey, Config, Counter, CtKey, CtValue, EventState, NatKey, NatValue, OverlayKey, Plain,
        SockRevKey, SockRevValue, VerdictKey,
    },
    events::{EventRing, EventRules, KINDS},
    sys,
};

impl Datapath {
    /// Identities recently seen in traffic from other nodes, with the outer source that sent them.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn overlay_rx(&self) -> Result<Vec<(OverlayKey, Counter)>, DatapathError> {
        self.per_cpu("cm_overlay_rx")
    }

    /// Counters by [`reason`](crate::abi::reason), those that are not zero.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn metrics(&self) -> Result<Vec<(u8, Counter)>, DatapathError> {
        let counters = self.per_cpu::<u32>("cm_metrics")?;
        Ok(counters
            .into_iter()
            .filter(|(_, counter)| *counter != Counter::default())
            .filter_map(|(reason, counter)| Some((u8::try_from(reason).ok()?, counter)))
            .collect())
    }

    /// Sockets that talk to a backend, and the frontend that each has named.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn sock_rev(&self) -> Result<Vec<(SockRevKey, SockRevValue)>, DatapathError> {
        use crate::table::Table as _;
        self.table("cm_sock_rev")?.dump()
    }

    /// Flows that are let through, also those that have expired and that nobody has replaced yet.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn flows(&self) -> Result<Vec<(CtKey, CtValue)>, DatapathError> {
        use crate::table::Table as _;
        self.table("cm_ct")?.dump()
    }

    /// How often each rule has decided lately.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn verdicts(&self) -> Result<Vec<(VerdictKey, Counter)>, DatapathError> {
        self.per_cpu("cm_verdict")
    }

    /// Flows to services whose packets are translated one by one, each both ways.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn translations(&self) -> Result<Vec<(NatKey, NatValue)>, DatapathError> {
        use crate::table::Table as _;
        self.table("cm_nat")?.dump()
    }

    /// How often each service was called: cluster by cluster, and how often there was no backend.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn calls(&self) -> Result<Vec<(CallKey, Counter)>, DatapathError> {
        self.per_cpu("cm_calls")
    }

    /// Forgets how often services were called. What is not there is fine.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn forget_calls(&self, keys: &[CallKey]) -> Result<(), DatapathError> {
        let (map, _) = self.open_map("cm_calls")?;
        keys.iter().try_for_each(|key| match sys::delete(map.as_fd(), key) {
            Err(source) if source.raw_os_error() != Some(libc::ENOENT) => {
                Err(maps::map_failed("cm_calls", "update", source))
            }
            _ => Ok(()),
        })
    }

    /// Says which events the programs send from now on. Those of an earlier life stay until this is called.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn set_events(&mut self, rules: &EventRules) -> Result<(), DatapathError> {
        let (map, _) = self.open_map("cm_event_rule")?;
        let mut events = 0;
        for (kind, rule) in (0_u32..).zip(rules) {
            let Some(rule) = rule else { continue };
            events |= 1 << kind;
            sys::update(map.as_fd(), &kind, rule)
                .map_err(|source| maps::map_failed("cm_event_rule", "update", source))?;
        }
        if self.config.events != events {
            let config = Config { events, ..self.config };
            maps::write_config(&self.pins.map("cm_config"), &config)?;
            self.config = config;
        }
        Ok(())
    }

    /// The reading end of the events. Have one at a time.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn event_ring(&self) -> Result<EventRing, DatapathError> {
        EventRing::open(&self.pins.map("cm_events"))
    }

    /// What became of the events of each kind, over all CPUs. Times are 0.
    ///
    /// # Errors
    /// [`DatapathError::Map`].
    pub fn event_states(&self) -> Result<[EventState; KINDS], DatapathError> {
        let (map, _) = self.open_map("cm_event_state")?;
        let mut sums = [EventState::default(); KINDS];
        crate::table::dump(&map, maps::possible_cpus()?, |kind: u32, states: &[EventState]| {
            let Some(sum) = sums.get_mut(kind as usize) else { return };
            for state in states {
                sum.sent += state.sent;
                sum.sampled += state.sampled;
                sum.limited += state.limited;
                sum.full += state.full;
                sum.unsent += state.unsent;
            }
        })
        .map_err(|source| maps::map_failed("cm_event_state", "read", source))?;
        Ok(sums)
    }

    fn per_cpu<K: Plain + Ord>(&self, name: &'static str) -> Result<Vec<(K, Counter)>, DatapathError> {
        let (map, _) = self.open_map(name)?;
        let mut sums = BTreeMap::new();
        crate::table::dump(&map, maps::possible_cpus()?, |key: K, counters: &[Counter]| {
            let sum = counters.iter().fold(Counter::default(), |sum, counter| Counter {
                packets: sum.packets.wrapping_add(counter.packets),
                bytes: sum.bytes.wrapping_add(counter.bytes),
            });
            sums.insert(key, sum);
        })
        .map_err(|source| maps::map_failed(name, "read", source))?;
        Ok(sums.into_iter().collect())
    }
}
