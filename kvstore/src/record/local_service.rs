use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::balancing::{Balancing, WireBalancing};
use super::external::{External, WireExternal};
use super::json::{self, null_is_empty};
use super::{PortMap, Protocol, Record, RecordError, net, port};
use crate::cluster::NamespacedName;
use crate::key::Kind;

/// A service of the own cluster, with all that agents of that cluster need to know and that the record
/// for other clusters ([`super::Service`]) cannot say: how calls are spread, and the condition of each backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalService {
    /// Name of the cluster.
    pub cluster: String,
    /// Namespace and name.
    pub name: NamespacedName,
    /// ID of the cluster.
    pub cluster_id: u32,
    /// Backends of other clusters may be used.
    pub global: bool,
    /// Backends of this cluster may be used by others.
    pub shared: bool,
    /// Other clusters know nothing of its namespace, whatever the service says of itself.
    pub private: bool,
    /// Whose backends are preferred.
    pub affinity: Affinity,
    /// With [`Affinity::Local`]: calls leave the cluster gradually.
    pub failover: Option<Failover>,
    /// How calls are spread beyond that.
    pub balancing: Balancing,
    /// How it is reached from outside of the mesh.
    pub external: External,
    /// Without cluster IP.
    pub headless: bool,
    /// Cluster IPs with the service's ports.
    pub frontends: BTreeMap<IpAddr, PortMap>,
    /// Backends, in order of their addresses.
    pub backends: Vec<LocalBackend>,
}

/// A backend of the own cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalBackend {
    /// Address.
    pub ip: IpAddr,
    /// Target ports by the names of the service's ports.
    pub ports: PortMap,
    /// Whether new connections may go there.
    pub state: BackendState,
    /// Node that runs it.
    pub node: Option<String>,
    /// Zone of that node.
    pub zone: Option<String>,
    /// Host name for DNS.
    pub hostname: Option<String>,
}

/// Whether new connections may go to a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Yes.
    #[default]
    Active,
    /// Only if there is no active one: it is going away but still answers.
    Terminating,
}

/// Whose backends a global service prefers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Affinity {
    /// Nobody's.
    #[default]
    None,
    /// Those of the own cluster while there are any.
    Local,
    /// Those of other clusters while there are any.
    Remote,
}

/// How calls leave a cluster whose backends become unhealthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Failover {
    /// Share of the cluster's backends in percent, 1 to 100, that can answer all its calls. While fewer are
    /// active, the part that is missing goes elsewhere.
    pub threshold: u8,
    /// Backends that the cluster would have if all were ready.
    pub expected: u32,
}

impl Record for LocalService {
    const KIND: Kind = Kind::LocalServices;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        let wire: Wire = json::decode(value)?;
        let name = net::object(suffix, &wire.cluster, wire.namespace, wire.name)?;
        Ok(Self {
            cluster: wire.cluster,
            name,
            cluster_id: wire.cluster_id,
            global: wire.global,
            shared: wire.shared,
            private: wire.private,
            affinity: wire.affinity,
            failover: wire.failover.map(Failover::check).transpose()?,
            balancing: Balancing::decode(wire.balancing)?,
            external: External::decode(wire.external)?,
            headless: wire.headless,
            frontends: net::by_address("frontends", wire.frontends, decode_ports)?,
            backends: wire.backends.into_iter().map(LocalBackend::decode).collect::<Result<_, _>>()?,
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
            cluster_id: self.cluster_id,
            global: self.global,
            shared: self.shared,
            private: self.private,
            affinity: self.affinity,
            failover: self.failover,
            balancing: self.balancing.encode(),
            external: self.external.encode(),
            headless: self.headless,
            frontends: net::by_text(&self.frontends, encode_ports),
            backends: self.backends.iter().map(LocalBackend::encode).collect(),
        })
    }
}

impl Failover {
    fn check(self) -> Result<Self, RecordError> {
        match self.threshold {
            1..=100 => Ok(self),
            other => Err(RecordError::BadValue { field: "threshold", value: other.to_string().into() }),
        }
    }
}

impl LocalBackend {
    fn decode(wire: WireBackend) -> Result<Self, RecordError> {
        Ok(Self {
            ip: net::address("backends", &wire.ip)?,
            ports: decode_ports(wire.ports)?,
            state: wire.state,
            node: wire.node,
            zone: wire.zone,
            hostname: wire.hostname,
        })
    }

    fn encode(&self) -> WireBackend {
        WireBackend {
            ip: self.ip.to_string(),
            ports: encode_ports(&self.ports),
            state: self.state,
            node: self.node.clone(),
            zone: self.zone.clone(),
            hostname: self.hostname.clone(),
        }
    }
}

/// Our own JSON; the `v1` in its key is its version.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    cluster: String,
    namespace: String,
    name: String,
    cluster_id: u32,
    global: bool,
    shared: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    private: bool,
    #[serde(default)]
    affinity: Affinity,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failover: Option<Failover>,
    #[serde(default, skip_serializing_if = "WireBalancing::is_default")]
    balancing: WireBalancing,
    #[serde(default, skip_serializing_if = "WireExternal::is_default")]
    external: WireExternal,
    #[serde(default)]
    headless: bool,
    #[serde(default, deserialize_with = "null_is_empty")]
    frontends: BTreeMap<String, WirePortMap>,
    #[serde(default, deserialize_with = "null_is_empty")]
    backends: Vec<WireBackend>,
}

#[derive(Serialize, Deserialize)]
struct WireBackend {
    ip: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    ports: WirePortMap,
    #[serde(default)]
    state: BackendState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zone: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hostname: Option<String>,
}

type WirePortMap = BTreeMap<String, WirePort>;

#[derive(Serialize, Deserialize)]
struct WirePort {
    protocol: String,
    port: u64,
}

fn decode_ports(ports: WirePortMap) -> Result<PortMap, RecordError> {
    let decode = |wire: WirePort| -> Result<super::Port, RecordError> {
        let protocol: Protocol = wire.protocol.parse()?;
        Ok(super::Port { protocol, port: port::number(wire.port)? })
    };
    ports.into_iter().map(|(name, wire)| Ok((name, decode(wire)?))).collect()
}

fn encode_ports(ports: &PortMap) -> WirePortMap {
    let encode =
        |port: &super::Port| WirePort { protocol: port.protocol.to_string(), port: port.port.into() };
    ports.iter().map(|(name, port)| (name.clone(), encode(port))).collect()
}
