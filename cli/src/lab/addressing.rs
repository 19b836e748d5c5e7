//! Which address everything in a lab gets. Plain arithmetic, the same on every run.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// At most one prefix per family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cidrs {
    pub(crate) v4: Option<Ipv4Net>,
    pub(crate) v6: Option<Ipv6Net>,
}

impl Cidrs {
    /// The prefixes, IPv4 first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = IpNet> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// Which families have a prefix: (IPv4, IPv6).
    pub(crate) fn families(&self) -> (bool, bool) {
        (self.v4.is_some(), self.v6.is_some())
    }

    /// Whether a prefix of one contains one of the other.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.iter().any(|a| other.iter().any(|b| a.contains(&b) || b.contains(&a)))
    }

    /// The `n`th address of each prefix (0 is the network address), IPv4 first.
    pub(crate) fn nth(&self, n: u32) -> Vec<IpAddr> {
        self.iter().map(|net| nth_address(net, n)).collect()
    }

    /// How many numbers [`Cidrs::nth`] may be asked for: hosts of the smaller prefix.
    fn hosts(&self) -> u32 {
        self.iter().map(hosts).min().unwrap_or(0)
    }
}

impl From<IpNet> for Cidrs {
    fn from(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => Self { v4: Some(net), v6: None },
            IpNet::V6(net) => Self { v4: None, v6: Some(net) },
        }
    }
}

impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.iter().map(|net| net.to_string()).collect();
        f.write_str(&texts.join(", "))
    }
}

/// The part of the cluster's pod CIDRs that node `index` of `count` gets: a /24 and a /64 as
/// kube-controller-manager cuts them, smaller ones if the cluster's prefix is too small for that.
///
/// # Errors
/// If the prefixes are too small for the nodes.
pub(crate) fn node_cidrs(cluster: &Cidrs, (index, count): (usize, usize)) -> Result<Cidrs, String> {
    let bits = u8::try_from(count.next_power_of_two().trailing_zeros()).unwrap_or(u8::MAX);
    let too_small =
        |net: IpNet| format!("{net} is too small for {count} nodes; use a shorter prefix, such as a /16");
    let v4 = cluster.v4.map(|net| {
        let length = net.prefix_len().saturating_add(bits).max(24);
        net.subnets(length)
            .ok()
            .filter(|_| length <= 28)
            .and_then(|mut s| s.nth(index))
            .ok_or(too_small(net.into()))
    });
    let v6 = cluster.v6.map(|net| {
        let length = net.prefix_len().saturating_add(bits).max(64);
        net.subnets(length)
            .ok()
            .filter(|_| length <= 120)
            .and_then(|mut s| s.nth(index))
            .ok_or(too_small(net.into()))
    });
    Ok(Cidrs { v4: v4.transpose()?, v6: v6.transpose()? })
}

/// Underlay address of node `node` of cluster `cluster.0` of `cluster.1`: in a /16 it is
/// `a.b.CLUSTER.NODE`, both counted from one, which is easy to read in traces. Of an IPv6 prefix these are the last two
/// bytes.
///
/// # Errors
/// If the underlay is too small.
pub(crate) fn underlay_address(
    underlay: IpNet,
    cluster: (usize, usize),
    node: usize,
) -> Result<IpAddr, String> {
    let bits = underlay.max_prefix_len() - underlay.prefix_len();
    let size = 1_usize << bits.min(UNDERLAY_BITS);
    let stride = (size / (cluster.1 + 1).next_power_of_two()).min(256);
    let offset = (cluster.0 + 1) * stride + node + 1;
    if node + 2 > stride {
        let larger = underlay.max_prefix_len() - UNDERLAY_BITS;
        return Err(format!("{underlay} is too small for these clusters and nodes; use a /{larger}"));
    }
    Ok(nth_address(underlay, u32::try_from(offset).map_err(|e| e.to_string())?))
}

/// The last address of an underlay that a host can have: it is no node's.
pub(crate) fn last_of_underlay(underlay: IpNet) -> IpAddr {
    let bits = underlay.max_prefix_len() - underlay.prefix_len();
    nth_address(underlay, (1 << bits.min(UNDERLAY_BITS)) - 2)
}

/// So many bits of an underlay's addresses are used.
const UNDERLAY_BITS: u8 = 16;

/// The next free host number for a pod on a node: after `last`, round and round, so that an address
/// is not handed out again right after its pod has gone.
pub(crate) fn next_pod_number(cidrs: &Cidrs, last: u32, used: &BTreeSet<u32>) -> Option<u32> {
    // 0 is the network, 1 the node itself.
    let (first, end) = (2, cidrs.hosts());
    let start = if (first..end).contains(&last) { last + 1 } else { first };
    (start..end).chain(first..start).find(|n| !used.contains(n))
}

/// A ClusterIP in `cidr` for the service `name` ("namespace/name"): where its hash points, or the next
/// free address. The same name gets the same address in every lab.
pub(crate) fn cluster_ip(cidr: IpNet, name: &str, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    // The first addresses are left to fixed ones, as Kubernetes does.
    let first = 10;
    let count = hosts(cidr).saturating_sub(first);
    if count == 0 {
        return None;
    }
    // The remainder is below count, which is a u32.
    let start = u32::try_from(fnv1a(name.as_bytes()) % u64::from(count)).ok()?;
    (start..count).chain(0..start).map(|n| nth_address(cidr, first + n)).find(|ip| !taken.contains(ip))
}

