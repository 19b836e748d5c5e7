//! Who is at the other ends of tunnels, for those who encrypt what goes there.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::Mesh;
use crate::tunnels::{EndChanges, EndNode, Scope, TunnelEnd};

impl Mesh {
    /// What goes between nodes in `scope` has to be encrypted, as it is to `encrypted`: told to the programs with the
    /// next change.
    pub fn require_encryption(&mut self, scope: Scope, encrypted: BTreeSet<IpAddr>) {
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
            let tunnel_ip = fact.tunnel_ip(self.topology.underlay.protocol());
            Some(EndNode { name: name.into(), tunnel_ip, key, ipsec })
        });
        TunnelEnd { cluster, node }
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
    use clustermesh_kvstore::record::WireguardKey;
    use ebpf_global_svc::abi::{NODE_CLEAR, NODE_ENCRYPTED};

    use super::*;
    use crate::desired::Changes;
    use crate::mesh::{Fact, NodeFact, Restored};
    use crate::tunnels::{Tunnels, UnderlayProtocol};
    use crate::wire_key;

    /// Node n2 of cluster 2 has an address of each family, and a key.
    fn two_clusters(protocol: UnderlayProtocol) -> (Mesh, [IpAddr; 2]) {
        let max = MaxConnectedClusters::C255;
        let [own, other] = [1, 2].map(|id| ClusterId::new(id, max).unwrap());
        let tunnels = Tunnels { protocol, node_ip: None };
        let mut mesh = Mesh::new(own, max, "n1", tunnels, Restored::default());
        let ips = [[192, 0, 2, 2].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 2].into()];
        let wireguard = WireguardKey::new([7; 32]);
        let node = NodeFact { internal_ips: ips.to_vec(), wireguard, ..NodeFact::default() };
        mesh.upsert(other, Fact::Node("n2".to_owned(), node), 0);
        mesh.upsert(
            own,
            Fact::Node(
                "n1".to_owned(),
                NodeFact { internal_ips: vec![[192, 0, 2, 1].into()], ..NodeFact::default() },
            ),
            0,
        );
        (mesh, ips)
    }

    #[track_caller]
    fn flags(changes: &Changes, ip: IpAddr) -> u16 {
        let (_, value) = changes.node.iter().find(|(key, _)| *key == wire_key::node_key(ip)).unwrap();
        value.unwrap().flags
    }

    #[test]
    fn ends_are_the_addresses_of_the_underlays_family() {
        for protocol in [UnderlayProtocol::Ipv4, UnderlayProtocol::Ipv6] {
            let (mut mesh, ips) = two_clusters(protocol);
            let ip = ips.into_iter().find(|ip| protocol.takes(*ip)).unwrap();
            let ends: Vec<_> = mesh.compute().ends.into_iter().filter(|(ip, _)| ips.contains(ip)).collect();
            let node = EndNode {
                name: "n2".to_owned(),
                tunnel_ip: Some(ip),
                key: WireguardKey::new([7; 32]),
                ipsec: None,
            };
            assert_eq!(ends, [(ip, Some(TunnelEnd { cluster: 2, node: Some(node) }))], "{protocol:?}");
        }
    }

    #[test]
    fn the_programs_are_told_which_nodes_are_encrypted_to() {
        for protocol in [UnderlayProtocol::Ipv4, UnderlayProtocol::Ipv6] {
            let (mut mesh, ips) = two_clusters(protocol);
            let ip = ips.into_iter().find(|ip| protocol.takes(*ip)).unwrap();
            mesh.require_encryption(Scope::Clusters, BTreeSet::new());
            let changes = mesh.compute();
            assert_eq!((flags(&changes, ip), flags(&changes, [192, 0, 2, 1].into())), (0, NODE_CLEAR));
            mesh.require_encryption(Scope::Clusters, [ip].into());
            let changes = mesh.compute();
            assert_eq!((flags(&changes, ip), changes.node.len()), (NODE_ENCRYPTED, 1), "{protocol:?}");
        }
    }
}
