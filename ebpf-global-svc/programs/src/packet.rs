// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Addresses of a packet, in the form in which every map has them.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_pull_data, programs::TcContext};
use ebpf_global_svc_abi::{Config, FAMILY_V4, FAMILY_V6, IpKey};

use crate::{
    flow::{DESTINATION_OPTIONS, EXTENSIONS, FRAGMENT_HEADER, HOP_BY_HOP, ROUTING, UDP},
    maps::over_ipv6,
    zero::zero,
};

pub const ETHERNET: usize = 14;
pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// What arrived.
pub enum Packet<'a> {
    Ip(&'a mut Addresses),
    /// ARP and whatever else is between the two ends of the wire.
    NotIp,
    /// Claims to be IP, and is not.
    Malformed,
}

/// Source and destination, as addresses of the cluster that was asked for. Aligned to be copied by words: the
/// compiler does not know that IP headers are.
#[repr(C, align(8))]
pub struct Addresses {
    pub source: IpKey,
    pub destination: IpKey,
}

impl Addresses {
    /// Reads the addresses of an Ethernet frame.
    #[inline(always)]
    pub fn read<'a>(ctx: &TcContext, cluster: u16, place: &'a mut MaybeUninit<Self>) -> Packet<'a> {
        // SAFETY: integers only.
        let addresses = unsafe { zero(place) };
        addresses.source.cluster = cluster;
        addresses.destination.cluster = cluster;
        // SAFETY: the context is the program's own.
        match unsafe { read_addresses(ctx.skb.skb, addresses) } {
            IS_IP => Packet::Ip(addresses),
            IS_NOT_IP => Packet::NotIp,
            _ => Packet::Malformed,
        }
    }

    /// Reads them again, of a packet that has others by now. False if it is none any more.
    #[inline(always)]
    pub fn again(&mut self, ctx: &TcContext) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { read_addresses(ctx.skb.skb, self) == IS_IP }
    }

    /// Multicast, broadcast and link-local destinations never leave the link: neighbour discovery,
    /// router solicitation, DHCP, mDNS. They are the stack's. 240.0.0.0/4 is like any other: virtual addresses are there.
    #[inline(always)]
    pub fn stay_on_link(&self) -> bool {
        let ip = &self.destination.ip;
        match self.destination.family {
            FAMILY_V4 => {
                ip[0] & 0xf0 == 224 || [ip[0], ip[1], ip[2], ip[3]] == [0xff; 4] || self.to_ipv4_link_local()
            }
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

/// The family that the frame says it is of; 0: none of IP's.
#[inline(always)]
pub fn family_of(skb: *mut __sk_buff) -> u8 {
    // SAFETY: callers pass the program's own context.
    match u16::from_be(unsafe { (*skb).protocol } as u16) {
        ETHERTYPE_IPV4 => FAMILY_V4,
        ETHERTYPE_IPV6 => FAMILY_V6,
        _ => 0,
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
unsafe extern "C" fn read_addresses(skb: *mut __sk_buff, addresses: *mut Addresses) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(addresses) = (unsafe { addresses.as_mut() }) else { return IS_MALFORMED };
    let ctx = TcContext::new(skb);
    let read = match family_of(skb) {
        FAMILY_V4 => read_ipv4(&ctx, addresses),
        FAMILY_V6 => read_ipv6(&ctx, addresses),
        _ => return IS_NOT_IP,
    };
    if read.is_some() { IS_IP } else { IS_MALFORMED }
}

#[inline(always)]
fn read_ipv4(ctx: &TcContext, addresses: &mut Addresses) -> Option<()> {
    let header = header::<5>(ctx)?;
    let first = header[0].to_ne_bytes()[0];
    // Version 4, and at least five words of header.
    if first >> 4 != 4 || first & 0x0f < 5 {
        return None;
    }
    set(&mut addresses.source, FAMILY_V4, [header[3], 0, 0, 0]);
    set(&mut addresses.destination, FAMILY_V4, [header[4], 0, 0, 0]);
    Some(())
}

#[inline(always)]
fn read_ipv6(ctx: &TcContext, addresses: &mut Addresses) -> Option<()> {
    let header = header::<10>(ctx)?;
    if header[0].to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    set(&mut addresses.source, FAMILY_V6, [header[2], header[3], header[4], header[5]]);
    set(&mut addresses.destination, FAMILY_V6, [header[6], header[7], header[8], header[9]]);
    Some(())
}

#[inline(always)]
fn set(address: &mut IpKey, family: u8, ip: [u32; 4]) {
    address.family = family;
    let words: *mut [u32; 4] = (&raw mut address.ip).cast();
    // SAFETY: of the same size; and within `Addresses`, both are at multiples of four.
    unsafe { *words = ip };
}

/// Whether a packet is the overlay's own: a UDP datagram to its port, unless this is a later fragment of one. Over IPv4
/// in any case, and over IPv6 if that is the underlay, where headers that hide what comes behind them count as such.
#[inline(always)]
pub fn is_overlays(ctx: &TcContext, config: &Config, destination: &IpKey) -> bool {
    if destination.family == FAMILY_V4 {
        return udp_port(ctx) == Some(config.overlay_port);
    }
    // SAFETY: the context is the program's own.
    over_ipv6(config) && unsafe { may_be_udp6_to(ctx.skb.skb, config.overlay_port.into()) != 0 }
}

#[inline(always)]
fn udp_port(ctx: &TcContext) -> Option<u16> {
    const FRAGMENT_OFFSET: u16 = 0x1fff;
    let header = header::<5>(ctx)?;
    let [first, ..] = header[0].to_ne_bytes();
    let [_, _, flags, offset] = header[1].to_ne_bytes();
    let [_, proto, ..] = header[2].to_ne_bytes();
    if proto != UDP || u16::from_be_bytes([flags, offset]) & FRAGMENT_OFFSET != 0 {
        return None;
    }
    let length = usize::from(first & 0x0f) * 4;
    ctx.load(ETHERNET + length + 2).ok().map(u16::from_be)
}

/// Whether an IPv6 packet is a datagram to a port, or may be one. Global to the verifier, and apart: callers have no room on
/// their stack.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn may_be_udp6_to(skb: *mut __sk_buff, port: u32) -> u32 {
    const NEXT: usize = 6;
    const HEADER: usize = 40;
    let ctx = TcContext::new(skb);
    let Ok(mut next) = ctx.load::<u8>(ETHERNET + NEXT) else { return 0 };
    let mut at = ETHERNET + HEADER;
    for _ in 0..EXTENSIONS {
        match next {
            UDP => {
                let Ok(to) = ctx.load::<u16>(at + 2) else { return 0 };
                return (u32::from(u16::from_be(to)) == port).into();
            }
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let Ok([following, length]) = ctx.load::<[u8; 2]>(at) else { return 0 };
                next = following;
                at += (usize::from(length) + 1) * 8;
            }
            FRAGMENT_HEADER => {
                let Ok([following, _, high, low]) = ctx.load::<[u8; 4]>(at) else { return 0 };
                if u16::from_be_bytes([high, low]) & !7 != 0 {
                    return 0;
                }
                next = following;
                at += 8;
            }
            _ => return 0,
        }
    }
    1
}

/// The first `N` words behind the Ethernet header, pulled into reach if they are in a fragment.
/// Valid until the next helper that changes the packet.
#[inline(always)]
fn header<const N: usize>(ctx: &TcContext) -> Option<&'static [u32; N]> {
    if let Some(header) = in_reach(ctx) {
        return Some(header);
    }
    let end = ETHERNET + N * 4;
    if (ctx.len() as usize) < end {
        return None;
    }
    // SAFETY: the context is the program's own.
    if unsafe { bpf_skb_pull_data(ctx.skb.skb, end as u32) } != 0 {
        return None;
    }
    in_reach(ctx)
}

#[inline(always)]
fn in_reach<const N: usize>(ctx: &TcContext) -> Option<&'static [u32; N]> {
    let start = ctx.data() + ETHERNET;
    if start + N * 4 > ctx.data_end() {
        return None;
    }
    // SAFETY: the N words lie before data_end, which the verifier checks too. The kernel aligns IP headers to
    // words on machines that need it.
    Some(unsafe { &*(start as *const [u32; N]) })
}
