//! Addresses as the kernel's tables spell them, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_global_svc::abi::{
    FAMILY_V4, FAMILY_V6, IpKey, NodeKey, PrefixKey, ServiceKey, TranslateKey, TranslateValue, scope,
    translate,
};
use ipnet::IpNet;

/// IPPROTO_TCP.
pub const TCP: u8 = 6;
/// IPPROTO_UDP.
pub const UDP: u8 = 17;
/// IPPROTO_SCTP.
pub const SCTP: u8 = 132;

/// Family and 16 bytes in network order; IPv4 fills the first four.
pub fn octets(ip: IpAddr) -> (u8, [u8; 16]) {
    match ip {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            (FAMILY_V4, bytes)
        }
        IpAddr::V6(v6) => (FAMILY_V6, v6.octets()),
    }
}

/// The inverse of [`octets`]; none if the family is neither.
pub fn address(family: u8, bytes: [u8; 16]) -> Option<IpAddr> {
    match family {
        FAMILY_V4 => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        FAMILY_V6 => Some(Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// Key of an address of a cluster.
pub fn ip_key(cluster: u16, ip: IpAddr) -> IpKey {
    let (family, ip) = octets(ip);
    IpKey { cluster, family, pad: 0, ip }
}

/// Key of a pod prefix; host bits are cleared.
pub fn prefix_key(net: IpNet) -> PrefixKey {
    let (family, ip) = octets(net.network());
    PrefixKey { prefixlen: 32 + u32::from(net.prefix_len()), family, pad: [0; 3], ip }
}

/// The prefix of a key; none if the key is no prefix.
pub fn prefix(key: &PrefixKey) -> Option<IpNet> {
    let length = u8::try_from(key.prefixlen.checked_sub(32)?).ok()?;
    IpNet::new(address(key.family, key.ip)?, length).ok()
}

/// Entries for pods of a cluster in `real` that are known by addresses in `virtual_`, a prefix of that length: to the
/// one, and to the other.
pub fn translations(cluster: u16, real: IpNet, virtual_: IpNet) -> [(TranslateKey, TranslateValue); 2] {
    let ((family, real_ip), (_, virtual_ip)) = (octets(real.network()), octets(virtual_.network()));
    let bits = std::array::from_fn(|n| real_ip[n] ^ virtual_ip[n]);
    let prefixlen = 32 + u32::from(real.prefix_len());
    [(translate::TO_REAL, virtual_ip), (translate::TO_VIRTUAL, real_ip)]
        .map(|(way, ip)| (TranslateKey { prefixlen, cluster, family, way, ip }, TranslateValue { bits }))
}

/// The prefix of a key, and the one in its place; none if the key is no prefix.
pub fn translation(key: &TranslateKey, value: &TranslateValue) -> Option<(IpNet, IpNet)> {
    let length = u8::try_from(key.prefixlen.checked_sub(32)?).ok()?;
    let turned = std::array::from_fn(|n| key.ip[n] ^ value.bits[n]);
    let net = |ip| IpNet::new(address(key.family, ip)?, length).ok();
    Some((net(key.ip)?, net(turned)?))
}

/// Key of an underlay address.
pub fn node_key(ip: IpAddr) -> NodeKey {
    let (family, ip) = octets(ip);
    NodeKey { family, pad: [0; 3], ip }
}

/// Key of a frontend; `port` in host order.
pub fn service_key(cluster: u16, ip: IpAddr, port: u16, proto: u8) -> ServiceKey {
    let (family, ip) = octets(ip);
    ServiceKey { cluster, port: port.to_be(), proto, family, scope: scope::MESH, pad: 0, ip }
}

/// `TCP`, `UDP`, `SCTP`, or the number.
pub fn protocol_name(proto: u8) -> String {
    match proto {
        TCP => "TCP".into(),
        UDP => "UDP".into(),
        SCTP => "SCTP".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_prefixes_survive_the_round_trip() {
        for ip in ["10.1.2.3", "fd00::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            let (family, bytes) = octets(ip);
            assert_eq!(address(family, bytes), Some(ip));
        }
        assert_eq!(address(0, [0; 16]), None);
        for (net, canonical) in [("10.1.2.3/16", "10.1.0.0/16"), ("fd00:0:0:1::5/64", "fd00:0:0:1::/64")] {
            let key = prefix_key(net.parse().unwrap());
            assert_eq!(prefix(&key), Some(canonical.parse().unwrap()));
        }
    }

    #[test]
    fn ports_are_in_network_order() {
        let key = service_key(1, "10.0.0.1".parse().unwrap(), 80, TCP);
        assert_eq!(key.port.to_ne_bytes(), [0, 80]);
    }
}
