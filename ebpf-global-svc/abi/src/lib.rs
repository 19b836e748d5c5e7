// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Layouts of the kernel maps, shared by the eBPF programs and user space.
//!
//! Every struct is `repr(C)` without implicit padding (`const` asserts below): the kernel compares
//! keys as bytes, so an uninitialised byte would make two equal keys differ. Addresses are 16 bytes
//! in network order, IPv4 in the first four with the rest zero; `family` tells which. Ports are in
//! network order as they stand in packets and socket addresses; everything else is in host order.
//!
//! Cluster IDs prefix every key that names a pod address, slot or frontend.
#![no_std]

mod address;
mod event;
mod nat;
mod policy;
pub mod reason;
mod service;

pub use address::{
    ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, ENDPOINT_VIA_STACK, EndpointValue,
    IpKey, IpValue, NODE_CLEAR, NODE_ENCRYPTED, NODE_VIRTUAL, NodeKey, NodeValue, PREFIX_VIRTUAL, PrefixKey,
    PrefixValue, TranslateKey, TranslateValue, UnderlayKey, UnderlayValue, translate,
};
pub use event::{
    EVENT_ANSWER, EVENT_BOUND, EVENT_DRAINING, EVENT_EGRESS, EVENT_KINDS, EVENT_POLICY, EVENT_STANDBY, Event,
    EventRule, EventState, event_hook, event_kind, read_event,
};
pub use nat::{NAT_CLOSED, NatKey, NatValue, nat_kind};
pub use policy::{
    CT_CLOSING, CT_FIN, CT_FIN_ANSWERED, CtKey, CtValue, FragmentKey, FragmentValue, POLICY_DENY,
    POLICY_PEER_BITS, POLICY_PORT_BITS, POLICY_PROTO_BITS, PolicyKey, PolicyValue, VerdictKey, direction,
    verdict,
};
pub use service::{
    AFFINITY_REFRESH_NS, AFFINITY_UNIT_SECONDS, AffinityKey, AffinityValue, BACKEND_EXCLUSIVE, BackendValue,
    CallKey, Group, MAX_SLOTS, ServiceKey, ServiceValue, SlotKey, SockRevKey, SockRevValue, backend_state,
    call, scope,
};

/// Changed whenever a layout or the meaning of a field changes; kept in [`Config::schema`].
pub const SCHEMA_VERSION: u32 = 1;

/// [`IpKey::family`] and others: IPv4.
pub const FAMILY_V4: u8 = 4;
/// [`IpKey::family`] and others: IPv6.
pub const FAMILY_V6: u8 = 6;

/// Cluster IDs range over 0..=511; index of [`ClusterState`] in `cm_cluster`.
pub const MAX_CLUSTERS: u32 = 512;
/// Clusters that can back one frontend ([`ServiceValue::groups`]).
pub const MAX_GROUPS: usize = 32;
/// Reason codes are a byte; see [`reason`].
pub const MAX_REASONS: u32 = 256;

/// Words of 64 bits in `cm_scratch` (PERCPU_ARRAY of 1), in which programs keep what does not fit on their stack.
pub const SCRATCH_WORDS: usize = 48;

/// Marks plain data: every bit pattern is a valid value and there is no padding.
///
/// # Safety
/// Implemented here only, for `repr(C)` structs of integers whose size equals the sum of their fields.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($t:ty = $size:literal),* $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$t>() == $size);
        // SAFETY: repr(C), integers only, and the assertion above proves that there is no padding.
        unsafe impl Plain for $t {}
    )*};
}
plain! {
    u32 = 4, IpKey = 20, IpValue = 12, PrefixKey = 24, PrefixValue = 12, EndpointValue = 24,
    NodeKey = 20, NodeValue = 8, ServiceKey = 24, ServiceValue = 264, Group = 8, SlotKey = 12,
    BackendValue = 28, SockRevKey = 32, SockRevValue = 24, ClusterState = 4, Config = 48,
    Counter = 16, OverlayKey = 8, PolicyKey = 16, PolicyValue = 8, VerdictKey = 12, CtKey = 44,
    CtValue = 16, FragmentKey = 40, FragmentValue = 8, AffinityKey = 16, AffinityValue = 16,
    TranslateKey = 24, TranslateValue = 16, UnderlayKey = 4, UnderlayValue = 16,
    Event = 128, EventRule = 24, EventState = 48, CallKey = 8, NatKey = 44, NatValue = 48,
}

