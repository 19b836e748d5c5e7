//! Services for packets: `cm_nat`.

/// `cm_nat` (LRU_HASH) key: one direction of a flow between a client and a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NatKey {
    /// Address of the client, network order; IPv4 in the first four bytes.
    pub client: [u8; 16],
    /// The frontend's, or the backend's.
    pub other: [u8; 16],
    /// Network order.
    pub client_port: u16,
    /// Network order.
    pub other_port: u16,
    /// Cluster of the backend; 0 with a frontend.
    pub cluster: u16,
    /// As in [`ServiceKey::proto`](crate::ServiceKey::proto).
    pub proto: u8,
    /// [`FAMILY_V4`](crate::FAMILY_V4) or [`FAMILY_V6`](crate::FAMILY_V6).
    pub family: u8,
    /// See [`nat_kind`].
    pub kind: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Values of [`NatKey::kind`].
pub mod nat_kind {
    /// From the client to the frontend; the value has the backend.
    pub const SERVED: u8 = 0;
    /// From the backend to the client; the value has the frontend, or the node that has it.
    pub const ANSWERED: u8 = 1;
}

/// `cm_nat` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NatValue {
    /// What the address becomes, network order; IPv4 in the first four bytes. Zero with a `node_ip`.
    pub ip: [u8; 16],
    /// When it was used last, in nanoseconds of the monotonic clock; up to a second late.
    pub used: u64,
    /// [`ServiceValue::id`](crate::ServiceValue::id).
    pub service: u32,
    /// The backend's ID.
    pub backend: u32,
    /// Interface at which the client's packets come in, and by which answers go out; 0: the client is a pod of this node.
    pub ifindex: u32,
    /// On the backend's node: the node that has the frontend, to which answers go through the overlay; else zero.
    pub node_ip: [u8; 4],
    /// What the port becomes, network order.
    pub port: u16,
    /// Cluster of the backend.
    pub cluster: u16,
    /// [`NAT_CLOSED`], or 0.
    pub flags: u16,
    /// Zero.
    pub pad: u16,
}

/// [`NatValue::flags`]: TCP; one end has sent a FIN or a RST, so that a SYN begins another flow.
pub const NAT_CLOSED: u16 = 1;
