//! What encryption tells of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use super::ipsec::{self, Way};
use super::{Core, Keys, Refused};
use crate::netlink::{Steering, WireguardState};
use crate::tunnels::TunnelEnd;

/// What encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// WireGuard.
    Wireguard,
    /// IPsec.
    Ipsec,
}

impl By {
    /// The word for the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard",
            Self::Ipsec => "ipsec",
        }
    }
}

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
    /// Its key can be no node's.
    BadKey,
    /// Known from an earlier life only.
    Unconfirmed,
}

impl Standing {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Encrypted,
        Self::Waiting,
        Self::NoKey,
        Self::Refused(Refused::OwnKey),
        Self::Refused(Refused::AnothersKey),
        Self::BadKey,
        Self::Unconfirmed,
    ];

    /// The word for metrics and the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::Waiting => "waiting",
            Self::NoKey => "no_key",
            Self::Refused(reason) => reason.as_str(),
            Self::BadKey => "bad_key",
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
    pub ip: IpAddr,
    /// How it stands.
    pub standing: Standing,
    /// By which it is, or would be.
    pub by: By,
    /// It is spoken to by this node's previous key.
    pub by_previous: bool,
    /// When it has answered last, in seconds since the Unix epoch; 0: never. By WireGuard: to a handshake. By IPsec it
    /// is when something came; Linux before 6.2 knows only when that was the first time.
    pub handshake: u64,
    /// Bytes from it.
    pub received: u64,
    /// Bytes to it.
    pub sent: u64,
}

/// A key of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportedKey {
    /// For what.
    pub by: By,
    /// Its public part.
    pub public: String,
    /// When it was made, in seconds since the Unix epoch; 0: not known.
    pub made: u64,
}

/// How encryption is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// All addresses that are to be encrypted, in their order.
    pub peers: Vec<ReportedPeer>,
    /// This node's keys: the announced ones, then one of WireGuard's that is still in use.
    pub keys: Vec<ReportedKey>,
    /// Why the kernel does not follow; none: it does.
    pub error: Option<String>,
}

impl Report {
    pub(super) fn of_wireguard(core: &Core, keys: &Keys) -> Self {
        let behind = core.behind();
        let mut states = States::new();
        for state in core.installed().peers.values() {
            state.allowed.iter().for_each(|ip| states.entry(*ip).or_default().push(state));
        }
        let peers = core.ends().map(|(ip, end)| peer(core, ip, end, &behind, &states)).collect();
        let key = |public: String, made| ReportedKey { by: By::Wireguard, public, made };
        let current = key(keys.current().public().to_string(), seconds(keys.made()));
        let previous = keys.previous().map(|previous| key(previous.public().to_string(), 0));
        Self { peers, keys: [current].into_iter().chain(previous).collect(), error: None }
    }

    pub(super) fn of_ipsec(core: &ipsec::Core, made: SystemTime) -> Self {
        let behind = core.behind();
        let mut sums: BTreeMap<IpAddr, (u64, u64, u64)> = BTreeMap::new();
        for (id, state) in &core.installed().states {
            let (_, sent, _) = sums.entry(id.destination).or_default();
            *sent += state.bytes;
            let (received, _, last) = sums.entry(id.source).or_default();
            *received += state.bytes;
            *last = state.last.max(*last);
        }
        let peers = core.ends().map(|(ip, end)| {
            let node = end.node.as_ref();
            let standing = match (core.installed().ways.get(&ip), node) {
                (Some(Way::Encrypted(_)), _) => Standing::Encrypted,
                (_, None) => Standing::Unconfirmed,
                (_, Some(node)) if node.ipsec.is_none() => Standing::NoKey,
                _ if core.is_bad(ip) => Standing::BadKey,
                _ => Standing::Waiting,
            };
            let (received, sent, handshake) = sums.get(&ip).copied().unwrap_or_default();
            let name = node.map_or_else(String::new, |node| node.name.clone());
            let (cluster, by_previous) = (end.cluster, behind.contains(&ip));
            let by = By::Ipsec;
            ReportedPeer { cluster, node: name, ip, standing, by, by_previous, handshake, received, sent }
        });
        let key = ReportedKey { by: By::Ipsec, public: core.public().to_string(), made: seconds(made) };
        Self { peers: peers.collect(), keys: vec![key], error: None }
    }

    /// Of both: each node as it is encrypted to, or as it would be first.
    pub(super) fn with(self, ipsec: Self) -> Self {
        let mut by_ipsec: BTreeMap<_, _> = ipsec.peers.into_iter().map(|peer| (peer.ip, peer)).collect();
        let peers = self.peers.into_iter().map(|wireguard| match by_ipsec.remove(&wireguard.ip) {
            None => wireguard,
            Some(ipsec) => {
                let (received, sent) = (wireguard.received + ipsec.received, wireguard.sent + ipsec.sent);
                let is_ipsec = ipsec.standing == Standing::Encrypted
                    || (wireguard.standing != Standing::Encrypted && ipsec.standing != Standing::NoKey);
                let chosen = if is_ipsec { ipsec } else { wireguard };
                ReportedPeer { received, sent, ..chosen }
            }
        });
        Self {
            peers: peers.collect(),
            keys: [ipsec.keys, self.keys].concat(),
            error: self.error.or(ipsec.error),
        }
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// By address: in every lane one at most.
type States<'a> = BTreeMap<IpAddr, Vec<&'a WireguardState>>;

fn peer(
    core: &Core,
    ip: IpAddr,
    end: &TunnelEnd,
    behind: &BTreeSet<IpAddr>,
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
    let (cluster, by, by_previous) = (end.cluster, By::Wireguard, behind.contains(&ip));
    ReportedPeer { cluster, node: name, ip, standing, by, by_previous, handshake, received, sent }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(by: By, standings: &[Standing]) -> Report {
        let peer = |(last, standing): (u8, &Standing)| ReportedPeer {
            cluster: 2,
            node: format!("node{last}"),
            ip: [172, 31, 2, last].into(),
            standing: *standing,
            by,
            by_previous: false,
            handshake: 0,
            received: 1,
            sent: 2,
        };
        let keys = vec![ReportedKey { by, public: by.as_str().into(), made: 0 }];
        Report { peers: (1..).zip(standings).map(peer).collect(), keys, error: None }
    }

    #[test]
    fn of_both_a_node_is_shown_as_it_is_encrypted_to_or_would_be_first() {
        let wireguard =
            [Standing::Encrypted, Standing::Encrypted, Standing::NoKey, Standing::Waiting, Standing::NoKey];
        let ipsec =
            [Standing::Waiting, Standing::Encrypted, Standing::BadKey, Standing::NoKey, Standing::NoKey];
        let both = report(By::Wireguard, &wireguard).with(report(By::Ipsec, &ipsec));
        let shown: Vec<_> = both.peers.iter().map(|peer| (peer.standing, peer.by)).collect();
        let wanted = [
            (Standing::Encrypted, By::Wireguard),
            (Standing::Encrypted, By::Ipsec),
            (Standing::BadKey, By::Ipsec),
            (Standing::Waiting, By::Wireguard),
            (Standing::NoKey, By::Wireguard),
        ];
        assert_eq!(shown, wanted);
        assert!(both.peers.iter().all(|peer| (peer.received, peer.sent) == (2, 4)));
        assert_eq!(both.keys.iter().map(|key| key.by).collect::<Vec<_>>(), [By::Ipsec, By::Wireguard]);
    }
}
