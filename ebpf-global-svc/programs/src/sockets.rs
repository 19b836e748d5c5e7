// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Service addresses at sockets: the application names a frontend, the kernel talks to a backend,
//! and no packet needs translation on its way.
//!
//! * connect, sendmsg: frontend to backend; the pair goes to `cm_sock_rev`.
//! * recvmsg, getpeername: backend to the frontend that this very socket named.
//!
//! An IPv4 address on an IPv6 socket (`::ffff:a.b.c.d`) is IPv4 in every map.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use ebpf_global_svc_abi::{
    BackendValue, EVENT_EGRESS, FAMILY_V4, FAMILY_V6, ServiceKey, SockRevKey, SockRevValue, event_hook,
    event_kind, reason, scope,
};

use crate::{
    events::{What, report_call, wanted},
    maps::{SOCK_REV, config},
    selection::{Selection, mix, select},
};

/// Let the system call proceed with the address that is now in the context.
const PROCEED: i32 = 1;
/// Fail the system call, with EPERM unless a return value is set.
const REJECT: i32 = 0;

const ECONNREFUSED: i32 = 111;

const TCP: u32 = 6;
const UDP: u32 = 17;
/// A subflow of MPTCP is TCP to everybody else.
const MPTCP: u32 = 262;

#[cgroup_sock_addr(connect4)]
pub fn cm_connect4(ctx: SockAddrContext) -> i32 {
    to_backend::<Ipv4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn cm_connect6(ctx: SockAddrContext) -> i32 {
    to_backend::<Ipv6>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn cm_sendmsg4(ctx: SockAddrContext) -> i32 {
    to_backend::<Ipv4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn cm_sendmsg6(ctx: SockAddrContext) -> i32 {
    to_backend::<Ipv6>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn cm_recvmsg4(ctx: SockAddrContext) -> i32 {
    to_frontend::<Ipv4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn cm_recvmsg6(ctx: SockAddrContext) -> i32 {
    to_frontend::<Ipv6>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn cm_getpeername4(ctx: SockAddrContext) -> i32 {
    to_frontend::<Ipv4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn cm_getpeername6(ctx: SockAddrContext) -> i32 {
    to_frontend::<Ipv6>(&ctx)
}

#[inline(always)]
fn to_backend<A: SocketAddress>(ctx: &SockAddrContext) -> i32 {
    let (Some(config), Some(proto)) = (config(), protocol(ctx)) else { return PROCEED };
    let named = A::read(ctx);
    let frontend = ServiceKey {
        cluster: config.cluster,
        port: named.port,
        proto,
        family: named.family,
        scope: scope::MESH,
        pad: 0,
        ip: named.ip,
    };
    // SAFETY: the context is the program's own.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    // A UDP socket sticks to its backend: a "connection" of datagrams must not be torn apart.
    let seed = match proto as u32 {
        // SAFETY: no preconditions.
        TCP => unsafe { bpf_get_prandom_u32() },
        // Another one for each service.
        _ => mix(cookie as u32 ^ mix((cookie >> 32) as u32)) ^ u32::from(named.port),
    };
    // To a service a pod is one client, whichever of its sockets calls.
    // SAFETY: the context is the program's own.
    let client = || unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    match select(&frontend, seed, client) {
        Selection::NotAService => PROCEED,
        Selection::NoBackend => {
            if wanted(config, event_kind::DROP) {
                let what =
                    What::new(event_kind::DROP, reason::LB_NO_BACKEND, event_hook::SOCKET, EVENT_EGRESS);
                // SAFETY: the context is the program's own.
                unsafe { report_call(ctx.sock_addr, &frontend, core::ptr::null(), what.word(), 0) };
            }
            // What a host without a listener says: clients retry or fail over at once.
            // SAFETY: no preconditions.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            REJECT
        }
        Selection::Backend { backend, service, how } => {
            if wanted(config, event_kind::CALL) {
                let what =
                    What::new(event_kind::CALL, reason::LB_SELECTED, event_hook::SOCKET, EVENT_EGRESS | how);
                // SAFETY: the context is the program's own.
                unsafe { report_call(ctx.sock_addr, &frontend, &backend, what.word(), service) };
            }
            remember(cookie, &backend, SockRevValue { ip: named.ip, port: named.port, pad: 0, service });
            A::write(ctx, &Address { ip: backend.ip, port: backend.port, family: backend.family });
            PROCEED
        }
    }
}

#[inline(always)]
fn to_frontend<A: SocketAddress>(ctx: &SockAddrContext) -> i32 {
    let Some(proto) = protocol(ctx) else { return PROCEED };
    let peer = A::read(ctx);
    let key = SockRevKey {
        // SAFETY: the context is the program's own.
        cookie: unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) },
        ip: peer.ip,
        port: peer.port,
        family: peer.family,
        proto,
        pad: 0,
    };
    // SAFETY: the element is read before anything could replace it; a recycled one belongs to a
    // socket that is talking right now, and costs that one look at a wrong peer name.
    if let Some(frontend) = unsafe { SOCK_REV.get(key) } {
        A::write(ctx, &Address { ip: frontend.ip, port: frontend.port, family: peer.family });
    }
    PROCEED
}

/// Without this entry recvmsg and getpeername show the backend, so a failure breaks nothing but
/// applications that check their peer.
#[inline(always)]
fn remember(cookie: u64, backend: &BackendValue, frontend: SockRevValue) {
    let key = SockRevKey {
        cookie,
        ip: backend.ip,
        port: backend.port,
        family: backend.family,
        proto: backend.proto,
        pad: 0,
    };
    let _ = SOCK_REV.insert(key, frontend, 0);
}

#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> Option<u8> {
    // SAFETY: the context is valid for the program's run.
    match unsafe { load(addr_of!((*ctx.sock_addr).protocol)) } {
        TCP | MPTCP => Some(TCP as u8),
        UDP => Some(UDP as u8),
        _ => None,
    }
}

/// Address and port as every map has them.
struct Address {
    ip: [u8; 16],
    port: u16,
    family: u8,
}

/// Where a hook finds the address.
trait SocketAddress {
    fn read(ctx: &SockAddrContext) -> Address;
    fn write(ctx: &SockAddrContext, address: &Address);
}

struct Ipv4;

impl SocketAddress for Ipv4 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Address {
        // SAFETY: the context is valid for the program's run, and the hook is one for IPv4.
        let word = unsafe { load(addr_of!((*ctx.sock_addr).user_ip4)) };
        Address { ip: bytes([word, 0, 0, 0]), port: port(ctx), family: FAMILY_V4 }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &Address) {
        let [word, ..] = words(address.ip);
        // SAFETY: as above; the hook may write address and port.
        unsafe { store(addr_of_mut!((*ctx.sock_addr).user_ip4), word) };
        set_port(ctx, address.port);
    }
}

struct Ipv6;

/// Third word of `::ffff:a.b.c.d`.
const MAPPED: u32 = 0xffff_u32.to_be();

impl SocketAddress for Ipv6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Address {
        let context: *mut bpf_sock_addr = ctx.sock_addr;
        // SAFETY: the context is valid for the program's run, and the hook is one for IPv6.
        let address = unsafe {
            [
                load(addr_of!((*context).user_ip6[0])),
                load(addr_of!((*context).user_ip6[1])),
                load(addr_of!((*context).user_ip6[2])),
                load(addr_of!((*context).user_ip6[3])),
            ]
        };
        match address {
            [0, 0, MAPPED, word] => {
                Address { ip: bytes([word, 0, 0, 0]), port: port(ctx), family: FAMILY_V4 }
            }
            _ => Address { ip: bytes(address), port: port(ctx), family: FAMILY_V6 },
        }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &Address) {
        let mut to = words(address.ip);
        if address.family == FAMILY_V4 {
            to = [0, 0, MAPPED, to[0]];
        }
        let context = ctx.sock_addr;
        // SAFETY: as above; the hook may write address and port.
        unsafe {
            store(addr_of_mut!((*context).user_ip6[0]), to[0]);
            store(addr_of_mut!((*context).user_ip6[1]), to[1]);
            store(addr_of_mut!((*context).user_ip6[2]), to[2]);
            store(addr_of_mut!((*context).user_ip6[3]), to[3]);
        }
        set_port(ctx, address.port);
    }
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: the context is valid for the program's run. The upper half of the field is zero.
    (unsafe { load(addr_of!((*ctx.sock_addr).user_port)) }) as u16
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: the context is valid for the program's run; the hook may write the port.
    unsafe { store(addr_of_mut!((*ctx.sock_addr).user_port), port.into()) };
}

/// Context fields are words that the verifier rewrites one by one: the compiler must not merge,
/// split or repeat accesses to them.
///
/// # Safety
/// `field` is readable.
#[inline(always)]
unsafe fn load(field: *const u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { field.read_volatile() }
}

/// # Safety
/// `field` is writable.
#[inline(always)]
unsafe fn store(field: *mut u32, value: u32) {
    // SAFETY: the caller's promise.
    unsafe { field.write_volatile(value) };
}

#[inline(always)]
fn bytes(words: [u32; 4]) -> [u8; 16] {
    let [a, b, c, d] = words.map(u32::to_ne_bytes);
    [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
}

#[inline(always)]
fn words(ip: [u8; 16]) -> [u32; 4] {
    [
        u32::from_ne_bytes([ip[0], ip[1], ip[2], ip[3]]),
        u32::from_ne_bytes([ip[4], ip[5], ip[6], ip[7]]),
        u32::from_ne_bytes([ip[8], ip[9], ip[10], ip[11]]),
        u32::from_ne_bytes([ip[12], ip[13], ip[14], ip[15]]),
    ]
}
