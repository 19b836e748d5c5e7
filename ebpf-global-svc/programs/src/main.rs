// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! The programs that carry the mesh's traffic.
//!
//! * `sockets`: cgroup hooks; an application that names a service talks to a backend.
//! * `selection`: which backend; two levels, clusters then slots.
//! * `pod`: traffic that leaves a pod of this node, or reaches one through the stack.
//! * `overlay`: traffic that enters or leaves the VXLAN device.
//! * `nat`: services for packets that no socket hook has seen; `netdev`: those from outside of the mesh.
//! * `xdp`: what `netdev` has let in, before the kernel has made anything of it.
//! * `policy`: whether a pod may send or receive it; `peer` says who the other end is, `flow` what it is,
//!   `conntrack` whether it is an answer.
//! * `mark`: what a packet carries through the stack.
//! * `packet`, `delivery`: what all need: addresses in, verdicts out.
//! * `translate`: addresses of clusters whose pods have addresses that are taken here.
//! * `rewrite`: another address in a packet, with its checksums.
//! * `events`: single packets and calls, for those who look at them.
//! * `maps`, `counters`: everything else shared with user space.
//! * `zero`: zeros that cost nothing.
//!
//! Every program is loaded once per node; what differs per pod is in `cm_endpoint`.
#![no_std]
#![no_main]

mod affinity;
mod conntrack;
mod counters;
mod delivery;
mod events;
mod flow;
mod maps;
mod mark;
mod nat;
mod netdev;
mod overlay;
mod packet;
mod peer;
mod pmtu;
mod pod;
mod policy;
mod rewrite;
mod selection;
mod sockets;
mod translate;
mod xdp;
mod zero;

/// The kernel lends most helpers to programs under its own licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

/// The verifier proves that no program gets here.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
