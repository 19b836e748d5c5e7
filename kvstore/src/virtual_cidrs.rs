//! Virtual addresses for the pods of a cluster whose own ones are taken.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Pod prefixes of a cluster and the virtual ones by which they are known here, each of the same length. An address
/// has one counterpart, so that nobody needs to keep state.
///
/// Only readers of the cluster's records know of it: records and packets on the wire have the real addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "BTreeMap<IpNet, IpNet>", try_from = "BTreeMap<IpNet, IpNet>")]
pub struct VirtualCidrs(Vec<Pair>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    real: IpNet,
    virtual_: IpNet,
}

/// Prefixes that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtualCidrError {
    /// One address is to become several, or the other way round.
    #[error("{real} and {virtual_} are not of one family and length")]
    Unequal {
        /// The cluster's.
        real: IpNet,
        /// In its place.
        virtual_: IpNet,
    },
    /// Two pairs name one address.
    #[error("{0} overlaps with {1}")]
    Overlap(IpNet, IpNet),
    /// More than [`VirtualCidrs::MAX`].
    #[error("more than {} prefixes", VirtualCidrs::MAX)]
    TooMany,
    /// An address in place of a prefix.
    #[error("{0} is not possible; write {trunc} if that is meant", trunc = .0.trunc())]
    HostBits(IpNet),
    /// No pod has such addresses.
    #[error("{0} holds addresses that no pod can have")]
    Implausible(IpNet),
    /// The checksums of TCP, UDP and ICMPv6 would be wrong.
    #[error(
        "the 16-bit words of {virtual_} have another sum than those of {real}, and checksums of IPv6 packets cover \
         them; {neutral} would do"
    )]
    Sum {
        /// The cluster's.
        real: Box<IpNet>,
        /// In its place.
        virtual_: Box<IpNet>,
        /// What could be in its place.
        neutral: Box<IpNet>,
    },
}

impl VirtualCidrs {
    /// Prefixes that a cluster can have.
    pub const MAX: usize = 16;

    /// Checks pairs of a real and a virtual prefix.
    ///
    /// # Errors
    /// They are no such pairs.
    pub fn new(pairs: impl IntoIterator<Item = (IpNet, IpNet)>) -> Result<Self, VirtualCidrError> {
        let mut all: Vec<Pair> = Vec::new();
        for (real, virtual_) in pairs {
            let pair = Pair { real, virtual_ };
            pair.check()?;
            if all.len() == Self::MAX {
                return Err(VirtualCidrError::TooMany);
            }
            for other in &all {
                let crossed = [(pair.real, other.real), (pair.virtual_, other.virtual_)];
                for (a, b) in crossed {
                    if overlap(a, b) {
                        return Err(VirtualCidrError::Overlap(a, b));
                    }
                }
            }
            all.push(pair);
        }
        all.sort_by_key(|pair| pair.real);
        Ok(Self(all))
    }

    /// Whether no prefix has a virtual one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Pairs of a real and a virtual prefix, in order.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, IpNet)> {
        self.0.iter().map(|pair| (pair.real, pair.virtual_))
    }

    /// By which address a pod of the cluster is known. None: its own address is another pod's virtual one.
    pub fn known_by(&self, ip: IpAddr) -> Option<IpAddr> {
        match self.0.iter().find(|pair| pair.real.contains(&ip)) {
            Some(pair) => Some(turn(ip, pair)),
            None if self.0.iter().any(|pair| pair.virtual_.contains(&ip)) => None,
            None => Some(ip),
        }
    }

    /// By which prefix a pod prefix of the cluster is known. None: some of its addresses have no counterpart, or
    /// are virtual ones.
    pub fn prefix_known_by(&self, net: IpNet) -> Option<IpNet> {
        let Some(pair) = self.0.iter().find(|pair| pair.real.contains(&net)) else {
            let touches = |pair: &Pair| overlap(pair.real, net) || overlap(pair.virtual_, net);
            return (!self.0.iter().any(touches)).then_some(net);
        };
        IpNet::new(turn(net.addr(), pair), net.prefix_len()).ok()
    }

    /// The address that the pod itself has.
    pub fn real(&self, ip: IpAddr) -> IpAddr {
        self.0.iter().find(|pair| pair.virtual_.contains(&ip)).map_or(ip, |pair| turn(ip, pair))
    }

    /// Whether a prefix lies in a virtual one.
    pub fn is_virtual(&self, net: IpNet) -> bool {
        self.0.iter().any(|pair| pair.virtual_.contains(&net))
    }
}

