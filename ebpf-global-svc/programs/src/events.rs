// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! `cm_events`: single packets and calls, for those who look at them.
//!
//! While nobody does, and nothing is dropped, it costs the test of a word that is at hand ([`wanted`]). Everything else
//! is in functions that are global to the verifier, and writes into the ring's own memory: the stack is full.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock_addr},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns, generated,
    },
    maps::ring_buf::RingBufEntry,
    programs::TcContext,
};
use ebpf_global_svc_abi::{
    BackendValue, Config, EVENT_ANSWER, EVENT_EGRESS, Event, ServiceKey, SockRevKey, event_hook, event_kind,
};

use crate::{
    counters::count,
    flow::{Flow, TCP, bytes, read_packet, tcp},
    maps::{EVENT_RULE, EVENT_STATE, EVENTS, SOCK_REV, config},
    packet::family_of,
    selection::below,
    zero::zero,
};

/// Whether anybody wants to know of events of a kind.
#[inline(always)]
pub fn wanted(config: &Config, kind: u8) -> bool {
    config.events >> kind & 1 != 0
}

/// What an event is about, in one word: a function that is global to the verifier has five arguments.
#[derive(Clone, Copy)]
pub struct What(u32);

impl What {
    #[inline(always)]
    pub const fn new(kind: u8, reason: u8, hook: u8, flags: u8) -> Self {
        Self(u32::from_le_bytes([kind, reason, hook, flags]))
    }

    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }

    #[inline(always)]
    fn write(self, event: &mut Event) {
        [event.kind, event.reason, event.hook, event.flags] = self.0.to_le_bytes();
    }
}

/// Tells of a packet that was read.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn report(flow: *const Flow, what: u32, source: u32, destination: u32, number: u32) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return 0 };
    let what = What(what);
    let [kind, ..] = what.0.to_le_bytes();
    let Some(mut entry) = reserve(kind) else { return 0 };
    // SAFETY: `reserve` gives zeroes, which are an event.
    let event = unsafe { entry.assume_init_mut() };
    what.write(event);
    if flow.is_answer_by_itself() {
        event.flags |= EVENT_ANSWER;
    }
    event.source = bytes(flow.source);
    event.destination = bytes(flow.destination);
    event.source_identity = source;
    event.destination_identity = destination;
    event.number = number;
    event.length = flow.bytes;
    event.ifindex = flow.ifindex;
    event.source_cluster = flow.source_cluster;
    event.destination_cluster = flow.destination_cluster;
    event.source_port = flow.source_port;
    event.destination_port = flow.destination_port;
    event.family = flow.family;
    event.proto = flow.proto;
    event.tcp_flags = flow.tcp_flags;
    event.icmp_code = flow.icmp_code;
    if flow.is_icmp() {
        event.icmp_type = u16::from_be(flow.service) as u8;
    }
    entry.submit(0);
    0
}

/// A packet ends here: counts it, and tells of it if somebody wants to know. `sender`: its identity, 0 if it is not
/// known.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drop_packet(skb: *mut __sk_buff, hook: u32, reason: u32, sender: u32) -> u32 {
    let ctx = TcContext::new(skb);
    count(reason as u8, ctx.len());
    let Some(config) = config() else { return 0 };
    if !wanted(config, event_kind::DROP) {
        return 0;
    }
    let (hook, mut flow) = (hook as u8, MaybeUninit::uninit());
    let flow = read_packet(&ctx, &mut flow, hook, family_of(skb), (0, 0));
    let flags = if hook == event_hook::FROM_POD { EVENT_EGRESS } else { 0 };
    report(flow, What::new(event_kind::DROP, reason as u8, hook, flags).word(), sender, 0, 0)
}

/// Tells of a packet that is passed on, unless it is in the midst of a TCP connection. `clusters`: see [`clusters`].
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trace_packet(
    skb: *mut __sk_buff,
    what: u32,
    source: u32,
    destination: u32,
    clusters: u32,
) -> u32 {
    let [_, _, hook, _] = what.to_le_bytes();
    let [a, b, c, d] = clusters.to_le_bytes();
    let clusters = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let mut flow = MaybeUninit::uninit();
    let flow = read_packet(&TcContext::new(skb), &mut flow, hook, family_of(skb), clusters);
    if flow.unreadable != 0 || flow.proto == TCP && flow.tcp_flags & (tcp::SYN | tcp::FIN | tcp::RST) == 0 {
        return 0;
    }
    let service = if hook == event_hook::FROM_POD { named_service(skb, flow) } else { 0 };
    report(flow, what, source, destination, service)
}

