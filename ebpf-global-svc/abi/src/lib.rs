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

mod event;
mod nat;

pub use event::{
    EVENT_ANSWER, EVENT_BOUND, EVENT_DRAINING, EVENT_EGRESS, EVENT_KINDS, EVENT_POLICY, EVENT_STANDBY, Event,
    EventRule, EventState, event_hook, event_kind, read_event,
};
pub use nat::{NAT_CLOSED, NatKey, NatValue, nat_kind};

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
    BackendValue = 28, SockRevKey = 32, SockRevValue = 24, ClusterState = 4, Config = 32,
    Counter = 16, OverlayKey = 8, PolicyKey = 16, PolicyValue = 8, VerdictKey = 12, CtKey = 44,
    CtValue = 16, FragmentKey = 40, FragmentValue = 8, AffinityKey = 16, AffinityValue = 16,
    TranslateKey = 24, TranslateValue = 16,
    Event = 128, EventRule = 24, EventState = 48, CallKey = 8, NatKey = 44, NatValue = 48,
}

/// `cm_ipcache` and `cm_endpoint` (HASH) key: an address of a cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpKey {
    /// Cluster ID.
    pub cluster: u16,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// Zero.
    pub pad: u8,
    /// Network order; IPv4 in the first four bytes.
    pub ip: [u8; 16],
}

/// `cm_ipcache` value: who has the address and where it lives.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpValue {
    /// Security identity.
    pub identity: u32,
    /// IPv4 underlay address of the node (network order); all zero: not behind a tunnel.
    pub node_ip: [u8; 4],
    /// Encryption key index; 0: plain.
    pub key: u8,
    /// None defined.
    pub flags: u8,
    /// Zero.
    pub pad: u16,
}

/// `cm_prefix` (LPM_TRIE) key. `prefixlen` counts from `family`: 32 + n for a /n.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixKey {
    /// Bits that count from `family` on.
    pub prefixlen: u32,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Network order; IPv4 in the first four bytes.
    pub ip: [u8; 16],
}

/// `cm_prefix` value: the cluster that owns a pod prefix, and the node that carries it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefixValue {
    /// Cluster ID.
    pub cluster: u16,
    /// [`PREFIX_VIRTUAL`], or 0.
    pub flags: u8,
    /// Zero.
    pub pad: u8,
    /// Node that carries the prefix when the exact address is not in `cm_ipcache` (yet); zero: none.
    pub node_ip: [u8; 4],
    /// Zero.
    pub reserved: u32,
}

/// [`PrefixValue::flags`]: the addresses are virtual: the cluster's pods have others, see [`TranslateKey`].
pub const PREFIX_VIRTUAL: u8 = 1;

/// `cm_translate` (LPM_TRIE) key: pods of a cluster whose addresses are taken here are known by virtual ones.
/// `prefixlen` counts from `cluster`: 32 + n for a /n.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TranslateKey {
    /// Bits that count from `cluster` on.
    pub prefixlen: u32,
    /// Cluster ID.
    pub cluster: u16,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// See [`translate`].
    pub way: u8,
    /// A virtual prefix if the way is [`translate::TO_REAL`], a real one otherwise. Network order; IPv4 in the first
    /// four bytes.
    pub ip: [u8; 16],
}

/// `cm_translate` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TranslateValue {
    /// Bits of the prefix that differ between real and virtual; exclusive or leads either way. For IPv6 the sum of
    /// the 16-bit words of both prefixes is the same, so that no checksum changes (as in RFC 6296).
    pub bits: [u8; 16],
}

/// [`TranslateKey::way`].
pub mod translate {
    /// From a virtual address to the pod's own.
    pub const TO_REAL: u8 = 0;
    /// From a pod's own address to the virtual one.
    pub const TO_VIRTUAL: u8 = 1;
}

/// `cm_endpoint` (HASH, key [`IpKey`]) value: a pod on this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointValue {
    /// Host side of the pod's veth.
    pub ifindex: u32,
    /// Security identity, written into the VNI of what it sends.
    pub identity: u32,
    /// The pod's end of the veth.
    pub pod_mac: [u8; 6],
    /// The node's end of the veth.
    pub host_mac: [u8; 6],
    /// [`ENDPOINT_VIA_STACK`] and those behind it.
    pub flags: u32,
}
/// [`EndpointValue::flags`]: `pod_mac` is unknown; deliver through the kernel's stack.
pub const ENDPOINT_VIA_STACK: u32 = 1;
/// [`EndpointValue::flags`]: a policy selects the pod as receiver: what none of its rules allows is dropped.
pub const ENDPOINT_ENFORCE_INGRESS: u32 = 2;
/// [`EndpointValue::flags`]: the same for what the pod sends.
pub const ENDPOINT_ENFORCE_EGRESS: u32 = 4;
/// [`EndpointValue::flags`]: what policy would drop is counted and passes.
pub const ENDPOINT_AUDIT: u32 = 8;

