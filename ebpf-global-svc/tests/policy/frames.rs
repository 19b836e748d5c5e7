//! Packets, put together by hand.

use std::net::IpAddr;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const GRE: u8 = 47;
pub(crate) const SCTP: u8 = 132;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// Echo request and answer of a family.
pub(crate) fn echo_types(source: IpAddr) -> (u8, u8) {
    if source.is_ipv4() { (8, 0) } else { (128, 129) }
}

/// ICMP of a family.
pub(crate) fn icmp_proto(source: IpAddr) -> u8 {
    if source.is_ipv4() { 1 } else { 58 }
}

/// An IP packet with `payload` of `proto`.
pub(crate) fn packet(source: IpAddr, destination: IpAddr, proto: u8, payload: &[u8]) -> Vec<u8> {
    packet_with(source, destination, proto, &[], payload)
}

/// The same with IPv4 options, or with IPv6 extension headers of which `proto` is the first, behind the
/// header.
pub(crate) fn packet_with(
    source: IpAddr,
    destination: IpAddr,
    proto: u8,
    extra: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let length = u16::try_from(extra.len() + payload.len()).unwrap();
    let mut packet = Vec::new();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let words = u8::try_from(extra.len() / 4).unwrap();
            packet.extend([0x45 + words, 0]);
            packet.extend((20 + length).to_be_bytes());
            packet.extend([0, 0, 0, 0, 64, proto, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([proto, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
        }
        _ => panic!("one family, please"),
    }
    packet.extend(extra);
    packet.extend(payload);
    packet
}

/// An Ethernet frame around an IP packet.
pub(crate) fn frame(packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 0xbb, 2, 0, 0, 0, 0, 0xaa], &ethertype[..], packet].concat()
}

/// A UDP datagram without data.
pub(crate) fn udp(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 8, 0, 0]].concat()
}

/// A TCP segment without data.
pub(crate) fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

/// A COOKIE ACK, the shortest SCTP chunk.
pub(crate) fn sctp(from: u16, to: u16) -> Vec<u8> {
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0, 0, 0, 1, 0, 0, 0, 0, 11, 0, 0, 4]].concat()
}

/// An ICMP or ICMPv6 message with an identifier.
pub(crate) fn icmp(kind: u8, code: u8, identifier: u16) -> Vec<u8> {
    [&[kind, code, 0, 0][..], &identifier.to_be_bytes(), &[0, 1]].concat()
}

/// An ICMP or ICMPv6 error about the beginning of a packet.
pub(crate) fn icmp_error(kind: u8, code: u8, about: &[u8]) -> Vec<u8> {
    [&[kind, code, 0, 0, 0, 0, 0, 0][..], about].concat()
}

/// A fragment of a packet of `proto`: `offset` in bytes, and whether more follow.
pub(crate) fn fragment(
    (source, destination): (IpAddr, IpAddr),
    proto: u8,
    id: u16,
    (offset, more): (u16, bool),
    payload: &[u8],
) -> Vec<u8> {
    if source.is_ipv4() {
        let mut packet = packet(source, destination, proto, payload);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&((offset / 8) | (u16::from(more) << 13)).to_be_bytes());
        return packet;
    }
    let mut header = vec![proto, 0];
    header.extend((offset | u16::from(more)).to_be_bytes());
    header.extend([0xab, 0xcd]);
    header.extend(id.to_be_bytes());
    packet_with(source, destination, 44, &header, payload)
}
