// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Traffic that leaves a pod of this node: ingress of the host side of its veth.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_global_svc_abi::{Config, EndpointValue, reason};

use crate::{
    counters::count,
    delivery::{drop, to_node, to_pod, to_stack},
    maps::{ENDPOINT, IPCACHE, config, prefix_of},
    packet::{Addresses, Packet, parse, udp_port},
};

#[classifier]
pub fn cm_from_pod(ctx: TcContext) -> i32 {
    let Some(config) = config() else { return drop(&ctx, reason::NOT_READY) };
    let addresses = match parse(&ctx, config.cluster) {
        Packet::Ip(addresses) => addresses,
        Packet::NotIp => return to_stack(&ctx),
        Packet::Malformed => return drop(&ctx, reason::INVALID_PACKET),
    };
    if addresses.stay_on_link() {
        return to_stack(&ctx);
    }
    // SAFETY: the element is only read; user space replaces elements, it does not write into them.
    let sender = match unsafe { ENDPOINT.get(addresses.source) } {
        // SAFETY: the context is valid for the program's run.
        Some(endpoint) if endpoint.ifindex == unsafe { (*ctx.skb.skb).ifindex } => endpoint,
        _ => return drop(&ctx, reason::INVALID_SOURCE_IP),
    };
    forward(&ctx, config, sender, addresses)
}

#[inline(always)]
fn forward(ctx: &TcContext, config: &Config, sender: &EndpointValue, addresses: Addresses) -> i32 {
    let mut destination = addresses.destination;
    let Some(prefix) = prefix_of(&destination) else {
        // Masquerading would make a pod's own VXLAN packet one of this node, with any identity.
        return match udp_port(ctx, &destination) {
            Some(port) if port == config.overlay_port => drop(ctx, reason::ENCAPSULATION_PROHIBITED),
            _ => to_stack(ctx),
        };
    };

    let local = prefix.cluster == config.cluster;
    if local {
        // SAFETY: as above.
        if let Some(pod) = unsafe { ENDPOINT.get(destination) } {
            count(reason::FORWARDED, ctx.len());
            return to_pod(ctx, pod);
        }
    }
    destination.cluster = prefix.cluster;
    // SAFETY: as above.
    let node_ip = match unsafe { IPCACHE.get(destination) } {
        Some(entry) => entry.node_ip,
        // Not known (yet): its node may know better.
        None => prefix.node_ip,
    };
    match node_ip {
        // The node's own address in its pod CIDR, or a pod that the agent has not seen yet.
        ip if local && (ip == config.node_ip || ip == [0; 4]) => to_stack(ctx),
        [0, 0, 0, 0] => drop(ctx, reason::NO_TUNNEL_ENDPOINT),
        ip => to_node(ctx, config, sender.identity, ip),
    }
}
