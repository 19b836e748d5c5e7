// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! What comes in at the node's own interfaces, before the kernel has made anything of it: the flows that `netdev` has let
//! in, to a backend on another node, leave again in a tunnel packet. Everything else passes, as it came, and `netdev` decides.
//!
//! Nothing is written but counters, and an entry of `cm_nat` counts for a second only after `netdev` has noted its use. So a
//! packet of each flow goes through the kernel every second: it renews the entry, and has the kernel look whether the next hop
//! is still there. Every other look-up is made for each packet, as `netdev` makes it; what it would drop passes.
//!
//! Packets are read where they lie. That is not aligned; machines that mind have no XDP that leaves it so.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{bpf_fib_lookup as FibLookup, xdp_action},
    helpers::{
        bpf_check_mtu, bpf_fib_lookup, bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_xdp_adjust_head,
        bpf_xdp_get_buff_len,
    },
    macros::xdp,
    programs::XdpContext,
};
use ebpf_global_svc_abi::{
    CONFIG_ENCRYPTS, CONFIG_STRICT, Config, FAMILY_V4, FAMILY_V6, IpKey, NatKey, NatValue, PREFIX_VIRTUAL,
    identity, nat_kind, reason,
};

use crate::{
    counters::count,
    delivery::TUNNEL_TTL,
    flow::{TCP, UDP, tcp},
    maps::{ENDPOINT, IPCACHE, NAT, config, prefix_of},
    nat,
    packet::{ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6},
    rewrite::pseudo_checksum,
    selection::mix,
    zero::zero,
};

const IPV4: usize = 20;
const IPV6: usize = 40;
/// IPv4: offset, and "more fragments".
const FRAGMENT: u16 = 0x3fff;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// Ethernet, IPv4, UDP, VXLAN.
const OUTER: usize = ETHERNET + OUTER_IP;
const OUTER_IP: usize = IPV4 + OUTER_UDP;
const OUTER_UDP: usize = UDP_HEADER + 8;
/// Two bits of the class of traffic: congestion.
const ECN: u8 = 3;
const ECN_EXPERIENCED: u8 = 3;
const ECN_CAPABLE: u8 = 2;
/// Routes are looked up as for what the node itself sends, which is what a tunnel packet is.
const LOOPBACK: u32 = 1;
/// Where the kernel takes source ports of tunnels from: its default.
const FIRST_PORT: u32 = 32768;
const PORTS: u32 = 60999 - FIRST_PORT;

/// A packet that may be of a flow.
struct Seen {
    /// Whose it would be.
    key: NatKey,
    /// Where its transport header is.
    transport: usize,
    /// Of the whole frame.
    length: u32,
    /// The class of its traffic.
    class: u8,
}

