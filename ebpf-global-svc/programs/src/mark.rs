// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! The identity of a sender, for the way through the node's stack to a pod whose MAC is not known.
//!
//! ```text
//! 31            16 15    12 11     8 7             0
//! [identity 15..0] [ left ] [ 0xf  ] [identity 23..16]
//! ```
//!
//! A tunnel packet that came encrypted has 0xd in bits 11 to 8 from the WireGuard device to `cm_from_overlay`: the
//! kernel keeps a mark when it takes a packet out of its tunnel within a network namespace.
//!
//! The layout is Cilium's; bits 15 to 12 are others' (kube-proxy has two of them). A pod cannot set a mark: the
//! kernel clears it between network namespaces, and `cm_from_pod` clears one that looks like ours nevertheless.

use aya_ebpf::programs::TcContext;

const MAGIC: u32 = 0x0f00;
/// Of a tunnel packet that WireGuard has decrypted, and of what is in it. Cilium's, too.
const DECRYPTED: u32 = 0x0d00;
const MAGIC_BITS: u32 = 0x0f00;
const OTHERS: u32 = 0xf000;

/// Leaves an identity of 24 bits with the packet.
#[inline(always)]
pub fn set(ctx: &TcContext, identity: u32) {
    let mark = (identity & 0xffff) << 16 | MAGIC | (identity >> 16 & 0xff);
    ctx.skb.set_mark(mark | read(ctx) & OTHERS);
}

/// The identity that one of our programs has left with the packet.
#[inline(always)]
pub fn identity(ctx: &TcContext) -> Option<u32> {
    let mark = read(ctx);
    (mark & MAGIC_BITS == MAGIC).then_some((mark & 0xff) << 16 | mark >> 16)
}

/// Takes away what looks like one of ours.
#[inline(always)]
pub fn clear(ctx: &TcContext) {
    if identity(ctx).is_some() {
        ctx.skb.set_mark(read(ctx) & OTHERS);
    }
}

/// Says that WireGuard has decrypted the packet.
#[inline(always)]
pub fn set_decrypted(ctx: &TcContext) {
    ctx.skb.set_mark(read(ctx) & OTHERS | DECRYPTED);
}

/// Whether WireGuard has decrypted the packet; afterwards it says so no more.
#[inline(always)]
pub fn take_decrypted(ctx: &TcContext) -> bool {
    let mark = read(ctx);
    let decrypted = mark & MAGIC_BITS == DECRYPTED;
    if decrypted {
        ctx.skb.set_mark(mark & OTHERS);
    }
    decrypted
}

#[inline(always)]
fn read(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the program's run.
    unsafe { (*ctx.skb.skb).mark }
}
