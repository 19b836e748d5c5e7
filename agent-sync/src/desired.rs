//! What the mesh wants in the kernel: the values that pass from [`crate::mesh`] to
//! [`crate::reconcile`], and to those who look after routes and encryption.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ebpf_global_svc::abi::{
    BACKEND_EXCLUSIVE, BackendValue, ClusterState, EndpointValue, IpKey, IpValue, NodeKey, NodeValue,
    PolicyKey, PolicyValue, PrefixKey, PrefixValue, ServiceKey, TranslateKey, TranslateValue, UnderlayKey,
    UnderlayValue, backend_state,
};
use ipnet::IpNet;

use crate::tunnels::EndChanges;
use crate::wire_key;

/// Everything that identifies a backend. Its entry in the kernel never changes: another state is
/// another backend, so that no program that holds an ID can see it turn into something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey {
    /// Cluster that runs it.
    pub cluster: u16,
    /// Pod address.
    pub ip: IpAddr,
    /// Host order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Still serving, but about to go.
    pub terminating: bool,
}

impl BackendKey {
    /// The kernel's value for this backend under `id`, which slots of one service only name if `exclusive`.
    pub fn value(&self, id: u32, exclusive: bool) -> BackendValue {
        let (family, ip) = wire_key::octets(self.ip);
        BackendValue {
            ip,
            cluster: self.cluster,
            port: self.port.to_be(),
            proto: self.proto,
            family,
            state: if self.terminating { backend_state::TERMINATING } else { backend_state::ACTIVE },
            flags: if exclusive { BACKEND_EXCLUSIVE } else { 0 },
            generation: id,
        }
    }

    /// The key of an installed value; none if we would never write such a value under `id`.
    pub fn of(id: u32, value: &BackendValue) -> Option<Self> {
        let key = Self {
            cluster: value.cluster,
            ip: wire_key::address(value.family, value.ip)?,
            port: u16::from_be(value.port),
            proto: value.proto,
            terminating: value.state == backend_state::TERMINATING,
        };
        let exclusive = value.flags & BACKEND_EXCLUSIVE != 0;
        (key.value(id, exclusive) == *value).then_some(key)
    }
}

/// One cluster's part in a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupPlan {
    /// The cluster.
    pub cluster: u16,
    /// Share of new connections; 0 is a standby.
    pub weight: u16,
    /// Counts only while no group of a lower tier can be used.
    pub tier: u8,
    /// In ascending order, no duplicates, never empty.
    pub backends: Vec<BackendKey>,
}

/// A frontend's backends. No groups: the frontend answers with a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    /// How long clients stay at their backends, in units of [`ebpf_global_svc::abi::AFFINITY_UNIT_SECONDS`]; 0: they
    /// need not.
    pub affinity_timeout: u16,
    /// Slots of each group that are shared out so that all nodes choose alike (Maglev); 0: one for each backend.
    pub table: u32,
    /// Own cluster first, then ascending by cluster; at most [`ebpf_global_svc::abi::MAX_GROUPS`].
    pub groups: Vec<GroupPlan>,
}

/// Sizes that [`ServicePlan::table`] can have: primes, so that each step through it reaches every place. Cilium's.
pub const TABLE_SIZES: [u32; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// All routes of a node into the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Pod prefixes that other nodes carry.
    pub prefixes: BTreeSet<IpNet>,
    /// This node's addresses inside the mesh, by preference.
    pub sources: Vec<IpAddr>,
}

/// How the routes differ from before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteChanges {
    /// In these prefixes: whether there is a route.
    Some(Vec<(IpNet, bool)>),
    /// This node is another one, or known for the first time: these are all.
    All(Routes),
}

impl Default for RouteChanges {
    fn default() -> Self {
        Self::Some(Vec::new())
    }
}

/// Differences of desired state; `None` removes a key.
#[derive(Debug, Default)]
pub struct Changes {
    /// Addresses of pods.
    pub ipcache: Vec<(IpKey, Option<IpValue>)>,
    /// Pod CIDRs.
    pub prefix: Vec<(PrefixKey, Option<PrefixValue>)>,
    /// Underlay addresses of nodes.
    pub node: Vec<(NodeKey, Option<NodeValue>)>,
    /// Addresses of nodes by number.
    pub underlay: Vec<(UnderlayKey, Option<UnderlayValue>)>,
    /// Pods of this node.
    pub endpoint: Vec<(IpKey, Option<EndpointValue>)>,
    /// Frontends.
    pub service: Vec<(ServiceKey, Option<ServicePlan>)>,
    /// What policies allow and deny.
    pub policy: Vec<(PolicyKey, Option<PolicyValue>)>,
    /// Address ranges that policies name.
    pub cidr: Vec<(PrefixKey, Option<u32>)>,
    /// Virtual addresses of pods.
    pub translate: Vec<(TranslateKey, Option<TranslateValue>)>,
    /// States of clusters, by ID; healthy ones have none.
    pub cluster: Vec<(u32, Option<ClusterState>)>,
    /// Routes of this node, which are in no table of ours.
    pub routes: RouteChanges,
    /// Who is at which underlay address, for those who encrypt what goes there.
    pub ends: EndChanges,
}

impl Changes {
    /// Number of changed keys of the tables.
    pub fn len(&self) -> usize {
        self.ipcache.len()
            + self.prefix.len()
            + self.node.len()
            + self.underlay.len()
            + self.endpoint.len()
            + self.service.len()
            + self.policy.len()
            + self.cidr.len()
            + self.translate.len()
            + self.cluster.len()
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a predecessor of this agent left installed.
#[derive(Debug, Default)]
pub struct Restored {
    /// `cm_ipcache`.
    pub ipcache: Vec<(IpKey, IpValue)>,
    /// `cm_prefix`.
    pub prefix: Vec<(PrefixKey, PrefixValue)>,
    /// `cm_node`.
    pub node: Vec<(NodeKey, NodeValue)>,
    /// `cm_underlay`.
    pub underlay: Vec<(UnderlayKey, UnderlayValue)>,
    /// `cm_endpoint`.
    pub endpoint: Vec<(IpKey, EndpointValue)>,
    /// `cm_service`, with its slots and backends followed.
    pub service: Vec<(ServiceKey, ServicePlan)>,
    /// `cm_policy`.
    pub policy: Vec<(PolicyKey, PolicyValue)>,
    /// `cm_cidr`.
    pub cidr: Vec<(PrefixKey, u32)>,
    /// `cm_translate`.
    pub translate: Vec<(TranslateKey, TranslateValue)>,
    /// `cm_cluster`.
    pub cluster: Vec<(u16, ClusterState)>,
}