/// Ingress, in the device's driver. Packets may be in several pieces, of which this needs the first one only: else drivers
/// refuse it where packets are large.
#[xdp(frags)]
pub fn cm_xdp(ctx: XdpContext) -> u32 {
    carry(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

/// Ingress, in the kernel, for drivers that run no programs. Packets are in one piece: since Linux 6.9 the kernel copies those of
/// programs that do not mind, and the copy forgets how long its Ethernet header is, so that whoever is at tc misreads it.
#[xdp]
pub fn cm_xdp_generic(ctx: XdpContext) -> u32 {
    carry(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

/// None: it passes, and is as it was.
#[inline(always)]
fn carry(ctx: &XdpContext) -> Option<u32> {
    let config = config()?;
    // Routing, or the kernel behind it, encrypts; nothing of that is asked here.
    if config.flags & (CONFIG_ENCRYPTS | CONFIG_STRICT) != 0 || config.overlay_ifindex == 0 {
        return None;
    }
    let mut seen = MaybeUninit::<Seen>::uninit();
    let seen = read(ctx, config, &mut seen)?;
    let mut value = MaybeUninit::<NatValue>::uninit();
    let value = entry(ctx, &seen.key, &mut value)?;
    let node_ip = node_of(config, seen, value)?;
    // What does not fit goes on in fragments, which are the kernel's to make.
    let mut inner = seen.length - ETHERNET as u32;
    // SAFETY: the context is the program's own.
    if unsafe { bpf_check_mtu(ctx.ctx.cast(), config.overlay_ifindex, &mut inner, 0, 0) } != 0 {
        return None;
    }
    let mut way = MaybeUninit::<FibLookup>::uninit();
    // SAFETY: integers only.
    let way = unsafe { zero(&mut way) };
    find_way(ctx, config, seen, node_ip, way)?;
    // SAFETY: the context is the program's own. No room in front of the packet: as it was.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OUTER as i32)) } != 0 {
        return None;
    }
    if give_backend(ctx, seen, value).is_none() || wrap(ctx, config, seen, node_ip, way).is_none() {
        // Never: it was as long before.
        count(reason::INVALID_PACKET, seen.length);
        return Some(xdp_action::XDP_DROP);
    }
    count(reason::SERVED, seen.length);
    count(reason::ENCAPSULATED, seen.length);
    count(reason::ACCELERATED, seen.length);
    Some(xdp_action::XDP_TX)
}

/// The packet, if it is in the midst of a flow, and has nothing that is not plain.
#[inline(always)]
fn read<'a>(ctx: &XdpContext, config: &Config, place: &'a mut MaybeUninit<Seen>) -> Option<&'a mut Seen> {
    // SAFETY: integers only.
    let seen = unsafe { zero(place) };
    // SAFETY: the context is the program's own.
    seen.length = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as u32;
    let key = &mut seen.key;
    let ethertype = u16::from_be(*at(ctx, ETHERNET - 2)?);
    let (transport, bytes, addresses) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header: &[u32; 5] = at(ctx, ETHERNET)?;
            let [version, class, high, low] = header[0].to_ne_bytes();
            let [_, _, flags, offset] = header[1].to_ne_bytes();
            let [_, proto, ..] = header[2].to_ne_bytes();
            if version != 0x45 || u16::from_be_bytes([flags, offset]) & FRAGMENT != 0 {
                return None;
            }
            (key.proto, key.family, seen.class) = (proto, FAMILY_V4, class);
            set(&mut key.client, [header[3], 0, 0, 0]);
            set(&mut key.other, [header[4], 0, 0, 0]);
            let bytes = u32::from(u16::from_be_bytes([high, low]));
            (IPV4, bytes, u64::from(header[3]) + u64::from(header[4]))
        }
        ETHERTYPE_IPV6 => {
            let header: &[u32; 10] = at(ctx, ETHERNET)?;
            let [first, second, ..] = header[0].to_ne_bytes();
            let [high, low, next, _] = header[1].to_ne_bytes();
            if first >> 4 != 6 {
                return None;
            }
            (key.proto, key.family, seen.class) = (next, FAMILY_V6, first << 4 | second >> 4);
            set(&mut key.client, [header[2], header[3], header[4], header[5]]);
            set(&mut key.other, [header[6], header[7], header[8], header[9]]);
            let bytes = IPV6 as u32 + u32::from(u16::from_be_bytes([high, low]));
            let (a, b) = (u64::from(header[2]) + u64::from(header[3]), u64::from(header[4]));
            let (c, d) = (u64::from(header[5]) + u64::from(header[6]), u64::from(header[7]));
            (IPV6, bytes, a + b + c + d + u64::from(header[8]) + u64::from(header[9]))
        }
        _ => return None,
    };
    seen.transport = ETHERNET + transport;
    let checksum = match key.proto {
        TCP => {
            let header: &[u16; TCP_HEADER / 2] = at(ctx, seen.transport)?;
            let [_, flags] = header[6].to_ne_bytes();
            if flags & (tcp::SYN | tcp::FIN | tcp::RST) != 0 {
                return None;
            }
            (key.client_port, key.other_port) = (header[0], header[1]);
            header[8]
        }
        UDP => {
            let header: &[u16; UDP_HEADER / 2] = at(ctx, seen.transport)?;
            if u16::from_be(header[1]) == config.overlay_port {
                return None;
            }
            (key.client_port, key.other_port) = (header[0], header[1]);
            header[3]
        }
        _ => return None,
    };
    let least = transport + if key.proto == TCP { TCP_HEADER } else { UDP_HEADER };
    if bytes < least as u32 || bytes + ETHERNET as u32 > seen.length {
        return None;
    }
    // The sum of the pseudo-header alone: a sender on this machine has left the rest to its device, and the kernel knows.
    let pseudo = addresses + be(key.proto.into()) + be((bytes - transport as u32) as u16);
    if checksum == fold(pseudo) {
        return None;
    }
    key.kind = nat_kind::SERVED;
    Some(seen)
}

