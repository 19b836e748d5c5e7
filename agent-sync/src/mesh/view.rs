//! What others ask the mesh.

use std::collections::BTreeSet;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::ClusterId;
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::abi::cluster_state;

use super::topology::Conflict;
use super::{FactKey, LeftOut, Mesh, Work};

/// Sizes, for status and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Identities of the own cluster.
    pub identities: usize,
    /// Pods on this node.
    pub endpoints: usize,
    /// Services of the own cluster.
    pub services: usize,
    /// Those of them that are global.
    pub global_services: usize,
    /// Frontends (address, port, protocol) of the own cluster.
    pub frontends: usize,
    /// Nodes of the own cluster.
    pub nodes: usize,
    /// Backends that the own cluster's services have at home.
    pub backends: usize,
}

impl Mesh {
    /// Whether pods of this node or their links may be others than when this was asked last.
    pub fn take_pods_moved(&mut self) -> bool {
        self.endpoints.take_moved()
    }

    /// Pods of this node.
    pub fn local_pods(&self) -> &BTreeSet<IpAddr> {
        self.endpoints.local()
    }

    /// This node's name.
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// What tables call this node, and its underlay address.
    pub fn node(&self) -> Option<([u8; 4], IpAddr)> {
        let node_ip = self.endpoints.node_ip()?;
        Some((node_ip, self.tunnel_end(node_ip)?))
    }

    /// The underlay address of a node that tables or records name; none: it is nowhere, or not known.
    pub fn tunnel_end(&self, node_ip: [u8; 4]) -> Option<IpAddr> {
        self.topology.underlay.address(node_ip)
    }

    /// What records call the node at an underlay address; zero: no node can be there.
    pub fn name_node(&mut self, ip: IpAddr) -> [u8; 4] {
        self.topology.underlay.name(ip)
    }

    /// Whether its backends are not to be chosen.
    pub fn is_dead(&self, cluster: ClusterId) -> bool {
        self.states.get(&cluster.get()).is_some_and(|state| state.state == cluster_state::DEAD)
    }

    /// Where tunnels to the nodes of `cluster` end, without addresses that another cluster holds.
    pub fn tunnel_ips(&self, cluster: ClusterId) -> impl Iterator<Item = IpAddr> {
        let records = self.clusters.get(&cluster.get());
        let ips = records.into_iter().flat_map(|records| records.nodes.iter());
        let protocol = self.topology.underlay.protocol();
        ips.filter_map(move |(_, node)| node.tunnel_ip(protocol))
            .filter(move |ip| self.topology.address_holder(*ip) == Some(cluster.get()))
    }

    /// Whether the list of `kind` of `cluster` is complete.
    pub fn is_synced(&self, cluster: ClusterId, kind: Kind) -> bool {
        self.clusters.get(&cluster.get()).is_some_and(|records| records.is_synced(kind))
    }

    /// Records held of `cluster`.
    pub fn count(&self, cluster: ClusterId, kind: Kind) -> usize {
        self.clusters.get(&cluster.get()).map_or(0, |records| records.count(kind))
    }

    /// Sum of the hashes of the records held of `cluster`, modulo 2^64; a restored one adds nothing.
    pub fn digest(&self, cluster: ClusterId, kind: Kind) -> u64 {
        self.clusters.get(&cluster.get()).map_or(0, |records| records.digest(kind))
    }

    /// Whether a record is held.
    pub fn holds(&self, cluster: ClusterId, key: &FactKey) -> bool {
        self.clusters.get(&cluster.get()).is_some_and(|records| match key {
            FactKey::Node(name) => records.nodes.get(name).is_some(),
            FactKey::Ip(ip) => records.ips.get(ip).is_some(),
            FactKey::Identity(id) => records.identities.get(id).is_some(),
            FactKey::Service(name) => records.services.get(name).is_some(),
            FactKey::LocalService(name) => records.local_services.get(name).is_some(),
            FactKey::LocalIp(ip) => records.local_ips.get(ip).is_some(),
            FactKey::LocalIdentity(id) => records.local_identities.get(id).is_some(),
            FactKey::LocalPolicy(name) => records.local_policies.get(name).is_some(),
        })
    }

    /// Whether [`Self::conflicts`] may be others than when this was asked last.
    pub fn take_conflicts_decided(&mut self) -> bool {
        // Both have to be asked.
        self.topology.take_decided() | self.services.take_decided()
    }

    /// Addresses of `cluster` that are not installed as their records say, for want of such a node.
    pub fn misplaced(&self, cluster: ClusterId) -> usize {
        self.placement.misplaced(cluster.get())
    }

    /// Claims to addresses that another cluster holds: first those of nodes, then backends of services, of
    /// which not all are named, and some may be named more than once.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        let backends = self.services.contested().map(|contested| Conflict {
            cluster: contested.cluster,
            claim: contested.ip.to_string(),
            holder: contested.holder,
        });
        self.topology.conflicts().chain(backends)
    }

    /// Contributions to services that were left out.
    pub fn left_out(&self) -> LeftOut {
        self.services.left_out()
    }

    /// What had to be looked at again.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Sizes.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            endpoints: self.endpoints.local().len(),
            frontends: self.services.frontends(),
            ..Counts::default()
        };
        if let Some(own) = self.clusters.get(&self.own) {
            counts.identities = own.identities.len() + own.local_identities.len();
            counts.nodes = own.nodes.len();
            counts.services = own.local_services.len();
            for (_, service) in own.local_services.iter() {
                counts.global_services += usize::from(service.global);
                counts.backends += service.backends.len();
            }
        }
        counts
    }
}
