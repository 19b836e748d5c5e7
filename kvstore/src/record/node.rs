use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::json::{self, null_is_empty};
use super::{IpsecKey, Record, RecordError, WireguardKey, net};
use crate::key::Kind;

/// A node of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Name, unique in its cluster.
    pub name: String,
    /// Name of its cluster.
    pub cluster: String,
    /// Its addresses, most important first.
    pub addresses: Vec<NodeAddress>,
    /// First IPv4 pod CIDR.
    pub ipv4_alloc_cidr: Option<Ipv4Net>,
    /// Further IPv4 pod CIDRs.
    pub ipv4_secondary_alloc_cidrs: Vec<Ipv4Net>,
    /// First IPv6 pod CIDR.
    pub ipv6_alloc_cidr: Option<Ipv6Net>,
    /// Further IPv6 pod CIDRs.
    pub ipv6_secondary_alloc_cidrs: Vec<Ipv6Net>,
    /// Address of the node's health endpoint.
    pub ipv4_health_ip: Option<Ipv4Addr>,
    /// Address of the node's health endpoint.
    pub ipv6_health_ip: Option<Ipv6Addr>,
    /// Source address of the node's ingress proxy.
    pub ipv4_ingress_ip: Option<Ipv4Addr>,
    /// Source address of the node's ingress proxy.
    pub ipv6_ingress_ip: Option<Ipv6Addr>,
    /// ID of its cluster.
    pub cluster_id: u32,
    /// Where the exporter has it from; informational.
    pub source: String,
    /// Encryption key index; 0 is none.
    pub encryption_key: u8,
    /// Kubernetes labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// Kubernetes annotations, and this node's key for IPsec ([`IpsecKey::ANNOTATION`]).
    pub annotations: Option<BTreeMap<String, String>>,
    /// The node's own identity; newer exporters leave it out. 0 is none.
    pub node_identity: Option<u32>,
    /// WireGuard public key in base64 (a [`WireguardKey`]), or empty.
    pub wireguard_pub_key: String,
    /// Changes with every boot, or empty.
    pub boot_id: String,
}

/// An address of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAddress {
    /// What the address is for.
    pub kind: NodeAddressKind,
    /// The address.
    pub ip: IpAddr,
}

/// What an address of a node is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeAddressKind {
    /// Reported as the host's name.
    Hostname,
    /// Reachable within the cluster: the end of its tunnels.
    #[serde(rename = "InternalIP")]
    InternalIp,
    /// Reachable from outside.
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    /// DNS name within the cluster.
    #[serde(rename = "InternalDNS")]
    InternalDns,
    /// DNS name from outside.
    #[serde(rename = "ExternalDNS")]
    ExternalDns,
    /// The node's own address out of its pod CIDR.
    #[serde(rename = "CiliumInternalIP")]
    CiliumInternalIp,
    /// One that we do not know.
    #[serde(untagged)]
    Other(String),
}

impl Node {
    /// First internal address of a family: where tunnels to this node end.
    pub fn internal_ip(&self, v4: bool) -> Option<IpAddr> {
        self.address_of(&NodeAddressKind::InternalIp, v4)
    }

    /// The node's own address out of its pod CIDR.
    pub fn cilium_internal_ip(&self, v4: bool) -> Option<IpAddr> {
        self.address_of(&NodeAddressKind::CiliumInternalIp, v4)
    }

    /// All pod CIDRs, the first of each family first.
    pub fn pod_cidrs(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.ipv4_alloc_cidr.iter().chain(&self.ipv4_secondary_alloc_cidrs);
        let v6 = self.ipv6_alloc_cidr.iter().chain(&self.ipv6_secondary_alloc_cidrs);
        v4.copied().map(IpNet::V4).chain(v6.copied().map(IpNet::V6))
    }

    /// The WireGuard public key, if it has one.
    pub fn wireguard_key(&self) -> Option<WireguardKey> {
        self.wireguard_pub_key.parse().ok()
    }