/// The flow's entry, if it has been used lately, and `netdev` would go by it.
#[inline(always)]
fn entry<'a>(
    ctx: &XdpContext,
    key: &NatKey,
    place: &'a mut MaybeUninit<NatValue>,
) -> Option<&'a mut NatValue> {
    // SAFETY: copied at once, as `nat` does.
    let value = place.write(unsafe { *NAT.get(key)? });
    // SAFETY: no preconditions.
    let idle = unsafe { bpf_ktime_get_ns() }.saturating_sub(value.used);
    let ifindex = ctx.ingress_ifindex() as u32;
    if idle > nat::REFRESH || value.ifindex != ifindex || value.node_ip != [0; 4] {
        return None;
    }
    if key.proto != TCP && !nat::still_serves(value, key.proto) {
        return None;
    }
    Some(value)
}

/// The node of the backend, if it is another one.
#[inline(always)]
fn node_of(config: &Config, seen: &Seen, value: &NatValue) -> Option<[u8; 4]> {
    let mut backend = IpKey { cluster: config.cluster, family: seen.key.family, pad: 0, ip: value.ip };
    let prefix = prefix_of(&backend)?;
    if prefix.flags & PREFIX_VIRTUAL != 0 {
        return None;
    }
    // SAFETY: elements are only read; user space replaces elements, it does not write into them.
    if prefix.cluster == config.cluster && unsafe { ENDPOINT.get(&backend) }.is_some() {
        return None;
    }
    backend.cluster = prefix.cluster;
    // SAFETY: as above.
    let node_ip = unsafe { IPCACHE.get(&backend) }.map_or(prefix.node_ip, |entry| entry.node_ip);
    (node_ip[0] != 0 && node_ip != config.node_ip).then_some(node_ip)
}

/// Asks the kernel for the way to a node, if that is the one by which the packet came.
#[inline(always)]
fn find_way(
    ctx: &XdpContext,
    config: &Config,
    seen: &Seen,
    node_ip: [u8; 4],
    way: &mut FibLookup,
) -> Option<()> {
    const AF_INET: u8 = 2;
    (way.family, way.l4_protocol, way.ifindex) = (AF_INET, UDP, LOOPBACK);
    (way.sport, way.dport) = (source_port(seen), config.overlay_port.to_be());
    way.__bindgen_anon_1.tot_len = seen.length as u16 + OUTER_IP as u16;
    way.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(config.node_ip);
    way.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(node_ip);
    // SAFETY: the context is the program's own, and the parameters have the size that is passed.
    let failed = unsafe { bpf_fib_lookup(ctx.ctx.cast(), way, size_of::<FibLookup>() as i32, 0) };
    let known = way.dmac != [0; 6];
    (failed == 0 && known && way.ifindex == ctx.ingress_ifindex() as u32).then_some(())
}

/// The same for all packets of a flow, as routers want it.
#[inline(always)]
fn source_port(seen: &Seen) -> u16 {
    let key = &seen.key;
    let client = words(&key.client);
    let ports = u32::from(key.client_port) << 16 | u32::from(key.other_port);
    let hash = mix(client[0] ^ mix(client[1] ^ mix(client[2] ^ mix(client[3] ^ mix(ports)))));
    ((FIRST_PORT + (u64::from(hash) * u64::from(PORTS) >> 32) as u32) as u16).to_be()
}

