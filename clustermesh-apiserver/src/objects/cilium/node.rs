use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clustermesh_kvstore::record::{self, NodeAddress, NodeAddressKind};
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::objects::meta::{Check, ObjectError, lean_with_annotations};
use crate::objects::node::wireguard_key;

/// A node as its agent describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct CiliumNode {
    /// What is to be said of it. Of which cluster it is, the object does not decide: that is left open.
    pub record: record::Node,
}

/// `cilium.io/v2` CiliumNode.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NodeResource {
    #[serde(default, deserialize_with = "lean_with_annotations")]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<Spec>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Spec {
    #[serde(default)]
    addresses: Option<Vec<Address>>,
    #[serde(default)]
    bootid: Option<String>,
    #[serde(default)]
    encryption: Option<Encryption>,
    #[serde(default)]
    health: Option<Pair>,
    #[serde(default)]
    ingress: Option<Pair>,
    #[serde(default)]
    ipam: Option<Ipam>,
    #[serde(default)]
    nodeidentity: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: NodeAddressKind,
    #[serde(default)]
    ip: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Encryption {
    #[serde(default)]
    key: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Pair {
    #[serde(default)]
    ipv4: Option<String>,
    #[serde(default)]
    ipv6: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Ipam {
    #[serde(rename = "podCIDRs", default)]
    pod_cidrs: Option<Vec<String>>,
    #[serde(default)]
    pools: Option<Pools>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Pools {
    #[serde(default)]
    allocated: Option<Vec<Pool>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Pool {
    #[serde(default)]
    cidrs: Option<Vec<String>>,
}

/// The first counts where both are there.
const PUBLIC_KEY: [&str; 2] = ["network.cilium.io/wg-pub-key", "io.cilium.network.wg-pub-key"];

impl TryFrom<NodeResource> for CiliumNode {
    type Error = ObjectError;

    fn try_from(object: NodeResource) -> Result<Self, ObjectError> {
        let check = Check::new("CiliumNode", &object.metadata);
        let name = check.cluster_scoped_name()?;
        let annotations = check.annotations();
        let spec = object.spec.unwrap_or_default();
        let key = spec.encryption.and_then(|encryption| encryption.key).unwrap_or(0);
        let encryption_key = u8::try_from(key)
            .map_err(|_| check.error("spec.encryption.key", format_args!("{key} is not a key's index")))?;
        let (health, ingress) = (spec.health.unwrap_or_default(), spec.ingress.unwrap_or_default());
        let mut record = record::Node {
            name,
            addresses: addresses(spec.addresses.unwrap_or_default()),
            ipv4_health_ip: v4(health.ipv4.as_deref()),
            ipv6_health_ip: v6(health.ipv6.as_deref()),
            ipv4_ingress_ip: v4(ingress.ipv4.as_deref()),
            ipv6_ingress_ip: v6(ingress.ipv6.as_deref()),
            source: "custom-resource".to_owned(),
            encryption_key,
            labels: non_empty(check.labels()?),
            node_identity: Some(spec.nodeidentity.unwrap_or(0)),
            wireguard_pub_key: wireguard_key(PUBLIC_KEY.iter().find_map(|key| annotations.get(*key))),
            annotations: non_empty(annotations),
            boot_id: spec.bootid.unwrap_or_default(),
            ..record::Node::default()
        };
        pod_cidrs(spec.ipam.unwrap_or_default(), &mut record);
        Ok(Self { record })
    }
}

fn addresses(addresses: Vec<Address>) -> Vec<NodeAddress> {
    addresses
        .into_iter()
        .filter_map(|address| {
            let ip = address.ip.parse::<IpAddr>().ok()?.to_canonical();
            Some(NodeAddress { kind: address.kind, ip })
        })
        .collect()
}

/// The first of each family is the main one; pools come after what was assigned directly.
fn pod_cidrs(ipam: Ipam, record: &mut record::Node) {
    let pools = ipam.pools.and_then(|pools| pools.allocated).unwrap_or_default();
    let pooled = pools.into_iter().flat_map(|pool| pool.cidrs.unwrap_or_default());
    for cidr in ipam.pod_cidrs.unwrap_or_default().into_iter().chain(pooled) {
        match cidr.parse::<IpNet>().map(|net| net.trunc()) {
            Ok(IpNet::V4(net)) if record.ipv4_alloc_cidr.is_none() => record.ipv4_alloc_cidr = Some(net),
            Ok(IpNet::V4(net)) => record.ipv4_secondary_alloc_cidrs.push(net),
            Ok(IpNet::V6(net)) if record.ipv6_alloc_cidr.is_none() => record.ipv6_alloc_cidr = Some(net),
            Ok(IpNet::V6(net)) => record.ipv6_secondary_alloc_cidrs.push(net),
            Err(_) => {}
        }
    }
}

fn v4(text: Option<&str>) -> Option<Ipv4Addr> {
    text?.parse().ok()
}

fn v6(text: Option<&str>) -> Option<Ipv6Addr> {
    text?.parse().ok()
}

fn non_empty(map: BTreeMap<String, String>) -> Option<BTreeMap<String, String>> {
    (!map.is_empty()).then_some(map)
}
