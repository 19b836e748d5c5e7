// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Addresses: of pods, their prefixes and nodes.

/// `cm_ipcache` and `cm_endpoint` (HASH) key: an address of a cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpKey {
    /// Cluster ID.
    pub cluster: u16,
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
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
    /// IPv4 underlay address of the node (network order), or its [number](UnderlayValue); all zero: not behind a
    /// tunnel.
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
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
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
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
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

/// `cm_node` (HASH) key: an underlay address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeKey {
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
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
    /// [`NODE_CLEAR`] and [`NODE_ENCRYPTED`], which count while [`CONFIG_STRICT`](crate::CONFIG_STRICT) is set, and [`NODE_VIRTUAL`].
    pub flags: u16,
    /// What tables call the node, unless the key says it: on an IPv6 underlay its [number](UnderlayValue); of an address
    /// at which no tunnel ends that of the one where they do. Its bytes in memory order; zero: none.
    pub number: u32,
}
/// [`NodeValue::flags`]: tunnel packets to and from it need not be encrypted.
pub const NODE_CLEAR: u16 = 1;
/// [`NodeValue::flags`]: tunnel packets to it are encrypted.
pub const NODE_ENCRYPTED: u16 = 2;
/// [`NodeValue::flags`]: pods of its cluster are known by virtual addresses: see [`TranslateKey`].
pub const NODE_VIRTUAL: u16 = 4;

/// `cm_underlay` (HASH) value: the address that a node number stands for. With an IPv6 underlay
/// ([`CONFIG_UNDERLAY_V6`](crate::CONFIG_UNDERLAY_V6)) other tables have a number where they have a node's IPv4 address
/// otherwise. Numbers are those of 0.0.0.0/8 but 0.0.0.0, which no underlay has as addresses; each node gives its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnderlayValue {
    /// IPv6, network order.
    pub ip: [u8; 16],
}

/// `cm_underlay` key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnderlayKey {
    /// As in [`IpValue::node_ip`].
    pub number: [u8; 4],
}
