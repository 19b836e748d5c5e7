//! What the mesh is told about clusters: records that passed the import policy, cut down to what the
//! agent uses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{Backends, IpsecKey, LocalPolicy, LocalService, PolicyName, WireguardKey};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ebpf_global_svc::abi::IpValue;
use ipnet::IpNet;

use crate::tunnels::UnderlayProtocol;

/// A record that may become state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A node.
    Node(String, NodeFact),
    /// A pod's address.
    Ip(IpAddr, IpValue),
    /// An identity and its labels, as [`clustermesh_kvstore::labels::Labels`] are written.
    Identity(u32, Box<str>),
    /// A service of another cluster.
    Service(NamespacedName, RemoteService),
    /// A service of the own cluster.
    LocalService(Box<LocalService>),
    /// An address that the own cluster keeps to itself.
    LocalIp(IpAddr, IpValue),
    /// An identity that the own cluster keeps to itself.
    LocalIdentity(u32, Box<str>),
    /// A policy of the own cluster.
    LocalPolicy(Box<LocalPolicy>),
}

/// The key of a [`Fact`] within its cluster and kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FactKey {
    /// Name of a node.
    Node(String),
    /// A pod's address.
    Ip(IpAddr),
    /// An identity.
    Identity(u32),
    /// A service of another cluster.
    Service(NamespacedName),
    /// A service of the own cluster.
    LocalService(NamespacedName),
    /// An address that the own cluster keeps to itself.
    LocalIp(IpAddr),
    /// An identity that the own cluster keeps to itself.
    LocalIdentity(u32),
    /// A policy of the own cluster.
    LocalPolicy(PolicyName),
}

impl Fact {
    /// Its key.
    pub fn key(&self) -> FactKey {
        match self {
            Self::Node(name, _) => FactKey::Node(name.clone()),
            Self::Ip(ip, _) => FactKey::Ip(*ip),
            Self::Identity(id, _) => FactKey::Identity(*id),
            Self::Service(name, _) => FactKey::Service(name.clone()),
            Self::LocalService(service) => FactKey::LocalService(service.name.clone()),
            Self::LocalIp(ip, _) => FactKey::LocalIp(*ip),
            Self::LocalIdentity(id, _) => FactKey::LocalIdentity(*id),
            Self::LocalPolicy(policy) => FactKey::LocalPolicy(policy.name.clone()),
        }
    }
}

impl FactKey {
    /// The kind of the record.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(_) => Kind::Nodes,
            Self::Ip(_) => Kind::Ip,
            Self::Identity(_) => Kind::Identities,
            Self::Service(_) => Kind::Services,
            Self::LocalService(_) => Kind::LocalServices,
            Self::LocalIp(_) => Kind::LocalIp,
            Self::LocalIdentity(_) => Kind::LocalIdentities,
            Self::LocalPolicy(_) => Kind::LocalPolicies,
        }
    }
}

/// What the agent uses of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFact {
    /// Underlay addresses: tunnels end at the first one of the underlay's family.
    pub internal_ips: Vec<IpAddr>,
    /// The node's own addresses out of its pod CIDRs: sources of host traffic into the mesh.
    pub mesh_ips: Vec<IpAddr>,
    /// Pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
    /// Which of those addresses and prefixes are virtual.
    pub virtual_cidrs: VirtualCidrs,
    /// Failure zone, of nodes of the own cluster.
    pub zone: Option<String>,
    /// By which what goes to the node is encrypted, with WireGuard.
    pub wireguard: Option<WireguardKey>,
    /// And with IPsec.
    pub ipsec: Option<IpsecKey>,
}

impl NodeFact {
    /// Where tunnels to the node end.
    pub fn tunnel_ip(&self, underlay: UnderlayProtocol) -> Option<IpAddr> {
        self.internal_ips.iter().copied().find(|ip| underlay.takes(*ip))
    }
}

/// What the agent uses of another cluster's service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteService {
    /// Its backends may be used.
    pub shared: bool,
    /// Target ports by name, for each backend, by its own address.
    pub backends: Backends,
    /// By which addresses they are known here.
    pub known_by: VirtualCidrs,
}

/// What is known about the interfaces of this node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// Nothing yet.
    #[default]
    Unknown,
    /// There are none: a table in memory needs none.
    Absent,
    /// All of them; a pod that is not in here has none.
    Known(BTreeMap<IpAddr, Link>),
}

/// How packets reach a pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Host side of the pod's veth.
    pub ifindex: u32,
    /// Addresses of both ends; none: deliver through the stack.
    pub macs: Option<Macs>,
}

/// The two ends of a veth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Macs {
    /// Inside the pod.
    pub pod: [u8; 6],
    /// On the host.
    pub host: [u8; 6],
}