/// `cm_policy` (LPM_TRIE) key. `prefixlen` counts from `subject`: [`POLICY_PEER_BITS`] for any protocol,
/// [`POLICY_PROTO_BITS`] for any port of one, and up to 16 more for the leading bits of a port.
///
/// Two look-ups decide: one for the peer's identity, one for any peer (0). If either finds a denial, it is
/// denied; else if either finds anything, it is allowed. Within the entries of one peer user space leaves out
/// what a wider denial covers, so that the longest match is right.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// Bits that count from `subject` on.
    pub prefixlen: u32,
    /// Identity of the pod of this node that the policy selects.
    pub subject: u32,
    /// Identity of the other end; 0: any.
    pub peer: u32,
    /// See [`direction`].
    pub direction: u8,
    /// IP protocol number; 0: any.
    pub proto: u8,
    /// Destination port of the flow, network order. ICMP and ICMPv6: the type.
    pub port: u16,
}
/// [`PolicyKey::prefixlen`] of an entry for all protocols.
pub const POLICY_PEER_BITS: u32 = 72;
/// [`PolicyKey::prefixlen`] of an entry for all ports of a protocol.
pub const POLICY_PROTO_BITS: u32 = 80;
/// [`PolicyKey::prefixlen`] of an entry for one port.
pub const POLICY_PORT_BITS: u32 = 96;

/// `cm_policy` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PolicyValue {
    /// [`POLICY_DENY`], or 0 to allow.
    pub flags: u32,
    /// Number of the rule that it comes from, for `cm_verdict`; never 0.
    pub rule: u32,
}
/// [`PolicyValue::flags`]: denied.
pub const POLICY_DENY: u32 = 1;

/// `cm_verdict` (LRU_PERCPU_HASH, value [`Counter`]) key: how often a rule decided.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerdictKey {
    /// Identity of the pod of this node that the policy selects.
    pub subject: u32,
    /// [`PolicyValue::rule`]; 0: no rule allowed it.
    pub rule: u32,
    /// See [`direction`].
    pub direction: u8,
    /// See [`verdict`].
    pub verdict: u8,
    /// Zero.
    pub pad: u16,
}

/// `cm_ct` (LRU_HASH) key: a flow of a pod that a policy selects, and that was let through. The answers to it
/// pass without a look at the policy of the other direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CtKey {
    /// The pod's address, network order; IPv4 in the first four bytes.
    pub local: [u8; 16],
    /// The other end's.
    pub remote: [u8; 16],
    /// The pod's port, network order; ICMP echo: the identifier.
    pub local_port: u16,
    /// The other end's; ICMP echo: the identifier again.
    pub remote_port: u16,
    /// Cluster of the other end; 0: outside of the mesh.
    pub cluster: u16,
    /// IP protocol number.
    pub proto: u8,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// In which direction it began; see [`direction`].
    pub direction: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `cm_ct` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CtValue {
    /// In nanoseconds of the monotonic clock; a later packet begins a new flow.
    pub expires: u64,
    /// [`CT_CLOSING`] and those behind it.
    pub flags: u32,
    /// Identity of the other end.
    pub peer: u32,
}
/// [`CtValue::flags`]: both ends have sent a FIN, or one a RST.
pub const CT_CLOSING: u32 = 1;
/// [`CtValue::flags`]: who began has sent a FIN.
pub const CT_FIN: u32 = 2;
/// [`CtValue::flags`]: the other end has sent a FIN.
pub const CT_FIN_ANSWERED: u32 = 4;

/// `cm_fragment` (LRU_HASH) key: a packet that is on its way in fragments.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FragmentKey {
    /// Network order; IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// The same.
    pub destination: [u8; 16],
    /// As it stands in the packet; IPv4 has it in the first two bytes.
    pub id: [u8; 4],
    /// IP protocol number; IPv6: 0.
    pub proto: u8,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// Zero.
    pub pad: u16,
}

/// `cm_fragment` value: what only the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentValue {
    /// Network order; ICMP: the identifier.
    pub source_port: u16,
    /// Network order; ICMP: the type.
    pub destination_port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// `cm_node` (HASH) key: an underlay address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeKey {
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// Network order; IPv4 in the first four bytes.
    pub ip: [u8; 16],
}

