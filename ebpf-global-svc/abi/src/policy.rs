// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Policy: what is allowed, what was decided, and the flows that pass by it.

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

/// `cm_verdict` (LRU_PERCPU_HASH, value [`Counter`](crate::Counter)) key: how often a rule decided.
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
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
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
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
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
