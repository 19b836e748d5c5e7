// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Services: frontends, their backends, and who is bound to which.

use crate::MAX_GROUPS;

/// `cm_service` (HASH) key: a frontend of this cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Own cluster ID.
    pub cluster: u16,
    /// Network order.
    pub port: u16,
    /// IPPROTO_TCP 6, IPPROTO_UDP 17, IPPROTO_SCTP 132.
    pub proto: u8,
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
    pub family: u8,
    /// Whom it answers; see [`scope`].
    pub scope: u8,
    /// Zero.
    pub pad: u8,
    /// Network order; IPv4 in the first four bytes.
    pub ip: [u8; 16],
}

/// Values of [`ServiceKey::scope`].
pub mod scope {
    /// Pods and processes of the node.
    pub const MESH: u8 = 0;
    /// Packets that come in at one of the node's own interfaces.
    pub const OUTSIDE: u8 = 1;
}

/// `cm_service` value: the first level of selection, over clusters.
///
/// Of groups with slots, those of the best rank count, one of which is drawn: healthy clusters come before
/// draining ones, then the lower tier, then groups with a weight before standbys (weight 0). Weighted groups
/// are drawn by weight, standbys by their slots. Groups of a dead cluster are never used.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceValue {
    /// Names the slots; never reused while a program may still read them.
    pub id: u32,
    /// How many of `groups` are in use.
    pub n_groups: u16,
    /// How long a client keeps its backend after its last call, in units of [`AFFINITY_UNIT_SECONDS`]; 0: no
    /// session affinity.
    pub affinity_timeout: u16,
    /// Clusters with backends.
    pub groups: [Group; MAX_GROUPS],
}

/// One cluster's part in a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Group {
    /// Cluster ID.
    pub cluster: u16,
    /// Share of new connections; 0: standby.
    pub weight: u16,
    /// [`Group::count`] in the lower 24 bits, [`Group::tier`] in the upper 8.
    pub slots: u32,
}

/// Slots that a group can have.
pub const MAX_SLOTS: u32 = (1 << TIER_SHIFT) - 1;
const TIER_SHIFT: u32 = 24;

impl Group {
    /// A group of `count` slots, at most [`MAX_SLOTS`].
    #[must_use]
    pub const fn new(cluster: u16, weight: u16, tier: u8, count: u32) -> Self {
        let count = if count > MAX_SLOTS { MAX_SLOTS } else { count };
        Self { cluster, weight, slots: (tier as u32) << TIER_SHIFT | count }
    }

    /// Slots 0..count of (service, cluster) exist.
    #[must_use]
    #[inline(always)]
    pub const fn count(&self) -> u32 {
        self.slots & MAX_SLOTS
    }

    /// A group counts only while there is none of a lower tier.
    #[must_use]
    #[inline(always)]
    pub const fn tier(&self) -> u8 {
        (self.slots >> TIER_SHIFT) as u8
    }
}

/// `cm_slot` (HASH) key; the value is a backend ID (u32).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotKey {
    /// [`ServiceValue::id`].
    pub service: u32,
    /// Less than [`Group::count`].
    pub slot: u32,
    /// Cluster ID.
    pub cluster: u16,
    /// Zero.
    pub pad: u16,
}

/// `cm_backend` (HASH, key u32) value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendValue {
    /// Network order; IPv4 in the first four bytes.
    pub ip: [u8; 16],
    /// Cluster ID.
    pub cluster: u16,
    /// Network order.
    pub port: u16,
    /// As in [`ServiceKey::proto`].
    pub proto: u8,
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
    pub family: u8,
    /// See [`backend_state`].
    pub state: u8,
    /// [`BACKEND_EXCLUSIVE`], or 0.
    pub flags: u8,
    /// The backend's ID again: a program that reads an element which the kernel has just recycled
    /// for another backend notices. Selection ignores a backend whose generation is not its ID.
    pub generation: u32,
}

/// [`BackendValue::flags`]: slots of one service only have its ID. So the ID alone proves that it is a backend of
/// that service, and clients can be bound to it.
pub const BACKEND_EXCLUSIVE: u8 = 1;

/// `cm_affinity` (LRU_HASH) key: a client of a service with session affinity.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityKey {
    /// The kernel's number of the client's network namespace: a pod, or this node itself.
    pub client: u64,
    /// [`ServiceValue::id`].
    pub service: u32,
    /// Zero.
    pub pad: u32,
}

/// `cm_affinity` value: the backend that the client is bound to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityValue {
    /// Last call, in nanoseconds of the monotonic clock; some calls within [`AFFINITY_REFRESH_NS`] are not noted.
    pub used: u64,
    /// The backend's ID.
    pub backend: u32,
    /// The key's service again, for a program that reads an element which the kernel has just recycled for
    /// another client. With `backend` it is one word, which is read at once.
    pub service: u32,
}
/// What [`ServiceValue::affinity_timeout`] counts: so 16 bits hold the longest that Kubernetes knows, a day.
pub const AFFINITY_UNIT_SECONDS: u32 = 2;
/// How long [`AffinityValue::used`] may lag behind: a 16th of the shortest time-out.
pub const AFFINITY_REFRESH_NS: u64 = 125_000_000;

/// `cm_sock_rev` (LRU_HASH) key: a socket and the backend that it talks to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SockRevKey {
    /// The kernel's number of the socket.
    pub cookie: u64,
    /// The backend's address.
    pub ip: [u8; 16],
    /// Network order.
    pub port: u16,
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
    pub family: u8,
    /// As in [`ServiceKey::proto`].
    pub proto: u8,
    /// Zero.
    pub pad: u32,
}

/// `cm_sock_rev` value: the frontend that the application named.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SockRevValue {
    /// The frontend's address.
    pub ip: [u8; 16],
    /// Network order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
    /// [`ServiceValue::id`].
    pub service: u32,
}

/// `cm_calls` (PERCPU_HASH, value [`Counter`](crate::Counter)) key: calls to a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallKey {
    /// [`ServiceValue::id`].
    pub service: u32,
    /// Cluster of the backend that was chosen; 0 if none was.
    pub cluster: u16,
    /// See [`call`].
    pub outcome: u16,
}

/// Values of [`CallKey::outcome`](super::CallKey::outcome).
pub mod call {
    /// A backend was chosen.
    pub const CHOSEN: u16 = 0;
    /// There was none.
    pub const REFUSED: u16 = 1;
}

/// Values of [`BackendValue::state`](super::BackendValue::state).
pub mod backend_state {
    /// Takes new connections.
    pub const ACTIVE: u8 = 0;
    /// Takes a new connection only if nothing else turns up.
    pub const TERMINATING: u8 = 1;
}
