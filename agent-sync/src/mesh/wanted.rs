//! What the tables should hold by now, key by key: for who compares them with what they do hold.

use ebpf_global_svc::abi::{
    ClusterState, EndpointValue, IpKey, IpValue, NodeKey, NodeValue, PolicyKey, PolicyValue, PrefixKey,
    PrefixValue, UnderlayKey, UnderlayValue,
};

use super::Mesh;
use crate::wire_key;

/// Valid after [`Mesh::compute`], until the next fact.
impl Mesh {
    /// Of `cm_ipcache`.
    pub fn wanted_address(&self, key: &IpKey) -> Option<IpValue> {
        let ip =
            wire_key::address(key.family, key.ip).filter(|ip| wire_key::ip_key(key.cluster, *ip) == *key)?;
        let value = self.clusters.get(&key.cluster)?.address(&ip)?;
        match value.node_ip {
            _ if key.cluster == self.own => Some(self.place_own(value)),
            name if self.placement.is_misplaced(key.cluster, ip)
                || !self.topology.underlay.is_tunnel_end(name) =>
            {
                self.placement.judge(&self.topology, key.cluster, ip, value)
            }
            _ => Some(value),
        }
    }

    /// Keys of all addresses, wanted or not, in any order.
    pub fn address_keys(&self) -> impl Iterator<Item = IpKey> {
        let clusters = self.clusters.iter();
        clusters.flat_map(|(id, records)| records.addresses().map(|(ip, _)| wire_key::ip_key(*id, ip)))
    }

    /// Of `cm_prefix`.
    pub fn wanted_prefix(&self, key: &PrefixKey) -> Option<PrefixValue> {
        let net = wire_key::prefix(key).filter(|net| wire_key::prefix_key(*net) == *key)?;
        self.topology.wanted_prefix(&net)
    }

    /// Keys of `cm_prefix`.
    pub fn prefix_keys(&self) -> impl Iterator<Item = PrefixKey> {
        self.topology.prefixes().map(|(net, ..)| wire_key::prefix_key(net))
    }

    /// Of `cm_node`.
    pub fn wanted_node(&self, key: &NodeKey) -> Option<NodeValue> {
        let ip = wire_key::address(key.family, key.ip).filter(|ip| wire_key::node_key(*ip) == *key)?;
        self.topology.wanted_node(ip)
    }

    /// Keys of `cm_node`.
    pub fn node_keys(&self) -> impl Iterator<Item = NodeKey> {
        self.topology.node_addresses().map(wire_key::node_key)
    }

    /// Of `cm_underlay`.
    pub fn wanted_underlay(&self, key: &UnderlayKey) -> Option<UnderlayValue> {
        self.topology.underlay.wanted(*key)
    }

    /// Keys of `cm_underlay`.
    pub fn underlay_keys(&self) -> impl Iterator<Item = UnderlayKey> {
        self.topology.underlay.keys()
    }

    /// Of `cm_endpoint`.
    pub fn wanted_endpoint(&self, key: &IpKey) -> Option<EndpointValue> {
        let ip =
            wire_key::address(key.family, key.ip).filter(|ip| wire_key::ip_key(self.own, *ip) == *key)?;
        self.endpoints.wanted().get(&ip).copied()
    }

    /// Keys of `cm_endpoint`.
    pub fn endpoint_keys(&self) -> impl Iterator<Item = IpKey> {
        self.endpoints.wanted().keys().map(|ip| wire_key::ip_key(self.own, *ip))
    }

    /// Of `cm_policy`.
    pub fn wanted_policy(&self, key: &PolicyKey) -> Option<PolicyValue> {
        self.policies.wanted(key)
    }

    /// Keys of `cm_policy`.
    pub fn policy_keys(&self) -> impl Iterator<Item = PolicyKey> {
        self.policies.keys()
    }

    /// Of `cm_cidr`.
    pub fn wanted_cidr(&self, key: &PrefixKey) -> Option<u32> {
        self.policies.wanted_range(key)
    }

    /// Keys of `cm_cidr`.
    pub fn cidr_keys(&self) -> impl Iterator<Item = PrefixKey> {
        self.policies.range_keys()
    }

    /// Of `cm_cluster`.
    pub fn wanted_state(&self, id: u32) -> Option<ClusterState> {
        self.states.get(&u16::try_from(id).ok()?).copied()
    }

    /// Keys of `cm_cluster`.
    pub fn state_keys(&self) -> impl Iterator<Item = u32> {
        self.states.keys().map(|id| u32::from(*id))
    }
}
