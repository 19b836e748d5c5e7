//! Which node a public key belongs to. Records of other clusters may say what they like.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use clustermesh_kvstore::record::WireguardKey;

use crate::tunnels::TunnelEnd;

/// A node, by cluster and name.
pub(super) type NodeName = (u16, String);

/// Why a node's key does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    /// It is this node's own.
    OwnKey,
    /// Another node has it. The own cluster's come first, then whose address is installed with it.
    AnothersKey,
}

impl Refused {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::OwnKey, Self::AnothersKey];

    /// The word for counters.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OwnKey => "own_key",
            Self::AnothersKey => "key_of_another_node",
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A key's node, with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) node: NodeName,
    pub(super) ips: BTreeSet<IpAddr>,
    pub(super) tunnel_ip: Option<IpAddr>,
}

/// Who has which key, and who claims one in vain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) holders: BTreeMap<WireguardKey, Holder>,
    pub(super) refused: BTreeMap<NodeName, Refused>,
}

impl Claims {
    /// Decides over the ends in scope; `own_keys` are nobody else's. `installed` tells whether a key's peer has an address by now.
    pub(super) fn decide<'a>(
        ends: impl Iterator<Item = (IpAddr, &'a TunnelEnd)>,
        own_cluster: u16,
        own_keys: &[WireguardKey],
        installed: impl Fn(&WireguardKey, IpAddr) -> bool,
    ) -> Self {
        let mut claimants: BTreeMap<WireguardKey, BTreeMap<NodeName, Holder>> = BTreeMap::new();
        for (ip, end) in ends {
            let Some(node) = &end.node else { continue };
            let Some(key) = node.key else { continue };
            let name = (end.cluster, node.name.clone());
            let holder = claimants.entry(key).or_default().entry(name.clone());
            let empty = Holder { node: name, ips: BTreeSet::new(), tunnel_ip: node.tunnel_ip };
            holder.or_insert(empty).ips.insert(ip);
        }
        let mut claims = Self::default();
        for (key, claimants) in claimants {
            if own_keys.contains(&key) {
                claims.refused.extend(claimants.into_keys().map(|node| (node, Refused::OwnKey)));
                continue;
            }
            let rank = |holder: &Holder| {
                let held = holder.ips.iter().any(|ip| installed(&key, *ip));
                (holder.node.0 != own_cluster, !held, holder.node.clone())
            };
            let Some(best) = claimants.values().min_by_key(|holder| rank(holder)).cloned() else { continue };
            let others = claimants.into_keys().filter(|node| *node != best.node);
            claims.refused.extend(others.map(|node| (node, Refused::AnothersKey)));
            claims.holders.insert(key, best);
        }
        claims
    }
}
