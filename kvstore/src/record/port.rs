use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::RecordError;

/// Layer 4 protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// `TCP`, `UDP` or `SCTP`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// The number in IP headers.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = RecordError;
    fn from_str(text: &str) -> Result<Self, RecordError> {
        match text {
            "TCP" => Ok(Self::Tcp),
            "UDP" => Ok(Self::Udp),
            "SCTP" => Ok(Self::Sctp),
            other => Err(RecordError::BadProtocol(other.into())),
        }
    }
}

/// Protocol and number of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port {
    /// The protocol.
    pub protocol: Protocol,
    /// The number, never 0.
    pub port: u16,
}

/// Ports by name; the name of a service's only port may be empty.
pub type PortMap = BTreeMap<String, Port>;

pub(super) fn number(port: u64) -> Result<u16, RecordError> {
    u16::try_from(port).ok().filter(|port| *port != 0).ok_or(RecordError::BadPort(port))
}

/// A port as Cilium writes it.
#[derive(Serialize, Deserialize)]
pub(super) struct WirePort {
    #[serde(rename = "Protocol")]
    protocol: String,
    #[serde(rename = "Port")]
    port: u64,
}

pub(super) type WirePortMap = BTreeMap<String, WirePort>;

pub(super) fn decode(ports: WirePortMap) -> Result<PortMap, RecordError> {
    ports
        .into_iter()
        .map(|(name, wire)| {
            let port = Port { protocol: wire.protocol.parse()?, port: number(wire.port)? };
            Ok((name, port))
        })
        .collect()
}

pub(super) fn encode(ports: &PortMap) -> WirePortMap {
    ports
        .iter()
        .map(|(name, port)| {
            let wire = WirePort { protocol: port.protocol.to_string(), port: port.port.into() };
            (name.clone(), wire)
        })
        .collect()
}
