// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! What a packet is a part of: addresses, protocol, ports, as connection tracking and policy want them.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes, programs::TcContext};
use ebpf_global_svc_abi::{FAMILY_V4, FAMILY_V6, FragmentKey, FragmentValue, reason};

use crate::{maps::FRAGMENT, packet::ETHERNET, zero::zero};

pub const HOP_BY_HOP: u8 = 0;
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ROUTING: u8 = 43;
pub const FRAGMENT_HEADER: u8 = 44;
pub const ICMPV6: u8 = 58;
pub const DESTINATION_OPTIONS: u8 = 60;
const SCTP: u8 = 132;

/// Extension headers that are looked behind; more of them are a protocol that nobody knows.
pub const EXTENSIONS: u32 = 6;
/// IPv4: offset in units of eight bytes, and "more fragments".
const OFFSET: u16 = 0x1fff;
const MORE: u16 = 0x2000;

/// Bits of [`Flow::traits`].
pub mod traits {
    /// [`Flow::service`](super::Flow::service) says something.
    pub const PORTS: u8 = 1;
    /// It begins a flow, and is no answer: TCP SYN, ICMP requests.
    pub const BEGINS: u8 = 2;
    /// It is an answer, and begins no flow.
    pub const ANSWERS: u8 = 4;
    /// Neither: it belongs to no flow.
    pub const ALONE: u8 = 8;
    /// TCP FIN.
    pub const FIN: u8 = 16;
    /// TCP RST.
    pub const RST: u8 = 32;
    /// Path MTU discovery, which no policy may break.
    pub const TOO_BIG: u8 = 64;
    /// IPv6 neighbour discovery.
    pub const NEIGHBOUR: u8 = 128;
}

/// One packet. Made by [`Flow::new`] and filled by [`read_flow`].
///
/// It goes to functions that the verifier looks at on their own (see `policy`), so every byte of it is some field's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Flow {
    /// In network order, by words.
    pub source: [u32; 4],
    pub destination: [u32; 4],
    /// Bytes of the packet, with its Ethernet header.
    pub bytes: u32,
    /// The interface on which it is seen.
    pub ifindex: u32,
    /// Where the packet that an ICMP error is about begins; 0: it is none.
    pub embedded: u32,
    /// Clusters of the two ends; 0: outside of the mesh.
    pub source_cluster: u16,
    pub destination_cluster: u16,
    /// Network order; ICMP echo: the identifier, as both.
    pub source_port: u16,
    pub destination_port: u16,
    /// What policies call the port, network order: that of the destination, or the type of an ICMP packet.
    pub service: u16,
    pub family: u8,
    pub proto: u8,
    /// See [`traits`].
    pub traits: u8,
    /// Why policy cannot be asked; 0: it can. See [`reason`].
    pub unreadable: u8,
    /// As they stand in the header; 0: it has none.
    pub tcp_flags: u8,
    /// Code of an ICMP packet.
    pub icmp_code: u8,
    /// Which program sees it; see `event_hook`.
    pub hook: u8,
    /// Zero.
    pad: [u8; 3],
}

impl Flow {
    /// A packet of which only this is known.
    #[inline(always)]
    pub fn new(place: &mut MaybeUninit<Self>, family: u8, clusters: (u16, u16)) -> &mut Self {
        // SAFETY: integers only.
        let flow = unsafe { zero(place) };
        flow.source_cluster = clusters.0;
        flow.destination_cluster = clusters.1;
        flow.family = family;
        flow
    }

    #[inline(always)]
    pub fn is(&self, traits: u8) -> bool {
        self.traits & traits != 0
    }

    #[inline(always)]
    pub fn is_icmp(&self) -> bool {
        matches!((self.proto, self.family), (ICMP, FAMILY_V4) | (ICMPV6, FAMILY_V6))
    }

    /// Whether the packet alone tells that it answers another one.
    #[inline(always)]
    pub fn is_answer_by_itself(&self) -> bool {
        self.is(traits::ANSWERS) || self.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
    }
}

/// Flags of a TCP header.
pub mod tcp {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// Where the IP header of a frame is.
pub const OUTER: u32 = ETHERNET as u32;

/// Reads the packet that a program is about, from its IP header on. `hook`: see `event_hook`.
#[inline(always)]
pub fn read_packet<'a>(
    ctx: &TcContext,
    place: &'a mut MaybeUninit<Flow>,
    hook: u8,
    family: u8,
    clusters: (u16, u16),
) -> &'a Flow {
    let flow = Flow::new(place, family, clusters);
    flow.hook = hook;
    flow.bytes = ctx.len();
    // SAFETY: the context is the program's own.
    unsafe {
        flow.ifindex = (*ctx.skb.skb).ifindex;
        read_flow(ctx.skb.skb, OUTER, flow);
    }
    flow
}

