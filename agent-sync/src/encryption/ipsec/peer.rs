//! The nodes that can be agreed with, out of the ends of tunnels.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::record::IpsecKey;

use super::super::claims::NodeName;
use crate::tunnels::TunnelEnd;

/// A node with a key, at the address where its tunnels end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) key: IpsecKey,
    /// The source of what it sends.
    pub(super) tunnel_ip: IpAddr,
    /// Where it receives, that one first.
    pub(super) ips: Vec<IpAddr>,
    /// Where this node receives from it.
    pub(super) own_ips: Vec<IpAddr>,
}

impl Peer {
    /// Those among the ends, with so many addresses each. A node whose tunnel's address is another's is none.
    pub(super) fn all<'a>(
        ends: impl Iterator<Item = (IpAddr, &'a TunnelEnd)>,
        addresses: usize,
    ) -> BTreeMap<NodeName, Self> {
        let mut peers: BTreeMap<NodeName, Self> = BTreeMap::new();
        for (ip, end) in ends {
            let Some(node) = &end.node else { continue };
            let (Some(key), Some(tunnel_ip)) = (node.ipsec, node.tunnel_ip) else { continue };
            let none = Self { key, tunnel_ip, ips: Vec::new(), own_ips: Vec::new() };
            let peer = peers.entry((end.cluster, node.name.clone())).or_insert(none);
            match ip == tunnel_ip {
                true => peer.ips.insert(0, ip),
                false => peer.ips.push(ip),
            }
        }
        peers.retain(|_, peer| peer.ips.first() == Some(&peer.tunnel_ip));
        peers.values_mut().for_each(|peer| peer.ips.truncate(addresses));
        peers
    }
}
