//! The values that stand in etcd, one file for each kind.
//!
//! Bytes come in, checked types come out, and the other way round. [`Record::decode`] checks what can be
//! checked without knowing the peer: syntax, addresses and masks, ports, sizes, and that a value is what
//! its key says. Whether *this* peer may say so (its cluster name and ID, its identities, its CIDRs) is
//! for the reader to judge.
//!
//! [`Record::encode`] gives the same bytes as Cilium's exporter (Go's `encoding/json`): field order,
//! `null` and omitted fields, map keys in order of their text, `<`, `>` and `&` escaped. Unknown fields
//! are ignored, so newer peers may add some.

mod announcement;
mod backends;
mod balancing;
mod cluster_config;
mod error;
mod external;
mod identity;
mod ip;
mod ipsec;
mod json;
mod local_service;
mod net;
mod node;
mod policy;
mod port;
mod service;
mod service_export;
mod service_reader;
mod wireguard;

pub use announcement::NodeAnnouncement;
pub use backends::Backends;
pub use balancing::{Balancing, Nearness};
pub use cluster_config::ClusterConfig;
pub use error::{RecordError, Text};
pub use external::{Algorithm, External};
pub use identity::IdentityRecord;
pub use ip::{IpRecord, NamedPort};
pub use ipsec::IpsecKey;
pub use local_service::{Affinity, BackendState, Failover, LocalBackend, LocalService};
pub use node::{Node, NodeAddress, NodeAddressKind};
pub use policy::{
    Entity, LabelSelector, LocalPolicy, Operator, Peer, PolicyKind, PolicyName, PolicyRule, PolicySection,
    PortMatch, Requirement, Traffic,
};
pub use port::{Port, PortMap, Protocol};
pub use service::{Service, Zone};
pub use service_export::{ExportPort, ExportType, ServiceExport};
pub use service_reader::ServiceReader;
pub use wireguard::WireguardKey;

use crate::key::Kind;

/// The longest value that is decoded, in bytes: etcd's own default limit for a request.
pub const MAX_VALUE: usize = 1_572_864;
/// The longest name of an object in bytes (Kubernetes: a DNS subdomain).
pub const MAX_NAME: usize = 253;

/// A kind of record: key suffix (what follows the prefix of its [`Kind`]) and value.
pub trait Record: Sized {
    /// The kind whose prefix holds these records.
    const KIND: Kind;

    /// Reads and checks a record. `suffix` is the key without the prefix.
    ///
    /// # Errors
    /// See [`RecordError`]; all of them are the peer's fault.
    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError>;

    /// The key without the prefix.
    fn suffix(&self) -> String;

    /// The value.
    fn encode(&self) -> Vec<u8>;
}
