use kube::core::{ApiResource, GroupVersionKind};

use crate::objects::ObjectKind;

/// API group of Cilium's objects.
pub(super) const CILIUM: &str = "cilium.io";

/// A kind that is read, all of it, in all namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The kind.
    pub kind: ObjectKind,
    /// Its API group, empty for Kubernetes' core.
    pub group: &'static str,
    /// Version, where it is not left to the server.
    pub version: &'static str,
    /// Its name in paths and roles.
    pub plural: &'static str,
}

/// Everything that is read: a role needs `list` and `watch` of these and nothing else.
pub const KINDS: [Resource; 12] = [
    Resource { kind: ObjectKind::Namespace, group: "", version: "v1", plural: "namespaces" },
    Resource { kind: ObjectKind::Node, group: "", version: "v1", plural: "nodes" },
    Resource { kind: ObjectKind::Pod, group: "", version: "v1", plural: "pods" },
    Resource { kind: ObjectKind::Service, group: "", version: "v1", plural: "services" },
    Resource {
        kind: ObjectKind::EndpointSlice,
        group: "discovery.k8s.io",
        version: "v1",
        plural: "endpointslices",
    },
    Resource { kind: ObjectKind::CiliumIdentity, group: CILIUM, version: "v2", plural: "ciliumidentities" },
    Resource { kind: ObjectKind::CiliumEndpoint, group: CILIUM, version: "v2", plural: "ciliumendpoints" },
    Resource {
        kind: ObjectKind::CiliumEndpointSlice,
        group: CILIUM,
        version: "v2alpha1",
        plural: "ciliumendpointslices",
    },
    Resource { kind: ObjectKind::CiliumNode, group: CILIUM, version: "v2", plural: "ciliumnodes" },
    Resource {
        kind: ObjectKind::NetworkPolicy,
        group: "networking.k8s.io",
        version: "v1",
        plural: "networkpolicies",
    },
    Resource {
        kind: ObjectKind::CiliumNetworkPolicy,
        group: CILIUM,
        version: "v2",
        plural: "ciliumnetworkpolicies",
    },
    Resource {
        kind: ObjectKind::CiliumClusterwideNetworkPolicy,
        group: CILIUM,
        version: "v2",
        plural: "ciliumclusterwidenetworkpolicies",
    },
];

impl Resource {
    /// The resource of a kind.
    pub fn of(kind: ObjectKind) -> Option<&'static Self> {
        KINDS.iter().find(|resource| resource.kind == kind)
    }

    /// Whether it is one of those in which Cilium says what there is. Its policies are written by people, also
    /// where it does not run.
    pub(super) fn speaks_for_cilium(&self) -> bool {
        self.group == CILIUM && self.kind.policy().is_none()
    }

    /// As the client wants it.
    pub(super) fn api(&self, version: &str) -> ApiResource {
        let kind = GroupVersionKind::gvk(self.group, version, self.kind.as_str());
        ApiResource::from_gvk_with_plural(&kind, self.plural)
    }
}
