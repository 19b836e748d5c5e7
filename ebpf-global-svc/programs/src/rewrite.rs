// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Another address and port in a packet, with all checksums that cover them.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::{bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes},
};
use ebpf_global_svc_abi::FAMILY_V4;

use crate::flow::{OUTER, TCP, UDP};

pub const UDP_LITE: u8 = 136;

/// Where IPv4 headers have their checksum, and where addresses begin.
pub const IPV4_CHECKSUM: u32 = 10;
pub const IPV4_ADDRESSES: u32 = 12;
pub const IPV6_ADDRESSES: u32 = 8;
/// Where ICMP headers have their checksum.
const ICMP_CHECKSUM: u32 = 2;

/// What becomes of one end of a packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Rewrite {
    /// Network order, by words.
    pub before: [u32; 4],
    pub after: [u32; 4],
    /// Where the IP header is.
    pub header: u32,
    /// Where the transport header is; 0: it is in another fragment.
    pub transport: u32,
    /// Where the ICMP header of an error is, if this is an address of what it holds, or an IPv6 address of its own; else 0.
    pub error: u32,
    /// Network order.
    pub port_before: u16,
    pub port_after: u16,
    pub family: u8,
    pub proto: u8,
    /// Of the two ends.
    pub is_destination: u8,
    pub pad: u8,
}

/// Where, in a transport header, a checksum is that covers the addresses; 0: nowhere.
#[inline(always)]
pub fn pseudo_checksum(proto: u8) -> u32 {
    match proto {
        TCP => 16,
        UDP | UDP_LITE => 6,
        _ => 0,
    }
}

/// Does it. 0, or something else if the packet ends before. Global to the verifier, as what reads addresses and flows.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rewrite(skb: *mut __sk_buff, what: *const Rewrite) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(what) = (unsafe { what.as_ref() }) else { return 1 };
    let done = address(skb, what).and_then(|()| port(skb, what));
    done.is_none().into()
}

#[inline(always)]
fn address(skb: *mut __sk_buff, what: &Rewrite) -> Option<()> {
    if what.before == what.after {
        return Some(());
    }
    if what.family == FAMILY_V4 {
        let at = what.header + IPV4_ADDRESSES + if what.is_destination == 0 { 0 } else { 4 };
        let (before, after) = (what.before[0], what.after[0]);
        let at_checksum = transport_checksum(what);
        // The checksum of a header that is held makes up for its address, so that of the error stays right.
        let flags = u64::from(BPF_F_PSEUDO_HDR | may_be_none(what)) | 4;
        // SAFETY: the context is the program's own, and the buffer has the size that is passed.
        let failed = unsafe {
            at_checksum != 0 && bpf_l4_csum_replace(skb, at_checksum, before.into(), after.into(), flags) != 0
                || bpf_l3_csum_replace(skb, what.header + IPV4_CHECKSUM, before.into(), after.into(), 4) != 0
                || bpf_skb_store_bytes(skb, at, (&raw const after).cast(), 4, 0) != 0
        };
        return (!failed).then_some(());
    }
    let at = what.header + IPV6_ADDRESSES + if what.is_destination == 0 { 0 } else { 16 };
    let (mut before, mut after) = (what.before, what.after);
    // SAFETY: both buffers have the size that is passed.
    let difference = unsafe { bpf_csum_diff(before.as_mut_ptr(), 16, after.as_mut_ptr(), 16, 0) };
    let (at_checksum, flags) = match what.error {
        0 => (transport_checksum(what), u64::from(BPF_F_PSEUDO_HDR | may_be_none(what))),
        error if what.header == OUTER => (error + ICMP_CHECKSUM, BPF_F_PSEUDO_HDR.into()),
        error => (error + ICMP_CHECKSUM, 0),
    };
    // SAFETY: the context is the program's own, and the buffer has the size that is passed.
    let failed = unsafe {
        at_checksum != 0 && bpf_l4_csum_replace(skb, at_checksum, 0, difference as u64, flags) != 0
            || bpf_skb_store_bytes(skb, at, after.as_ptr().cast(), 16, 0) != 0
    };
    (!failed).then_some(())
}

#[inline(always)]
fn port(skb: *mut __sk_buff, what: &Rewrite) -> Option<()> {
    if what.port_before == what.port_after || what.transport == 0 {
        return Some(());
    }
    let at = what.transport + if what.is_destination == 0 { 0 } else { 2 };
    let (before, after) = (what.port_before, what.port_after);
    let (at_checksum, flags) = match what.error {
        0 => (transport_checksum(what), u64::from(may_be_none(what))),
        error => (error + ICMP_CHECKSUM, 0),
    };
    // SAFETY: the context is the program's own, and the buffer has the size that is passed.
    let failed = unsafe {
        at_checksum != 0 && bpf_l4_csum_replace(skb, at_checksum, before.into(), after.into(), flags | 2) != 0
            || bpf_skb_store_bytes(skb, at, (&raw const after).cast(), 2, 0) != 0
    };
    (!failed).then_some(())
}

/// Where the checksum of the transport header is; 0: it has none that covers addresses, or is not to be touched.
#[inline(always)]
fn transport_checksum(what: &Rewrite) -> u32 {
    let within = pseudo_checksum(what.proto);
    if what.transport == 0 || what.error != 0 || within == 0 { 0 } else { what.transport + within }
}

/// UDP: there is no checksum if it is 0.
#[inline(always)]
fn may_be_none(what: &Rewrite) -> u32 {
    if what.proto == TCP { 0 } else { BPF_F_MARK_MANGLED_0 }
}
