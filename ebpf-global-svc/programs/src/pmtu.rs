// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Tells a pod that its packet is too big for the overlay, as a router would: ICMP "fragmentation needed" (RFC 1191) or
//! ICMPv6 "packet too big" (RFC 4443, 3.2). It comes from the address that the pod sent to: the one that is sure to be of the
//! right family, and that the pod's policies let talk.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INVALIDATE_HASH, bpf_check_mtu_flags::BPF_MTU_CHK_SEGS},
    helpers::{
        bpf_check_mtu, bpf_csum_diff, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use ebpf_global_svc_abi::{CONFIG_PMTU_DISCOVERY, FAMILY_V4, event_hook, reason};

use crate::{
    delivery::drop,
    flow::{ICMP, ICMPV6, OUTER, is_error},
    maps::{config, over_ipv6},
    packet::{ETHERNET, family_of},
    zero::zero,
};

/// Every IPv6 link carries as much (RFC 8200, 5).
const IPV6_MINIMUM: u32 = 1280;
/// Where an IPv4 header has its flags, and an IPv4 and an IPv6 header what comes next.
const IPV4_FLAGS: u32 = 6;
const IPV4_PROTO: u32 = 9;
const IPV6_NEXT: u32 = 6;
const DO_NOT_FRAGMENT: u8 = 0x40;
const HOPS: u8 = 64;
/// Internetwork control (RFC 1812, 4.3.2.5).
const CLASS: u8 = 0xc0;

/// What an IPv4 pod is sent; in network order. Of its own packet it gets the largest possible IP header, and eight bytes more.
#[repr(C, align(8))]
struct Told4 {
    version: u8,
    class: u8,
    length: u16,
    id: u16,
    fragment: u16,
    hops: u8,
    proto: u8,
    header_checksum: u16,
    source: u32,
    destination: u32,
    kind: u8,
    code: u8,
    checksum: u16,
    unused: u16,
    mtu: u16,
    about: [u32; 17],
}

/// What an IPv6 pod is sent; in network order. Of its own packet it gets what an extension header or two leave room for.
#[repr(C, align(8))]
struct Told6 {
    version: u32,
    length: u16,
    next: u8,
    hops: u8,
    ends: Ends6,
    kind: u8,
    code: u8,
    checksum: u16,
    mtu: u32,
    about: [u32; 22],
}

#[repr(C)]
struct Ends6 {
    source: [u32; 4],
    destination: [u32; 4],
}

const LENGTH4: u16 = size_of::<Told4>() as u16;
/// Without the IP header.
const LENGTH6: u16 = size_of::<Told6>() as u16 - 40;

/// What becomes of a pod's packet that does not fit the overlay and whose sender would rather hear so than see it in
/// fragments: dropped, or on its way back as what its sender is told. 0: it may go on.
#[inline(always)]
pub fn refuse(ctx: &TcContext, sender: u32) -> i32 {
    if ctx.len() <= ETHERNET as u32 + IPV6_MINIMUM {
        return 0;
    }
    // SAFETY: the context is the program's own.
    unsafe { refuse_too_big(ctx.skb.skb, sender) as i32 }
}

/// Whether the packet, or what the device will make of it, exceeds the MTU of an interface, which is written.
#[inline(always)]
pub fn exceeds(skb: *mut __sk_buff, ifindex: u32, mtu: &mut u32) -> bool {
    // SAFETY: callers pass the program's own context.
    unsafe { bpf_check_mtu(skb.cast(), ifindex, mtu, 0, BPF_MTU_CHK_SEGS.into()) > 0 }
}

/// See [`refuse`]. One call, for its caller has no room on the stack to remember anything between several.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn refuse_too_big(skb: *mut __sk_buff, sender: u32) -> u32 {
    let Some(config) = config() else { return 0 };
    if config.flags & CONFIG_PMTU_DISCOVERY == 0 {
        return 0;
    }
    // SAFETY: the caller's.
    let mtu = unsafe { too_big_for(skb, config.overlay_ifindex) };
    if mtu == 0 {
        return 0;
    }
    let dropped = drop(&TcContext::new(skb), event_hook::FROM_POD, reason::FRAG_NEEDED, sender);
    // SAFETY: as above.
    let failed = unsafe { if family_of(skb) == FAMILY_V4 { tell4(skb, mtu) } else { tell6(skb, mtu) } };
    if failed != 0 {
        return dropped as u32;
    }
    // SAFETY: as above.
    unsafe { bpf_redirect((*skb).ifindex, 0) as u32 }
}