/// `cm_node` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeValue {
    /// The cluster for which this node may speak.
    pub cluster: u16,
    /// [`NODE_CLEAR`] and [`NODE_ENCRYPTED`], which count while [`CONFIG_STRICT`] is set, and [`NODE_VIRTUAL`].
    pub flags: u16,
    /// Zero.
    pub reserved: u32,
}
/// [`NodeValue::flags`]: tunnel packets to and from it need not be encrypted.
pub const NODE_CLEAR: u16 = 1;
/// [`NodeValue::flags`]: tunnel packets to it are encrypted.
pub const NODE_ENCRYPTED: u16 = 2;
/// [`NodeValue::flags`]: pods of its cluster are known by virtual addresses: see [`TranslateKey`].
pub const NODE_VIRTUAL: u16 = 4;

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
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
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
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
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
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
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
    /// Own underlay IPv4 address.
    pub node_ip: [u8; 4],
    /// UDP port of the overlay, host order; 0: unknown.
    pub overlay_port: u16,
    /// [`CONFIG_STRICT`], [`CONFIG_PACKET_SERVICES`], [`CONFIG_PMTU_DISCOVERY`].
    pub flags: u16,
    /// Which events are wanted: a bit for each [`event_kind`].
    pub events: u32,
    /// Zero.
    pub reserved: [u32; 2],
}
/// [`Config::flags`]: tunnel packets to a node go only if they are encrypted, and only such are taken in, but for
/// nodes with [`NODE_CLEAR`].
pub const CONFIG_STRICT: u16 = 1;
/// [`Config::flags`]: packets that pods send to frontends, past all socket hooks, are translated.
pub const CONFIG_PACKET_SERVICES: u16 = 2;
/// [`Config::flags`]: pods are told of packets that the overlay would have to fragment, and that must not or cannot be
/// fragmented on their way.
pub const CONFIG_PMTU_DISCOVERY: u16 = 4;

/// `cm_metrics` (PERCPU_ARRAY of [`MAX_REASONS`]), `cm_overlay_rx`, `cm_verdict` and `cm_calls` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counter {
    /// Packets, or events.
    pub packets: u64,
    /// Bytes with Ethernet header; 0 for events at sockets.
    pub bytes: u64,
}

/// `cm_calls` (PERCPU_HASH, value [`Counter`]) key: calls to a service.
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

/// `cm_overlay_rx` (LRU_PERCPU_HASH) key: identity seen in decapsulated traffic, and the outer source.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OverlayKey {
    /// The VNI.
    pub identity: u32,
    /// The outer source, network order.
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

/// Values of [`PolicyKey::direction`](super::PolicyKey::direction), seen from the pod.
pub mod direction {
    /// To the pod.
    pub const INGRESS: u8 = 0;
    /// From the pod.
    pub const EGRESS: u8 = 1;
}

