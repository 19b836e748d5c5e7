//! What programs tell of single packets and calls (`cm_events`), and who wants to know.

use crate::Plain;

/// `cm_events` (RINGBUF) record: what became of a packet or a call.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// In nanoseconds of the monotonic clock.
    pub time: u64,
    /// The kernel's number of the socket that it is from; 0: not known.
    pub socket: u64,
    /// Network order; IPv4 in the first four bytes. Zero: not known, as of a socket that is not bound.
    pub source: [u8; 16],
    /// The same. Of a call: the backend's, zero if there is none.
    pub destination: [u8; 16],
    /// Of a call: the address that the application named.
    pub frontend: [u8; 16],
    /// Of a call: name of the thread, zero-terminated unless it has 16 bytes.
    pub command: [u8; 16],
    /// Identity of the sender; 0: not known.
    pub source_identity: u32,
    /// Identity of the receiver; 0: not known, or not looked for.
    pub destination_identity: u32,
    /// Where a policy decided ([`EVENT_POLICY`]): [`PolicyValue::rule`](super::PolicyValue::rule), 0 for none. Else
    /// [`ServiceValue::id`](super::ServiceValue::id) of the service that the socket named, 0 for none.
    pub number: u32,
    /// Of a call: the process.
    pub process: u32,
    /// Bytes with Ethernet header; 0 of a call.
    pub length: u32,
    /// The interface on which it was seen; 0 of a call.
    pub ifindex: u32,
    /// Events of this kind that this CPU has not sent since its last one, because they were too many or there was no
    /// room. What sampling left out does not count.
    pub unsent: u32,
    /// Cluster of the sender; 0: not known, or outside of the mesh.
    pub source_cluster: u16,
    /// The same of the receiver.
    pub destination_cluster: u16,
    /// Network order; ICMP echo: the identifier.
    pub source_port: u16,
    /// The same.
    pub destination_port: u16,
    /// Of a call: the port that the application named, network order.
    pub frontend_port: u16,
    /// See [`event_kind`].
    pub kind: u8,
    /// See [`reason`](super::reason).
    pub reason: u8,
    /// See [`event_hook`].
    pub hook: u8,
    /// [`EVENT_EGRESS`] and those behind it.
    pub flags: u8,
    /// [`FAMILY_V4`](super::FAMILY_V4) or [`FAMILY_V6`](super::FAMILY_V6); 0: no IP.
    pub family: u8,
    /// IP protocol number.
    pub proto: u8,
    /// As they stand in the TCP header.
    pub tcp_flags: u8,
    /// Type of an ICMP or ICMPv6 packet.
    pub icmp_type: u8,
    /// Its code.
    pub icmp_code: u8,
    /// Zero.
    pub pad: u8,
}

/// [`Event::flags`]: a pod of this node sends it; otherwise one receives it, or none has a part in it.
pub const EVENT_EGRESS: u8 = 1;
/// [`Event::flags`]: a policy decided about it.
pub const EVENT_POLICY: u8 = 2;
/// [`Event::flags`]: it answers, as far as the packet alone tells: TCP SYN with ACK, ICMP echo reply.
pub const EVENT_ANSWER: u8 = 4;
/// [`Event::flags`], of a call: the backend is the one that its client is bound to by session affinity.
pub const EVENT_BOUND: u8 = 8;
/// [`Event::flags`], of a call: the backend is of a standby group.
pub const EVENT_STANDBY: u8 = 16;
/// [`Event::flags`], of a call: the backend is in a draining cluster.
pub const EVENT_DRAINING: u8 = 32;

/// How many kinds there are.
pub const EVENT_KINDS: u32 = 5;

/// Values of [`Event::kind`].
pub mod event_kind {
    /// A packet was dropped, or a call refused.
    pub const DROP: u8 = 0;
    /// Policy would have dropped the first packet of a flow, and only audits.
    pub const AUDIT: u8 = 1;
    /// Policy let the first packet of a flow pass.
    pub const ALLOW: u8 = 2;
    /// A packet that was passed on.
    pub const TRACE: u8 = 3;
    /// A call got a backend.
    pub const CALL: u8 = 4;
}

/// Values of [`Event::hook`].
pub mod event_hook {
    /// `cm_from_pod`.
    pub const FROM_POD: u8 = 0;
    /// `cm_to_pod`.
    pub const TO_POD: u8 = 1;
    /// `cm_from_overlay`.
    pub const FROM_OVERLAY: u8 = 2;
    /// `cm_to_overlay`.
    pub const TO_OVERLAY: u8 = 3;
    /// `cm_connect4` and those like it.
    pub const SOCKET: u8 = 4;
    /// `cm_from_netdev`.
    pub const FROM_NETDEV: u8 = 5;
}

/// `cm_event_rule` (ARRAY of [`EVENT_KINDS`]) value: how many events of a kind are sent, on each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventRule {
    /// Nanoseconds between two events, in the long run; 0: no limit.
    pub interval: u64,
    /// How far ahead of that a burst may be, in nanoseconds: interval times events, less one.
    pub tolerance: u64,
    /// One of so many is sent, by chance; 0 and 1: all.
    pub sample: u32,
    /// Zero.
    pub pad: u32,
}

impl EventRule {
    /// At most `rate` events a second in the long run, and `burst` at once; a rate of 0 has no limit. One of `sample`
    /// is looked at.
    #[must_use]
    pub const fn new(rate: u32, burst: u32, sample: u32) -> Self {
        if rate == 0 {
            return Self { interval: 0, tolerance: 0, sample, pad: 0 };
        }
        let interval = 1_000_000_000 / rate as u64;
        Self { interval, tolerance: interval * burst.saturating_sub(1) as u64, sample, pad: 0 }
    }
}

/// `cm_event_state` (PERCPU_ARRAY of [`EVENT_KINDS`]) value: what became of a kind's events on a CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventState {
    /// When the next event would be on time (GCRA, the "generic cell rate algorithm" of ITU-T I.371): one may be ahead
    /// of that by [`EventRule::tolerance`].
    pub due: u64,
    /// In the ring.
    pub sent: u64,
    /// Left out by [`EventRule::sample`].
    pub sampled: u64,
    /// Left out by the limit of [`EventRule`].
    pub limited: u64,
    /// There was no room in the ring.
    pub full: u64,
    /// [`Event::unsent`] of the next one.
    pub unsent: u64,
}

/// Reads a record of `cm_events`; none if that is none of ours.
#[must_use]
pub fn read_event(record: &[u8]) -> Option<Event> {
    const SIZE: usize = core::mem::size_of::<Event>();
    let record: &[u8; SIZE] = record.try_into().ok()?;
    // SAFETY: of the size of an event, of which any bytes are one (`Plain`).
    let event: Event = unsafe { core::ptr::read_unaligned(record.as_ptr().cast()) };
    (u32::from(event.kind) < EVENT_KINDS).then_some(event)
}

const _: () = {
    const fn plain<T: Plain>() {}
    plain::<Event>();
};
