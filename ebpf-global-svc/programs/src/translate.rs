// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Clusters whose pods have addresses that are taken here: their pods are known by virtual ones.
//!
//! On the wire between nodes there are real addresses only. Who sends writes the real destination in place of the
//! virtual one; who receives writes the virtual source in place of the real one, of which only the VNI says whose it is.
//! Real and virtual prefixes are of one length, so each address is the other one with some bits turned over
//! (`cm_translate`): there is no state, and every node does it by itself.
//!
//! An ICMP error travels against the packet that it holds, so there it is the other end's address, too: the source of
//! what it holds if the error is sent, the destination if it is received.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes},
    programs::TcContext,
};
use ebpf_global_svc_abi::{FAMILY_V4, FAMILY_V6, reason, translate};

use crate::{
    flow::{EMBEDDED, Flow, OUTER, Part, TCP, is_error, load, read_network},
    maps::turned_bits,
    rewrite::{IPV4_ADDRESSES, IPV4_CHECKSUM, IPV6_ADDRESSES, pseudo_checksum},
};

/// The packet is about to be sent to a cluster; its destination is a virtual address there. Else: why it must not go.
#[inline(always)]
pub fn leave(ctx: &TcContext, cluster: u16) -> Result<(), u8> {
    translate(ctx, cluster, translate::TO_REAL)
}

/// The packet has come from a cluster with virtual addresses. A source that has none stays as it is.
#[inline(always)]
pub fn enter(ctx: &TcContext, cluster: u16) -> Result<(), u8> {
    translate(ctx, cluster, translate::TO_VIRTUAL)
}

#[inline(always)]
fn translate(ctx: &TcContext, cluster: u16, way: u8) -> Result<(), u8> {
    // SAFETY: the context is the program's own.
    match unsafe { translate_packet(ctx.skb.skb, cluster.into(), way.into()) } {
        0 => Ok(()),
        reason => Err(reason as u8),
    }
}

/// Global to the verifier, as what reads addresses and flows. 0, or the reason why the packet is dropped.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn translate_packet(skb: *mut __sk_buff, cluster: u32, way: u32) -> u32 {
    // SAFETY: the context is valid for the program's run.
    let family = match u16::from_be(unsafe { (*skb).protocol } as u16) {
        0x0800 => FAMILY_V4,
        0x86dd => FAMILY_V6,
        _ => return reason::INVALID_PACKET.into(),
    };
    let (cluster, way) = (cluster as u16, way as u8);
    let mut flow = MaybeUninit::uninit();
    let flow = Flow::new(&mut flow, family, (0, 0));
    let behind = read_network(skb, OUTER, flow);
    let is_first = match behind.part {
        Part::Unknown => return reason::INVALID_PACKET.into(),
        Part::Later => false,
        Part::All | Part::First => true,
    };
    let to_real = way == translate::TO_REAL;
    let checksum = if is_first { pseudo_checksum(flow.proto) } else { 0 };
    let checksum = if checksum == 0 { 0 } else { behind.at + checksum };
    match turn(
        skb,
        OUTER,
        Place { family, cluster, way, is_destination: to_real, checksum, proto: flow.proto },
    ) {
        TURNED => {}
        AS_IT_WAS if !to_real => {}
        AS_IT_WAS => return reason::NO_MAPPING.into(),
        _ => return reason::INVALID_PACKET.into(),
    }
    if !is_first || !flow.is_icmp() {
        return 0;
    }
    match load::<[u8; 1]>(skb, behind.at) {
        Some([kind]) if is_error(family, kind) => {}
        _ => return 0,
    }
    // The checksum of an IPv4 header makes up for its address, so that of the error stays right.
    let place = Place { family, cluster, way, is_destination: !to_real, checksum: 0, proto: 0 };
    // Cut off: then nobody needs it.
    turn(skb, behind.at + EMBEDDED, place);
    0
}

/// What is to be turned in a packet.
struct Place {
    family: u8,
    cluster: u16,
    way: u8,
    /// Of the two addresses.
    is_destination: bool,
    /// Where a checksum is that covers the addresses; 0: nowhere.
    checksum: u32,
    proto: u8,
}

/// The address stands there as its counterpart.
const TURNED: u32 = 0;
/// It has none.
const AS_IT_WAS: u32 = 1;
const CUT_OFF: u32 = 2;

/// Puts the counterpart of an address in its place. `header`: where its IP header is.
#[inline(always)]
fn turn(skb: *mut __sk_buff, header: u32, place: Place) -> u32 {
    let turned = if place.family == FAMILY_V4 {
        turn_ipv4(skb, header, &place)
    } else {
        turn_ipv6(skb, header, &place)
    };
    turned.unwrap_or(CUT_OFF)
}

#[inline(always)]
fn turn_ipv4(skb: *mut __sk_buff, header: u32, place: &Place) -> Option<u32> {
    let at = header + IPV4_ADDRESSES + if place.is_destination { 4 } else { 0 };
    let [before] = load::<[u32; 1]>(skb, at)?;
    let Some([bits, ..]) = turned_bits(place.cluster, FAMILY_V4, place.way, [before, 0, 0, 0]) else {
        return Some(AS_IT_WAS);
    };
    let after = before ^ bits;
    // UDP: none, if it is 0.
    let may_be_none = if place.proto == TCP { 0 } else { BPF_F_MARK_MANGLED_0 };
    let flags = u64::from(BPF_F_PSEUDO_HDR | may_be_none) | 4;
    // SAFETY: the context is the program's own, and the buffer has the size that is passed.
    let failed = unsafe {
        place.checksum != 0
            && bpf_l4_csum_replace(skb, place.checksum, before.into(), after.into(), flags) != 0
            || bpf_l3_csum_replace(skb, header + IPV4_CHECKSUM, before.into(), after.into(), 4) != 0
            || bpf_skb_store_bytes(skb, at, (&raw const after).cast(), 4, 0) != 0
    };
    (!failed).then_some(TURNED)
}

/// Virtual and real prefixes of IPv6 have one sum: no checksum changes.
#[inline(always)]
fn turn_ipv6(skb: *mut __sk_buff, header: u32, place: &Place) -> Option<u32> {
    let at = header + IPV6_ADDRESSES + if place.is_destination { 16 } else { 0 };
    let before = load::<[u32; 4]>(skb, at)?;
    let Some(bits) = turned_bits(place.cluster, FAMILY_V6, place.way, before) else { return Some(AS_IT_WAS) };
    let after = [before[0] ^ bits[0], before[1] ^ bits[1], before[2] ^ bits[2], before[3] ^ bits[3]];
    // SAFETY: the context is the program's own, and the buffer has the size that is passed.
    let stored = unsafe { bpf_skb_store_bytes(skb, at, after.as_ptr().cast(), 16, 0) };
    (stored == 0).then_some(TURNED)
}