/// The clusters of both ends, 0 outside of the mesh, in one word.
#[inline(always)]
pub fn clusters(source: u16, destination: u16) -> u32 {
    u32::from(source) | u32::from(destination) << 16
}

/// The service that the socket of a packet has named; 0: none, or nobody can tell.
#[inline(never)]
fn named_service(skb: *mut __sk_buff, flow: &Flow) -> u32 {
    let key = SockRevKey {
        // SAFETY: callers pass the program's own context.
        cookie: unsafe { bpf_get_socket_cookie(skb.cast()) },
        ip: bytes(flow.destination),
        port: flow.destination_port,
        family: flow.family,
        proto: flow.proto,
        pad: 0,
    };
    // SAFETY: copied at once; one that the kernel has recycled just now costs a wrong name.
    unsafe { SOCK_REV.get(&key) }.map_or(0, |frontend| frontend.service)
}

/// Tells of a call: `backend` is null if it is refused.
///
/// # Safety
/// `ctx` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn report_call(
    ctx: *mut bpf_sock_addr,
    frontend: *const ServiceKey,
    backend: *const BackendValue,
    what: u32,
    service: u32,
) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(frontend) = (unsafe { frontend.as_ref() }) else { return 0 };
    let what = What(what);
    let [kind, ..] = what.0.to_le_bytes();
    // SAFETY: the caller's promise.
    let socket = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    let process = (bpf_get_current_pid_tgid() >> 32) as u32;
    let Some(mut entry) = reserve(kind) else { return 0 };
    // SAFETY: `reserve` gives zeroes, which are an event.
    let event = unsafe { entry.assume_init_mut() };
    what.write(event);
    event.socket = socket;
    event.process = process;
    // SAFETY: the buffer has the size that is passed; on failure it stays zero.
    unsafe {
        generated::bpf_get_current_comm(event.command.as_mut_ptr().cast(), size_of_val(&event.command) as u32)
    };
    event.frontend = frontend.ip;
    event.frontend_port = frontend.port;
    event.source_cluster = frontend.cluster;
    event.family = frontend.family;
    event.proto = frontend.proto;
    event.number = service;
    // SAFETY: callers pass a reference, or null.
    if let Some(backend) = unsafe { backend.as_ref() } {
        event.destination = backend.ip;
        event.destination_port = backend.port;
        event.destination_cluster = backend.cluster;
    }
    entry.submit(0);
    0
}

/// Room for an event of a kind, with all its bytes zero but those about itself; none if it is one too many, or if
/// there is no room. That is counted, and the next one says so.
#[inline(always)]
fn reserve(kind: u8) -> Option<RingBufEntry<Event>> {
    let rule = EVENT_RULE.get(kind.into())?;
    let state = EVENT_STATE.get_ptr_mut(kind.into())?;
    // SAFETY: the element belongs to this CPU, and programs do not migrate. An interrupt may come between: that costs a
    // count, or lets one more through.
    let state = unsafe { &mut *state };
    // SAFETY: no preconditions.
    if rule.sample > 1 && below(unsafe { bpf_get_prandom_u32() }, rule.sample) != 0 {
        state.sampled += 1;
        return None;
    }
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let mut due = if state.due > now { state.due } else { now };
    let ahead = due - now;
    if ahead > rule.tolerance {
        if ahead - rule.tolerance <= rule.interval {
            state.limited += 1;
            state.unsent += 1;
            return None;
        }
        // Nobody gets as far ahead under this rule: it was another one, which counts no more.
        due = now;
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        state.full += 1;
        state.unsent += 1;
        return None;
    };
    // SAFETY: integers only.
    let event = unsafe { zero(&mut entry) };
    event.time = now;
    event.unsent = state.unsent as u32;
    state.due = due + rule.interval;
    state.unsent = 0;
    state.sent += 1;
    Some(entry)
}
