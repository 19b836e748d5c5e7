//! From the ring to the hub.
//!
//! Edge. Waits for the ring's descriptor, reads what is there, and has the engine say what it means: in batches, so
//! that a storm costs the engine one answer for many events.

use std::io;
use std::time::Duration;

use ebpf_global_svc::EventRing;
use jiff::{SignedDuration, Timestamp};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::flow::Flow;
use super::hub::Hub;
use crate::engine::Query;

/// Events that the engine is asked about at once.
const BATCH: usize = 256;

/// Reads until the engine is gone.
///
/// # Errors
/// If the ring cannot be waited for.
pub(crate) async fn read_events(ring: EventRing, queries: mpsc::Sender<Query>, hub: Hub) -> io::Result<()> {
    #[expect(
        deprecated,
        reason = "the ring keeps its descriptor until it is dropped; what replaces this is unsafe"
    )]
    let mut ring = AsyncFd::with_interest(ring, Interest::READABLE)?;
    let mut events = Vec::with_capacity(BATCH);
    let mut warned = false;
    loop {
        let mut ready = ring.readable_mut().await?;
        let foreign = ready.get_inner_mut().read(BATCH, &mut events);
        if foreign > 0 && !warned {
            warned = true;
            warn!(foreign, "another version's programs have left events that cannot be read");
        }
        if events.len() + foreign < BATCH {
            // The kernel tells of what comes after this has been read, and of nothing before.
            ready.clear_ready();
        }
        drop(ready);
        if events.is_empty() {
            continue;
        }
        let (reply, answer) = oneshot::channel();
        let batch = std::mem::replace(&mut events, Vec::with_capacity(BATCH));
        let anchor = Anchor::now();
        if queries.send(Query::Describe(batch, reply)).await.is_err() {
            return Ok(());
        }
        let Ok(flows) = answer.await else { return Ok(()) };
        hub.publish(flows.into_iter().map(|flow| Flow { time: anchor.time(flow.event.time), ..flow }));
    }
}

/// The wall clock's time at one of the programs' clock.
struct Anchor {
    wall: Timestamp,
    monotonic: Duration,
}

impl Anchor {
    fn now() -> Self {
        Self { wall: Timestamp::now(), monotonic: ebpf_global_svc::program_time() }
    }

    fn time(&self, nanoseconds: u64) -> Timestamp {
        let ago = self.monotonic.saturating_sub(Duration::from_nanos(nanoseconds));
        let ago = SignedDuration::try_from(ago).unwrap_or(SignedDuration::MAX);
        self.wall.checked_sub(ago).unwrap_or(Timestamp::MIN)
    }
}
