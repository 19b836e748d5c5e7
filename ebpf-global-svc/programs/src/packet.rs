// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Addresses of a packet, in the form in which every map has them.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_pull_data, programs::TcContext};
use ebpf_global_svc_abi::{FAMILY_V4, FAMILY_V6, IpKey};

pub const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// What arrived.
pub enum Packet {
    Ip(Addresses),
    /// ARP and whatever else is between the two ends of the wire.
    NotIp,
    /// Claims to be IP, and is not.
    Malformed,
}

/// Source and destination, as addresses of the cluster that was asked for.
#[repr(C)]
pub struct Addresses {
    pub source: IpKey,
    pub destination: IpKey,
}

impl Addresses {
    /// Multicast, broadcast and link-local destinations never leave the link: neighbour discovery,
    /// router solicitation, DHCP, mDNS. They are the stack's.
    #[inline(always)]
    pub fn stay_on_link(&self) -> bool {
        let ip = &self.destination.ip;
        match self.destination.family {
            FAMILY_V4 => ip[0] >= 224 || self.to_ipv4_link_local(),
            _ => ip[0] == 0xff || (ip[0] == 0xfe && ip[1] & 0xc0 == 0x80),
        }
    }

    /// Clouds have services there, and Linux forwards to them.
    #[inline(always)]
    pub fn to_ipv4_link_local(&self) -> bool {
        let ip = &self.destination.ip;
        self.destination.family == FAMILY_V4 && ip[0] == 169 && ip[1] == 254
    }
}

/// Reads the addresses of an Ethernet frame.
#[inline(always)]
pub fn parse(ctx: &TcContext, cluster: u16) -> Packet {
    let nobody = IpKey { cluster, family: 0, pad: 0, ip: [0; 16] };
    let mut addresses = Addresses { source: nobody, destination: nobody };
    // SAFETY: the context is the program's own.
    match unsafe { parse_addresses(ctx.skb.skb, &raw mut addresses) } {
        IS_IP => Packet::Ip(addresses),
        IS_NOT_IP => Packet::NotIp,
        _ => Packet::Malformed,
    }
}

const IS_IP: u32 = 0;
const IS_NOT_IP: u32 = 1;
const IS_MALFORMED: u32 = 2;

/// Global to the verifier, as what `policy` calls is: it would go on from here once for each family.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn parse_addresses(skb: *mut __sk_buff, addresses: *mut Addresses) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(addresses) = (unsafe { addresses.as_mut() }) else { return IS_MALFORMED };
    let ctx = TcContext::new(skb);
    // SAFETY: the context is valid for the program's run.
    let ethertype = u16::from_be(unsafe { (*skb).protocol } as u16);
    let parsed = match ethertype {
        ETHERTYPE_IPV4 => parse_ipv4(&ctx, addresses),
        ETHERTYPE_IPV6 => parse_ipv6(&ctx, addresses),
        _ => return IS_NOT_IP,
    };
    if parsed.is_some() { IS_IP } else { IS_MALFORMED }
}

#[inline(always)]
fn parse_ipv4(ctx: &TcContext, addresses: &mut Addresses) -> Option<()> {
    let header = header::<20>(ctx)?;
    // Version 4, and at least five words of header.
    if header[0] >> 4 != 4 || header[0] & 0x0f < 5 {
        return None;
    }
    for (at, address) in [(12, &mut addresses.source), (16, &mut addresses.destination)] {
        address.family = FAMILY_V4;
        address.ip[..4].copy_from_slice(&header[at..at + 4]);
    }
    Some(())
}

#[inline(always)]
fn parse_ipv6(ctx: &TcContext, addresses: &mut Addresses) -> Option<()> {
    let header = header::<40>(ctx)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    for (at, address) in [(8, &mut addresses.source), (24, &mut addresses.destination)] {
        address.family = FAMILY_V6;
        address.ip.copy_from_slice(&header[at..at + 16]);
    }
    Some(())
}

/// Destination port of an IPv4 UDP datagram, unless this is a later fragment of one. The overlay
/// has no IPv6 underlay, so nobody asks for more.
#[inline(always)]
pub fn udp_port(ctx: &TcContext, destination: &IpKey) -> Option<u16> {
    const UDP: u8 = 17;
    const FRAGMENT_OFFSET: u16 = 0x1fff;
    if destination.family != FAMILY_V4 {
        return None;
    }
    let header = header::<20>(ctx)?;
    if header[9] != UDP || u16::from_be_bytes([header[6], header[7]]) & FRAGMENT_OFFSET != 0 {
        return None;
    }
    let length = usize::from(header[0] & 0x0f) * 4;
    ctx.load(ETHERNET + length + 2).ok().map(u16::from_be)
}

/// The first `N` bytes behind the Ethernet header, pulled into reach if they are in a fragment.
/// Valid until the next helper that changes the packet.
#[inline(always)]
fn header<const N: usize>(ctx: &TcContext) -> Option<&'static [u8; N]> {
    if let Some(header) = in_reach(ctx) {
        return Some(header);
    }
    if (ctx.len() as usize) < ETHERNET + N {
        return None;
    }
    // SAFETY: the context is the program's own.
    if unsafe { bpf_skb_pull_data(ctx.skb.skb, (ETHERNET + N) as u32) } != 0 {
        return None;
    }
    in_reach(ctx)
}

#[inline(always)]
fn in_reach<const N: usize>(ctx: &TcContext) -> Option<&'static [u8; N]> {
    let start = ctx.data() + ETHERNET;
    if start + N > ctx.data_end() {
        return None;
    }
    // SAFETY: the N bytes lie before data_end, which the verifier checks too.
    Some(unsafe { &*(start as *const [u8; N]) })
}
