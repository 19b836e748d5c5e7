//! Answers about single things, for those who ask why.

use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, NamespacedName};
use clustermesh_kvstore::record::LocalService;
use ebpf_global_svc::abi::{IpValue, ServiceKey};
use ipnet::IpNet;

use super::{Mesh, RemoteService};

impl Mesh {
    /// The own cluster's service.
    pub fn local_service(&self, name: &NamespacedName) -> Option<&LocalService> {
        self.clusters.get(&self.own)?.local_services.get(name)
    }

    /// Another cluster's service.
    pub fn remote_service(&self, cluster: ClusterId, name: &NamespacedName) -> Option<&RemoteService> {
        self.clusters.get(&cluster.get())?.services.get(name)
    }

    /// Backends of a cluster that stand behind the service's frontends.
    pub fn backends_of(&self, name: &NamespacedName, cluster: ClusterId) -> usize {
        let keys = self.frontends_of(name);
        let plans = keys.iter().filter_map(|key| self.services.plan(key));
        plans
            .flat_map(|plan| plan.groups.iter().filter(|group| group.cluster == cluster.get()))
            .map(|group| group.backends.len())
            .max()
            .unwrap_or(0)
    }

    /// Keys of the service's frontends.
    pub fn frontends_of(&self, name: &NamespacedName) -> Vec<ServiceKey> {
        let Some(service) = self.local_service(name) else { return Vec::new() };
        super::service::frontends(self.own, service).collect()
    }

    /// What a cluster says of an address.
    pub fn address(&self, cluster: ClusterId, ip: IpAddr) -> Option<IpValue> {
        self.clusters.get(&cluster.get())?.address(&ip)
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
