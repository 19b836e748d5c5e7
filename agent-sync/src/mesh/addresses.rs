//! One cluster's addresses: by far the most records, so each is packed without a byte of padding.
//!
//! Those behind one node are chained, so that what becomes of a node costs what it carries, not what its
//! cluster has.

mod family;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_global_svc::abi::IpValue;
use ipnet::IpNet;

use family::Family;

/// Addresses by family.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    v4: Family<[u8; 4]>,
    v6: Family<[u8; 16]>,
}

impl Addresses {
    /// Stores an address and tells whether it is new or another one than before.
    pub(super) fn upsert(&mut self, ip: IpAddr, value: IpValue, hash: u64) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.upsert(ip.octets(), value, hash),
            IpAddr::V6(ip) => self.v6.upsert(ip.octets(), value, hash),
        }
    }

    /// Tells whether there was such an address.
    pub(super) fn delete(&mut self, ip: &IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.delete(&ip.octets()),
            IpAddr::V6(ip) => self.v6.delete(&ip.octets()),
        }
    }

    /// An address that is held is no more what its cluster writes.
    pub(super) fn disown(&mut self, ip: &IpAddr) {
        match ip {
            IpAddr::V4(ip) => self.v4.disown(&ip.octets()),
            IpAddr::V6(ip) => self.v6.disown(&ip.octets()),
        }
    }

    /// An address that nobody has confirmed yet.
    pub(super) fn restore(&mut self, ip: IpAddr, value: IpValue) {
        match ip {
            IpAddr::V4(ip) => self.v4.restore(ip.octets(), value),
            IpAddr::V6(ip) => self.v6.restore(ip.octets(), value),
        }
    }

    pub(super) fn begin_list(&mut self) {
        self.v4.begin_list();
        self.v6.begin_list();
    }

    /// The list is complete: gives back what it did not confirm.
    pub(super) fn finish_list(&mut self) -> Vec<(IpAddr, IpValue)> {
        let v4 = self.v4.finish_list().into_iter();
        let v6 = self.v6.finish_list().into_iter();
        v4.map(|(ip, value)| (Ipv4Addr::from(ip).into(), value))
            .chain(v6.map(|(ip, value)| (Ipv6Addr::from(ip).into(), value)))
            .collect()
    }

    pub(super) fn is_listing(&self) -> bool {
        self.v4.is_listing()
    }

    pub(super) fn is_synced(&self) -> bool {
        self.v4.is_synced()
    }

    pub(super) fn get(&self, ip: &IpAddr) -> Option<IpValue> {
        match ip {
            IpAddr::V4(ip) => self.v4.get(&ip.octets()),
            IpAddr::V6(ip) => self.v6.get(&ip.octets()),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, IpValue)> {
        let v4 = self.v4.iter().map(|(ip, value)| (Ipv4Addr::from(ip).into(), value));
        let v6 = self.v6.iter().map(|(ip, value)| (Ipv6Addr::from(ip).into(), value));
        v4.chain(v6)
    }

    /// Addresses whose records name this node.
    pub(super) fn behind(&self, node_ip: [u8; 4]) -> impl Iterator<Item = (IpAddr, IpValue)> {
        let v4 = self.v4.behind(node_ip).map(|(ip, value)| (Ipv4Addr::from(ip).into(), value));
        let v6 = self.v6.behind(node_ip).map(|(ip, value)| (Ipv6Addr::from(ip).into(), value));
        v4.chain(v6)
    }

    /// Nodes that records name, as tables call them.
    pub(super) fn nodes(&self) -> impl Iterator<Item = [u8; 4]> {
        self.v4.nodes().chain(self.v6.nodes())
    }

    /// Addresses inside a prefix. Costs what it has room for, or what there is at all, if that is less.
    pub(super) fn inside(&self, net: IpNet) -> Vec<(IpAddr, IpValue)> {
        let room = match net {
            IpNet::V4(net) => 1_u128 << (32 - net.prefix_len()),
            IpNet::V6(net) => 1_u128.checked_shl(128 - u32::from(net.prefix_len())).unwrap_or(u128::MAX),
        };
        if room > self.len() as u128 {
            return self.iter().filter(|(ip, _)| net.contains(ip)).collect();
        }
        let first = match net.network() {
            IpAddr::V4(ip) => ip.to_bits().into(),
            IpAddr::V6(ip) => ip.to_bits(),
        };
        let ips = (first..first + room).filter_map(|bits| match net {
            IpNet::V4(_) => Some(Ipv4Addr::from_bits(u32::try_from(bits).ok()?).into()),
            IpNet::V6(_) => Some(Ipv6Addr::from_bits(bits).into()),
        });
        ips.filter_map(|ip| Some((ip, self.get(&ip)?))).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub(super) fn digest(&self) -> u64 {
        self.v4.digest().wrapping_add(self.v6.digest())
    }
}
