//! What a cluster may say. A remote cluster is input from outside: whatever is not allowed here never
//! becomes state.
//!
//! Plain code: a decoded record and the peer come in, a refusal or nothing comes out. Checks that need
//! the state of the mesh (who holds an address or a prefix) are [`crate::mesh`]'s, since they have to be
//! made again whenever that state changes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, MaxConnectedClusters};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{IdentityRecord, IpRecord, LocalService, Node, NodeAddressKind, Service};
use ipnet::IpNet;

/// Shortest pod prefix of a cluster: a typing error must not swallow the address space.
const MIN_PREFIX_V4: u8 = 8;
/// The same for IPv6.
const MIN_PREFIX_V6: u8 = 16;
/// Pod prefixes of one node.
const MAX_NODE_PREFIXES: usize = 64;
/// Addresses of one node.
const MAX_NODE_ADDRESSES: usize = 64;
/// Backends of one service in one cluster.
const MAX_BACKENDS: usize = 16_384;
/// Frontend addresses of one service.
const MAX_FRONTENDS: usize = 16;
/// Ports of one service or backend.
const MAX_PORTS: usize = 256;

/// Whose records these are.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// The cluster's name, which is that of its config file.
    pub name: &'a ClusterName,
    /// Its ID, from its cluster config.
    pub id: ClusterId,
    /// The mesh's width.
    pub max: MaxConnectedClusters,
    /// It is the agent's own cluster.
    pub is_own: bool,
}

/// Why a record is refused: a short stable word for counters, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// The word.
    pub reason: &'static str,
    /// The sentence.
    pub detail: String,
}

/// Records of one kind that one cluster may have.
pub fn quota(kind: Kind, max: MaxConnectedClusters) -> usize {
    match kind {
        Kind::Nodes => 10_000,
        Kind::Identities => (1 << max.identity_shift()) - 1,
        Kind::Ip => 250_000,
        Kind::Services | Kind::LocalServices => 20_000,
        Kind::ServiceExports => 0,
    }
}

impl Peer<'_> {
    /// Checks a node.
    ///
    /// # Errors
    /// A [`Refusal`]; so in all checks below.
    pub fn check_node(&self, node: &Node) -> Result<(), Refusal> {
        self.check_owner(&node.cluster, node.cluster_id)?;
        bounded("addresses", node.addresses.len(), MAX_NODE_ADDRESSES)?;
        for address in node.addresses.iter().filter(|address| address.kind == NodeAddressKind::InternalIp) {
            check_address(address.ip)?;
        }
        bounded("pod prefixes", node.pod_cidrs().count(), MAX_NODE_PREFIXES)?;
        node.pod_cidrs().try_for_each(check_prefix)
    }

    /// Checks an address and gives the identity behind it: another cluster's host is a remote node
    /// here.
    pub fn check_ip(&self, record: &IpRecord) -> Result<Identity, Refusal> {
        check_address(record.prefix.addr())?;
        if record.prefix.prefix_len() != record.prefix.max_prefix_len() {
            return refuse("not_an_address", format!("{} is a prefix, not a pod", record.prefix));
        }
        if let Some(host) = record.host_ip {
            check_address(host)?;
        }
        let identity = record.identity;
        if !identity.is_reserved() && !identity.belongs_to(self.id, self.max) {
            return refuse("identity_out_of_range", self.out_of_range(identity));
        }
        Ok(if identity == Identity::HOST && !self.is_own { Identity::REMOTE_NODE } else { identity })
    }

    /// Checks an identity.
    pub fn check_identity(&self, record: &IdentityRecord) -> Result<(), Refusal> {
        if !record.id.belongs_to(self.id, self.max) {
            return refuse("identity_out_of_range", self.out_of_range(record.id));
        }
        match record.labels.cluster() {
            Some(cluster) if cluster == self.name.as_str() => Ok(()),
            label => refuse(
                "cluster_label_mismatch",
                format!("the labels name cluster {:?}, not {}", label.unwrap_or(""), self.name),
            ),
        }
    }

    /// Checks a service of another cluster.
    pub fn check_service(&self, service: &Service) -> Result<(), Refusal> {
        self.check_owner(&service.cluster, service.cluster_id)?;
        bounded("backends", service.backends.len(), MAX_BACKENDS)?;
        for (ip, ports) in &service.backends {
            check_address(*ip)?;
            bounded("ports", ports.len(), MAX_PORTS)?;
        }
        Ok(())
    }

    /// Checks a service of the own cluster, which alone may have one of this kind.
    pub fn check_local_service(&self, service: &LocalService) -> Result<(), Refusal> {
        if !self.is_own {
            return refuse(
                "not_own_cluster",
                format!("{} cannot define services of this cluster", self.name),
            );
        }
        self.check_owner(&service.cluster, service.cluster_id)?;
        bounded("backends", service.backends.len(), MAX_BACKENDS)?;
        bounded("frontends", service.frontends.len(), MAX_FRONTENDS)?;
        service.frontends.values().try_for_each(|ports| bounded("ports", ports.len(), MAX_PORTS))?;
        for (ip, ports) in service.backends.iter().map(|backend| (backend.ip, &backend.ports)) {
            check_address(ip)?;
            bounded("ports", ports.len(), MAX_PORTS)?;
        }
        service.frontends.keys().try_for_each(|ip| check_address(*ip))
    }

    fn check_owner(&self, name: &str, id: u32) -> Result<(), Refusal> {
        if name != self.name.as_str() {
            return refuse("cluster_name_mismatch", format!("it is of cluster {name:?}, not {}", self.name));
        }
        if id != u32::from(self.id.get()) {
            return refuse("cluster_id_mismatch", format!("it has cluster ID {id}, not {}", self.id));
        }
        Ok(())
    }

    fn out_of_range(&self, identity: Identity) -> String {
        let (first, last) = self.id.identity_range(self.max);
        format!("identity {identity} is not in {first} to {last}, the range of {}", self.name)
    }
}

