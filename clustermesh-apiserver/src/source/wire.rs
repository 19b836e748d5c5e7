//! What objects are read into, whoever has them. Only the fields are built that something is made of: the
//! rest of a pod is several times as much.

use std::sync::Arc;

use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer};

use crate::objects::{
    ClusterwideResource, EndpointResource, IdentityResource, NamespacedResource, NodeResource, Object,
    ObjectError, ObjectKind, SliceResource, lean, lean_with_annotations,
};

/// One object in JSON, as a list or a watch tells of it.
///
/// # Errors
/// See [`ReadError`].
pub fn read(kind: ObjectKind, json: &str) -> Result<Object, ReadError> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let object = deserialize(kind, &mut deserializer)?;
    deserializer.end()?;
    Ok(object?)
}

/// One object in any form. Outside: it has not the form of its kind; inside: it says something that cannot be.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    kind: ObjectKind,
    from: D,
) -> Result<Result<Object, ObjectError>, D::Error> {
    Ok(match kind {
        ObjectKind::Namespace => Namespace::deserialize(from)?.into_object(),
        ObjectKind::Node => Node::deserialize(from)?.into_object(),
        ObjectKind::Pod => Pod::deserialize(from)?.into_object(),
        ObjectKind::Service => Service::deserialize(from)?.into_object(),
        ObjectKind::EndpointSlice => EndpointSlice::deserialize(from)?.into_object(),
        ObjectKind::CiliumIdentity => IdentityResource::deserialize(from)?.into_object(),
        ObjectKind::CiliumEndpoint => EndpointResource::deserialize(from)?.into_object(),
        ObjectKind::CiliumEndpointSlice => SliceResource::deserialize(from)?.into_object(),
        ObjectKind::CiliumNode => NodeResource::deserialize(from)?.into_object(),
        ObjectKind::NetworkPolicy => NetworkPolicy::deserialize(from)?.into_object(),
        ObjectKind::CiliumNetworkPolicy => NamespacedResource::deserialize(from)?.into_object(),
        ObjectKind::CiliumClusterwideNetworkPolicy => ClusterwideResource::deserialize(from)?.into_object(),
    })
}

/// An object that means nothing to us. Whoever wrote it is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not of its kind's form.
    #[error("the object cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// It says something that cannot be.
    #[error(transparent)]
    Object(#[from] ObjectError),
}

/// What an [`Object`] can be made of.
trait Wire {
    /// Checks it.
    fn into_object(self) -> Result<Object, ObjectError>;
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(default, deserialize_with = "lean_with_annotations")]
    metadata: ObjectMeta,
}

#[derive(Deserialize)]
struct Node {
    #[serde(default, deserialize_with = "lean_with_annotations")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<NodeSpec>,
    #[serde(default)]
    status: Option<NodeStatus>,
}

#[derive(Deserialize)]
struct NodeSpec {
    #[serde(rename = "podCIDR", default)]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs", default)]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeStatus {
    #[serde(default)]
    addresses: Option<Vec<v1::NodeAddress>>,
    #[serde(default)]
    node_info: Option<v1::NodeSystemInfo>,
}

#[derive(Deserialize)]
struct Pod {
    #[serde(default, deserialize_with = "lean")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<PodSpec>,
    #[serde(default)]
    status: Option<PodStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    #[serde(default)]
    service_account_name: Option<String>,
    #[serde(default)]
    service_account: Option<String>,
    #[serde(default)]
    node_name: Option<String>,
    #[serde(default)]
    host_network: Option<bool>,
    #[serde(default)]
    hostname: Option<String>,
    #[serde(default)]
    subdomain: Option<String>,
    #[serde(default)]
    containers: Option<Vec<Container>>,
    #[serde(default)]
    init_containers: Option<Vec<Container>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    #[serde(default)]
    restart_policy: Option<String>,
    #[serde(default)]
    ports: Option<Vec<v1::ContainerPort>>,
}

#[derive(Deserialize)]
struct PodStatus {
    #[serde(default)]
    phase: Option<String>,
    #[serde(rename = "hostIP", default)]
    host_ip: Option<String>,
    #[serde(rename = "podIP", default)]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs", default)]
    pod_ips: Option<Vec<v1::PodIP>>,
    #[serde(default)]
    conditions: Option<Vec<Condition>>,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    status: String,
}

