//! Who is at the other ends of tunnels, for those who encrypt what goes there.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use super::Mesh;
use crate::encryption::{EndChanges, EndNode, Scope, TunnelEnd};

impl Mesh {
    /// What goes between nodes in `scope` has to be encrypted, as it is to `encrypted`: told to the programs with the
    /// next change.
    pub fn require_encryption(&mut self, scope: Scope, encrypted: BTreeSet<Ipv4Addr>) {
        self.topology.require_encryption(scope, encrypted);
    }

    /// What follows for the ends of tunnels from what has changed.
    pub(super) fn compute_ends(&mut self) -> EndChanges {
        let ends = self.topology.take_ends();
        ends.into_iter().map(|(ip, node)| (ip, node.map(|(cluster, name)| self.end(cluster, name)))).collect()
    }

    fn end(&self, cluster: u16, name: Option<Box<str>>) -> TunnelEnd {
        let node = name.and_then(|name| {
            let fact = self.clusters.get(&cluster)?.nodes.get(&String::from(name.clone()))?;
            let (key, ipsec) = (fact.wireguard, fact.ipsec);
            let tunnel_ip = match fact.tunnel_ip(self.topology.underlay.protocol()) {
                Some(IpAddr::V4(ip)) => Some(ip),
                _ => None,
            };
            Some(EndNode { name: name.into(), tunnel_ip, key, ipsec })
        });
        TunnelEnd { cluster, node }
    }
}
