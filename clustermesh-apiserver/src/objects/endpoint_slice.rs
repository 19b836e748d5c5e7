use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::{Port, PortMap};
use k8s_openapi::api::discovery::v1;

use super::meta::{Check, ObjectError};

/// Some endpoints of a service, computed by somebody else.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub name: NamespacedName,
    /// The service that it belongs to, in the same namespace.
    pub service: Option<NamespacedName>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Ports that every one of the endpoints has.
    pub ports: PortMap,
}

/// One or more addresses of one backend.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Addresses that are used alike.
    pub addresses: Vec<IpAddr>,
    /// May get new connections.
    pub ready: bool,
    /// Answers, whether it terminates or not.
    pub serving: bool,
    /// Was asked to end.
    pub terminating: bool,
    /// Name of its host in DNS.
    pub hostname: Option<String>,
    /// Node that it runs on.
    pub node: Option<String>,
    /// Failure zone.
    pub zone: Option<String>,
}

impl TryFrom<v1::EndpointSlice> for EndpointSlice {
    type Error = ObjectError;

    fn try_from(object: v1::EndpointSlice) -> Result<Self, ObjectError> {
        let check = Check::new("EndpointSlice", &object.metadata);
        let name = check.namespaced_name()?;
        let labels = check.labels()?;

        // Copies of other clusters' endpoints would come back to those clusters as ours.
        let imported = labels.contains_key("multicluster.kubernetes.io/source-cluster");
        let addresses = matches!(object.address_type.as_str(), "IPv4" | "IPv6");
        let service = labels
            .get("kubernetes.io/service-name")
            .filter(|service| !service.is_empty() && !imported && addresses)
            .map(|service| NamespacedName { namespace: name.namespace.clone(), name: service.clone() });

        let mut endpoints = Vec::new();
        let mut ports = PortMap::new();
        if addresses {
            endpoints.reserve_exact(object.endpoints.as_ref().map_or(0, Vec::len));
            for endpoint in object.endpoints.iter().flatten() {
                endpoints.push(self::endpoint(&check, endpoint)?);
            }
            for port in object.ports.iter().flatten() {
                // A port without a number means "all ports", which no service map can say.
                let Some(number) = port.port else { continue };
                let protocol = check.protocol("ports.protocol", port.protocol.as_deref())?;
                let number = check.port("ports.port", number)?;
                ports.insert(port.name.clone().unwrap_or_default(), Port { protocol, port: number });
            }
        }
        Ok(Self { name, service, endpoints, ports })
    }
}

/// An absent condition means: ready; serving if ready; not terminating.
fn endpoint(check: &Check<'_>, endpoint: &v1::Endpoint) -> Result<Endpoint, ObjectError> {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let non_empty = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    // Almost always one; collected, each would have room for four.
    let mut addresses = Vec::with_capacity(endpoint.addresses.len());
    for text in &endpoint.addresses {
        addresses.push(check.ip("endpoints.addresses", text)?);
    }
    Ok(Endpoint {
        addresses,
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        hostname: non_empty(&endpoint.hostname),
        node: non_empty(&endpoint.node_name),
        zone: non_empty(&endpoint.zone),
    })
}