/// Refuses what can never be a pod or a node of another machine.
fn check_address(ip: IpAddr) -> Result<(), Refusal> {
    let special = match ip {
        IpAddr::V4(v4) => is_special_v4(v4),
        IpAddr::V6(v6) => is_special_v6(v6),
    };
    if special { refuse("bad_address", format!("{ip} is no address of a pod or node")) } else { Ok(()) }
}

fn check_prefix(prefix: IpNet) -> Result<(), Refusal> {
    let shortest = if prefix.addr().is_ipv4() { MIN_PREFIX_V4 } else { MIN_PREFIX_V6 };
    if prefix.prefix_len() < shortest {
        return refuse("prefix_too_wide", format!("{prefix} is wider than a /{shortest}"));
    }
    check_address(prefix.network())?;
    check_address(prefix.broadcast())
}

fn is_special_v4(ip: Ipv4Addr) -> bool {
    ip.octets()[0] == 0 || ip.is_loopback() || ip.is_link_local() || ip.octets()[0] >= 224
}

fn is_special_v6(ip: Ipv6Addr) -> bool {
    ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_multicast()
        || ip.is_unicast_link_local()
        // An IPv4 address in disguise would pass by the checks of its family.
        || ip.to_ipv4_mapped().is_some()
}

fn bounded(what: &str, n: usize, max: usize) -> Result<(), Refusal> {
    if n > max { refuse("too_many", format!("{n} {what}; at most {max} are taken")) } else { Ok(()) }
}

fn refuse<T>(reason: &'static str, detail: String) -> Result<T, Refusal> {
    Err(Refusal { reason, detail })
}

#[cfg(test)]
mod tests {
    use clustermesh_kvstore::cluster::NamespacedName;
    use clustermesh_kvstore::labels::Labels;
    use clustermesh_kvstore::record::{NodeAddress, PortMap};

    use super::*;

