//! Layouts of the kernel maps, shared by the eBPF programs and user space.
//!
//! Every struct is `repr(C)` without implicit padding (`const` asserts below): the kernel compares
//! keys as bytes, so an uninitialised byte would make two equal keys differ. Addresses are 16 bytes
//! in network order, IPv4 in the first four with the rest zero; `family` tells which. Ports are in
//! network order as they stand in packets and socket addresses; everything else is in host order.
//!
//! Cluster IDs prefix every key that names a pod address, slot or frontend.
#![no_std]

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
    BackendValue = 28, SockRevKey = 32, SockRevValue = 24, ClusterState = 4, Config = 32,
    Counter = 16, OverlayKey = 8,
}

/// `cm_ipcache` and `cm_endpoint` (HASH) key: an address of a cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpKey {
    pub cluster: u16,
    pub family: u8,
    pub pad: u8,
    pub ip: [u8; 16],
}

/// `cm_ipcache` value: who has the address and where it lives.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpValue {
    pub identity: u32,
    /// IPv4 underlay address of the node (network order); all zero: not behind a tunnel.
    pub node_ip: [u8; 4],
    /// Encryption key index; 0: plain.
    pub key: u8,
    pub flags: u8,
    pub pad: u16,
}

/// `cm_prefix` (LPM_TRIE) key. `prefixlen` counts from `family`: 32 + n for a /n.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixKey {
    pub prefixlen: u32,
    pub family: u8,
    pub pad: [u8; 3],
    pub ip: [u8; 16],
}

/// `cm_prefix` value: the cluster that owns a pod prefix, and the node that carries it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefixValue {
    pub cluster: u16,
    pub flags: u8,
    pub pad: u8,
    /// Node that carries the prefix when the exact address is not in `cm_ipcache` (yet); zero: none.
    pub node_ip: [u8; 4],
    pub reserved: u32,
}

/// `cm_endpoint` (HASH, key [`IpKey`]) value: a pod on this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointValue {
    /// Host side of the pod's veth.
    pub ifindex: u32,
    pub identity: u32,
    pub pod_mac: [u8; 6],
    pub host_mac: [u8; 6],
    pub flags: u32,
}
/// [`EndpointValue::flags`]: `pod_mac` is unknown; deliver through the kernel's stack.
pub const ENDPOINT_VIA_STACK: u32 = 1;

/// `cm_node` (HASH) key: an underlay address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeKey {
    pub family: u8,
    pub pad: [u8; 3],
    pub ip: [u8; 16],
}

/// `cm_node` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeValue {
    /// The cluster for which this node may speak.
    pub cluster: u16,
    pub flags: u16,
    pub reserved: u32,
}

/// `cm_service` (HASH) key: a frontend of this cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    pub cluster: u16,
    /// Network order.
    pub port: u16,
    /// IPPROTO_TCP 6, IPPROTO_UDP 17, IPPROTO_SCTP 132.
    pub proto: u8,
    pub family: u8,
    pub pad: u16,
    pub ip: [u8; 16],
}

/// `cm_service` value: the first level of selection, over clusters.
///
/// Among groups with `count > 0` whose cluster is healthy, one is drawn by `weight`; groups of
/// weight 0 are standbys, drawn (by `count`) only if no weighted group is usable; groups of a
/// draining cluster come last; those of a dead cluster never.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceValue {
    pub id: u32,
    pub n_groups: u16,
    pub flags: u16,
    pub groups: [Group; MAX_GROUPS],
}

/// One cluster's part in a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Group {
    pub cluster: u16,
    pub weight: u16,
    /// Slots 0..count of (service, cluster) exist.
    pub count: u32,
}

/// `cm_slot` (HASH) key; the value is a backend ID (u32).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotKey {
    pub service: u32,
    pub slot: u32,
    pub cluster: u16,
    pub pad: u16,
}

/// `cm_backend` (HASH, key u32) value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendValue {
    pub ip: [u8; 16],
    pub cluster: u16,
    /// Network order.
    pub port: u16,
    pub proto: u8,
    pub family: u8,
    /// See [`backend_state`].
    pub state: u8,
    pub flags: u8,
    /// Low bits of the backend's ID, so that a recycled element is noticed.
    pub generation: u32,
}

/// `cm_sock_rev` (LRU_HASH) key: a socket and the backend that it talks to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SockRevKey {
    pub cookie: u64,
    pub ip: [u8; 16],
    pub port: u16,
    pub family: u8,
    pub proto: u8,
    pub pad: u32,
}

/// `cm_sock_rev` value: the frontend that the application named.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SockRevValue {
    pub ip: [u8; 16],
    pub port: u16,
    pub pad: u16,
    pub service: u32,
}

/// `cm_cluster` (ARRAY of [`MAX_CLUSTERS`]) value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClusterState {
    /// See [`cluster_state`].
    pub state: u32,
}

/// `cm_config` (ARRAY of 1) value; written once by the loader, read by every program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Config {
    pub schema: u32,
    /// Own cluster ID.
    pub cluster: u16,
    /// Bits of the cluster-local part of an identity: 16 (255 clusters) or 15 (511).
    pub identity_shift: u16,
    /// Ifindex of the VXLAN device; 0: no overlay.
    pub overlay_ifindex: u32,
    /// Own underlay IPv4 address.
    pub node_ip: [u8; 4],
    pub reserved: [u32; 4],
}

/// `cm_metrics` (PERCPU_ARRAY of [`MAX_REASONS`]) and `cm_overlay_rx` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

/// `cm_overlay_rx` (LRU_PERCPU_HASH) key: identity seen in decapsulated traffic, and the outer source.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OverlayKey {
    pub identity: u32,
    pub node_ip: [u8; 4],
}

/// [`ClusterState::state`].
pub mod cluster_state {
    pub const HEALTHY: u32 = 0;
    pub const DRAINING: u32 = 1;
    pub const DEAD: u32 = 2;
}

/// [`super::BackendValue::state`].
pub mod backend_state {
    pub const ACTIVE: u8 = 0;
    pub const TERMINATING: u8 = 1;
}

/// Reserved identities (below 256), the same in every cluster.
pub mod identity {
    pub const UNKNOWN: u32 = 0;
    pub const HOST: u32 = 1;
    pub const WORLD: u32 = 2;
    pub const REMOTE_NODE: u32 = 6;
    /// First identity that is not reserved.
    pub const FIRST_USER: u32 = 256;
}

/// Indices of `cm_metrics`; drop codes are Cilium's where it has one.
pub mod reason {
    pub const FORWARDED: u8 = 0;
    pub const ENCAPSULATED: u8 = 1;
    pub const DECAPSULATED: u8 = 2;
    pub const TO_STACK: u8 = 3;
    pub const LB_SELECTED: u8 = 4;
    pub const LB_NO_BACKEND_SLOT: u8 = 5;
    pub const LB_NO_BACKEND: u8 = 6;
    pub const LB_STANDBY: u8 = 7;
    pub const INVALID_SOURCE_IP: u8 = 132;
    pub const INVALID_PACKET: u8 = 134;
    pub const NO_TUNNEL_KEY: u8 = 147;
    pub const UNKNOWN_TARGET: u8 = 150;
    pub const NO_TUNNEL_ENDPOINT: u8 = 160;
    pub const INVALID_IDENTITY: u8 = 171;
    pub const UNKNOWN_SENDER: u8 = 172;
    pub const INVALID_CLUSTER_ID: u8 = 192;
}
