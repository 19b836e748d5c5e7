// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Which flows have been let through (`cm_ct`), so that their answers are.
//!
//! A pod that a policy selects in either direction has an entry for each flow: else the answers to a flow
//! that came in would look like a flow that goes out, whose entry would let the next packets in unasked.
//! Only who began keeps an entry alive, and only while policy lets it: a flow whose permission is gone ends.
//!
//! Entries are changed in place. Another CPU may do so at the same time, and the kernel may have given the
//! element to another flow just then: what can be lost is a FIN, or the time at which an entry ends.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_ktime_get_ns};
use ebpf_global_svc_abi::{CT_CLOSING, CT_FIN, CT_FIN_ANSWERED, CtKey, CtValue, IpKey, direction};

use crate::{
    flow::{Flow, TCP, read_flow, traits},
    maps::{CT, prefix_of},
};

const SECOND: u64 = 1_000_000_000;
/// TCP, from the second packet on.
const ESTABLISHED: u64 = 8_000 * SECOND;
/// TCP, once it is closed.
const CLOSING: u64 = 10 * SECOND;
/// TCP until then, and everything else.
const BRIEF: u64 = 60 * SECOND;

/// Whether the packet, which a pod sends or receives, belongs to a flow that began the other way.
#[inline(always)]
pub fn is_answer(flow: &Flow, toward: u8) -> bool {
    if flow.is(traits::BEGINS | traits::ALONE) {
        return false;
    }
    let Some(entry) = CT.get_ptr_mut(key(flow, toward, toward ^ 1)) else { return false };
    // SAFETY: the element stays readable until the program ends; see the module on who else writes it.
    unsafe {
        let now = bpf_ktime_get_ns();
        if (*entry).expires <= now {
            return false;
        }
        if flow.is(traits::FIN | traits::RST) {
            close(entry, flow, CT_FIN_ANSWERED, now);
        }
    }
    true
}

/// A packet of a flow that begins, or has begun, in its own direction is let through.
#[inline(always)]
pub fn remember(flow: &Flow, toward: u8, peer: u32) {
    if flow.is(traits::ANSWERS | traits::ALONE) {
        return;
    }
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let key = key(flow, toward, toward);
    if !flow.is(traits::BEGINS) || flow.proto != TCP {
        if let Some(entry) = CT.get_ptr_mut(key) {
            // SAFETY: as above.
            if unsafe { refresh(entry, flow, now) } {
                return;
            }
        }
    }
    if flow.is(traits::RST) {
        return;
    }
    let value = CtValue { expires: now + lifetime(flow, 0), flags: 0, peer };
    // A failure costs the answers, where a policy selects, until the next packet.
    let _ = CT.insert(key, value, 0);
}

/// The flow is not let through any more, and neither are its answers.
#[inline(always)]
pub fn forget(flow: &Flow, toward: u8) {
    if !flow.is(traits::ANSWERS | traits::ALONE) {
        let _ = CT.remove(key(flow, toward, toward));
    }
}

/// Whether an ICMP error is about a packet of a flow that was let through.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn is_about_flow(skb: *mut __sk_buff, error: *const Flow, toward: u32) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(error) = (unsafe { error.as_ref() }) else { return 0 };
    let mut about = Flow::new(error.family, (0, 0), 0);
    // SAFETY: the caller's promise.
    unsafe { read_flow(skb, error.embedded, &raw mut about) };
    if about.unreadable != 0 || about.is(traits::ALONE) {
        return 0;
    }
    is_known(&about, error, toward as u8).into()
}

/// Whether the packet `about`, which comes back in an error that goes `toward`, is of a flow that was let
/// through. Apart, so that its keys do not lie on the stack while the packet is read.
#[inline(never)]
fn is_known(about: &Flow, error: &Flow, toward: u8) -> bool {
    // It travelled the other way: what the pod has sent comes back to it.
    let sent = toward ^ 1;
    let mut key = key(about, sent, sent);
    let pod = if sent == direction::EGRESS { &error.destination } else { &error.source };
    if key.local != *pod {
        return false;
    }
    let address = IpKey { cluster: 0, family: key.family, pad: 0, ip: key.remote };
    key.cluster = prefix_of(&address).map_or(0, |prefix| prefix.cluster);
    if is_alive(&key) {
        return true;
    }
    key.direction ^= 1;
    is_alive(&key)
}

#[inline(always)]
fn is_alive(key: &CtKey) -> bool {
    // SAFETY: the element is only read.
    match unsafe { CT.get(key) } {
        // SAFETY: no preconditions.
        Some(entry) => entry.expires > unsafe { bpf_ktime_get_ns() },
        None => false,
    }
}

/// The entry of the flow of a packet that goes `toward`, if it began as `began`.
#[inline(always)]
fn key(flow: &Flow, toward: u8, began: u8) -> CtKey {
    let mut key = CtKey {
        local: flow.source,
        remote: flow.destination,
        local_port: flow.source_port,
        remote_port: flow.destination_port,
        cluster: flow.destination_cluster,
        proto: flow.proto,
        family: flow.family,
        direction: began,
        pad: [0; 3],
    };
    if toward == direction::INGRESS {
        key.local = flow.destination;
        key.remote = flow.source;
        key.local_port = flow.destination_port;
        key.remote_port = flow.source_port;
        key.cluster = flow.source_cluster;
    }
    key
}

/// Lets an entry live on. False if it has ended already.
///
/// # Safety
/// `entry` is an element of `cm_ct`.
#[inline(always)]
unsafe fn refresh(entry: *mut CtValue, flow: &Flow, now: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        if (*entry).expires <= now {
            return false;
        }
        if flow.is(traits::FIN | traits::RST) {
            close(entry, flow, CT_FIN, now);
            return true;
        }
        let lifetime = lifetime(flow, (*entry).flags);
        // Not with every packet: the entry may be in another CPU's cache.
        if (*entry).expires - now < lifetime / 2 {
            (*entry).expires = now + lifetime;
        }
    }
    true
}

/// One end has nothing more to say.
///
/// # Safety
/// `entry` is an element of `cm_ct`.
#[inline(always)]
unsafe fn close(entry: *mut CtValue, flow: &Flow, fin: u32, now: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut flags = (*entry).flags | fin;
        if flow.is(traits::RST) || flags & (CT_FIN | CT_FIN_ANSWERED) == CT_FIN | CT_FIN_ANSWERED {
            flags |= CT_CLOSING;
            (*entry).expires = now + CLOSING;
        }
        (*entry).flags = flags;
    }
}

/// How long an entry lives on after this packet.
#[inline(always)]
fn lifetime(flow: &Flow, flags: u32) -> u64 {
    if flow.proto != TCP || flow.is(traits::BEGINS) {
        BRIEF
    } else if flags & CT_CLOSING != 0 || flow.is(traits::FIN) {
        CLOSING
    } else {
        ESTABLISHED
    }
}
