// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! What can become of a packet, each with its counter.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, TC_ACT_OK, TC_ACT_SHOT, bpf_tunnel_key},
    helpers::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_type, bpf_skb_set_tunnel_key,
        bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use ebpf_global_svc_abi::{
    CONFIG_STRICT, Config, ENDPOINT_VIA_STACK, EndpointValue, NODE_CLEAR, NODE_ENCRYPTED, reason,
};

use crate::{
    counters::count,
    events::drop_packet,
    maps::{node, over_ipv6, underlay, words},
    nat, pmtu,
    zero::zero,
};

/// As if the frame had been sent to this very device.
const PACKET_HOST: u32 = 0;
pub const TUNNEL_TTL: u8 = 64;
/// A VNI has 24 bits.
const MAX_VNI: u32 = (1 << 24) - 1;

/// The packet ends here. `hook`: see `event_hook`; `sender`: its identity, 0 if it is not known.
#[inline(always)]
pub fn drop(ctx: &TcContext, hook: u8, reason: u8, sender: u32) -> i32 {
    // SAFETY: the context is the program's own.
    unsafe { drop_packet(ctx.skb.skb, hook.into(), reason.into(), sender) };
    TC_ACT_SHOT
}

/// The packet ends here, and nobody is told: because policy said so and has told of it, or because nobody asks.
#[inline(always)]
pub fn drop_untold(ctx: &TcContext, reason: u8) -> i32 {
    count(reason, ctx.len());
    TC_ACT_SHOT
}

/// The kernel's own routing decides.
#[inline(always)]
pub fn to_stack(ctx: &TcContext) -> i32 {
    count(reason::TO_STACK, ctx.len());
    TC_ACT_OK
}

/// Whether packets reach the pod through the stack, and so through `cm_to_pod`.
#[inline(always)]
pub fn is_via_stack(pod: &EndpointValue) -> bool {
    pod.flags & ENDPOINT_VIA_STACK != 0
}

/// Moves the packet into a pod of this node, past the node's routing and queues.
#[inline(always)]
pub fn to_pod(ctx: &TcContext, hook: u8, pod: &EndpointValue, sender: u32) -> i32 {
    if is_via_stack(pod) {
        return to_stack(ctx);
    }
    let (mac, host) = (pod.pod_mac, pod.host_mac);
    let addresses = [
        mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], host[0], host[1], host[2], host[3], host[4], host[5],
    ];
    // SAFETY: the context is the program's own, and the buffer has the length that is passed.
    unsafe {
        if bpf_skb_store_bytes(ctx.skb.skb, 0, addresses.as_ptr().cast(), 12, 0) != 0 {
            return drop(ctx, hook, reason::INVALID_PACKET, sender);
        }
        bpf_redirect_peer(pod.ifindex, 0) as i32
    }
}

/// Gives an answer the address of the frontend that its client knows.
#[inline(always)]
pub fn as_frontend(ctx: &TcContext) -> Result<(), u8> {
    nat::give(ctx)?;
    count(reason::ANSWERED, ctx.len());
    Ok(())
}

/// Sends an answer to a client outside through an interface of this node, with the neighbour that routing has there.
#[inline(always)]
pub fn to_outside(ifindex: u32) -> i32 {
    // SAFETY: no preconditions.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Sends the packet of a pod to a node through the overlay, under the sender's identity. Apart, so that its tunnel key does
/// not lie on the stack while policy is asked.
#[inline(never)]
pub fn to_node(ctx: &TcContext, config: &'static Config, hook: u8, identity: u32, node_ip: [u8; 4]) -> i32 {
    if config.overlay_ifindex == 0 {
        return drop(ctx, hook, reason::NO_TUNNEL_ENDPOINT, identity);
    }
    if identity > MAX_VNI {
        // What the VNI would hold of it is somebody else's.
        return drop(ctx, hook, reason::INVALID_IDENTITY, identity);
    }
    if !may_go(config, node_ip) {
        return drop(ctx, hook, reason::UNENCRYPTED, identity);
    }
    if pmtu::exceeds(ctx.skb.skb, config.overlay_ifindex, &mut 0) {
        // The overlay will fragment it. That works, and an operator wants to know.
        count(reason::TOO_BIG, ctx.len());
    }
    if !set_tunnel(ctx, config, identity, node_ip) {
        return drop(ctx, hook, reason::NO_TUNNEL_KEY, identity);
    }
    count(reason::ENCAPSULATED, ctx.len());
    // SAFETY: no preconditions.
    unsafe { bpf_redirect(config.overlay_ifindex, 0) as i32 }
}

/// Whether a tunnel packet may go to a node. What has to be encrypted, routing sends to WireGuard or nowhere; this
/// says so first, and counts it.
#[inline(always)]
pub fn may_go(config: &Config, node_ip: [u8; 4]) -> bool {
    if config.flags & CONFIG_STRICT == 0 {
        return true;
    }
    let is_v6 = over_ipv6(config);
    let ip = if is_v6 { underlay(node_ip) } else { Some([u32::from_ne_bytes(node_ip), 0, 0, 0]) };
    let node = ip.and_then(|ip| node(is_v6, ip));
    node.is_some_and(|node| node.flags & (NODE_CLEAR | NODE_ENCRYPTED) != 0)
}

/// Tells the VXLAN device where to send the packet and which identity to write into its VNI. Apart, so that the key is on
/// the stack no longer than it takes.
#[inline(never)]
pub fn set_tunnel(ctx: &TcContext, config: &'static Config, identity: u32, node_ip: [u8; 4]) -> bool {
    let mut key = MaybeUninit::<bpf_tunnel_key>::uninit();
    // SAFETY: integers only.
    let key = unsafe { zero(&mut key) };
    key.tunnel_id = identity;
    key.tunnel_ttl = TUNNEL_TTL;
    // Peers know this node by this address, whatever else its interfaces have.
    let flags = if over_ipv6(config) {
        let Some(remote) = underlay(node_ip) else { return false };
        key.__bindgen_anon_1.remote_ipv6 = remote;
        key.__bindgen_anon_3.local_ipv6 = words(&config.node_ip6);
        // With the outer UDP checksum: an IPv6 header has none of its own, and many drop what has neither (RFC 8200, 8.1).
        BPF_F_TUNINFO_IPV6
    } else {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(node_ip);
        key.__bindgen_anon_3.local_ipv4 = u32::from_be_bytes(config.node_ip);
        BPF_F_ZERO_CSUM_TX
    };
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: the context is the program's own; the key is initialised and has the size that is passed.
    unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, key, size, flags.into()) == 0 }
}

/// Makes a decapsulated frame acceptable to whoever gets it next: its Ethernet addresses are those
/// of a veth pair on another node.
#[inline(always)]
pub fn accept_frame(ctx: &TcContext) {
    // SAFETY: the context is the program's own.
    unsafe { bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) };
}
