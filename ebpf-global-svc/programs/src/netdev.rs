// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! What comes in at the node's own interfaces, from outside of the mesh, for a service's frontend.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};
use ebpf_global_svc_abi::{
    Config, EndpointValue, IpKey, PREFIX_VIRTUAL, direction, event_hook, identity, reason, scope,
};

use crate::{
    counters::count,
    delivery::{drop, drop_untold, is_via_stack, to_node, to_pod},
    maps::{ENDPOINT, IPCACHE, config, prefix_of},
    mark,
    nat::{self, Served},
    packet::{Addresses, Packet, is_overlays},
    peer, policy, translate,
};

const HOOK: u8 = event_hook::FROM_NETDEV;

/// Ingress: whatever comes in. What is for no frontend is left to whoever comes next on this hook, and the stack.
#[classifier]
pub fn cm_from_netdev(ctx: TcContext) -> i32 {
    let Some(config) = config() else { return TC_ACT_UNSPEC };
    let mut place = MaybeUninit::uninit();
    let Packet::Ip(addresses) = Addresses::read(&ctx, config.cluster, &mut place) else {
        return TC_ACT_UNSPEC;
    };
    // The overlay's own packets are most of them, and no frontend has their port.
    if is_overlays(&ctx, config, &addresses.destination) {
        return TC_ACT_UNSPEC;
    }
    let is_own = peer::is_this_node(config, &addresses.destination);
    match nat::serve(&ctx, config.cluster, scope::OUTSIDE) {
        Served::Not => return TC_ACT_UNSPEC,
        Served::Yes => {}
        // The stack says that nobody listens.
        Served::Refused if is_own => return TC_ACT_UNSPEC,
        Served::Refused => return drop(&ctx, HOOK, reason::NO_BACKEND, identity::WORLD),
        Served::Broken => return drop(&ctx, HOOK, reason::INVALID_PACKET, identity::WORLD),
    }
    let mut place = MaybeUninit::uninit();
    let Packet::Ip(addresses) = Addresses::read(&ctx, config.cluster, &mut place) else {
        return drop(&ctx, HOOK, reason::INVALID_PACKET, identity::WORLD);
    };
    count(reason::SERVED, ctx.len());
    deliver(&ctx, config, addresses)
}

/// To the backend that is the destination now.
#[inline(always)]
fn deliver(ctx: &TcContext, config: &'static Config, addresses: &Addresses) -> i32 {
    let destination = &addresses.destination;
    let Some(prefix) = prefix_of(destination) else {
        // A process of some node, whose answers would not pass here.
        return drop(ctx, HOOK, reason::NO_TUNNEL_ENDPOINT, identity::WORLD);
    };
    if prefix.cluster == config.cluster
        // SAFETY: the element is only read; user space replaces elements, it does not write into them.
        && let Some(pod) = unsafe { ENDPOINT.get(destination) }
    {
        if let Err(reason) = admit(ctx, config, pod, &addresses.source) {
            return drop_untold(ctx, reason);
        }
        return to_pod(ctx, HOOK, pod, identity::WORLD);
    }
    let mut destination = *destination;
    destination.cluster = prefix.cluster;
    // SAFETY: as above.
    let node_ip = unsafe { IPCACHE.get(&destination) }.map_or(prefix.node_ip, |entry| entry.node_ip);
    if node_ip == [0; 4] || node_ip == config.node_ip {
        return drop(ctx, HOOK, reason::NO_TUNNEL_ENDPOINT, identity::WORLD);
    }
    if prefix.flags & PREFIX_VIRTUAL != 0
        && let Err(reason) = translate::leave(ctx, prefix.cluster)
    {
        return drop(ctx, HOOK, reason, identity::WORLD);
    }
    to_node(ctx, config, HOOK, identity::INGRESS, node_ip)
}

/// What the policy of a pod of this node says.
#[inline(always)]
fn admit(ctx: &TcContext, config: &Config, pod: &EndpointValue, source: &IpKey) -> Result<(), u8> {
    if !policy::selects(pod) {
        return Ok(());
    }
    if is_via_stack(pod) {
        mark::set(ctx, identity::WORLD);
        return Ok(());
    }
    let mut flow = MaybeUninit::uninit();
    let flow = policy::flow(ctx, &mut flow, HOOK, source.family, (0, config.cluster));
    policy::check(ctx, flow, pod, direction::INGRESS, peer::outside(config, source))
}
