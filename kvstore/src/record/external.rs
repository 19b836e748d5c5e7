use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::json::null_is_empty;
use super::{RecordError, net, port};

/// How a service of the own cluster is reached from outside of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct External {
    /// Addresses that whoever routes there sends to any node: of load balancers, and `externalIPs`. With the service's
    /// ports.
    pub ips: BTreeSet<IpAddr>,
    /// Ports on every node's own addresses, by the names of the service's ports.
    pub node_ports: BTreeMap<String, u16>,
    /// Only backends of the node at which a call arrives answer it (`externalTrafficPolicy: Local`).
    pub only_node: bool,
    /// How such a call finds a backend; none: as the node's agent was told.
    pub algorithm: Option<Algorithm>,
}

/// How a call from outside finds one of several backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Algorithm {
    /// Each node chooses by itself.
    Random,
    /// All nodes choose alike, and few clients move when backends come or go.
    Maglev,
}

impl External {
    /// Whether it is not reached at all.
    pub fn is_empty(&self) -> bool {
        self.ips.is_empty() && self.node_ports.is_empty()
    }

    pub(super) fn decode(wire: WireExternal) -> Result<Self, RecordError> {
        let ips = wire.ips.iter().map(|ip| net::address("external", ip)).collect::<Result<_, _>>()?;
        let node_ports = wire.node_ports.into_iter().map(|(name, number)| Ok((name, port::number(number)?)));
        let node_ports = node_ports.collect::<Result<_, RecordError>>()?;
        Ok(Self { ips, node_ports, only_node: wire.only_node, algorithm: wire.algorithm })
    }

    pub(super) fn encode(&self) -> WireExternal {
        WireExternal {
            ips: self.ips.iter().map(IpAddr::to_string).collect(),
            node_ports: self.node_ports.iter().map(|(name, port)| (name.clone(), (*port).into())).collect(),
            only_node: self.only_node,
            algorithm: self.algorithm,
        }
    }
}

/// Part of [`super::LocalService`]'s JSON.
#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WireExternal {
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    ips: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    node_ports: BTreeMap<String, u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    only_node: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    algorithm: Option<Algorithm>,
}

impl WireExternal {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
