//! Flags for what the programs tell of single packets and calls.

use agent_sync::observe::Limits;
use clap::Args;

/// See docs/observe.md.
#[derive(Debug, Args)]
pub(crate) struct ObserveFlags {
    /// Events of a kind per second and CPU while somebody observes; 0: no limit
    #[arg(long, value_name = "EVENTS", default_value_t = Limits::default().rate)]
    observe_rate: u32,
    /// Drops and refused calls per second and CPU that are remembered while nobody observes; 0: none
    #[arg(long, value_name = "EVENTS", default_value_t = Limits::default().idle_rate)]
    observe_idle_rate: u32,
    /// Flows that are remembered, to be looked at later
    #[arg(long, value_name = "FLOWS", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    observe_history: u32,
    /// Bytes of the ring in which the programs leave events (cm_events), a power of two
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20, value_parser = ring_bytes)]
    events_bytes: u32,
}

impl ObserveFlags {
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            idle_rate: self.observe_idle_rate,
            rate: self.observe_rate,
            // At most a million.
            history: usize::try_from(self.observe_history).unwrap_or(usize::MAX),
        }
    }

    pub(crate) fn ring_bytes(&self) -> u32 {
        self.events_bytes
    }
}

/// The kernel wants whole pages, which have 64 KiB on some machines.
fn ring_bytes(text: &str) -> Result<u32, String> {
    const RANGE: std::ops::RangeInclusive<u32> = 65_536..=1 << 30;
    let bytes = text.parse().ok().filter(|bytes: &u32| bytes.is_power_of_two() && RANGE.contains(bytes));
    bytes.ok_or_else(|| "write a power of two from 65536 to 1073741824".into())
}

#[cfg(test)]
mod tests {
    use super::ring_bytes;

    #[test]
    fn a_ring_has_a_power_of_two() {
        assert_eq!(ring_bytes("65536"), Ok(65_536));
        assert_eq!(ring_bytes("1048576"), Ok(1 << 20));
        for wrong in ["", "-1", "0", "4096", "100000", "1048577", "2147483648", "4294967296", "1M"] {
            ring_bytes(wrong).unwrap_err();
        }
    }
}
