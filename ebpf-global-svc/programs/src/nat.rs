// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Services for what no socket hook sees: packets from outside of the mesh, and of pods whose sockets are none of this
//! kernel's (virtual machines, network stacks of their own).
//!
//! A client's packet to a frontend gets the address of a backend (`cm_nat`, kind `SERVED`), and what the backend answers
//! gets the frontend's (`ANSWERED`). The client's own address stays as it is: policy sees who calls, and so does the
//! backend. If the backend is on another node, that one notes by which node the packet came, and sends answers back
//! there.
//!
//! `cm_scratch` holds one packet's flow, frontend, entry and rewrite: they do not fit on the stack. Nothing else runs on this CPU
//! between a look-up here and what is done with it; policy, which may be asked meanwhile, does not use it.

use core::{mem::MaybeUninit, ptr::addr_of_mut};

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_ktime_get_ns, programs::TcContext};
use ebpf_global_svc_abi::{
    BackendValue, FAMILY_V4, NAT_CLOSED, NatKey, NatValue, SCRATCH_WORDS, ServiceKey, backend_state,
    nat_kind, reason, scope,
};

use crate::{
    flow::{EMBEDDED, Flow, OUTER, TCP, bytes, read_flow, traits},
    maps::{NAT, NAT_USED, SCRATCH},
    packet::family_of,
    rewrite::{Rewrite, rewrite},
    selection::{Selection, mix, select},
    zero::zero,
};

const SECOND: u64 = 1_000_000_000;
/// How long `NatValue::used` may lag behind.
pub const REFRESH: u64 = SECOND;
/// Datagrams, and TCP that is only beginning or at its end: another flow after so long.
const BRIEF: u64 = 60 * SECOND;
/// TCP otherwise.
const ESTABLISHED: u64 = 8_000 * SECOND;

/// What [`serve`] has found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// To no frontend: the packet is as it was.
    Not,
    /// Its destination is a backend now.
    Yes,
    /// To a frontend without a backend.
    Refused,
    /// It cannot be translated.
    Broken,
}

/// What [`answer`] has found.
pub enum Answer {
    /// It is none, as far as this node knows.
    Not,
    /// To a client that is a pod of this node. [`give`] it the frontend's address.
    ToPod,
    /// To a client outside, through an interface of this node. [`give`] it the frontend's address.
    Outside(u32),
    /// To a client outside, by the node that has the frontend.
    ByNode([u8; 4]),
}

#[repr(C)]
struct Scratch {
    key: NatKey,
    pad: u32,
    value: NatValue,
    flow: Flow,
    about: Flow,
    rewrite: Rewrite,
    frontend: ServiceKey,
}

const _: () = assert!(size_of::<Scratch>() <= SCRATCH_WORDS * 8);

#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    let place: *mut Scratch = SCRATCH.get_ptr_mut(0)?.cast();
    // SAFETY: of this CPU, which runs nothing else of this module meanwhile; integers only.
    Some(unsafe { &mut *place })
}

/// Whether there is, or was, anything in `cm_nat`: if not, packets need no look-up.
#[inline(always)]
pub fn is_used() -> bool {
    NAT_USED.get(0).is_some_and(|used| *used != 0)
}

/// Gives a packet to a frontend of `cluster` the address of a backend. `whose`: see [`scope`].
#[inline(always)]
pub fn serve(ctx: &TcContext, cluster: u16, whose: u8) -> Served {
    let skb = ctx.skb.skb;
    // One after the other, and not from each other: their stacks add up.
    // SAFETY: the context is the program's own.
    let found = match unsafe { find_served(skb) } {
        IS_NEW => choose(skb, u32::from(cluster) << 8 | u32::from(whose)),
        found => found,
    };
    // SAFETY: as above.
    match found {
        IS_NOT => Served::Not,
        IS_REFUSED => Served::Refused,
        IS_DONE if unsafe { give_backend(skb) } == 0 => Served::Yes,
        _ => Served::Broken,
    }
}