/// A locally administered MAC address that belongs to `name`.
pub(crate) fn mac(name: &str) -> String {
    let h = fnv1a(name.as_bytes()).to_be_bytes();
    format!("02:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", h[0], h[1], h[2], h[3], h[4])
}

/// Eight hex digits that belong to `name`; for interface names, which hold 15 characters.
pub(crate) fn short_hash(name: &str) -> String {
    let hash = fnv1a(name.as_bytes());
    format!("{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff))
}

/// FNV-1a: stable over versions and machines, unlike the standard library's hasher.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Number of usable host numbers, at most 65,535: nobody looks at more in a lab.
fn hosts(net: IpNet) -> u32 {
    let bits = match net {
        IpNet::V4(net) => 32 - net.prefix_len(),
        IpNet::V6(net) => 128 - net.prefix_len(),
    };
    (1_u32 << bits.min(16)) - 1
}

fn nth_address(net: IpNet, n: u32) -> IpAddr {
    match net {
        IpNet::V4(net) => Ipv4Addr::from_bits(net.network().to_bits() + n).into(),
        IpNet::V6(net) => Ipv6Addr::from_bits(net.network().to_bits() + u128::from(n)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs(v4: &str, v6: &str) -> Cidrs {
        Cidrs { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    #[test]
    fn nodes_get_disjoint_parts() {
        for (v4, v6, count) in
            [("10.1.0.0/16", "fd00::/48", 2), ("10.1.0.0/24", "fd00::/64", 5), ("10.1.0.0/22", "", 64)]
        {
            let cluster = cidrs(v4, v6);
            let parts: Vec<Cidrs> = (0..count).map(|i| node_cidrs(&cluster, (i, count)).unwrap()).collect();
            for (i, part) in parts.iter().enumerate() {
                assert_eq!(part.families(), cluster.families());
                assert!(part.overlaps(&cluster));
                assert!(parts[..i].iter().all(|other| !other.overlaps(part)), "{part}");
            }
        }
        assert!(node_cidrs(&cidrs("10.1.0.0/26", ""), (0, 8)).is_err());
    }

    #[test]
    fn pod_numbers_go_round_before_they_are_used_again() {
        let net = cidrs("10.1.0.0/29", "fd00::/64");
        let mut used = BTreeSet::new();
        assert_eq!(next_pod_number(&net, 0, &used), Some(2));
        used.extend([2, 3]);
        assert_eq!(next_pod_number(&net, 3, &used), Some(4));
        used.remove(&2);
        assert_eq!(next_pod_number(&net, 3, &used), Some(4), "2 was freed but 4 was never used");
        assert_eq!(next_pod_number(&net, 6, &used), Some(2));
        used.extend(2..7);
        assert_eq!(next_pod_number(&net, 4, &used), None, "7 is the broadcast address");
    }

    #[test]
    fn cluster_ips_are_stable_and_distinct() {
        for cidr in ["10.101.0.0/16", "10.101.0.0/24", "fd00:101::/112"] {
            let cidr: IpNet = cidr.parse().unwrap();
            let first = cluster_ip(cidr, "shop/orders", &BTreeSet::new()).unwrap();
            assert!(cidr.contains(&first));
            let second = cluster_ip(cidr, "shop/orders", &BTreeSet::from([first])).unwrap();
            assert_ne!(first, second);
        }
        let small: IpNet = "10.101.0.0/28".parse().unwrap();
        let mut taken = BTreeSet::new();
        while let Some(ip) = cluster_ip(small, "shop/orders", &taken) {
            assert!(taken.insert(ip) && small.contains(&ip));
        }
        assert_eq!(taken.len(), 5, ".10 to .14 of sixteen");
    }

    #[test]
    fn underlay_is_readable_and_bounded() {
        let wide: IpNet = "172.31.0.0/16".parse().unwrap();
        let address = |ip: &str| ip.parse::<IpAddr>().unwrap();
        assert_eq!(underlay_address(wide, (1, 3), 4).unwrap(), address("172.31.2.5"));
        assert_eq!(last_of_underlay(wide), address("172.31.255.254"));
        let narrow: IpNet = "192.0.2.0/24".parse().unwrap();
        assert_eq!(underlay_address(narrow, (0, 2), 0).unwrap(), address("192.0.2.65"));
        assert_eq!(last_of_underlay(narrow), address("192.0.2.254"));
        for v6 in ["fd00:172:31::/48", "fd00:172:31::/112"] {
            let v6: IpNet = v6.parse().unwrap();
            assert_eq!(underlay_address(v6, (1, 3), 4).unwrap(), address("fd00:172:31::205"));
            assert_eq!(last_of_underlay(v6), address("fd00:172:31::fffe"));
        }
        assert!(underlay_address(narrow, (1, 2), 63).is_err());
    }
}