    fn check<T: std::fmt::Debug>(f: impl FnOnce(&Peer<'_>) -> Result<T, Refusal>) -> &'static str {
        let name: ClusterName = "beta".parse().unwrap();
        let max = MaxConnectedClusters::C255;
        let peer = Peer { name: &name, id: ClusterId::new(2, max).unwrap(), max, is_own: false };
        f(&peer).err().map_or("", |refusal| refusal.reason)
    }

    fn node(cluster: &str, cluster_id: u32, ip: &str, cidr: &str) -> Node {
        Node {
            name: "n1".into(),
            cluster: cluster.into(),
            cluster_id,
            addresses: vec![NodeAddress { kind: NodeAddressKind::InternalIp, ip: ip.parse().unwrap() }],
            ipv4_alloc_cidr: Some(cidr.parse().unwrap()),
            ..Node::default()
        }
    }

    fn ip(address: &str, identity: u32) -> IpRecord {
        IpRecord {
            prefix: address.parse().unwrap(),
            host: true,
            host_ip: Some("192.0.2.1".parse().unwrap()),
            identity: Identity(identity),
            key: 0,
            metadata: String::new(),
            namespace: "shop".into(),
            pod_name: "p".into(),
            service_account: String::new(),
            named_ports: Vec::new(),
        }
    }

    #[test]
    fn nodes_must_be_the_peers_own_and_have_plausible_addresses() {
        let reason = |node: Node| check(|peer| peer.check_node(&node));
        assert_eq!(reason(node("beta", 2, "192.0.2.1", "10.2.0.0/16")), "");
        assert_eq!(reason(node("gamma", 2, "192.0.2.1", "10.2.0.0/16")), "cluster_name_mismatch");
        assert_eq!(reason(node("beta", 1, "192.0.2.1", "10.2.0.0/16")), "cluster_id_mismatch");
        for bad in ["127.0.0.1", "0.0.0.0", "169.254.1.1", "224.0.0.1", "255.255.255.255", "fe80::1", "::1"] {
            assert_eq!(reason(node("beta", 2, bad, "10.2.0.0/16")), "bad_address", "{bad}");
        }
        assert_eq!(reason(node("beta", 2, "192.0.2.1", "0.0.0.0/0")), "prefix_too_wide");
        assert_eq!(reason(node("beta", 2, "192.0.2.1", "127.0.0.0/16")), "bad_address");
    }

    #[test]
    fn identities_stay_in_the_peers_range_and_hosts_become_remote_nodes() {
        let reason = |record: IpRecord| check(|peer| peer.check_ip(&record));
        assert_eq!(reason(ip("10.2.0.1/32", 2 << 16 | 7)), "");
        assert_eq!(reason(ip("10.2.0.1/32", 1 << 16 | 7)), "identity_out_of_range");
        assert_eq!(reason(ip("10.2.0.1/32", 256)), "identity_out_of_range");
        assert_eq!(reason(ip("10.2.0.0/24", 2 << 16 | 7)), "not_an_address");
        assert_eq!(reason(ip("::ffff:10.1.0.1/128", 2 << 16 | 7)), "bad_address");
        let name: ClusterName = "beta".parse().unwrap();
        let max = MaxConnectedClusters::C255;
        let mut peer = Peer { name: &name, id: ClusterId::new(2, max).unwrap(), max, is_own: false };
        assert_eq!(peer.check_ip(&ip("10.2.0.1/32", 1)), Ok(Identity::REMOTE_NODE));
        peer.is_own = true;
        assert_eq!(peer.check_ip(&ip("10.2.0.1/32", 1)), Ok(Identity::HOST));
    }

    #[test]
    fn an_identitys_labels_name_the_peer() {
        let reason = |id, labels| {
            check(|peer| {
                let labels = Labels::parse(labels).unwrap();
                peer.check_identity(&IdentityRecord { id: Identity(id), labels })
            })
        };
        let good = "k8s:app=a;k8s:io.cilium.k8s.policy.cluster=beta;";
        assert_eq!(reason(2 << 16 | 1, good), "");
        assert_eq!(reason(3 << 16 | 1, good), "identity_out_of_range");
        let alpha = "k8s:io.cilium.k8s.policy.cluster=alpha;";
        for bad in ["k8s:app=a;", alpha, "any:io.cilium.k8s.policy.cluster=beta;"] {
            assert_eq!(reason(2 << 16 | 1, bad), "cluster_label_mismatch", "{bad}");
        }
    }

    #[test]
    fn a_remote_defines_no_services_of_this_cluster() {
        let service = LocalService {
            cluster: "beta".into(),
            name: NamespacedName { namespace: "shop".into(), name: "orders".into() },
            cluster_id: 2,
            global: true,
            shared: true,
            affinity: clustermesh_kvstore::record::Affinity::None,
            headless: false,
            frontends: [("10.96.0.1".parse().unwrap(), PortMap::new())].into(),
            backends: Vec::new(),
        };
        assert_eq!(check(|peer| peer.check_local_service(&service)), "not_own_cluster");
    }
}