/// Reads the packet whose IP header is at `at`. If that is one that an ICMP error is about, only its first
/// bytes are there. Gives where the transport header is; 0: it is in another fragment, or cut off.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read_flow(skb: *mut __sk_buff, at: u32, flow: *mut Flow) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return 0 };
    let behind = read_network(skb, at, flow);
    match behind.part {
        Part::Unknown => flow.unreadable = reason::INVALID_PACKET,
        Part::Later => {
            // SAFETY: the element is only read, and at worst is one that is being replaced.
            match unsafe { FRAGMENT.get(fragment_key(flow, behind.id)) } {
                Some(first) => recall(first, flow),
                None => flow.unreadable = reason::FRAGMENT_NOT_FOUND,
            }
        }
        Part::First | Part::All => {
            if read_transport(skb, behind.at, at != OUTER, flow).is_none() {
                flow.unreadable = reason::INVALID_PACKET;
                return 0;
            }
            if matches!(behind.part, Part::First) && at == OUTER {
                remember(&fragment_key(flow, behind.id), flow);
            }
            return behind.at;
        }
    }
    0
}

/// What comes behind the IP headers. No enum with fields: of those that a variant does not have the compiler reads
/// what nobody wrote, ahead of the test, which kernels before 6.3 refuse.
pub struct Behind {
    pub part: Part,
    /// Where the transport header is.
    pub at: u32,
    /// Of the packet that this is a fragment of.
    id: [u8; 4],
}

/// How much of a packet this is.
#[derive(Clone, Copy)]
pub enum Part {
    /// Its headers are cut off.
    Unknown,
    All,
    /// The fragment with the transport header.
    First,
    Later,
}

const TRUNCATED: Behind = Behind { part: Part::Unknown, at: 0, id: [0; 4] };

/// Addresses and protocol of the packet whose IP header is at `at`.
#[inline(always)]
pub fn read_network(skb: *mut __sk_buff, at: u32, flow: &mut Flow) -> Behind {
    if flow.family == FAMILY_V4 { read_ipv4(skb, at, flow) } else { read_ipv6(skb, at, flow) }
}

#[inline(always)]
fn read_ipv4(skb: *mut __sk_buff, at: u32, flow: &mut Flow) -> Behind {
    let Some(header) = load::<[u32; 5]>(skb, at) else { return TRUNCATED };
    flow.source = [header[3], 0, 0, 0];
    flow.destination = [header[4], 0, 0, 0];
    let [first, ..] = header[0].to_ne_bytes();
    let [id_high, id_low, flags, offset] = header[1].to_ne_bytes();
    [_, flow.proto, ..] = header[2].to_ne_bytes();
    let length = u32::from(first & 0x0f) * 4;
    if length < 20 {
        return TRUNCATED;
    }
    let fragment = u16::from_be_bytes([flags, offset]);
    let part = match (fragment & OFFSET, fragment & MORE) {
        (0, 0) => Part::All,
        (0, _) => Part::First,
        _ => Part::Later,
    };
    Behind { part, at: at + length, id: [id_high, id_low, 0, 0] }
}

#[inline(always)]
fn read_ipv6(skb: *mut __sk_buff, at: u32, flow: &mut Flow) -> Behind {
    let Some(header) = load::<[u32; 10]>(skb, at) else { return TRUNCATED };
    flow.source = [header[2], header[3], header[4], header[5]];
    flow.destination = [header[6], header[7], header[8], header[9]];
    let [_, _, mut next, _] = header[1].to_ne_bytes();
    let mut behind = Behind { part: Part::All, at: at + 40, id: [0; 4] };
    for _ in 0..EXTENSIONS {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let Some(extension) = load::<[u8; 2]>(skb, behind.at) else { return TRUNCATED };
                next = extension[0];
                behind.at += (u32::from(extension[1]) + 1) * 8;
            }
            FRAGMENT_HEADER => {
                let Some(extension) = load::<[u8; 8]>(skb, behind.at) else { return TRUNCATED };
                next = extension[0];
                behind.at += 8;
                let place = u16::from_be_bytes([extension[2], extension[3]]);
                if place & !6 != 0 {
                    behind.id = [extension[4], extension[5], extension[6], extension[7]];
                    behind.part = Part::First;
                }
                if place & !7 != 0 {
                    behind.part = Part::Later;
                    return behind;
                }
            }
            _ => break,
        }
    }
    flow.proto = next;
    behind
}

