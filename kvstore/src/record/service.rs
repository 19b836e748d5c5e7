use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::json::{self, null_is_empty};
use super::port::{self, PortMap, WirePortMap};
use super::{Backends, Record, RecordError, net};
use crate::cluster::NamespacedName;
use crate::key::Kind;

/// A global service as one cluster exports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name of the exporting cluster.
    pub cluster: String,
    /// Namespace and name: services of different clusters with the same one are one service.
    pub name: NamespacedName,
    /// Cluster IPs with the service's ports; empty for a headless service.
    pub frontends: BTreeMap<IpAddr, PortMap>,
    /// Backends that may be used. Their condition is not carried.
    pub backends: Backends,
    /// Host names of backends by their address.
    pub hostnames: BTreeMap<String, String>,
    /// Zones of backends (newer exporters).
    pub zones: BTreeMap<IpAddr, Zone>,
    /// Labels of the service.
    pub labels: BTreeMap<String, String>,
    /// Selector of the service.
    pub selector: BTreeMap<String, String>,
    /// Backends of other clusters may be used in this one.
    pub include_external: bool,
    /// Backends of this cluster may be used in others.
    pub shared: bool,
    /// ID of the exporting cluster.
    pub cluster_id: u32,
}

/// Where a backend stands, and for which zones it is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    /// Its own zone.
    pub zone: String,
    /// Zones that should prefer it.
    pub for_zones: Vec<String>,
}

impl Record for Service {
    const KIND: Kind = Kind::Services;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        let wire: Wire = json::decode(value)?;
        let name = net::object(suffix, &wire.cluster, wire.namespace, wire.name)?;
        for address in wire.hostnames.keys() {
            net::address("hostnames", address)?;
        }
        Ok(Self {
            cluster: wire.cluster,
            name,
            frontends: net::by_address("frontends", wire.frontends, port::decode)?,
            backends: decode_backends(wire.backends)?,
            hostnames: wire.hostnames,
            zones: net::by_address("zones", wire.zones, |zone| Ok(zone.into()))?,
            labels: wire.labels,
            selector: wire.selector,
            include_external: wire.include_external,
            shared: wire.shared,
            cluster_id: wire.cluster_id,
        })
    }

    fn suffix(&self) -> String {
        self.name.to_string()
    }

    fn encode(&self) -> Vec<u8> {
        json::encode(&Wire {
            cluster: self.cluster.clone(),
            namespace: self.name.namespace.clone(),
            name: self.name.name.clone(),
            frontends: net::by_text(&self.frontends, port::encode),
            backends: self.backends.iter().map(|(ip, ports)| (ip.to_string(), port::encode(ports))).collect(),
            hostnames: self.hostnames.clone(),
            zones: net::by_text(&self.zones, |zone| zone.into()),
            labels: self.labels.clone(),
            selector: self.selector.clone(),
            include_external: self.include_external,
            shared: self.shared,
            cluster_id: self.cluster_id,
        })
    }
}

fn decode_backends(wire: BTreeMap<String, WirePortMap>) -> Result<Backends, RecordError> {
    let decode = |(text, ports): (String, WirePortMap)| -> Result<(IpAddr, PortMap), RecordError> {
        Ok((net::address("backends", &text)?, port::decode(ports)?))
    };
    let decoded = wire.into_iter().map(decode).collect::<Result<Vec<_>, _>>()?;
    let mut ips: Vec<IpAddr> = decoded.iter().map(|(ip, _)| *ip).collect();
    ips.sort_unstable();
    match ips.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Err(RecordError::DuplicateAddress { field: "backends", address: pair[0].to_string().into() })
        }
        None => Ok(decoded.into_iter().collect()),
    }
}

/// Cilium's `ClusterService`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    cluster: String,
    namespace: String,
    name: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    frontends: BTreeMap<String, WirePortMap>,
    #[serde(default, deserialize_with = "null_is_empty")]
    backends: BTreeMap<String, WirePortMap>,
    #[serde(default, deserialize_with = "null_is_empty")]
    hostnames: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    zones: BTreeMap<String, WireZone>,
    #[serde(default, deserialize_with = "null_is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    selector: BTreeMap<String, String>,
    #[serde(default)]
    include_external: bool,
    #[serde(default)]
    shared: bool,
    #[serde(rename = "clusterID", default)]
    cluster_id: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireZone {
    #[serde(default)]
    zone: String,
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    for_zones: Vec<WireForZone>,
}

#[derive(Serialize, Deserialize)]
struct WireForZone {
    name: String,
}

impl From<WireZone> for Zone {
    fn from(wire: WireZone) -> Self {
        Self { zone: wire.zone, for_zones: wire.for_zones.into_iter().map(|zone| zone.name).collect() }
    }
}

impl From<&Zone> for WireZone {
    fn from(zone: &Zone) -> Self {
        let for_zones = zone.for_zones.iter().map(|name| WireForZone { name: name.clone() });
        Self { zone: zone.zone.clone(), for_zones: for_zones.collect() }
    }
}
