//! Which virtual prefixes stand for the pods of a cluster whose own ones are taken.
//!
//! They follow from the cluster's ID alone, so that all clusters that know it so choose alike, and two clusters never
//! get the same ones.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use clustermesh_kvstore::virtual_cidrs::{VirtualCidrs, neutral};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Nodes of a cluster have their pod CIDRs in such a block of it, which has room for the nodes to come.
const BLOCK_V4: u8 = 16;
const BLOCK_V6: u8 = 48;

/// Blocks of a cluster that can be chosen for.
const BLOCKS: usize = 7;

/// Virtual prefixes for the pods of the cluster with this ID, whose nodes have these pod CIDRs.
///
/// IPv4 prefixes are of 240.0.0.0/4, where nobody else is; IPv6 prefixes of fdcc::/12.
///
/// # Errors
/// Why none can be chosen, in words.
pub(crate) fn choose(id: u32, pod_cidrs: &[IpNet]) -> Result<VirtualCidrs, String> {
    let blocks: BTreeSet<IpNet> = pod_cidrs.iter().map(block).collect::<Result<_, _>>()?;
    let (v4, v6): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|net| net.addr().is_ipv4());
    if v4.len().max(v6.len()) > BLOCKS {
        return Err(format!(
            "its pod CIDRs lie in {} blocks; for {BLOCKS} at most prefixes are chosen",
            v4.len().max(v6.len())
        ));
    }
    let pairs = [v4, v6].into_iter().flat_map(|blocks| blocks.into_iter().zip(0..));
    let pairs: Option<Vec<_>> = pairs.map(|(real, n)| Some((real, in_place_of(real, id, n)?))).collect();
    VirtualCidrs::new(pairs.ok_or("cluster IDs are 1 to 511")?).map_err(|error| error.to_string())
}

fn block(net: &IpNet) -> Result<IpNet, String> {
    let wanted = if net.addr().is_ipv4() { BLOCK_V4 } else { BLOCK_V6 };
    if net.prefix_len() < wanted {
        return Err(format!("{net} is wider than the /{wanted} for which a virtual prefix can be chosen"));
    }
    IpNet::new(net.addr(), wanted).map(|net| net.trunc()).map_err(|error| error.to_string())
}

/// The prefix for the `n`-th block.
fn in_place_of(real: IpNet, id: u32, n: u8) -> Option<IpNet> {
    let id = u16::try_from(id).ok().filter(|id| (1..=511).contains(id))?;
    match real {
        IpNet::V4(_) => {
            let [high, low] = id.to_be_bytes();
            Some(Ipv4Net::new(Ipv4Addr::new(240 + 2 * n + high, low, 0, 0), BLOCK_V4).ok()?.into())
        }
        IpNet::V6(real) => {
            let wanted = Ipv6Addr::new(0xfdcc + u16::from(n), id, 0, 0, 0, 0, 0, 0);
            Some(neutral(real, Ipv6Net::new(wanted, BLOCK_V6).ok()?)?.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(id: u32, cidrs: &[&str]) -> Result<String, String> {
        let cidrs: Vec<_> = cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect();
        choose(id, &cidrs).map(|cidrs| cidrs.to_string())
    }

    #[test]
    fn prefixes_follow_from_the_id() {
        let nodes = ["10.1.0.0/24", "10.1.1.0/24", "10.7.3.0/24", "fd00:10:1:1::/64"];
        assert_eq!(
            chosen(2, &nodes).unwrap(),
            "10.1.0.0/16 as 240.2.0.0/16, 10.7.0.0/16 as 242.2.0.0/16, fd00:10:1::/48 as fdcc:2:ff42::/48"
        );
        assert_eq!(chosen(511, &["10.1.0.0/16"]).unwrap(), "10.1.0.0/16 as 241.255.0.0/16");
        assert_eq!(chosen(2, &[]).unwrap(), "");
    }

    #[test]
    fn no_two_clusters_and_blocks_get_the_same() {
        let mut all = BTreeSet::new();
        let real = |n: u8| IpNet::from(Ipv4Net::new(Ipv4Addr::new(10, n, 0, 0), 16).unwrap());
        for id in 1..=511 {
            for n in 0..7 {
                let net = in_place_of(real(n), id, n).unwrap();
                assert!(all.insert(net), "{net} of cluster {id}");
                VirtualCidrs::new([(real(n), net)]).unwrap();
            }
        }
    }

    #[test]
    fn what_cannot_be_chosen_is_said() {
        assert!(chosen(2, &["10.0.0.0/8"]).unwrap_err().contains("10.0.0.0/8 is wider than the /16"));
        assert!(chosen(512, &["10.1.0.0/16"]).unwrap_err().contains("1 to 511"));
        let many: Vec<_> = (0..8).map(|n| format!("10.{n}.0.0/16")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert!(chosen(2, &many).unwrap_err().contains("8 blocks"));
    }
}