/// None if it is cut off.
#[inline(always)]
fn read_transport(skb: *mut __sk_buff, at: u32, embedded: bool, flow: &mut Flow) -> Option<()> {
    match (flow.proto, flow.family) {
        (TCP | UDP | SCTP, _) => {
            let ports: [u16; 2] = load(skb, at)?;
            flow.source_port = ports[0];
            flow.destination_port = ports[1];
            flow.service = ports[1];
            flow.traits |= traits::PORTS;
            if flow.proto == TCP && !embedded {
                let [flags] = load::<[u8; 1]>(skb, at + 13)?;
                flow.tcp_flags = flags;
                flow.traits |= tcp_traits(flags);
            }
        }
        (ICMP, FAMILY_V4) | (ICMPV6, FAMILY_V6) => {
            let header: [u8; 8] = load(skb, at)?;
            let [kind, code] = [header[0], header[1]];
            flow.icmp_code = code;
            icmp(kind, u16::from_ne_bytes([header[4], header[5]]), flow);
            if is_error(flow.family, kind) {
                flow.embedded = at + EMBEDDED;
            }
            let too_big = if flow.family == FAMILY_V4 { kind == 3 && code == 4 } else { kind == 2 };
            if too_big {
                flow.traits |= traits::TOO_BIG;
            }
        }
        _ => {}
    }
    Some(())
}

/// Where, in an ICMP error, the packet begins that it is about.
pub const EMBEDDED: u32 = 8;

/// Whether an ICMP packet of this type is about another packet.
#[inline(always)]
pub fn is_error(family: u8, kind: u8) -> bool {
    if family == FAMILY_V4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) }
}

#[inline(always)]
fn tcp_traits(flags: u8) -> u8 {
    let mut is = 0;
    if flags & (tcp::SYN | tcp::ACK) == tcp::SYN {
        is |= traits::BEGINS;
    }
    if flags & tcp::FIN != 0 {
        is |= traits::FIN;
    }
    if flags & tcp::RST != 0 {
        is |= traits::RST;
    }
    is
}

/// What the type of an ICMP packet says about its flow.
#[inline(always)]
fn icmp(kind: u8, identifier: u16, flow: &mut Flow) {
    let (request, answer) = if flow.family == FAMILY_V4 { (8, 0) } else { (128, 129) };
    flow.service = u16::from(kind).to_be();
    flow.traits |= traits::PORTS;
    if kind == request || kind == answer {
        flow.source_port = identifier;
        flow.destination_port = identifier;
        flow.traits |= if kind == request { traits::BEGINS } else { traits::ANSWERS };
    } else {
        flow.traits |= traits::ALONE;
        if flow.family != FAMILY_V4 && matches!(kind, 133..=137) {
            flow.traits |= traits::NEIGHBOUR;
        }
    }
}

#[inline(always)]
fn fragment_key(flow: &Flow, id: [u8; 4]) -> FragmentKey {
    FragmentKey {
        source: bytes(flow.source),
        destination: bytes(flow.destination),
        id,
        // Fragments of an IPv6 packet need not agree about what they begin with.
        proto: if flow.family == FAMILY_V4 { flow.proto } else { 0 },
        family: flow.family,
        pad: 0,
    }
}

/// Keeps what later fragments will need. Failure drops those, where a policy selects.
#[inline(always)]
fn remember(key: &FragmentKey, flow: &Flow) {
    let destination_port = if flow.is_icmp() { flow.service } else { flow.destination_port };
    let first =
        FragmentValue { source_port: flow.source_port, destination_port, proto: flow.proto, pad: [0; 3] };
    let _ = FRAGMENT.insert(key, first, 0);
}

/// Makes a later fragment a part of what the first one was.
#[inline(always)]
fn recall(first: &FragmentValue, flow: &mut Flow) {
    flow.proto = first.proto;
    if flow.is_icmp() {
        icmp(u16::from_be(first.destination_port) as u8, first.source_port, flow);
        return;
    }
    flow.source_port = first.source_port;
    flow.destination_port = first.destination_port;
    flow.service = first.destination_port;
    if matches!(flow.proto, TCP | UDP | SCTP) {
        flow.traits |= traits::PORTS;
    }
}

/// An address, as maps have it.
#[inline(always)]
pub fn bytes(words: [u32; 4]) -> [u8; 16] {
    // SAFETY: of the same size, and any bytes are valid.
    unsafe { core::mem::transmute(words) }
}

/// `size_of::<T>()` bytes of the packet, wherever they are; none if it ends before.
#[inline(always)]
pub fn load<T: Copy>(skb: *mut __sk_buff, at: u32) -> Option<T> {
    let mut bytes = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the caller passes the program's own context, and the buffer has the size that is passed. T is
    // an array of integers, for which all bytes are valid, and the helper fills it whole if it succeeds.
    unsafe {
        if bpf_skb_load_bytes(skb.cast(), at, bytes.as_mut_ptr().cast(), size_of::<T>() as u32) != 0 {
            return None;
        }
        Some(bytes.assume_init())
    }
}