impl From<VirtualCidrs> for BTreeMap<IpNet, IpNet> {
    fn from(cidrs: VirtualCidrs) -> Self {
        cidrs.iter().collect()
    }
}

impl TryFrom<BTreeMap<IpNet, IpNet>> for VirtualCidrs {
    type Error = VirtualCidrError;

    fn try_from(pairs: BTreeMap<IpNet, IpNet>) -> Result<Self, VirtualCidrError> {
        Self::new(pairs)
    }
}

impl fmt::Display for VirtualCidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (real, virtual_)) in self.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{real} as {virtual_}")?;
        }
        Ok(())
    }
}

impl Pair {
    fn check(&self) -> Result<(), VirtualCidrError> {
        let Self { real, virtual_ } = *self;
        if real.addr().is_ipv4() != virtual_.addr().is_ipv4() || real.prefix_len() != virtual_.prefix_len() {
            return Err(VirtualCidrError::Unequal { real, virtual_ });
        }
        if overlap(real, virtual_) {
            return Err(VirtualCidrError::Overlap(virtual_, real));
        }
        for net in [real, virtual_] {
            if net.trunc() != net {
                return Err(VirtualCidrError::HostBits(net));
            }
            if !is_plausible(net) {
                return Err(VirtualCidrError::Implausible(net));
            }
        }
        if let (IpNet::V6(from), IpNet::V6(to)) = (real, virtual_)
            && sum(from.network()) != sum(to.network())
        {
            let neutral = neutral(from, to).map_or(real, IpNet::from);
            let [real, virtual_, neutral] = [real, virtual_, neutral].map(Box::new);
            return Err(VirtualCidrError::Sum { real, virtual_, neutral });
        }
        Ok(())
    }
}