    /// The public key for IPsec, if it has one.
    pub fn ipsec_key(&self) -> Option<IpsecKey> {
        self.annotations.as_ref()?.get(IpsecKey::ANNOTATION)?.parse().ok()
    }

    fn address_of(&self, kind: &NodeAddressKind, v4: bool) -> Option<IpAddr> {
        let fits = |address: &&NodeAddress| address.kind == *kind && address.ip.is_ipv4() == v4;
        self.addresses.iter().find(fits).map(|address| address.ip)
    }
}

impl Record for Node {
    const KIND: Kind = Kind::Nodes;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        let wire: Wire = json::decode(value)?;
        net::name("Name", &wire.name)?;
        net::name("Cluster", &wire.cluster)?;
        net::same_key(suffix, &wire.name)?;
        if !wire.wireguard_pub_key.is_empty() {
            wire.wireguard_pub_key.parse::<WireguardKey>()?;
        }
        if let Some(key) = wire.annotations.as_ref().and_then(|all| all.get(IpsecKey::ANNOTATION)) {
            key.parse::<IpsecKey>()?;
        }
        let addresses = wire.ip_addresses.into_iter().map(|address| {
            Ok(NodeAddress { ip: net::address("IPAddresses", &address.ip)?, kind: address.kind })
        });
        Ok(Self {
            addresses: addresses.collect::<Result<_, _>>()?,
            ipv4_alloc_cidr: wire.ipv4_alloc_cidr.map(|wire| wire.v4("IPv4AllocCIDR")).transpose()?,
            ipv4_secondary_alloc_cidrs: WireNet::all(wire.ipv4_secondary_alloc_cidrs, |wire| {
                wire.v4("IPv4SecondaryAllocCIDRs")
            })?,
            ipv6_alloc_cidr: wire.ipv6_alloc_cidr.map(|wire| wire.v6("IPv6AllocCIDR")).transpose()?,
            ipv6_secondary_alloc_cidrs: WireNet::all(wire.ipv6_secondary_alloc_cidrs, |wire| {
                wire.v6("IPv6SecondaryAllocCIDRs")
            })?,
            ipv4_health_ip: net::optional_v4("IPv4HealthIP", &wire.ipv4_health_ip)?,
            ipv6_health_ip: net::optional_v6("IPv6HealthIP", &wire.ipv6_health_ip)?,
            ipv4_ingress_ip: net::optional_v4("IPv4IngressIP", &wire.ipv4_ingress_ip)?,
            ipv6_ingress_ip: net::optional_v6("IPv6IngressIP", &wire.ipv6_ingress_ip)?,
            name: wire.name,
            cluster: wire.cluster,
            cluster_id: wire.cluster_id,
            source: wire.source,
            encryption_key: wire.encryption_key,
            labels: wire.labels,
            annotations: wire.annotations,
            node_identity: wire.node_identity,
            wireguard_pub_key: wire.wireguard_pub_key,
            boot_id: wire.boot_id,
        })
    }

    fn suffix(&self) -> String {
        self.name.clone()
    }

    fn encode(&self) -> Vec<u8> {
        let v4 = |net: &Ipv4Net| WireNet::from(IpNet::V4(*net));
        let v6 = |net: &Ipv6Net| WireNet::from(IpNet::V6(*net));
        let addresses = self
            .addresses
            .iter()
            .map(|address| WireAddress { kind: address.kind.clone(), ip: address.ip.to_string() });
        json::encode(&Wire {
            name: self.name.clone(),
            cluster: self.cluster.clone(),
            ip_addresses: addresses.collect(),
            ipv4_alloc_cidr: self.ipv4_alloc_cidr.as_ref().map(v4),
            ipv4_secondary_alloc_cidrs: none_if_empty(
                self.ipv4_secondary_alloc_cidrs.iter().map(v4).collect(),
            ),
            ipv6_alloc_cidr: self.ipv6_alloc_cidr.as_ref().map(v6),
            ipv6_secondary_alloc_cidrs: none_if_empty(
                self.ipv6_secondary_alloc_cidrs.iter().map(v6).collect(),
            ),
            ipv4_health_ip: net::text(self.ipv4_health_ip),
            ipv6_health_ip: net::text(self.ipv6_health_ip),
            ipv4_ingress_ip: net::text(self.ipv4_ingress_ip),
            ipv6_ingress_ip: net::text(self.ipv6_ingress_ip),
            cluster_id: self.cluster_id,
            source: self.source.clone(),
            encryption_key: self.encryption_key,
            labels: self.labels.clone(),
            annotations: self.annotations.clone(),
            node_identity: self.node_identity,
            wireguard_pub_key: self.wireguard_pub_key.clone(),
            boot_id: self.boot_id.clone(),
        })
    }
}