const IS_NOT: u32 = 0;
const IS_DONE: u32 = 1;
const IS_REFUSED: u32 = 2;
const IS_BROKEN: u32 = 3;
/// A flow of which nothing is known.
const IS_NEW: u32 = 4;

/// Looks whether a packet from a backend of `cluster` is an answer, and where it goes.
#[inline(always)]
pub fn answer(ctx: &TcContext, cluster: u16) -> Answer {
    // SAFETY: the context is the program's own.
    let found = unsafe { find_answer(ctx.skb.skb, cluster.into()) };
    let rest = found as u32;
    match (found >> 32) as u32 {
        IS_ANSWER if rest == 0 => Answer::ToPod,
        IS_ANSWER => Answer::Outside(rest),
        IS_BY_NODE => Answer::ByNode(rest.to_ne_bytes()),
        _ => Answer::Not,
    }
}

const IS_ANSWER: u32 = 1;
const IS_BY_NODE: u32 = 2;

/// Puts the frontend's address into the packet of which [`answer`] has just said that it is an answer.
#[inline(always)]
pub fn give(ctx: &TcContext) -> Result<(), u8> {
    // SAFETY: the context is the program's own.
    match unsafe { give_answer(ctx.skb.skb) } {
        0 => Ok(()),
        _ => Err(reason::INVALID_PACKET),
    }
}

/// A packet has come through the overlay from a client outside, let in by a service at `node_ip`: what its receiver, a
/// pod of `cluster` on this node, answers goes back there.
#[inline(always)]
pub fn note_way_back(ctx: &TcContext, cluster: u16, node_ip: [u8; 4]) {
    // SAFETY: the context is the program's own.
    unsafe { note_node(ctx.skb.skb, cluster.into(), u32::from_ne_bytes(node_ip)) };
}

/// Global to the verifier, as what reads addresses and flows; so are those below.
///
/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn find_served(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = scratch() else { return IS_NOT };
    let Some(transport) = read_into(skb, &mut scratch.flow) else { return IS_NOT };
    let flow = &scratch.flow;
    if flow.embedded != 0 {
        // About an answer that a client has got.
        let (at, family) = (flow.embedded, flow.family);
        if read_held(skb, at, family, &mut scratch.about).is_none()
            || scratch.flow.destination != scratch.about.source
        {
            return IS_NOT;
        }
        set_key(&mut scratch.key, nat_kind::SERVED, 0, &scratch.about, true);
        return if peek(&scratch.key, &mut scratch.value) { IS_DONE } else { IS_NOT };
    }
    if !has_ports(flow) {
        return IS_NOT;
    }
    scratch.rewrite.transport = transport;
    set_key(&mut scratch.key, nat_kind::SERVED, 0, flow, false);
    if find(&scratch.key, &mut scratch.value, flow, true) { IS_DONE } else { IS_NEW }
}

/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn give_backend(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = scratch() else { return IS_BROKEN };
    let (at, family) = (scratch.flow.embedded, scratch.flow.family);
    if at == 0 {
        let transport = scratch.rewrite.transport;
        set_rewrite(&mut scratch.rewrite, OUTER, transport, &scratch.flow, &scratch.value, true);
        // SAFETY: the context is the program's own.
        return unsafe { rewrite(skb, &raw const scratch.rewrite) };
    }
    let Some(transport) = read_held(skb, at, family, &mut scratch.about) else { return IS_BROKEN };
    turn_error(skb, scratch, transport, at, true)
}

