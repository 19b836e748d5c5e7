//! One cluster's addresses: by far the most records, so each is packed without a byte of padding.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_global_svc::abi::IpValue;

use super::records::Store;

/// Addresses by family: an IPv4 address costs 23 bytes times the slack of a hash table.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    v4: Store<[u8; 4], Packed>,
    v6: Store<[u8; 16], Packed>,
}

/// An [`IpValue`] without alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed {
    identity: [u8; 4],
    node_ip: [u8; 4],
    key: u8,
    flags: u8,
}

impl Addresses {
    /// Stores an address and tells whether it is new or another one than before.
    pub(super) fn upsert(&mut self, ip: IpAddr, value: IpValue, hash: u64) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.upsert(ip.octets(), value.into(), hash).is_change(),
            IpAddr::V6(ip) => self.v6.upsert(ip.octets(), value.into(), hash).is_change(),
        }
    }

    /// Tells whether there was such an address.
    pub(super) fn delete(&mut self, ip: &IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.delete(&ip.octets()).is_some(),
            IpAddr::V6(ip) => self.v6.delete(&ip.octets()).is_some(),
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
            IpAddr::V4(ip) => self.v4.restore(ip.octets(), value.into()),
            IpAddr::V6(ip) => self.v6.restore(ip.octets(), value.into()),
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
        v4.map(|(ip, value)| (Ipv4Addr::from(ip).into(), value.into()))
            .chain(v6.map(|(ip, value)| (Ipv6Addr::from(ip).into(), value.into())))
            .collect()
    }

    pub(super) fn is_listing(&self) -> bool {
        self.v4.listing
    }

    pub(super) fn is_synced(&self) -> bool {
        self.v4.synced
    }

    pub(super) fn get(&self, ip: &IpAddr) -> Option<IpValue> {
        match ip {
            IpAddr::V4(ip) => self.v4.get(&ip.octets()),
            IpAddr::V6(ip) => self.v6.get(&ip.octets()),
        }
        .map(|packed| (*packed).into())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, IpValue)> {
        let v4 = self.v4.iter().map(|(ip, value)| (Ipv4Addr::from(*ip).into(), (*value).into()));
        let v6 = self.v6.iter().map(|(ip, value)| (Ipv6Addr::from(*ip).into(), (*value).into()));
        v4.chain(v6)
    }

    pub(super) fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub(super) fn digest(&self) -> u64 {
        self.v4.digest().wrapping_add(self.v6.digest())
    }
}

impl From<IpValue> for Packed {
    fn from(value: IpValue) -> Self {
        let IpValue { identity, node_ip, key, flags, pad: _ } = value;
        Self { identity: identity.to_ne_bytes(), node_ip, key, flags }
    }
}

impl From<Packed> for IpValue {
    fn from(Packed { identity, node_ip, key, flags }: Packed) -> Self {
        Self { identity: u32::from_ne_bytes(identity), node_ip, key, flags, pad: 0 }
    }
}
