//! What encryption tells of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::UNIX_EPOCH;

use clustermesh_kvstore::record::WireguardKey;

use super::{Core, Keys, Refused, TunnelEnd};
use crate::netlink::{Steering, WireguardState};

/// How it stands between this node and another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// What goes there is encrypted.
    Encrypted,
    /// It has not answered yet.
    Waiting,
    /// Its record has no key.
    NoKey,
    /// Its key does not count.
    Refused(Refused),
    /// Known from an earlier life only.
    Unconfirmed,
}

impl Standing {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Encrypted,
        Self::Waiting,
        Self::NoKey,
        Self::Refused(Refused::OwnKey),
        Self::Refused(Refused::AnothersKey),
        Self::Unconfirmed,
    ];

    /// The word for metrics and the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::Waiting => "waiting",
            Self::NoKey => "no_key",
            Self::Refused(reason) => reason.as_str(),
            Self::Unconfirmed => "unconfirmed",
        }
    }
}

/// A node in the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedPeer {
    /// Its cluster.
    pub cluster: u16,
    /// Its name; empty if only an earlier life knew it.
    pub node: String,
    /// One of its underlay addresses.
    pub ip: Ipv4Addr,
    /// How it stands.
    pub standing: Standing,
    /// It is spoken to by this node's previous key.
    pub by_previous: bool,
    /// When the last handshake was, in seconds since the Unix epoch; 0: never.
    pub handshake: u64,
    /// Bytes from it.
    pub received: u64,
    /// Bytes to it.
    pub sent: u64,
}

/// A key of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedKey {
    /// Its public part.
    pub public: WireguardKey,
    /// When it was made, in seconds since the Unix epoch; 0: not known.
    pub made: u64,
}

/// How encryption is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// All addresses that are to be encrypted, in their order.
    pub peers: Vec<ReportedPeer>,
    /// This node's keys: the announced one, then one that is still in use.
    pub keys: Vec<ReportedKey>,
    /// Why the kernel does not follow; none: it does.
    pub error: Option<String>,
}

impl Report {
    pub(super) fn new(core: &Core, keys: &Keys, error: Option<String>) -> Self {
        let behind = core.behind();
        let mut states = States::new();
        for state in core.installed().peers.values() {
            state.allowed.iter().for_each(|ip| states.entry(*ip).or_default().push(state));
        }
        let peers = core.ends().map(|(ip, end)| peer(core, ip, end, &behind, &states)).collect();
        let made = keys.made().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let current = ReportedKey { public: keys.current().public(), made };
        let previous = keys.previous().map(|key| ReportedKey { public: key.public(), made: 0 });
        Self { peers, keys: [current].into_iter().chain(previous).collect(), error }
    }
}

/// By address: in every lane one at most.
type States<'a> = BTreeMap<Ipv4Addr, Vec<&'a WireguardState>>;

fn peer(
    core: &Core,
    ip: Ipv4Addr,
    end: &TunnelEnd,
    behind: &BTreeSet<Ipv4Addr>,
    states: &States<'_>,
) -> ReportedPeer {
    let node = end.node.as_ref();
    let name = node.map_or_else(String::new, |node| node.name.clone());
    let refused = core.refused().get(&(end.cluster, name.clone()));
    let steering = core.installed().steering.get(&ip);
    let standing = match (steering, node) {
        (Some(Steering::Encrypted(_)), _) => Standing::Encrypted,
        (_, None) => Standing::Unconfirmed,
        (_, Some(node)) if node.key.is_none() => Standing::NoKey,
        _ => refused.map_or(Standing::Waiting, |reason| Standing::Refused(*reason)),
    };
    // Of all lanes: counters go on while keys change.
    let states = states.get(&ip).filter(|_| refused.is_none()).into_iter().flatten();
    let (mut handshake, mut received, mut sent) = (0, 0, 0);
    for state in states {
        handshake = state.handshake.max(handshake);
        received += state.received;
        sent += state.sent;
    }
    let by_previous = behind.contains(&ip);
    ReportedPeer { cluster: end.cluster, node: name, ip, standing, by_previous, handshake, received, sent }
}