/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn find_answer(skb: *mut __sk_buff, cluster: u32) -> u64 {
    let Some(scratch) = scratch() else { return 0 };
    let Some(transport) = read_into(skb, &mut scratch.flow) else { return 0 };
    let flow = &scratch.flow;
    if flow.embedded != 0 {
        let (at, family) = (flow.embedded, flow.family);
        if read_held(skb, at, family, &mut scratch.about).is_none() {
            return 0;
        }
        set_key(&mut scratch.key, nat_kind::ANSWERED, cluster as u16, &scratch.about, false);
        if !peek(&scratch.key, &mut scratch.value) {
            return 0;
        }
    } else {
        if !has_ports(flow) {
            return 0;
        }
        set_key(&mut scratch.key, nat_kind::ANSWERED, cluster as u16, flow, true);
        if !find(&scratch.key, &mut scratch.value, flow, false) {
            return 0;
        }
        set_rewrite(&mut scratch.rewrite, OUTER, transport, flow, &scratch.value, false);
    }
    let value = &scratch.value;
    let (kind, rest) = match value.node_ip {
        [0, 0, 0, 0] => (IS_ANSWER, value.ifindex),
        ip => (IS_BY_NODE, u32::from_ne_bytes(ip)),
    };
    u64::from(kind) << 32 | u64::from(rest)
}

/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn give_answer(skb: *mut __sk_buff) -> u32 {
    let Some(scratch) = scratch() else { return IS_BROKEN };
    let (at, family) = (scratch.flow.embedded, scratch.flow.family);
    if at == 0 {
        // SAFETY: the context is the program's own.
        return unsafe { rewrite(skb, &raw const scratch.rewrite) };
    }
    let Some(transport) = read_held(skb, at, family, &mut scratch.about) else { return IS_BROKEN };
    turn_error(skb, scratch, transport, at, false)
}

/// # Safety
/// `skb` is the program's own context.
#[inline(never)]
#[unsafe(no_mangle)]
unsafe extern "C" fn note_node(skb: *mut __sk_buff, cluster: u32, node_ip: u32) -> u32 {
    let Some(scratch) = scratch() else { return 0 };
    if read_into(skb, &mut scratch.flow).is_none() || !has_ports(&scratch.flow) {
        return 0;
    }
    let flow = &scratch.flow;
    set_key(&mut scratch.key, nat_kind::ANSWERED, cluster as u16, flow, false);
    let node_ip = node_ip.to_ne_bytes();
    if find(&scratch.key, &mut scratch.value, flow, true) && scratch.value.node_ip == node_ip {
        return 0;
    }
    // In the middle of a stream this would be a way to get at what a pod sends to somebody else.
    if flow.proto == TCP && !flow.is(traits::BEGINS) {
        return 0;
    }
    let value = &mut scratch.value;
    set_fresh(value);
    value.node_ip = node_ip;
    let _ = NAT.insert(&scratch.key, &*value, 0);
    use_it();
    0
}

/// Chooses a backend for the first packet of a flow, and notes both directions. `whose`: cluster and scope.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn choose(skb: *mut __sk_buff, whose: u32) -> u32 {
    let Some(scratch) = scratch() else { return IS_NOT };
    // SAFETY: callers pass the program's own context.
    let ifindex = if whose as u8 == scope::OUTSIDE { unsafe { (*skb).ifindex } } else { 0 };
    let flow = &scratch.flow;
    scratch.frontend = ServiceKey {
        cluster: (whose >> 8) as u16,
        port: flow.destination_port,
        proto: flow.proto,
        family: flow.family,
        scope: whose as u8,
        pad: 0,
        ip: bytes(flow.destination),
    };
    let source = mix(flow.source[0] ^ mix(flow.source[1] ^ mix(flow.source[2] ^ mix(flow.source[3]))));
    // The frontend's address does not count: it may be another one at each node.
    let ports = u32::from(flow.source_port) << 16 | u32::from(flow.destination_port);
    let seed = source ^ mix(ports);
    // Apart from the network namespaces of pods.
    let client = || 1 << 63 | u64::from(source) << 24 | u64::from(flow.source[0] >> 8);
    let (backend, service) = match select(&scratch.frontend, seed, client) {
        Selection::NotAService => return IS_NOT,
        Selection::NoBackend => return IS_REFUSED,
        Selection::Backend { backend, service, .. } => (backend, service),
    };
    note(scratch, &backend, service, ifindex);
    IS_DONE
}

