//! IPsec between nodes: ESP in transport mode (RFC 4303) around the tunnel packets themselves, with AES-GCM (RFC 4106).
//!
//! ```text
//! announced public keys  ->  agree (pure)  ->  core (plain)  ->  states and policies   (side, edge)
//! ```
//!
//! A security association goes one way, from one underlay address to another. Both its ends compute its key and SPI
//! from their private keys, the other's public key and the two addresses: nothing secret is ever sent. A node's
//! private key is made when its agent starts, lives in memory only, and is forgotten when the next one is made; the
//! kernel keeps the associations that came of it for as long as somebody uses them.
//!
//! AES-GCM must never see a key and a counter twice. So an association is installed once: [`Core`] remembers what it
//! has installed by its present key, and where one of those is lacking later asks for a new key instead.
//!
//! A policy names the SPI that packets to a node go by. It moves to a new one when a packet has come in by the other
//! direction of the same agreement: that end sends nothing before it can receive. While nothing has come, the ends
//! ask each other by single packets of their own ([`Hello`]).

mod agree;
mod core;
mod handover;
mod leave;
mod old;
mod peer;
mod side;

use std::collections::BTreeMap;
use std::net::IpAddr;

pub use self::core::Core;
pub use agree::{Agree, Association, NodeKey, Pair};
pub(crate) use handover::LeftOver;
pub use leave::leave;
pub(crate) use leave::leave_quietly;
pub use side::IpsecSide;

/// UDP port of [`Hello`]s. They go by ESP only: no other firewall than the node's own sees it.
pub const HELLO_PORT: u16 = 51_870;

/// A security association's name in the kernel, together with the protocol, which is always ESP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StateId {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// The receiver tells associations apart by it; above 255 (RFC 4303, section 2.1).
    pub spi: u32,
}

/// What has gone by an association.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateUse {
    /// Packets, of which those that come in are authentic and no repetitions.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When the last one was, in seconds since the Unix epoch; 0: there was none.
    pub last: u64,
}

/// What becomes of tunnel packets to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the association with this SPI. If that is lacking they are dropped.
    Encrypted(u32),
    /// They are dropped.
    Blocked,
}

/// A packet that shows the other end that this one can receive what goes by the same agreement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// To which address.
    pub to: IpAddr,
    /// Nothing has come from there: it is to say hello, too.
    pub asks: bool,
}

/// Who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Our cluster.
    pub cluster: u16,
    /// Our node's name.
    pub node: String,
    /// The source of our tunnel packets.
    pub ip: IpAddr,
}

/// What the kernel has of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Associations, those of earlier lives among them.
    pub states: BTreeMap<StateId, StateUse>,
    /// Policies about tunnel packets from the own address, by the other one.
    pub ways: BTreeMap<IpAddr, Way>,
    /// SPIs by which [`Hello`]s go.
    pub hellos: BTreeMap<IpAddr, u32>,
}

/// Something to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// An association that was not there before.
    Add {
        /// Which.
        association: Association,
        /// It is for what comes.
        inbound: bool,
    },
    /// By which SPI a hello to an address goes; none: there is no policy for it.
    Greet(IpAddr, Option<u32>),
    /// What becomes of tunnel packets to an address; none: they go as they are.
    Steer(IpAddr, Option<Way>),
    /// An association that nobody uses.
    Remove(StateId),
}