fn none_if_empty<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// Cilium's `Node`: Go field names, nothing omitted.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Wire {
    name: String,
    cluster: String,
    #[serde(rename = "IPAddresses", default, deserialize_with = "null_is_empty")]
    ip_addresses: Vec<WireAddress>,
    #[serde(rename = "IPv4AllocCIDR", default)]
    ipv4_alloc_cidr: Option<WireNet>,
    #[serde(rename = "IPv4SecondaryAllocCIDRs", default)]
    ipv4_secondary_alloc_cidrs: Option<Vec<WireNet>>,
    #[serde(rename = "IPv6AllocCIDR", default)]
    ipv6_alloc_cidr: Option<WireNet>,
    #[serde(rename = "IPv6SecondaryAllocCIDRs", default)]
    ipv6_secondary_alloc_cidrs: Option<Vec<WireNet>>,
    #[serde(rename = "IPv4HealthIP", default)]
    ipv4_health_ip: String,
    #[serde(rename = "IPv6HealthIP", default)]
    ipv6_health_ip: String,
    #[serde(rename = "IPv4IngressIP", default)]
    ipv4_ingress_ip: String,
    #[serde(rename = "IPv6IngressIP", default)]
    ipv6_ingress_ip: String,
    #[serde(rename = "ClusterID", default)]
    cluster_id: u32,
    #[serde(default)]
    source: String,
    #[serde(default)]
    encryption_key: u8,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node_identity: Option<u32>,
    #[serde(default)]
    wireguard_pub_key: String,
    #[serde(rename = "BootID", default)]
    boot_id: String,
}

#[derive(Serialize, Deserialize)]
struct WireAddress {
    #[serde(rename = "Type")]
    kind: NodeAddressKind,
    #[serde(rename = "IP")]
    ip: String,
}

/// Go's `net.IPNet`.
#[derive(Serialize, Deserialize)]
struct WireNet {
    #[serde(rename = "IP")]
    ip: String,
    #[serde(rename = "Mask")]
    mask: String,
}

impl WireNet {
    fn all<T>(
        list: Option<Vec<Self>>,
        decode: impl Fn(Self) -> Result<T, RecordError>,
    ) -> Result<Vec<T>, RecordError> {
        list.unwrap_or_default().into_iter().map(decode).collect()
    }

    fn v4(self, field: &'static str) -> Result<Ipv4Net, RecordError> {
        match net::prefix(field, &self.ip, &self.mask)? {
            IpNet::V4(net) => Ok(net),
            IpNet::V6(_) => Err(RecordError::BadAddress { field, address: self.ip.into() }),
        }
    }

    fn v6(self, field: &'static str) -> Result<Ipv6Net, RecordError> {
        match net::prefix(field, &self.ip, &self.mask)? {
            IpNet::V6(net) => Ok(net),
            IpNet::V4(_) => Err(RecordError::BadAddress { field, address: self.ip.into() }),
        }
    }
}

impl From<IpNet> for WireNet {
    fn from(net: IpNet) -> Self {
        Self { ip: net.addr().to_string(), mask: net::mask(net) }
    }
}