/// Values of [`VerdictKey::verdict`](super::VerdictKey::verdict).
pub mod verdict {
    /// It passed.
    pub const ALLOWED: u8 = 0;
    /// It was dropped.
    pub const DENIED: u8 = 1;
    /// It would have been dropped.
    pub const AUDITED: u8 = 2;
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

/// Indices of `cm_metrics`. Codes from 130 on are drops, and are Cilium's where it has one; our own
/// begin at 250.
pub mod reason {
    /// Delivered from pod to pod on this node.
    pub const FORWARDED: u8 = 0;
    /// Sent into the overlay.
    pub const ENCAPSULATED: u8 = 1;
    /// Accepted from the overlay.
    pub const DECAPSULATED: u8 = 2;
    /// Left to the kernel's routing.
    pub const TO_STACK: u8 = 3;
    /// A backend was chosen.
    pub const LB_SELECTED: u8 = 4;
    /// A slot or backend was being replaced; the selection looked again.
    pub const LB_NO_BACKEND_SLOT: u8 = 5;
    /// A service had no usable backend: the system call was refused.
    pub const LB_NO_BACKEND: u8 = 6;
    /// The backend chosen is of a standby group (weight 0).
    pub const LB_STANDBY: u8 = 7;
    /// The backend chosen is in a draining cluster.
    pub const LB_DRAINING: u8 = 8;
    /// Larger than the overlay's MTU; sent in fragments.
    pub const TOO_BIG: u8 = 9;
    /// Policy would have dropped it, and only audits.
    pub const POLICY_AUDITED: u8 = 10;
    /// The backend chosen is the one that its client is bound to by session affinity.
    pub const LB_AFFINITY: u8 = 11;
    /// A packet to a frontend got a backend's address, and was sent on.
    pub const SERVED: u8 = 12;
    /// An answer got the frontend's address, and was sent on.
    pub const ANSWERED: u8 = 13;
    /// Drop: a pod sent from an address that is not its own, or a node from one of another cluster.
    pub const INVALID_SOURCE_IP: u8 = 132;
    /// Drop: no rule of a policy that selects the pod allows it.
    pub const POLICY: u8 = 133;
    /// Drop: truncated or malformed.
    pub const INVALID_PACKET: u8 = 134;
    /// Drop: larger than the overlay's MTU; the pod that sent it has been told.
    pub const FRAG_NEEDED: u8 = 136;
    /// Drop: a packet on the overlay without tunnel metadata.
    pub const NO_TUNNEL_KEY: u8 = 147;
    /// Drop: came from the overlay and is for nobody on this node.
    pub const UNKNOWN_TARGET: u8 = 150;
    /// Drop: a packet to a service without a usable backend.
    pub const NO_BACKEND: u8 = 158;
    /// Drop: the destination is in the mesh, but its node is not known (or there is no overlay).
    pub const NO_TUNNEL_ENDPOINT: u8 = 160;
    /// Drop: a virtual address that stands for none.
    pub const NO_MAPPING: u8 = 167;
    /// Drop: a pod speaks the overlay's protocol itself, to pass for its node.
    pub const ENCAPSULATION_PROHIBITED: u8 = 170;
    /// Drop: a later fragment whose first one has not been seen, so that policy cannot be asked.
    pub const FRAGMENT_NOT_FOUND: u8 = 175;
    /// Drop: a policy selects the pod, and the other end is in the mesh but not known (yet).
    pub const UNKNOWN_IDENTITY: u8 = 250;
    /// Drop: a reserved identity that must not be on the wire.
    pub const INVALID_IDENTITY: u8 = 171;
    /// Drop: the outer source is not a node of the mesh.
    pub const UNKNOWN_SENDER: u8 = 172;
    /// Drop: a rule of a policy that selects the pod denies it.
    pub const POLICY_DENY: u8 = 181;
    /// Drop: the identity belongs to another cluster than the node that sent it.
    pub const INVALID_CLUSTER_ID: u8 = 192;
    /// Drop: a tunnel packet that should be encrypted would go out, or has come, in clear.
    pub const UNENCRYPTED: u8 = 195;
    /// Drop: the datapath is not configured.
    pub const NOT_READY: u8 = 202;

    /// As people write it: `to-stack`; none of a number that is no reason.
    #[must_use]
    pub const fn name(reason: u8) -> Option<&'static str> {
        Some(match reason {
            FORWARDED => "forwarded",
            ENCAPSULATED => "encapsulated",
            DECAPSULATED => "decapsulated",
            TO_STACK => "to-stack",
            LB_SELECTED => "lb-selected",
            LB_NO_BACKEND_SLOT => "lb-no-backend-slot",
            LB_NO_BACKEND => "lb-no-backend",
            LB_STANDBY => "lb-standby",
            LB_DRAINING => "lb-draining",
            TOO_BIG => "too-big",
            POLICY_AUDITED => "policy-audited",
            LB_AFFINITY => "lb-affinity",
            SERVED => "served",
            ANSWERED => "answered",
            NO_BACKEND => "no-backend",
            INVALID_SOURCE_IP => "invalid-source-ip",
            POLICY => "policy",
            INVALID_PACKET => "invalid-packet",
            FRAG_NEEDED => "frag-needed",
            NO_TUNNEL_KEY => "no-tunnel-key",
            UNKNOWN_TARGET => "unknown-target",
            NO_TUNNEL_ENDPOINT => "no-tunnel-endpoint",
            NO_MAPPING => "no-mapping",
            ENCAPSULATION_PROHIBITED => "encapsulation-prohibited",
            FRAGMENT_NOT_FOUND => "fragment-not-found",
            UNKNOWN_IDENTITY => "unknown-identity",
            INVALID_IDENTITY => "invalid-identity",
            UNKNOWN_SENDER => "unknown-sender",
            POLICY_DENY => "policy-deny",
            INVALID_CLUSTER_ID => "invalid-cluster-id",
            UNENCRYPTED => "unencrypted",
            NOT_READY => "not-ready",
            _ => return None,
        })
    }

    /// Whether it is one of a packet that is dropped.
    #[must_use]
    pub const fn is_drop(reason: u8) -> bool {
        reason >= FIRST_DROP
    }

    /// Reasons from here on are drops.
    pub const FIRST_DROP: u8 = 130;
}
