//! WireGuard between nodes: what is encrypted is the tunnel packet from one node's underlay address to another's.
//!
//! ```text
//! mesh (who has which underlay address, and its key)  ->  core  ->  device, peers, steering   (keep, edge)
//! ```
//!
//! [`Core`] is plain: it knows the ends of tunnels and what is installed, and says what to do next. [`keep`] reads
//! and writes the kernel. The key is this node's own ([`PrivateKey`]); its public part goes by [`announce`] into
//! the own etcd, from where the exporter puts it into the node's record. Sessions, keys and routes survive the
//! agent: what is installed is taken over, and a peer is changed in place. Keys are replaced without loss, each in a
//! [`Lane`] of its own.
//!
//! The kernel looks up no more than a rule and a route per packet. WireGuard itself proves the outer source of what
//! arrives: a peer may only speak from the underlay addresses of its node.

pub mod announce;
mod board;
mod claims;
mod core;
mod devices;
mod keep;
mod lane;
mod leave;
mod private_key;
mod report;
mod rotate;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clustermesh_kvstore::record::WireguardKey;

pub use self::core::{Core, Installed, Own, PeerId, Step};
pub use board::TunnelBoard;
pub use claims::Refused;
pub(crate) use devices::device_name;
pub use keep::{Keeper, Lines};
pub use lane::{Lane, Slot};
pub use leave::leave;
pub(crate) use leave::leave_quietly;
pub use private_key::{KeyError, Keys, PrivateKey, file as key_file, forget as forget_key};
pub use report::{Report, ReportedKey, ReportedPeer, Standing};
pub use rotate::{Rotate, RotateDesk, RotateError};

/// WireGuard over IPv4 adds a header of 20 bytes, UDP's 8, its own 16, and a tag of 16.
pub const OVERHEAD: u32 = 60;

/// Between which nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of different clusters.
    Clusters,
    /// All.
    Nodes,
}

/// What the operator wants.
#[derive(Clone, Debug)]
pub struct EncryptionOptions {
    /// Between which nodes.
    pub scope: Scope,
    /// What should be encrypted is never sent or taken in clear text.
    pub strict: bool,
    /// Lowest of four UDP ports of WireGuard, the same in the whole mesh.
    pub port: u16,
    /// Name of the WireGuard devices, without their number.
    pub device: String,
    /// Where the private key is.
    pub state_dir: PathBuf,
    /// The age at which a key is replaced; none: when somebody asks for it.
    pub rotation: Option<Duration>,
}

/// The node at an underlay address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelEnd {
    /// Its cluster.
    pub cluster: u16,
    /// Its name, and what its record says; none: an earlier life knew the address, and nobody has confirmed it.
    pub node: Option<EndNode>,
}

/// What a node's record says about tunnels to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndNode {
    /// Its name.
    pub name: String,
    /// Where its tunnels end.
    pub tunnel_ip: Option<Ipv4Addr>,
    /// Its public key, if it has one.
    pub key: Option<WireguardKey>,
}

/// Addresses with another end than before; none: no node has it any more.
pub type EndChanges = Vec<(Ipv4Addr, Option<TunnelEnd>)>;
