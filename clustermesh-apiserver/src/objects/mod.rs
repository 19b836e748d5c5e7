//! The facts: what the cluster looks like, as far as a mesh cares.
//!
//! Sources turn manifests and API objects into the checked types here, and nothing else of the
//! crate sees Kubernetes' own types. What goes in is checked against what Kubernetes itself would
//! accept (names, labels, addresses, ports), because these strings become parts of etcd keys and of
//! label strings in other clusters; what comes out can be relied on without looking again.

mod balancing;
mod cilium;
mod endpoint_slice;
mod external;
mod meta;
mod node;
mod pod;
mod policy;
mod service;
mod store;

use std::fmt;
use std::sync::Arc;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::{PolicyKind, PolicyName};

pub use cilium::{CiliumEndpoint, CiliumEndpointSlice, CiliumIdentity, CiliumNode};
pub(crate) use cilium::{EndpointResource, IdentityResource, NodeResource, SliceResource};
pub use endpoint_slice::{Endpoint, EndpointSlice};
pub use meta::{Namespace, ObjectError};
pub(crate) use meta::{lean, lean_with_annotations};
pub use node::Node;
pub use pod::{ContainerPort, Pod};
pub(crate) use policy::{ClusterwideResource, NamespacedResource};
pub use policy::{Effect, Gap, GapReason, Policy};
pub use service::{IpFamily, Service, ServicePort, TargetPort};
pub use store::Objects;

/// One object of a kind that is exported or has a part in what is exported.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A namespace: its labels are part of the identity of its pods.
    Namespace(Arc<Namespace>),
    /// A node.
    Node(Arc<Node>),
    /// A pod.
    Pod(Arc<Pod>),
    /// A service.
    Service(Arc<Service>),
    /// Endpoints of a service that somebody else computed.
    EndpointSlice(Arc<EndpointSlice>),
    /// An identity that Cilium gave a number.
    CiliumIdentity(Arc<CiliumIdentity>),
    /// A pod that Cilium manages.
    CiliumEndpoint(Arc<CiliumEndpoint>),
    /// Several of them in one object.
    CiliumEndpointSlice(Arc<CiliumEndpointSlice>),
    /// A node that Cilium runs on.
    CiliumNode(Arc<CiliumNode>),
    /// A network policy of any kind.
    Policy(Arc<Policy>),
}

impl Object {
    /// Kind, namespace and name.
    pub fn key(&self) -> ObjectKey {
        let (kind, name) = match self {
            Self::Namespace(o) => (ObjectKind::Namespace, cluster_scoped(&o.name)),
            Self::Node(o) => (ObjectKind::Node, cluster_scoped(&o.name)),
            Self::Pod(o) => (ObjectKind::Pod, o.name.clone()),
            Self::Service(o) => (ObjectKind::Service, o.name.clone()),
            Self::EndpointSlice(o) => (ObjectKind::EndpointSlice, o.name.clone()),
            Self::CiliumIdentity(o) => (ObjectKind::CiliumIdentity, cluster_scoped(&o.name)),
            Self::CiliumEndpoint(o) => (ObjectKind::CiliumEndpoint, o.name.clone()),
            Self::CiliumEndpointSlice(o) => (ObjectKind::CiliumEndpointSlice, cluster_scoped(&o.name)),
            Self::CiliumNode(o) => (ObjectKind::CiliumNode, cluster_scoped(&o.record.name)),
            Self::Policy(o) => {
                let PolicyName { kind, namespace, name } = o.name.clone();
                (ObjectKind::of_policy(kind), NamespacedName { namespace, name })
            }
        };
        ObjectKey { kind, name }
    }
}

fn cluster_scoped(name: &str) -> NamespacedName {
    NamespacedName { namespace: String::new(), name: name.to_owned() }
}

/// The kinds of [`Object`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// v1 Namespace.
    Namespace,
    /// v1 Node.
    Node,
    /// v1 Pod.
    Pod,
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// cilium.io/v2 CiliumIdentity.
    CiliumIdentity,
    /// cilium.io/v2 CiliumEndpoint.
    CiliumEndpoint,
    /// cilium.io CiliumEndpointSlice, v2alpha1 or v2.
    CiliumEndpointSlice,
    /// cilium.io/v2 CiliumNode.
    CiliumNode,
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy,
    /// cilium.io/v2 CiliumNetworkPolicy.
    CiliumNetworkPolicy,
    /// cilium.io/v2 CiliumClusterwideNetworkPolicy.
    CiliumClusterwideNetworkPolicy,
}

impl ObjectKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::Namespace,
        Self::Node,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::CiliumIdentity,
        Self::CiliumEndpoint,
        Self::CiliumEndpointSlice,
        Self::CiliumNode,
        Self::NetworkPolicy,
        Self::CiliumNetworkPolicy,
        Self::CiliumClusterwideNetworkPolicy,
    ];

    /// The kind as manifests spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::CiliumIdentity => "CiliumIdentity",
            Self::CiliumEndpoint => "CiliumEndpoint",
            Self::CiliumEndpointSlice => "CiliumEndpointSlice",
            Self::CiliumNode => "CiliumNode",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::CiliumNetworkPolicy => "CiliumNetworkPolicy",
            Self::CiliumClusterwideNetworkPolicy => "CiliumClusterwideNetworkPolicy",
        }
    }

    /// The kind of the objects that a kind of policies comes from.
    pub const fn of_policy(kind: PolicyKind) -> Self {
        match kind {
            PolicyKind::Network => Self::NetworkPolicy,
            PolicyKind::Cilium => Self::CiliumNetworkPolicy,
            PolicyKind::CiliumClusterwide => Self::CiliumClusterwideNetworkPolicy,
        }
    }

    /// The kind of policies that the objects are, if they are.
    pub const fn policy(self) -> Option<PolicyKind> {
        match self {
            Self::NetworkPolicy => Some(PolicyKind::Network),
            Self::CiliumNetworkPolicy => Some(PolicyKind::Cilium),
            Self::CiliumClusterwideNetworkPolicy => Some(PolicyKind::CiliumClusterwide),
            _ => None,
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What tells one object from another. The namespace of a node or namespace is empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Kind.
    pub kind: ObjectKind,
    /// Namespace and name.
    pub name: NamespacedName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.name.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name.name)
        } else {
            write!(f, "{} {}", self.kind, self.name)
        }
    }
}

/// A change of the facts.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The object is new or different.
    Upsert(Object),
    /// The object is gone.
    Delete(ObjectKey),
}