/// Notes both directions of a flow. Apart, so that what selection needs is off the stack.
#[inline(never)]
fn note(scratch: &mut Scratch, backend: &BackendValue, service: u32, ifindex: u32) {
    let (flow, value, key) = (&scratch.flow, &mut scratch.value, &mut scratch.key);
    set_fresh(value);
    (value.service, value.backend, value.ifindex) = (service, backend.generation, ifindex);
    value.cluster = backend.cluster;
    // The key is that of the other direction so far.
    (key.other, key.other_port) = (backend.ip, backend.port);
    (key.cluster, key.kind) = (backend.cluster, nat_kind::ANSWERED);
    (value.ip, value.port) = (bytes(flow.destination), flow.destination_port);
    let _ = NAT.insert(&*key, &*value, 0);
    (key.other, key.other_port) = (bytes(flow.destination), flow.destination_port);
    (key.cluster, key.kind) = (0, nat_kind::SERVED);
    (value.ip, value.port) = (backend.ip, backend.port);
    let _ = NAT.insert(&*key, &*value, 0);
    use_it();
}

/// Nothing but the time.
#[inline(always)]
fn set_fresh(value: &mut NatValue) {
    let place: *mut MaybeUninit<NatValue> = (&raw mut *value).cast();
    // SAFETY: of the same layout, and integers only; no preconditions.
    unsafe { zero(&mut *place).used = bpf_ktime_get_ns() };
}

#[inline(always)]
fn use_it() {
    if let Some(used) = NAT_USED.get_ptr_mut(0) {
        // SAFETY: a word that only ever becomes 1.
        unsafe {
            if used.read_volatile() == 0 {
                used.write_volatile(1);
            }
        }
    }
}

/// The entry of a flow that goes on, copied. `from_client`: the packet is, and may begin another flow.
#[inline(always)]
fn find(key: &NatKey, value: &mut NatValue, flow: &Flow, from_client: bool) -> bool {
    let Some(entry) = NAT.get_ptr_mut(key) else { return false };
    // SAFETY: the element stays readable until the program ends. What is written to it are its time and a flag: if it is
    // another flow's by now, that lives a little longer, or its next SYN begins anew.
    unsafe {
        *value = entry.read();
        let now = bpf_ktime_get_ns();
        let idle = now.saturating_sub(value.used);
        let closed = value.flags & NAT_CLOSED != 0;
        let begins = from_client && flow.proto == TCP && flow.is(traits::BEGINS);
        let limit = if flow.proto == TCP && !closed && !begins { ESTABLISHED } else { BRIEF };
        if idle > limit || begins && closed {
            return false;
        }
        if from_client
            && (begins || flow.proto != TCP)
            && value.node_ip == [0; 4]
            && !still_serves(value, flow.proto)
        {
            return false;
        }
        if idle > REFRESH {
            addr_of_mut!((*entry).used).write_volatile(now);
        }
        if flow.is(traits::FIN | traits::RST) && !closed {
            addr_of_mut!((*entry).flags).write_volatile(value.flags | NAT_CLOSED);
        }
    }
    true
}

/// The entry of whatever flow, copied.
#[inline(always)]
fn peek(key: &NatKey, value: &mut NatValue) -> bool {
    // SAFETY: copied at once.
    match unsafe { NAT.get(key) } {
        Some(entry) => {
            *value = *entry;
            true
        }
        None => false,
    }
}

/// Whether what begins may go to the backend of an entry.
#[inline(always)]
pub fn still_serves(value: &NatValue, proto: u8) -> bool {
    let id = value.backend;
    // SAFETY: an element that is recycled has another generation.
    let Some(backend) = (unsafe { crate::maps::BACKEND.get(id) }) else { return false };
    backend.generation == id
        && backend.proto == proto
        && backend.state == backend_state::ACTIVE
        && crate::affinity::is_in_reach(backend.cluster)
}

