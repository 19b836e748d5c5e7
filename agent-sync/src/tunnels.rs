//! What all who have to do with tunnels know: between addresses of which family they run, where this node's end is, and
//! who is at the other ends.

use std::net::{IpAddr, Ipv4Addr};

use clustermesh_kvstore::record::{IpsecKey, WireguardKey};

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

/// The node at an underlay address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelEnd {
    /// Its cluster.
    pub cluster: u16,
    /// Its name, and what its record says; none: an earlier life knew the address, and nobody has confirmed it.
    pub node: Option<EndNode>,
}

/// What a node's record says about tunnels to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndNode {
    /// Its name.
    pub name: String,
    /// Where its tunnels end.
    pub tunnel_ip: Option<IpAddr>,
    /// Its public key for WireGuard, if it has one.
    pub key: Option<WireguardKey>,
    /// And for IPsec.
    pub ipsec: Option<IpsecKey>,
}

/// Addresses with another end than before; none: no node has it any more.
pub type EndChanges = Vec<(IpAddr, Option<TunnelEnd>)>;

/// Between which nodes what goes through tunnels is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of different clusters.
    Clusters,
    /// All.
    Nodes,
}
