use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::identity::identity;
use super::json::{self, null_is_empty};
use super::{Protocol, Record, RecordError, net, port};
use crate::cluster::Identity;
use crate::key::Kind;

/// An address (or prefix), the identity behind it and the node that carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpRecord {
    /// The address; a full-length prefix for a single one.
    pub prefix: IpNet,
    /// The record is about a single address and its key has no `/length`.
    pub host: bool,
    /// Address of the node behind which it lies.
    pub host_ip: Option<IpAddr>,
    /// The identity.
    pub identity: Identity,
    /// Encryption key index; 0 is none.
    pub key: u8,
    /// Free text, empty so far.
    pub metadata: String,
    /// Namespace of the pod, or empty.
    pub namespace: String,
    /// Name of the pod, or empty.
    pub pod_name: String,
    /// Service account of the pod, or empty (exporters before 1.18 do not say).
    pub service_account: String,
    /// Named ports of the pod.
    pub named_ports: Vec<NamedPort>,
}

/// A port that a pod gives a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPort {
    /// Name.
    pub name: String,
    /// Number, never 0.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl Record for IpRecord {
    const KIND: Kind = Kind::Ip;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        let wire: Wire = json::decode(value)?;
        let prefix = match &wire.mask {
            Some(mask) => net::prefix("IP", &wire.ip, mask)?,
            None => net::address("IP", &wire.ip)?.into(),
        };
        let named_ports = wire.named_ports.into_iter().map(NamedPort::decode).collect::<Result<_, _>>()?;
        let record = Self {
            prefix,
            host: wire.mask.is_none(),
            host_ip: net::optional_address("HostIP", &wire.host_ip)?,
            identity: identity(wire.id)?,
            key: wire.key,
            metadata: wire.metadata,
            namespace: wire.namespace,
            pod_name: wire.pod_name,
            service_account: wire.service_account,
            named_ports,
        };
        net::same_key(suffix, &record.suffix())?;
        Ok(record)
    }

    fn suffix(&self) -> String {
        if self.host { self.prefix.addr().to_string() } else { self.prefix.to_string() }
    }

    fn encode(&self) -> Vec<u8> {
        json::encode(&Wire {
            ip: self.prefix.addr().to_string(),
            mask: (!self.host).then(|| net::mask(self.prefix)),
            host_ip: net::text(self.host_ip),
            id: self.identity.0,
            key: self.key,
            metadata: self.metadata.clone(),
            namespace: self.namespace.clone(),
            pod_name: self.pod_name.clone(),
            service_account: self.service_account.clone(),
            named_ports: self.named_ports.iter().map(NamedPort::encode).collect(),
        })
    }
}

impl NamedPort {
    fn decode(wire: WireNamedPort) -> Result<Self, RecordError> {
        Ok(Self { name: wire.name, port: port::number(wire.port)?, protocol: wire.protocol.parse()? })
    }

    fn encode(&self) -> WireNamedPort {
        WireNamedPort { name: self.name.clone(), port: self.port.into(), protocol: self.protocol.to_string() }
    }
}

/// Cilium's `IPIdentityPair`.
#[derive(Serialize, Deserialize)]
struct Wire {
    #[serde(rename = "IP")]
    ip: String,
    #[serde(rename = "Mask", default)]
    mask: Option<String>,
    #[serde(rename = "HostIP", default)]
    host_ip: String,
    #[serde(rename = "ID")]
    id: u32,
    #[serde(rename = "Key", default)]
    key: u8,
    #[serde(rename = "Metadata", default)]
    metadata: String,
    #[serde(rename = "K8sNamespace", default, skip_serializing_if = "String::is_empty")]
    namespace: String,
    #[serde(rename = "K8sPodName", default, skip_serializing_if = "String::is_empty")]
    pod_name: String,
    #[serde(rename = "K8sServiceAccount", default, skip_serializing_if = "String::is_empty")]
    service_account: String,
    #[serde(
        rename = "NamedPorts",
        default,
        deserialize_with = "null_is_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    named_ports: Vec<WireNamedPort>,
}

#[derive(Serialize, Deserialize)]
struct WireNamedPort {
    #[serde(rename = "Name")]
    name: String,
    #[serde(rename = "Port")]
    port: u64,
    #[serde(rename = "Protocol")]
    protocol: String,
}
