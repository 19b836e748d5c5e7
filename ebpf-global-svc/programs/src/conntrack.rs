// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Which flows have been let through (`cm_ct`), so that their answers are.
//!
//! A pod that a policy selects in either direction has an entry for each flow: else the answers to a flow
//! that came in would look like a flow that goes out, whose entry would let the next packets in unasked.
//! Only who began keeps an entry alive, and only while policy lets it: a flow whose permission is gone ends.
//!
//! Entries are changed in place. Another CPU may do so at the same time, and the kernel may have given the
//! element to another flow just then: what can be lost is a FIN, or the time at which an entry ends.
//!
//! While `cm_ct` is replaced by one of another size, programs are on their hooks that know both (`CT_CHANGES`): they look
//! into the new one first, and write into both, so that programs that know only one of them find all flows.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_ktime_get_ns};
use ebpf_global_svc_abi::{CT_CLOSING, CT_FIN, CT_FIN_ANSWERED, CtKey, CtValue, IpKey, direction};

use crate::{
    flow::{Flow, TCP, bytes, read_flow, traits},
    maps::{CT, CT_BEFORE, ct_changes, prefix_of},
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
    let Some(entry) = entry(&Key::new(flow, toward, toward ^ 1)) else { return false };
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

/// A packet of a flow that begins, or has begun, in its own direction is let through. Tells whether it is the first
/// of its flow, or belongs to none.
#[inline(always)]
pub fn remember(flow: &Flow, toward: u8, peer: u32) -> bool {
    if flow.is(traits::ANSWERS | traits::ALONE) {
        return flow.is(traits::ALONE);
    }
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let key = Key::new(flow, toward, toward);
    if !flow.is(traits::BEGINS) || flow.proto != TCP {
        if let Some(entry) = entry(&key) {
            // SAFETY: as above.
            if unsafe { refresh(entry, flow, now) } {
                return false;
            }
        }
    }
    if flow.is(traits::RST) {
        return false;
    }
    let value = CtValue { expires: now + lifetime(flow, 0), flags: 0, peer };
    // A failure costs the answers, where a policy selects, until the next packet.
    let _ = CT.insert(&*key, value, 0);
    if ct_changes() {
        let _ = CT_BEFORE.insert(&*key, value, 0);
    }
    true
}

/// The flow is not let through any more, and neither are its answers.
#[inline(always)]
pub fn forget(flow: &Flow, toward: u8) {
    if !flow.is(traits::ANSWERS | traits::ALONE) {
        let key = Key::new(flow, toward, toward);
        let _ = CT.remove(&*key);
        if ct_changes() {
            let _ = CT_BEFORE.remove(&*key);
        }
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
    let mut about = MaybeUninit::uninit();
    let about = Flow::new(&mut about, error.family, (0, 0));
    // SAFETY: the caller's promise.
    unsafe { read_flow(skb, error.embedded, about) };
    // It travelled the other way: what the pod has sent comes back to it.
    let sent = toward as u8 ^ 1;
    let is_pods = if sent == direction::EGRESS {
        about.source == error.destination
    } else {
        about.destination == error.source
    };
    if !is_pods || about.unreadable != 0 || about.is(traits::ALONE) {
        return 0;
    }
    is_known(about, sent).into()
}

/// Whether the packet, which went as `sent`, is of a flow that was let through. Apart, so that its keys do not
/// lie on the stack while the packet is read.
#[inline(never)]
fn is_known(about: &Flow, sent: u8) -> bool {
    let mut key = Key::new(about, sent, sent);
    let address = IpKey { cluster: 0, family: about.family, pad: 0, ip: bytes(key.remote) };
    key.set_cluster(prefix_of(&address).map_or(0, |prefix| prefix.cluster));
    if is_alive(&key) {
        return true;
    }
    key.began = Key::new(about, sent, sent ^ 1).began;
    is_alive(&key)
}

#[inline(always)]
fn is_alive(key: &CtKey) -> bool {
    match entry(key) {
        // SAFETY: the element stays readable until the program ends; no preconditions.
        Some(entry) => unsafe { (*entry).expires > bpf_ktime_get_ns() },
        None => false,
    }
}

/// The entry of a flow.
#[inline(always)]
fn entry(key: &CtKey) -> Option<*mut CtValue> {
    match CT.get_ptr_mut(key) {
        None if ct_changes() => CT_BEFORE.get_ptr_mut(key),
        entry => entry,
    }
}

/// [`CtKey`] by words: by fields, its padding would become a call of memset.
#[repr(C)]
struct Key {
    local: [u32; 4],
    remote: [u32; 4],
    ports: u32,
    /// Cluster, protocol, family.
    kind: u32,
    /// Direction, padding.
    began: u32,
}
const _: () = assert!(size_of::<Key>() == size_of::<CtKey>());

impl Key {
    /// The entry of the flow of a packet that goes `toward`, if it began as `began`.
    #[inline(always)]
    fn new(flow: &Flow, toward: u8, began: u8) -> Self {
        let (source, destination) = (flow.source_port.to_ne_bytes(), flow.destination_port.to_ne_bytes());
        let (local, remote, ports, cluster) = if toward == direction::EGRESS {
            (flow.source, flow.destination, [source, destination], flow.destination_cluster)
        } else {
            (flow.destination, flow.source, [destination, source], flow.source_cluster)
        };
        let [[a, b], [c, d]] = ports;
        let ports = u32::from_ne_bytes([a, b, c, d]);
        let [low, high] = cluster.to_ne_bytes();
        let kind = u32::from_ne_bytes([low, high, flow.proto, flow.family]);
        Self { local, remote, ports, kind, began: u32::from_ne_bytes([began, 0, 0, 0]) }
    }

    #[inline(always)]
    fn set_cluster(&mut self, cluster: u16) {
        let [_, _, proto, family] = self.kind.to_ne_bytes();
        let [low, high] = cluster.to_ne_bytes();
        self.kind = u32::from_ne_bytes([low, high, proto, family]);
    }
}

impl core::ops::Deref for Key {
    type Target = CtKey;

    #[inline(always)]
    fn deref(&self) -> &CtKey {
        // SAFETY: of the same size, laid out alike, and aligned to more.
        unsafe { &*(&raw const *self).cast() }
    }
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