/// `answers`: the packet goes to the client; otherwise it comes from there.
#[inline(always)]
fn set_key(key: &mut NatKey, kind: u8, cluster: u16, flow: &Flow, answers: bool) {
    let (client, other) =
        if answers { (flow.destination, flow.source) } else { (flow.source, flow.destination) };
    (key.client, key.other) = (bytes(client), bytes(other));
    (key.client_port, key.other_port) = if answers {
        (flow.destination_port, flow.source_port)
    } else {
        (flow.source_port, flow.destination_port)
    };
    (key.cluster, key.proto, key.family, key.kind) = (cluster, flow.proto, flow.family, kind);
    key.pad = [0; 3];
}

#[inline(always)]
fn set_rewrite(
    to: &mut Rewrite,
    header: u32,
    transport: u32,
    flow: &Flow,
    value: &NatValue,
    is_destination: bool,
) {
    (to.before, to.port_before) = if is_destination {
        (flow.destination, flow.destination_port)
    } else {
        (flow.source, flow.source_port)
    };
    (to.after, to.port_after) = (words(value.ip), value.port);
    (to.header, to.error, to.pad) = (header, 0, 0);
    to.transport = transport;
    (to.family, to.proto, to.is_destination) = (flow.family, flow.proto, is_destination.into());
}

/// Both addresses in an error: the outer one, if it is that of the end which the packet that is held names, and the one
/// that is held; 0 if that works. `to_backend`: the outer destination and the held source; else the outer source and the held destination.
#[inline(always)]
fn turn_error(skb: *mut __sk_buff, scratch: &mut Scratch, transport: u32, at: u32, to_backend: bool) -> u32 {
    set_rewrite(&mut scratch.rewrite, at, transport, &scratch.about, &scratch.value, !to_backend);
    let held = scratch.rewrite.before;
    scratch.rewrite.error = at - EMBEDDED;
    // SAFETY: the context is the program's own.
    let failed = unsafe { rewrite(skb, &raw const scratch.rewrite) };
    if failed != 0 {
        return failed;
    }
    let outer = if to_backend { scratch.flow.destination } else { scratch.flow.source };
    if outer != held {
        // From a router on the way.
        return 0;
    }
    let to = &mut scratch.rewrite;
    (to.header, to.error, to.transport) = (OUTER, 0, 0);
    (to.port_before, to.port_after) = (0, 0);
    to.is_destination = to_backend.into();
    if to.family != FAMILY_V4 {
        // Its checksum covers the outer addresses, and stands where `error` says.
        (to.error, to.transport) = (at - EMBEDDED, at - EMBEDDED);
    }
    // SAFETY: as above.
    unsafe { rewrite(skb, &raw const scratch.rewrite) }
}

/// TCP, UDP and SCTP.
#[inline(always)]
fn has_ports(flow: &Flow) -> bool {
    flow.is(traits::PORTS) && !flow.is_icmp()
}

#[inline(always)]
fn read_into(skb: *mut __sk_buff, flow: &mut Flow) -> Option<u32> {
    let family = family_of(skb);
    if family == 0 {
        return None;
    }
    clear(flow, family);
    // SAFETY: the context is the program's own.
    let transport = unsafe { read_flow(skb, OUTER, flow) };
    (flow.unreadable == 0).then_some(transport)
}

#[inline(always)]
fn clear(flow: &mut Flow, family: u8) {
    let place: *mut MaybeUninit<Flow> = (&raw mut *flow).cast();
    // SAFETY: of the same layout.
    Flow::new(unsafe { &mut *place }, family, (0, 0));
}

/// The packet that an error holds.
#[inline(always)]
fn read_held(skb: *mut __sk_buff, at: u32, family: u8, about: &mut Flow) -> Option<u32> {
    clear(about, family);
    // SAFETY: the context is the program's own.
    let transport = unsafe { read_flow(skb, at, about) };
    (about.unreadable == 0 && has_ports(about)).then_some(transport)
}

#[inline(always)]
fn words(ip: [u8; 16]) -> [u32; 4] {
    // SAFETY: of the same size, and any bytes are valid.
    unsafe { core::mem::transmute(ip) }
}
