use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::Protocol;
use k8s_openapi::api::core::v1;
use k8s_openapi::jiff::Timestamp;

use super::meta::{Check, ObjectError};

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// Namespace and name.
    pub name: NamespacedName,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Service account; `default` where none is named, as the API server fills in.
    pub service_account: String,
    /// Node that it is bound to.
    pub node: Option<String>,
    /// Uses the node's own network namespace and so the node's identity and address.
    pub host_network: bool,
    /// `spec.hostname`.
    pub hostname: Option<String>,
    /// `spec.subdomain`: the headless service that gives the host name its DNS record.
    pub subdomain: Option<String>,
    /// Ports of all containers that run as long as the pod does.
    pub ports: Vec<ContainerPort>,
    /// Addresses, the primary one first.
    pub ips: Vec<IpAddr>,
    /// Address of its node according to its status.
    pub host_ip: Option<IpAddr>,
    /// All containers have ended for good (phase Succeeded or Failed): the address may be anybody's.
    pub finished: bool,
    /// The Ready condition is True.
    pub ready: bool,
    /// Was asked to end.
    pub terminating: bool,
    /// When it was created; tells who holds an address that two pods claim.
    pub created: Option<Timestamp>,
}

/// A port that a container declares.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerPort {
    /// Name, for services that refer to it, or empty.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Number.
    pub number: u16,
}

impl Pod {
    /// Has an address of its own: runs, and not in its node's network namespace.
    pub fn owns_its_ips(&self) -> bool {
        !self.host_network && !self.finished
    }
}

impl TryFrom<v1::Pod> for Pod {
    type Error = ObjectError;

    fn try_from(object: v1::Pod) -> Result<Self, ObjectError> {
        let check = Check::new("Pod", &object.metadata);
        let spec = object.spec.unwrap_or_default();
        let status = object.status.unwrap_or_default();

        let mut ips = Vec::new();
        for text in status.pod_ips.unwrap_or_default().into_iter().map(|ip| ip.ip).chain(status.pod_ip) {
            let ip = check.ip("status.podIPs", &text)?;
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
        let host_ip = match status.host_ip.as_deref() {
            None | Some("") => None,
            Some(text) => Some(check.ip("status.hostIP", text)?),
        };
        let ready = status
            .conditions
            .unwrap_or_default()
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");

        Ok(Self {
            name: check.namespaced_name()?,
            labels: check.labels()?,
            service_account: spec
                .service_account_name
                .clone()
                .or_else(|| spec.service_account.clone())
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| "default".to_owned()),
            node: spec.node_name.clone().filter(|name| !name.is_empty()),
            host_network: spec.host_network.unwrap_or(false),
            hostname: spec.hostname.clone().filter(|name| !name.is_empty()),
            subdomain: spec.subdomain.clone().filter(|name| !name.is_empty()),
            ports: container_ports(&check, &spec)?,
            ips,
            host_ip,
            finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            ready,
            terminating: object.metadata.deletion_timestamp.is_some(),
            created: object.metadata.creation_timestamp.as_ref().map(|time| time.0),
        })
    }
}

/// Containers first, then sidecars (init containers that keep running), the order in which
/// Kubernetes looks for a named port.
fn container_ports(check: &Check<'_>, spec: &v1::PodSpec) -> Result<Vec<ContainerPort>, ObjectError> {
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut ports = Vec::new();
    for port in spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten())
    {
        ports.push(ContainerPort {
            name: port.name.clone().unwrap_or_default(),
            protocol: check.protocol("spec.containers.ports.protocol", port.protocol.as_deref())?,
            number: check.port("spec.containers.ports.containerPort", port.container_port)?,
        });
    }
    Ok(ports)
}
