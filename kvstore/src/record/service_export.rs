use serde::{Deserialize, Serialize};

use super::json::{self, null_is_empty};
use super::{Protocol, Record, RecordError, net, port};
use crate::cluster::NamespacedName;
use crate::key::Kind;

/// A service that a cluster exports by the Multi-Cluster Services API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceExport {
    /// Name of the exporting cluster.
    pub cluster: String,
    /// Namespace and name.
    pub name: NamespacedName,
    /// When the export was created, RFC 3339: the oldest wins conflicts between clusters.
    pub created: String,
    /// Ports of the service.
    pub ports: Vec<ExportPort>,
    /// With or without a cluster-set IP.
    pub kind: ExportType,
    /// `ClientIP` or `None`.
    pub session_affinity: String,
    /// Kubernetes' own object, passed on as it is.
    pub session_affinity_config: Option<serde_json::Value>,
}

/// With or without a cluster-set IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportType {
    /// With one.
    ClusterSetIp,
    /// Without.
    Headless,
}

/// A port of an exported service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportPort {
    /// Name, or empty.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// Application protocol, or empty.
    pub app_protocol: String,
    /// Number, never 0.
    pub port: u16,
}

impl Record for ServiceExport {
    const KIND: Kind = Kind::ServiceExports;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        let wire: Wire = json::decode(value)?;
        let name = net::object(suffix, &wire.cluster, wire.namespace, wire.name)?;
        let kind = match wire.kind.as_str() {
            "ClusterSetIP" => ExportType::ClusterSetIp,
            "Headless" => ExportType::Headless,
            other => return Err(RecordError::BadValue { field: "type", value: other.into() }),
        };
        if !matches!(wire.session_affinity.as_str(), "" | "None" | "ClientIP") {
            let value = wire.session_affinity.into();
            return Err(RecordError::BadValue { field: "sessionAffinity", value });
        }
        Ok(Self {
            cluster: wire.cluster,
            name,
            created: wire.created,
            ports: wire.ports.into_iter().map(ExportPort::decode).collect::<Result<_, _>>()?,
            kind,
            session_affinity: wire.session_affinity,
            session_affinity_config: wire.session_affinity_config,
        })
    }

    fn suffix(&self) -> String {
        self.name.to_string()
    }

    fn encode(&self) -> Vec<u8> {
        let kind = match self.kind {
            ExportType::ClusterSetIp => "ClusterSetIP",
            ExportType::Headless => "Headless",
        };
        json::encode(&Wire {
            cluster: self.cluster.clone(),
            name: self.name.name.clone(),
            namespace: self.name.namespace.clone(),
            created: self.created.clone(),
            ports: self.ports.iter().map(ExportPort::encode).collect(),
            kind: kind.into(),
            session_affinity: self.session_affinity.clone(),
            session_affinity_config: self.session_affinity_config.clone(),
        })
    }
}

impl ExportPort {
    fn decode(wire: WirePort) -> Result<Self, RecordError> {
        // Kubernetes' default.
        let protocol = if wire.protocol.is_empty() { Protocol::Tcp } else { wire.protocol.parse()? };
        let port = port::number(wire.port)?;
        Ok(Self { name: wire.name, protocol, app_protocol: wire.app_protocol, port })
    }

    fn encode(&self) -> WirePort {
        WirePort {
            name: self.name.clone(),
            protocol: self.protocol.to_string(),
            app_protocol: self.app_protocol.clone(),
            port: self.port.into(),
        }
    }
}

/// Cilium's `MCSAPIServiceSpec`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    cluster: String,
    name: String,
    namespace: String,
    #[serde(rename = "exportCreationTimestamp", default)]
    created: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    ports: Vec<WirePort>,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    session_affinity: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session_affinity_config: Option<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WirePort {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    protocol: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    app_protocol: String,
    port: u64,
}
