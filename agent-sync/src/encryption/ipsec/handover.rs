//! What an earlier life of the agent encrypts to by IPsec, on a node that uses WireGuard only now.
//!
//! Its policies stay until WireGuard has taken over, node by node: right after the start nobody knows yet which node is
//! where, and a strict node would send nothing until somebody does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::super::Awaited;
use super::Way;
use super::core::HANDOVER;
use crate::netlink::{NetlinkError, Xfrm};

/// See the module.
pub(crate) struct LeftOver {
    xfrm: Xfrm,
    ways: Ways,
    began: Instant,
}

/// Those that are left.
#[derive(Debug, Default)]
struct Ways {
    encrypted: BTreeMap<IpAddr, Known>,
    blocked: BTreeSet<IpAddr>,
}

/// Since when the node at an address is known.
type Known = Option<Duration>;

impl LeftOver {
    /// Policies for tunnel packets from `own` to their `port`; none: there are none.
    ///
    /// # Errors
    /// A dump that the kernel refused.
    pub(crate) async fn find(own: IpAddr, port: u16) -> Result<Option<Self>, NetlinkError> {
        let xfrm = match Xfrm::open(own, port) {
            Err(NetlinkError::NoIpsec(_)) => return Ok(None),
            xfrm => xfrm?,
        };
        let ways = Ways::new(xfrm.read().await?.ways);
        Ok((!ways.is_empty()).then(|| Self { xfrm, ways, began: Instant::now() }))
    }

    /// Addresses that are encrypted to by what is left.
    pub(crate) fn encrypted(&self) -> BTreeSet<IpAddr> {
        self.ways.encrypted()
    }

    /// Takes those out that are not needed any more, by what has to come before WireGuard encrypts. Their policies are
    /// there until they are [released](Self::release).
    pub(crate) fn take_done(&mut self, awaited: impl Fn(IpAddr) -> Awaited) -> Vec<IpAddr> {
        self.ways.take_done(awaited, self.began.elapsed())
    }

    /// Removes policies.
    ///
    /// # Errors
    /// The kernel refused. [`leave`](super::leave()) removes them, too.
    pub(crate) async fn release(&self, ips: &[IpAddr]) -> Result<(), NetlinkError> {
        for ip in ips {
            self.xfrm.steer(*ip, None).await?;
        }
        Ok(())
    }

    /// Whether all can go.
    pub(crate) fn is_empty(&self) -> bool {
        self.ways.is_empty()
    }
}

impl Ways {
    fn new(ways: BTreeMap<IpAddr, Way>) -> Self {
        let (blocked, encrypted): (BTreeMap<_, _>, BTreeMap<_, _>) =
            ways.into_iter().partition(|(_, way)| *way == Way::Blocked);
        Self {
            encrypted: encrypted.into_keys().map(|ip| (ip, None)).collect(),
            blocked: blocked.into_keys().collect(),
        }
    }

    fn encrypted(&self) -> BTreeSet<IpAddr> {
        self.encrypted.keys().copied().collect()
    }

    fn is_empty(&self) -> bool {
        self.encrypted.is_empty() && self.blocked.is_empty()
    }

    /// Who blocks from now on is WireGuard.
    fn take_done(&mut self, awaited: impl Fn(IpAddr) -> Awaited, now: Duration) -> Vec<IpAddr> {
        let mut done: Vec<_> = std::mem::take(&mut self.blocked).into_iter().collect();
        self.encrypted.retain(|ip, known| {
            let is_needed = match awaited(*ip) {
                Awaited::Node => true,
                Awaited::Answer => now < *known.get_or_insert(now) + HANDOVER,
                Awaited::Nothing => false,
            };
            if !is_needed {
                done.push(*ip);
            }
            is_needed
        });
        done
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const IP: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 31, 2, 1));

    fn ways() -> Ways {
        Ways::new(BTreeMap::from([(IP, Way::Encrypted(7))]))
    }

    #[test]
    fn a_way_stays_until_wireguard_has_taken_over() {
        let mut ways = ways();
        assert!(ways.take_done(|_| Awaited::Node, Duration::from_secs(9_999)).is_empty());
        assert!(ways.take_done(|_| Awaited::Answer, Duration::from_secs(10_000)).is_empty());
        assert_eq!(ways.encrypted(), [IP].into());
        assert_eq!(ways.take_done(|_| Awaited::Nothing, Duration::from_secs(10_000)), [IP]);
        assert!(ways.is_empty());
    }

    #[test]
    fn a_node_that_does_not_answer_keeps_it_for_a_while() {
        let mut ways = ways();
        let start = Duration::from_secs(5);
        assert!(ways.take_done(|_| Awaited::Answer, start).is_empty());
        assert!(ways.take_done(|_| Awaited::Answer, start + HANDOVER / 2).is_empty());
        assert_eq!(ways.take_done(|_| Awaited::Answer, start + HANDOVER), [IP]);
    }

    #[test]
    fn what_was_blocked_goes_at_once() {
        let other = IpAddr::V4(Ipv4Addr::new(172, 31, 3, 1));
        let mut ways = Ways::new(BTreeMap::from([(IP, Way::Encrypted(7)), (other, Way::Blocked)]));
        assert_eq!(ways.encrypted(), [IP].into());
        assert_eq!(ways.take_done(|_| Awaited::Node, Duration::ZERO), [other]);
        assert!(!ways.is_empty());
    }
}
