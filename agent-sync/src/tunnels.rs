//! What all who have to do with tunnels know: between addresses of which family they run, and where this node's end is.

use std::net::{IpAddr, Ipv4Addr};

/// The family of the addresses between which tunnels run; one for the whole mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnderlayProtocol {
    /// A node is where its first IPv4 address is.
    #[default]
    Ipv4,
    /// A node is where its first IPv6 address is that is more than link-local.
    Ipv6,
}

impl UnderlayProtocol {
    /// Whether tunnels can end at an address.
    pub fn takes(self, ip: IpAddr) -> bool {
        match (self, ip) {
            (Self::Ipv4, IpAddr::V4(_)) => true,
            (Self::Ipv6, IpAddr::V6(ip)) => !ip.is_unicast_link_local(),
            _ => false,
        }
    }
}

/// What is known of this node's tunnels before its record is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnels {
    /// Their family.
    pub protocol: UnderlayProtocol,
    /// This node's end of them.
    pub node_ip: Option<IpAddr>,
}

impl From<Ipv4Addr> for Tunnels {
    fn from(node_ip: Ipv4Addr) -> Self {
        Self { protocol: UnderlayProtocol::Ipv4, node_ip: Some(node_ip.into()) }
    }
}