/// `cm_cluster` (ARRAY of [`MAX_CLUSTERS`]) value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClusterState {
    /// See [`cluster_state`].
    pub state: u32,
}

/// `cm_config` (ARRAY of 1) value; written by the loader, read by every program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Config {
    /// [`SCHEMA_VERSION`].
    pub schema: u32,
    /// Own cluster ID.
    pub cluster: u16,
    /// Bits of the cluster-local part of an identity: 16 (255 clusters) or 15 (511).
    pub identity_shift: u16,
    /// Ifindex of the VXLAN device; 0: no overlay.
    pub overlay_ifindex: u32,
    /// Own underlay IPv4 address, or [number](UnderlayValue).
    pub node_ip: [u8; 4],
    /// UDP port of the overlay, host order; 0: unknown.
    pub overlay_port: u16,
    /// [`CONFIG_STRICT`], [`CONFIG_PACKET_SERVICES`], [`CONFIG_PMTU_DISCOVERY`], [`CONFIG_ENCRYPTS`],
    /// [`CONFIG_UNDERLAY_V6`].
    pub flags: u16,
    /// Which events are wanted: a bit for each [`event_kind`].
    pub events: u32,
    /// Zero.
    pub reserved: [u32; 2],
    /// Own address on an IPv6 underlay, network order; else zero.
    pub node_ip6: [u8; 16],
}
/// [`Config::flags`]: tunnel packets to a node go only if they are encrypted, and only such are taken in, but for
/// nodes with [`NODE_CLEAR`].
pub const CONFIG_STRICT: u16 = 1;
/// [`Config::flags`]: packets that pods send to frontends, past all socket hooks, are translated.
pub const CONFIG_PACKET_SERVICES: u16 = 2;
/// [`Config::flags`]: pods are told of packets that the overlay would have to fragment, and that must not or cannot be
/// fragmented on their way.
pub const CONFIG_PMTU_DISCOVERY: u16 = 4;
/// [`Config::flags`]: tunnel packets to some node may have to be encrypted, so all of them go through the kernel.
pub const CONFIG_ENCRYPTS: u16 = 8;
/// [`Config::flags`]: tunnels run over IPv6, and nodes have [numbers](UnderlayValue).
pub const CONFIG_UNDERLAY_V6: u16 = 16;

/// `cm_metrics` (PERCPU_ARRAY of [`MAX_REASONS`]), `cm_overlay_rx`, `cm_verdict` and `cm_calls` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counter {
    /// Packets, or events.
    pub packets: u64,
    /// Bytes with Ethernet header; 0 for events at sockets.
    pub bytes: u64,
}

/// `cm_overlay_rx` (LRU_PERCPU_HASH) key: identity seen in decapsulated traffic, and the outer source.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OverlayKey {
    /// The VNI.
    pub identity: u32,
    /// The outer source, network order, or its [number](UnderlayValue).
    pub node_ip: [u8; 4],
}

/// Values of [`ClusterState::state`].
pub mod cluster_state {
    /// Takes part in selection.
    pub const HEALTHY: u32 = 0;
    /// New connections only when no healthy cluster has a backend; established ones go on.
    pub const DRAINING: u32 = 1;
    /// No new connections.
    pub const DEAD: u32 = 2;
}

/// Reserved identities (below 256), the same in every cluster.
pub mod identity {
    /// Not known; never on the wire.
    pub const UNKNOWN: u32 = 0;
    /// The node itself; never on the wire, where it becomes [`REMOTE_NODE`].
    pub const HOST: u32 = 1;
    /// Outside of the mesh: what a node merely forwards.
    pub const WORLD: u32 = 2;
    /// A node of the mesh.
    pub const REMOTE_NODE: u32 = 6;
    /// Outside of the mesh, and let in by a service's frontend at the node that sends it: answers go back there. To
    /// policies it is [`WORLD`]. The number is that of Cilium's "ingress".
    pub const INGRESS: u32 = 8;
    /// First identity that is not reserved.
    pub const FIRST_USER: u32 = 256;
    /// First identity of an address range outside of the mesh that a policy names (`cm_cidr`). These mean
    /// something on one node only, and are never on the wire.
    pub const FIRST_CIDR: u32 = 1 << 24;
}