/// The MTU of an interface, if the packet does not fit and must not be cut, or cannot be; else 0. Nobody is told of an ICMP error
/// (RFC 1122, 3.2.2).
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn too_big_for(skb: *mut __sk_buff, ifindex: u32) -> u32 {
    let mut mtu = 0;
    if !exceeds(skb, ifindex, &mut mtu) {
        return 0;
    }
    let is_v4 = family_of(skb) == FAMILY_V4;
    let (at_proto, icmp) = if is_v4 { (IPV4_PROTO, ICMP) } else { (IPV6_NEXT, ICMPV6) };
    if is_v4 {
        // Fragments of a packet have the flag if the packet had it. The kernel does not cut tunnel packets over IPv6.
        match byte(skb, OUTER + IPV4_FLAGS) {
            Some(flags) if flags & DO_NOT_FRAGMENT != 0 => {}
            Some(_) if config().is_some_and(over_ipv6) => {}
            _ => return 0,
        }
    } else if mtu < IPV6_MINIMUM {
        return 0;
    }
    let Some(proto) = byte(skb, OUTER + at_proto) else { return 0 };
    if proto == icmp {
        let header = match (is_v4, byte(skb, OUTER)) {
            (true, Some(first)) => u32::from(first & 0x0f) * 4,
            _ => 40,
        };
        match byte(skb, OUTER + header) {
            Some(kind) if !is_error(if is_v4 { FAMILY_V4 } else { 0 }, kind) => {}
            _ => return 0,
        }
    }
    mtu
}

/// 0 if the packet is now what its sender is to be told.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn tell4(skb: *mut __sk_buff, mtu: u32) -> u32 {
    let mut told = MaybeUninit::<Told4>::uninit();
    // SAFETY: integers only.
    let told = unsafe { zero(&mut told) };
    if !load(skb, OUTER, &mut told.about) {
        return 1;
    }
    (told.kind, told.code, told.mtu) = (3, 4, (mtu as u16).to_be());
    told.checksum = folded(sum((&raw mut told.kind).cast(), 8 + size_of_val(&told.about) as u32, 0));
    (told.version, told.class, told.hops, told.proto) = (0x45, CLASS, HOPS, ICMP);
    told.length = LENGTH4.to_be();
    (told.source, told.destination) = (told.about[4], told.about[3]);
    told.header_checksum = folded(sum((&raw mut told.version).cast(), 20, 0));
    replace(skb, told)
}

/// 0 if the packet is now what its sender is to be told.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn tell6(skb: *mut __sk_buff, mtu: u32) -> u32 {
    let mut told = MaybeUninit::<Told6>::uninit();
    // SAFETY: integers only.
    let told = unsafe { zero(&mut told) };
    if !load(skb, OUTER, &mut told.about) {
        return 1;
    }
    let about = &told.about;
    told.ends.source = [about[6], about[7], about[8], about[9]];
    told.ends.destination = [about[2], about[3], about[4], about[5]];
    (told.kind, told.mtu) = (2, mtu.to_be());
    // The pseudo-header: addresses, length and protocol, each of the last two in a word.
    let seed = u32::from(LENGTH6).to_be() + u32::from(ICMPV6).to_be();
    let seed = sum((&raw mut told.ends).cast(), size_of::<Ends6>() as u32, seed);
    told.checksum = folded(sum((&raw mut told.kind).cast(), LENGTH6.into(), seed));
    told.version = (6_u32 << 28).to_be();
    (told.next, told.hops, told.length) = (ICMPV6, HOPS, LENGTH6.to_be());
    replace(skb, told)
}

/// Puts `packet` where that of the frame was, and sends the frame back to whom it came from.
#[inline(always)]
fn replace<T>(skb: *mut __sk_buff, packet: &mut T) -> u32 {
    let mut addresses = [0_u16; 6];
    if !load(skb, 0, &mut addresses) {
        return 1;
    }
    let [to0, to1, to2, from0, from1, from2] = addresses;
    let back = [from0, from1, from2, to0, to1, to2];
    let size = size_of::<T>() as u32;
    // SAFETY: the context is the program's own, and the buffers have the lengths that are passed.
    let failed = unsafe {
        bpf_skb_change_tail(skb, OUTER + size, 0) != 0
            || bpf_skb_store_bytes(skb, 0, back.as_ptr().cast(), 12, 0) != 0
            || bpf_skb_store_bytes(
                skb,
                OUTER,
                (&raw const *packet).cast(),
                size,
                BPF_F_INVALIDATE_HASH.into(),
            ) != 0
    };
    failed.into()
}

#[inline(always)]
fn byte(skb: *mut __sk_buff, at: u32) -> Option<u8> {
    let mut byte = 0_u8;
    load(skb, at, &mut byte).then_some(byte)
}

/// Fills `into` from the packet. Whatever its bytes are, they are a `T`: only integers are loaded.
#[inline(always)]
fn load<T>(skb: *mut __sk_buff, at: u32, into: &mut T) -> bool {
    // SAFETY: the context is the program's own, and the buffer has the length that is passed.
    unsafe { bpf_skb_load_bytes(skb.cast(), at, (&raw mut *into).cast(), size_of::<T>() as u32) == 0 }
}

/// Of `size` bytes, a multiple of four, in ones' complement.
#[inline(always)]
fn sum(words: *mut u32, size: u32, seed: u32) -> u32 {
    // SAFETY: callers pass a part of a value that is written.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words, size, seed) as u32 }
}

/// As headers have it (RFC 1071).
#[inline(always)]
fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}