/// The address on the other side of a pair: the bits in which the prefixes differ are turned over.
fn turn(ip: IpAddr, pair: &Pair) -> IpAddr {
    match (ip, pair.real.network(), pair.virtual_.network()) {
        (IpAddr::V4(ip), IpAddr::V4(a), IpAddr::V4(b)) => {
            Ipv4Addr::from_bits(ip.to_bits() ^ a.to_bits() ^ b.to_bits()).into()
        }
        (IpAddr::V6(ip), IpAddr::V6(a), IpAddr::V6(b)) => {
            Ipv6Addr::from_bits(ip.to_bits() ^ a.to_bits() ^ b.to_bits()).into()
        }
        // An address that a prefix holds is of its family.
        _ => ip,
    }
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// As wide as pod prefixes can be, and with no addresses in them that stay on a link or a machine. 240.0.0.0/4 is
/// fine: nobody else uses it, and Linux routes it.
fn is_plausible(net: IpNet) -> bool {
    let reserved = match net {
        IpNet::V4(_) => {
            ["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"].as_slice()
        }
        IpNet::V6(_) => ["::/16", "fe80::/10", "ff00::/8"].as_slice(),
    };
    let narrowest = if net.addr().is_ipv4() { 8 } else { 16 };
    let mut reserved = reserved.iter().filter_map(|text| text.parse().ok());
    net.prefix_len() >= narrowest && !reserved.any(|reserved| overlap(net, reserved))
}

/// Of the 16-bit words, as the checksums of transport protocols have it (RFC 1071); two sums that mean the same are
/// equal.
fn sum(ip: Ipv6Addr) -> u32 {
    ip.segments().iter().map(|word| u32::from(*word)).sum::<u32>() % 0xffff
}

/// A prefix near `wanted` whose words have the sum of those of `real`, as in RFC 6296: one whole word of the prefix
/// makes up for the others. None if it has no whole word besides the first.
pub fn neutral(real: ipnet::Ipv6Net, wanted: ipnet::Ipv6Net) -> Option<ipnet::Ipv6Net> {
    let last = usize::from(wanted.prefix_len() / 16).checked_sub(1).filter(|last| *last > 0)?;
    let mut words = wanted.network().segments();
    words[last] = 0;
    let missing = (sum(real.network()) + 0xffff - sum(words.into())) % 0xffff;
    words[last] = u16::try_from(missing).ok()?;
    ipnet::Ipv6Net::new(words.into(), wanted.prefix_len()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn of(pairs: &[(&str, &str)]) -> Result<VirtualCidrs, String> {
        let pairs = pairs.iter().map(|(real, virtual_)| (net(real), net(virtual_)));
        VirtualCidrs::new(pairs).map_err(|error| error.to_string())
    }

    #[test]
    fn addresses_have_one_counterpart() {
        let cidrs = of(&[("10.1.0.0/16", "241.2.0.0/16"), ("fd00:10:1::/48", "fd00:f:2::/48")]).unwrap();
        for (real, virtual_) in [
            ("10.1.2.3", "241.2.2.3"),
            ("10.1.255.255", "241.2.255.255"),
            ("fd00:10:1:7::5", "fd00:f:2:7::5"),
        ] {
            assert_eq!(cidrs.known_by(ip(real)), Some(ip(virtual_)));
            assert_eq!(cidrs.real(ip(virtual_)), ip(real));
        }
        assert_eq!(cidrs.known_by(ip("10.2.0.1")), Some(ip("10.2.0.1")));
        assert_eq!(cidrs.known_by(ip("241.2.0.1")), None, "it is that of 10.1.0.1");
        assert_eq!(cidrs.real(ip("10.2.0.1")), ip("10.2.0.1"));

        assert_eq!(cidrs.prefix_known_by(net("10.1.7.0/24")), Some(net("241.2.7.0/24")));
        assert_eq!(cidrs.prefix_known_by(net("10.2.7.0/24")), Some(net("10.2.7.0/24")));
        assert_eq!(cidrs.prefix_known_by(net("10.0.0.0/8")), None, "half of it would have to be elsewhere");
        assert_eq!(cidrs.prefix_known_by(net("241.2.7.0/24")), None);
        assert!(cidrs.is_virtual(net("241.2.7.0/24")) && !cidrs.is_virtual(net("10.1.7.0/24")));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (pairs, why) in [
            (&[("10.1.0.0/16", "241.2.0.0/24")][..], "not of one family and length"),
            (&[("10.1.0.0/16", "fd00::/16")], "not of one family and length"),
            (&[("10.1.0.0/16", "10.1.0.0/16")], "10.1.0.0/16 overlaps with 10.1.0.0/16"),
            (
                &[("10.1.0.0/16", "241.2.0.0/16"), ("10.1.3.0/24", "241.3.0.0/24")],
                "10.1.3.0/24 overlaps with 10.1",
            ),
            (
                &[("10.1.0.0/16", "241.2.0.0/16"), ("10.2.0.0/16", "241.2.0.0/16")],
                "241.2.0.0/16 overlaps with 241",
            ),
            (&[("10.1.0.0/16", "127.2.0.0/16")], "127.2.0.0/16 holds addresses that no pod can have"),
            (&[("10.1.0.0/16", "169.254.0.0/16")], "no pod can have"),
            (&[("10.0.0.0/7", "240.0.0.0/7")], "no pod can have"),
            (&[("fd00:10:1::/48", "fd00:10:2::/48")], "fd00:10:1::/48 would do"),
            (&[("fd00:10:1::/48", "fdcc:0:2::/48")], "fdcc:0:ff44::/48 would do"),
        ] {
            let error = of(pairs).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        // What one pair has as its real prefix may be another one's virtual one.
        of(&[("10.1.0.0/16", "10.2.0.0/16"), ("10.2.0.0/16", "10.1.0.0/16")]).unwrap();
    }

    proptest! {
        #[test]
        fn a_neutral_prefix_changes_no_checksum(real: u128, wanted: u128, length in 32..=112_u8, host: u128) {
            let prefix = |bits| ipnet::Ipv6Net::new(Ipv6Addr::from_bits(bits), length).unwrap().trunc();
            let (real, virtual_) = (prefix(real), neutral(prefix(real), prefix(wanted)).unwrap());
            let host = host & real.hostmask().to_bits();
            let at = |net: ipnet::Ipv6Net| Ipv6Addr::from_bits(net.network().to_bits() | host);
            prop_assert_eq!(sum(at(real)), sum(at(virtual_)));
            prop_assert_eq!(virtual_.trunc(), virtual_);
        }

        #[test]
        fn there_and_back_again(a in 0_u32..1 << 16, b in 0_u32..1 << 16, host: u16) {
            let cidr = |n: u32| IpNet::from(ipnet::Ipv4Net::new(Ipv4Addr::from_bits(n << 16), 16).unwrap());
            let Ok(cidrs) = VirtualCidrs::new([(cidr(a), cidr(b))]) else { return Ok(()) };
            let real = IpAddr::from(Ipv4Addr::from_bits(a << 16 | u32::from(host)));
            let virtual_ = cidrs.known_by(real).unwrap();
            prop_assert!(cidr(b).contains(&virtual_));
            prop_assert_eq!(cidrs.real(virtual_), real);
        }
    }
}