/// Puts the backend's address and port, and the checksums that cover them, into the packet behind its outer headers.
#[inline(always)]
fn give_backend(ctx: &XdpContext, seen: &Seen, value: &NatValue) -> Option<()> {
    let (before, after) = (words(&seen.key.other), words(&value.ip));
    let mut change = 0;
    for n in 0..4 {
        change += u64::from(!before[n]) + u64::from(after[n]);
    }
    if seen.key.family == FAMILY_V4 {
        let header: &mut [u16; IPV4 / 2] = at(ctx, OUTER + ETHERNET)?;
        header[5] = !fold(u64::from(!header[5]) + change);
        let destination: &mut u32 = at(ctx, OUTER + ETHERNET + 16)?;
        *destination = after[0];
    } else {
        let destination: &mut [u32; 4] = at(ctx, OUTER + ETHERNET + 24)?;
        *destination = after;
    }
    change += u64::from(!seen.key.other_port) + u64::from(value.port);
    let is_tcp = seen.key.proto == TCP;
    let transport = OUTER + seen.transport;
    let port: &mut u16 = at(ctx, transport + 2)?;
    *port = value.port;
    let checksum: &mut u16 = at(ctx, transport + pseudo_checksum(seen.key.proto) as usize)?;
    if is_tcp || *checksum != 0 {
        let sum = !fold(u64::from(!*checksum) + change);
        // UDP: 0 would say that there is none.
        *checksum = if sum == 0 && !is_tcp { 0xffff } else { sum };
    }
    Some(())
}

/// Writes the outer headers, as the kernel's VXLAN device does.
#[inline(always)]
fn wrap(ctx: &XdpContext, config: &Config, seen: &Seen, node_ip: [u8; 4], way: &FibLookup) -> Option<()> {
    let ethernet: &mut [u8; ETHERNET] = at(ctx, 0)?;
    for n in 0..6 {
        ethernet[n] = way.dmac[n];
        ethernet[6 + n] = way.smac[n];
    }
    [ethernet[12], ethernet[13]] = ETHERTYPE_IPV4.to_be_bytes();
    let congestion = if seen.class & ECN == ECN_EXPERIENCED { ECN_CAPABLE } else { seen.class & ECN };
    // SAFETY: no preconditions.
    let id = unsafe { bpf_get_prandom_u32() } & 0xffff;
    let length = seen.length as u16;
    let [high, low] = (length + OUTER_IP as u16).to_be_bytes();
    let ip: &mut [u32; IPV4 / 4] = at(ctx, ETHERNET)?;
    let mut header = [
        u32::from_ne_bytes([0x45, congestion, high, low]),
        id,
        u32::from_ne_bytes([TUNNEL_TTL, UDP, 0, 0]),
        u32::from_ne_bytes(config.node_ip),
        u32::from_ne_bytes(node_ip),
    ];
    let sum = header.iter().map(|word| u64::from(*word)).sum();
    header[2] |= u32::from(!fold(sum)) << 16;
    *ip = header;
    let udp: &mut [u16; 4] = at(ctx, ETHERNET + IPV4)?;
    // No checksum: the inner packet has one.
    *udp = [source_port(seen), config.overlay_port.to_be(), (length + OUTER_UDP as u16).to_be(), 0];
    let vxlan: &mut [u32; 2] = at(ctx, ETHERNET + IPV4 + UDP_HEADER)?;
    const HAS_VNI: u32 = 0x0800_0000;
    *vxlan = [HAS_VNI.to_be(), (identity::INGRESS << 8).to_be()];
    Some(())
}

/// What is at a place of the packet; none if it ends before. Not to be kept when the packet moves, or is written elsewhere.
#[inline(always)]
fn at<'a, T>(ctx: &XdpContext, offset: usize) -> Option<&'a mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: it lies before data_end, which the verifier checks too; integers only.
    Some(unsafe { &mut *(start as *mut T) })
}

/// A number in network order, as part of a sum.
#[inline(always)]
fn be(number: u16) -> u64 {
    number.to_be().into()
}

/// A sum in ones' complement, in 16 bits.
#[inline(always)]
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[inline(always)]
fn set(to: &mut [u8; 16], from: [u32; 4]) {
    let place: *mut [u32; 4] = (&raw mut *to).cast();
    // SAFETY: of the same size, and within `NatKey` at a multiple of four.
    unsafe { *place = from };
}

#[inline(always)]
fn words(ip: &[u8; 16]) -> [u32; 4] {
    let place: *const [u32; 4] = (&raw const *ip).cast();
    // SAFETY: of the same size; both `NatKey` and `NatValue` have addresses at multiples of four.
    unsafe { *place }
}