#[derive(Deserialize)]
struct Service {
    #[serde(default, deserialize_with = "lean_with_annotations")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<v1::ServiceSpec>,
    #[serde(default)]
    status: Option<v1::ServiceStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EndpointSlice {
    #[serde(default, deserialize_with = "lean")]
    metadata: ObjectMeta,
    #[serde(default)]
    address_type: String,
    #[serde(default)]
    endpoints: Option<Vec<discovery::Endpoint>>,
    #[serde(default)]
    ports: Option<Vec<discovery::EndpointPort>>,
}

#[derive(Deserialize)]
struct NetworkPolicy {
    #[serde(default, deserialize_with = "lean")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<networking::NetworkPolicySpec>,
}

impl From<Namespace> for v1::Namespace {
    fn from(read: Namespace) -> Self {
        Self { metadata: read.metadata, ..Self::default() }
    }
}

impl From<Node> for v1::Node {
    fn from(read: Node) -> Self {
        let spec = read.spec.map(|spec| v1::NodeSpec {
            pod_cidr: spec.pod_cidr,
            pod_cidrs: spec.pod_cidrs,
            ..v1::NodeSpec::default()
        });
        let status = read.status.map(|status| v1::NodeStatus {
            addresses: status.addresses,
            node_info: status.node_info,
            ..v1::NodeStatus::default()
        });
        Self { metadata: read.metadata, spec, status }
    }
}

impl From<Pod> for v1::Pod {
    fn from(read: Pod) -> Self {
        let containers = |read: Vec<Container>| -> Vec<v1::Container> {
            let built = read.into_iter().map(|container| v1::Container {
                restart_policy: container.restart_policy,
                ports: container.ports,
                ..v1::Container::default()
            });
            built.collect()
        };
        let spec = read.spec.map(|spec| v1::PodSpec {
            service_account_name: spec.service_account_name,
            service_account: spec.service_account,
            node_name: spec.node_name,
            host_network: spec.host_network,
            hostname: spec.hostname,
            subdomain: spec.subdomain,
            containers: containers(spec.containers.unwrap_or_default()),
            init_containers: spec.init_containers.map(containers),
            ..v1::PodSpec::default()
        });
        let status = read.status.map(|status| v1::PodStatus {
            phase: status.phase,
            host_ip: status.host_ip,
            pod_ip: status.pod_ip,
            pod_ips: status.pod_ips,
            conditions: status.conditions.map(|conditions| {
                let built = conditions.into_iter().map(|condition| v1::PodCondition {
                    type_: condition.kind,
                    status: condition.status,
                    ..v1::PodCondition::default()
                });
                built.collect()
            }),
            ..v1::PodStatus::default()
        });
        Self { metadata: read.metadata, spec, status }
    }
}

impl From<Service> for v1::Service {
    fn from(read: Service) -> Self {
        Self { metadata: read.metadata, spec: read.spec, status: read.status }
    }
}

impl From<EndpointSlice> for discovery::EndpointSlice {
    fn from(read: EndpointSlice) -> Self {
        Self {
            metadata: read.metadata,
            address_type: read.address_type,
            endpoints: read.endpoints,
            ports: read.ports,
        }
    }
}

impl From<NetworkPolicy> for networking::NetworkPolicy {
    fn from(read: NetworkPolicy) -> Self {
        Self { metadata: read.metadata, spec: read.spec }
    }
}

/// What is read, by way of what kind of object, into which [`Object`].
macro_rules! wire {
    ($($read:ty, $via:ty => $object:ident;)*) => {$(
        impl Wire for $read {
            fn into_object(self) -> Result<Object, ObjectError> {
                let checked = crate::objects::$object::try_from(<$via>::from(self))?;
                Ok(Object::$object(Arc::new(checked)))
            }
        }
    )*};
}

wire! {
    Namespace, v1::Namespace => Namespace;
    Node, v1::Node => Node;
    Pod, v1::Pod => Pod;
    Service, v1::Service => Service;
    EndpointSlice, discovery::EndpointSlice => EndpointSlice;
    IdentityResource, IdentityResource => CiliumIdentity;
    EndpointResource, EndpointResource => CiliumEndpoint;
    SliceResource, SliceResource => CiliumEndpointSlice;
    NodeResource, NodeResource => CiliumNode;
    NetworkPolicy, networking::NetworkPolicy => Policy;
    NamespacedResource, NamespacedResource => Policy;
    ClusterwideResource, ClusterwideResource => Policy;
}
