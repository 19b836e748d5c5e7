use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::objects::meta::{Check, ObjectError, lean};

/// A pod as the agent on its node sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct CiliumEndpoint {
    /// Namespace and name of the pod.
    pub name: NamespacedName,
    /// Number of its identity, 0 as long as it has none.
    pub identity: u32,
    /// Address of the node that it runs on.
    pub node_ip: Option<IpAddr>,
    /// Index of the encryption key, 0 without encryption.
    pub encryption_key: u8,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// Several endpoints of one namespace, collected by the operator.
#[derive(Clone, Debug, PartialEq)]
pub struct CiliumEndpointSlice {
    /// Name; slices have no namespace of their own.
    pub name: String,
    /// Its endpoints.
    pub endpoints: Vec<CiliumEndpoint>,
}

impl CiliumEndpointSlice {
    /// The endpoint of this name.
    pub fn endpoint(&self, name: &NamespacedName) -> Option<&CiliumEndpoint> {
        self.endpoints.iter().find(|endpoint| endpoint.name == *name)
    }
}

/// `cilium.io/v2` CiliumEndpoint.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct EndpointResource {
    #[serde(default, deserialize_with = "lean")]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    status: Option<EndpointStatus>,
}

/// `cilium.io` CiliumEndpointSlice.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct SliceResource {
    #[serde(default, deserialize_with = "lean")]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    endpoints: Option<Vec<CoreEndpoint>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct EndpointStatus {
    #[serde(default)]
    identity: Option<EndpointIdentity>,
    #[serde(default)]
    networking: Option<Networking>,
    #[serde(default)]
    encryption: Option<Encryption>,
}

#[derive(Clone, Debug, Deserialize)]
struct CoreEndpoint {
    #[serde(default)]
    name: String,
    #[serde(default)]
    id: Option<i64>,
    #[serde(default)]
    networking: Option<Networking>,
    #[serde(default)]
    encryption: Option<Encryption>,
}

#[derive(Clone, Debug, Deserialize)]
struct EndpointIdentity {
    #[serde(default)]
    id: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Networking {
    #[serde(default)]
    addressing: Option<Vec<Option<AddressPair>>>,
    #[serde(default)]
    node: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct AddressPair {
    #[serde(default)]
    ipv4: Option<String>,
    #[serde(default)]
    ipv6: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Encryption {
    #[serde(default)]
    key: Option<i64>,
}

impl TryFrom<EndpointResource> for CiliumEndpoint {
    type Error = ObjectError;

    fn try_from(object: EndpointResource) -> Result<Self, ObjectError> {
        let check = Check::new("CiliumEndpoint", &object.metadata);
        let name = check.namespaced_name()?;
        let status = object.status.unwrap_or_default();
        let identity = status.identity.and_then(|identity| identity.id);
        endpoint(&check, name, identity, status.networking, status.encryption)
    }
}

impl TryFrom<SliceResource> for CiliumEndpointSlice {
    type Error = ObjectError;

    fn try_from(object: SliceResource) -> Result<Self, ObjectError> {
        let check = Check::new("CiliumEndpointSlice", &object.metadata);
        let name = check.cluster_scoped_name()?;
        let namespace = object.namespace.unwrap_or_default();
        let endpoints = object.endpoints.unwrap_or_default().into_iter().map(|core| {
            let name = check.name_in(&namespace, core.name)?;
            endpoint(&check, name, core.id, core.networking, core.encryption)
        });
        Ok(Self { name, endpoints: endpoints.collect::<Result<_, _>>()? })
    }
}

/// An address that cannot be read is passed over, the others count.
fn endpoint(
    check: &Check<'_>,
    name: NamespacedName,
    identity: Option<i64>,
    networking: Option<Networking>,
    encryption: Option<Encryption>,
) -> Result<CiliumEndpoint, ObjectError> {
    let networking = networking.unwrap_or_default();
    let identity = identity.unwrap_or(0);
    let mut ips = Vec::new();
    for pair in networking.addressing.into_iter().flatten().flatten() {
        for ip in [pair.ipv4, pair.ipv6].iter().flatten().filter_map(|text| address(text)) {
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
    }
    // Kept for as long as the endpoint lives, and mostly there is one.
    ips.shrink_to_fit();
    let key = encryption.and_then(|encryption| encryption.key).unwrap_or(0);
    Ok(CiliumEndpoint {
        name,
        identity: u32::try_from(identity)
            .map_err(|_| check.error("identity.id", format_args!("{identity} is not an identity")))?,
        node_ip: networking.node.as_deref().and_then(address),
        encryption_key: u8::try_from(key)
            .map_err(|_| check.error("encryption.key", format_args!("{key} is not the index of a key")))?,
        ips,
    })
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}
