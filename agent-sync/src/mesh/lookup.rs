//! Answers about single things, for those who ask why.

use std::collections::BTreeSet;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, NamespacedName};
use clustermesh_kvstore::record::LocalService;
use ebpf_global_svc::abi::{IpValue, ServiceKey, identity};
use ipnet::IpNet;

use super::{Mesh, RemoteService};

/// Backends of one cluster in a service, by family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// Behind its IPv4 frontends.
    pub v4: usize,
    /// Behind its IPv6 frontends.
    pub v6: usize,
}

impl InUse {
    /// Of both families.
    pub fn total(self) -> usize {
        self.v4 + self.v6
    }
}

impl Mesh {
    /// The own cluster's service.
    pub fn local_service(&self, name: &NamespacedName) -> Option<&LocalService> {
        self.clusters.get(&self.own)?.local_services.get(name)
    }

    /// Another cluster's service.
    pub fn remote_service(&self, cluster: ClusterId, name: &NamespacedName) -> Option<&RemoteService> {
        self.clusters.get(&cluster.get())?.services.get(name)
    }

    /// Backends of a cluster that stand behind any of the service's frontends.
    pub fn backends_of(&self, name: &NamespacedName, cluster: ClusterId) -> InUse {
        let keys = self.frontends_of(name);
        let plans = keys.iter().filter_map(|key| self.services.plan(key));
        let groups = plans.flat_map(|plan| plan.groups.iter().filter(|group| group.cluster == cluster.get()));
        // One that serves several ports is one.
        let ips: BTreeSet<IpAddr> =
            groups.flat_map(|group| &group.backends).map(|backend| backend.ip).collect();
        let v4 = ips.iter().filter(|ip| ip.is_ipv4()).count();
        InUse { v4, v6: ips.len() - v4 }
    }

    /// Keys of the service's frontends.
    pub fn frontends_of(&self, name: &NamespacedName) -> Vec<ServiceKey> {
        let Some(service) = self.local_service(name) else { return Vec::new() };
        self.services.frontends_of(service)
    }

    /// What a cluster says of an address.
    pub fn address(&self, cluster: ClusterId, ip: IpAddr) -> Option<IpValue> {
        self.clusters.get(&cluster.get())?.address(&ip)
    }

    /// The node of a cluster that has an underlay address.
    pub fn node_at(&self, cluster: ClusterId, ip: IpAddr) -> Option<&str> {
        let nodes = self.clusters.get(&cluster.get())?.nodes.iter();
        nodes.filter(|(_, node)| node.internal_ips.contains(&ip)).map(|(name, _)| name.as_str()).min()
    }

    /// The node of a cluster that has an address: of the underlay, or its own out of its pod CIDRs.
    pub fn node_of_address(&self, cluster: ClusterId, ip: IpAddr) -> Option<&str> {
        let holds = self.topology.address_holder(ip) == Some(cluster.get())
            || self.address(cluster, ip).is_some_and(|value| value.identity == identity::REMOTE_NODE);
        if !holds {
            return None;
        }
        let nodes = self.clusters.get(&cluster.get())?.nodes.iter();
        let has = |node: &super::NodeFact| node.internal_ips.contains(&ip) || node.mesh_ips.contains(&ip);
        nodes.filter(|(_, node)| has(node)).map(|(name, _)| name.as_str()).min()
    }

    /// The own cluster's service that has a frontend.
    pub fn service_at(&self, frontend: &ServiceKey) -> Option<&NamespacedName> {
        self.services.holder(frontend)
    }

    /// Whether the address is not used as its cluster says, for want of such a node or prefix.
    pub fn is_misplaced(&self, cluster: ClusterId, ip: IpAddr) -> bool {
        self.placement.is_misplaced(cluster.get(), ip)
    }

    /// How many addresses of a cluster have an identity, and the first `most` of them in order.
    pub fn addresses_of(&self, cluster: ClusterId, identity: u32, most: usize) -> (usize, Vec<IpAddr>) {
        let records = self.clusters.get(&cluster.get());
        let ips = records.into_iter().flat_map(|records| records.addresses());
        let mut ips: Vec<IpAddr> =
            ips.filter(|(_, value)| value.identity == identity).map(|(ip, _)| ip).collect();
        let count = ips.len();
        ips.sort_unstable();
        ips.truncate(most);
        (count, ips)
    }

    /// The cluster that holds an address, by a pod prefix or as a node's.
    pub fn holder_of(&self, ip: IpAddr) -> Option<u16> {
        self.topology.holder(ip)
    }

    /// The pod prefix around an address, and its cluster.
    pub fn prefix_of(&self, ip: IpAddr) -> Option<(IpNet, u16)> {
        self.topology.prefix_of(ip)
    }
}
