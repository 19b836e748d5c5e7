//! What the programs tell of single packets and calls.

use std::{
    fmt,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
};

use aya::maps::{Map, MapData, RingBuf};

use crate::{
    DatapathError,
    abi::{EVENT_KINDS, Event, EventRule, read_event},
};

/// Kinds of events, [`EVENT_KINDS`] of them.
pub const KINDS: usize = EVENT_KINDS as usize;

/// Which events the programs send, by [`event_kind`](crate::abi::event_kind); none: none of that kind.
pub type EventRules = [Option<EventRule>; KINDS];

/// The reading end of `cm_events`. There can be one at a time: it says what has been read.
///
/// Its descriptor becomes readable when there is something to read.
pub struct EventRing(RingBuf<MapData>);

impl EventRing {
    pub(crate) fn open(path: &Path) -> Result<Self, DatapathError> {
        let failed = |error: aya::maps::MapError| DatapathError::Map {
            map: "cm_events".to_owned(),
            operation: "open",
            source: std::io::Error::other(error),
        };
        let map = Map::RingBuf(MapData::from_pin(path).map_err(failed)?);
        RingBuf::try_from(map).map(Self).map_err(failed)
    }

    /// Moves at most `most` events behind those in `events`. Gives the number of records that are none, of which there
    /// are only after an upgrade.
    pub fn read(&mut self, most: usize, events: &mut Vec<Event>) -> usize {
        let mut foreign = 0;
        for _ in 0..most {
            let Some(record) = self.0.next() else { break };
            match read_event(&record) {
                Some(event) => events.push(event),
                None => foreign += 1,
            }
        }
        foreign
    }
}

impl AsFd for EventRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventRing {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl fmt::Debug for EventRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventRing").field(&self.as_raw_fd()).finish()
    }
}
