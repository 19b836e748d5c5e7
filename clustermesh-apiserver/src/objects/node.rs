use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clustermesh_kvstore::record::WireguardKey;
use ipnet::IpNet;
use k8s_openapi::api::core::v1;

use super::meta::{Check, ObjectError};

/// A node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Those of its annotations that mesh and network read (`*.cilium.io/`, `clustermesh.io/`).
    /// All others, which may be large or private, stay in the cluster.
    pub annotations: BTreeMap<String, String>,
    /// Addresses of type InternalIP, in the order of the status.
    pub internal_ips: Vec<IpAddr>,
    /// Addresses of type ExternalIP, in the order of the status.
    pub external_ips: Vec<IpAddr>,
    /// The host's own address in the pod network, from its annotations.
    pub cilium_internal_ips: Vec<IpAddr>,
    /// Where the health endpoint listens, from its annotation.
    pub ipv4_health_ip: Option<Ipv4Addr>,
    /// Where the health endpoint listens, from its annotation.
    pub ipv6_health_ip: Option<Ipv6Addr>,
    /// Networks that pods of this node take their addresses from, masked.
    pub pod_cidrs: Vec<IpNet>,
    /// Index of the encryption key, from its annotation; 0 without encryption.
    pub encryption_key: u8,
    /// WireGuard public key, from its annotation, or empty.
    pub wireguard_pub_key: String,
    /// Kernel boot ID, or empty.
    pub boot_id: String,
}

impl Node {
    /// The address that tunnels to this node end at: IPv4 where it has one.
    pub fn tunnel_ip(&self) -> Option<IpAddr> {
        self.internal_ips.iter().find(|ip| ip.is_ipv4()).or(self.internal_ips.first()).copied()
    }

    /// The failure zone.
    pub fn zone(&self) -> Option<&str> {
        self.labels.get("topology.kubernetes.io/zone").map(String::as_str).filter(|zone| !zone.is_empty())
    }
}

impl TryFrom<v1::Node> for Node {
    type Error = ObjectError;

    fn try_from(object: v1::Node) -> Result<Self, ObjectError> {
        let check = Check::new("Node", &object.metadata);
        let annotations = check.annotations();
        let annotation = Annotations { check: &check, annotations: &annotations };
        let status = object.status.unwrap_or_default();
        let spec = object.spec.unwrap_or_default();

        let mut internal_ips = Vec::new();
        let mut external_ips = Vec::new();
        for address in status.addresses.unwrap_or_default() {
            match address.type_.as_str() {
                "InternalIP" => internal_ips.push(check.ip("status.addresses", &address.address)?),
                "ExternalIP" => external_ips.push(check.ip("status.addresses", &address.address)?),
                _ => {}
            }
        }
        let mut cilium_internal_ips = Vec::new();
        cilium_internal_ips.extend(annotation.parse("network.cilium.io/ipv4-cilium-host")?.map(IpAddr::V4));
        cilium_internal_ips.extend(annotation.parse("network.cilium.io/ipv6-cilium-host")?.map(IpAddr::V6));

        let cidrs = match spec.pod_cidrs {
            Some(cidrs) if !cidrs.is_empty() => cidrs,
            _ => spec.pod_cidr.into_iter().collect(),
        };
        let pod_cidrs = cidrs
            .iter()
            .filter(|cidr| !cidr.is_empty())
            .map(|cidr| match cidr.parse::<IpNet>() {
                Ok(net) => Ok(net.trunc()),
                Err(_) => Err(check.error("spec.podCIDRs", format_args!("{cidr:?} is not a network"))),
            })
            .collect::<Result<_, _>>()?;

        Ok(Self {
            name: check.cluster_scoped_name()?,
            labels: check.labels()?,
            internal_ips,
            external_ips,
            cilium_internal_ips,
            ipv4_health_ip: annotation.parse("network.cilium.io/ipv4-health-ip")?,
            ipv6_health_ip: annotation.parse("network.cilium.io/ipv6-health-ip")?,
            pod_cidrs,
            encryption_key: annotation.parse("network.cilium.io/encryption-key")?.unwrap_or(0),
            wireguard_pub_key: wireguard_key(annotations.get("network.cilium.io/wg-pub-key")),
            boot_id: status.node_info.map(|info| info.boot_id).unwrap_or_default(),
            annotations: annotations.into_iter().filter(|(key, _)| concerns_the_network(key)).collect(),
        })
    }
}

/// What an annotation says, if that is a key: readers refuse the record of a node with another one.
pub(crate) fn wireguard_key(text: Option<&String>) -> String {
    text.filter(|text| text.parse::<WireguardKey>().is_ok()).cloned().unwrap_or_default()
}

struct Annotations<'a> {
    check: &'a Check<'a>,
    annotations: &'a BTreeMap<String, String>,
}

impl Annotations<'_> {
    fn parse<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, ObjectError> {
        let Some(text) = self.annotations.get(key).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        text.parse().map(Some).map_err(|_| {
            let field = format!("metadata.annotations[{key}]");
            self.check.error(field, format_args!("{text:?} is not valid here"))
        })
    }
}

fn concerns_the_network(key: &str) -> bool {
    key.split_once('/')
        .is_some_and(|(domain, _)| domain.ends_with(".cilium.io") || domain == "clustermesh.io")
}
