// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Both directions of the VXLAN device. The VNI of every packet is the identity of its sender.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{BPF_F_TUNINFO_IPV6, TC_ACT_OK, TC_ACT_UNSPEC, bpf_tunnel_key},
    helpers::bpf_skb_get_tunnel_key,
    macros::classifier,
    programs::TcContext,
};
use ebpf_global_svc_abi::{
    CONFIG_STRICT, Config, EndpointValue, NODE_CLEAR, NODE_VIRTUAL, NodeValue, OverlayKey, PREFIX_VIRTUAL,
    PrefixValue, direction, event_hook, event_kind, identity, reason,
};

use crate::{
    counters::{count, count_overlay},
    delivery::{
        accept_frame, as_frontend, drop, drop_untold, is_via_stack, may_go, set_tunnel, to_outside, to_pod,
        to_stack,
    },
    events::{What, clusters, trace_packet, wanted},
    maps::{ENDPOINT, IPCACHE, config, node, over_ipv6, prefix_of},
    mark, nat,
    packet::{Addresses, Packet},
    peer, policy, translate,
    zero::zero,
};

/// Ingress: a packet from another node.
#[classifier]
pub fn cm_from_overlay(ctx: TcContext) -> i32 {
    const HOOK: u8 = event_hook::FROM_OVERLAY;
    let Some(config) = config() else { return drop(&ctx, HOOK, reason::NOT_READY, 0) };
    let Some((origin, sender)) = tunnel_origin(&ctx, config) else {
        return drop(&ctx, HOOK, reason::NO_TUNNEL_KEY, 0);
    };
    // Taken in any case: nobody behind us is to see it.
    let decrypted = mark::take_decrypted(&ctx);
    let speaker = match speaker(config, &origin, sender, decrypted) {
        Ok(node) => node,
        Err(reason) => return drop(&ctx, HOOK, reason, origin.identity),
    };
    if speaker.flags & NODE_VIRTUAL != 0
        && let Err(reason) = translate::enter(&ctx, speaker.cluster)
    {
        return drop(&ctx, HOOK, reason, origin.identity);
    }
    let speaker = speaker.cluster;
    let mut addresses = MaybeUninit::uninit();
    let addresses = match Addresses::read(&ctx, config.cluster, &mut addresses) {
        Packet::Ip(addresses) => addresses,
        Packet::NotIp | Packet::Malformed => {
            return drop(&ctx, HOOK, reason::INVALID_PACKET, origin.identity);
        }
    };
    // A node that speaks for one cluster must not send from the addresses of another.
    let prefix = prefix_of(&addresses.source);
    if let Some(prefix) = prefix
        && (prefix.cluster != speaker || origin.identity == identity::INGRESS)
    {
        return drop(&ctx, HOOK, reason::INVALID_SOURCE_IP, origin.identity);
    }
    count_overlay(&origin, ctx.len());
    accept_frame(&ctx);
    // SAFETY: the element is only read; user space replaces elements, it does not write into them.
    if let Some(pod) = unsafe { ENDPOINT.get(&addresses.destination) } {
        let cluster = if prefix.is_some() { speaker } else { 0 };
        let is_let_in = origin.identity == identity::INGRESS;
        let sender = if is_let_in { identity::WORLD } else { origin.identity };
        if let Err(reason) = admit(&ctx, config, pod, addresses, sender, cluster) {
            return drop_untold(&ctx, reason);
        }
        if is_let_in {
            nat::note_way_back(&ctx, config.cluster, origin.node_ip);
        } else if nat::is_used()
            && let nat::Answer::ToPod = nat::answer(&ctx, speaker)
            && let Err(reason) = as_frontend(&ctx)
        {
            return drop(&ctx, HOOK, reason, origin.identity);
        }
        count(reason::DECAPSULATED, ctx.len());
        if wanted(config, event_kind::TRACE) {
            tell(
                &ctx,
                reason::DECAPSULATED,
                origin.identity,
                pod.identity,
                clusters(cluster, config.cluster),
            );
        }
        return to_pod(&ctx, HOOK, pod, origin.identity);
    }
    if nat::is_used()
        && let nat::Answer::Outside(ifindex) = nat::answer(&ctx, speaker)
    {
        return match as_frontend(&ctx) {
            Ok(()) => to_outside(ifindex),
            Err(reason) => drop(&ctx, HOOK, reason, origin.identity),
        };
    }
    if !belongs_here(config, addresses) {
        return drop(&ctx, HOOK, reason::UNKNOWN_TARGET, origin.identity);
    }
    if origin.identity == identity::INGRESS {
        // A pod that the agent has not seen yet.
        nat::note_way_back(&ctx, config.cluster, origin.node_ip);
    }
    count(reason::DECAPSULATED, ctx.len());
    if wanted(config, event_kind::TRACE) {
        let cluster = if prefix.is_some() { speaker } else { 0 };
        tell(&ctx, reason::TO_STACK, origin.identity, 0, clusters(cluster, config.cluster));
    }
    to_stack(&ctx)
}

/// Tells of a packet from another node that is about to be passed on.
#[inline(always)]
fn tell(ctx: &TcContext, reason: u8, sender: u32, receiver: u32, clusters: u32) {
    let what = What::new(event_kind::TRACE, reason, event_hook::FROM_OVERLAY, 0);
    // SAFETY: the context is the program's own.
    unsafe { trace_packet(ctx.skb.skb, what.word(), sender, receiver, clusters) };
}

/// Ingress of the WireGuard device: a tunnel packet that another node has encrypted, and that is from one of its
/// addresses.
#[classifier]
pub fn cm_from_wireguard(ctx: TcContext) -> i32 {
    mark::set_decrypted(&ctx);
    TC_ACT_UNSPEC
}

/// Egress: pods' packets come with a tunnel key from `cm_from_pod`; what the node itself routes here
/// gets one.
#[classifier]
pub fn cm_to_overlay(ctx: TcContext) -> i32 {
    const HOOK: u8 = event_hook::TO_OVERLAY;
    let Some(config) = config() else { return drop(&ctx, HOOK, reason::NOT_READY, 0) };
    if has_tunnel(&ctx, config) {
        return TC_ACT_OK;
    }
    let mut addresses = MaybeUninit::uninit();
    let addresses = match Addresses::read(&ctx, config.cluster, &mut addresses) {
        Packet::Ip(addresses) => addresses,
        Packet::NotIp | Packet::Malformed => return drop(&ctx, HOOK, reason::INVALID_PACKET, 0),
    };
    let Some((prefix, node_ip)) = node_of(addresses) else {
        // Kernels try each device with neighbour discovery, multicast reports and router solicitations.
        return match addresses.stay_on_link() {
            true => drop_untold(&ctx, reason::NO_TUNNEL_ENDPOINT),
            false => drop(&ctx, HOOK, reason::NO_TUNNEL_ENDPOINT, 0),
        };
    };
    if prefix.flags & PREFIX_VIRTUAL != 0
        && let Err(reason) = translate::leave(&ctx, prefix.cluster)
    {
        return drop(&ctx, HOOK, reason, 0);
    }
    // SAFETY: the context is valid for the program's run.
    let routed = unsafe { (*ctx.skb.skb).ingress_ifindex } != 0;
    // Nobody on this node sent a packet that it only forwards: it must not pass for the node's.
    let sender = if routed { identity::WORLD } else { identity::REMOTE_NODE };
    if !may_go(config, node_ip) {
        return drop(&ctx, HOOK, reason::UNENCRYPTED, sender);
    }
    if !set_tunnel(&ctx, config, sender, node_ip) {
        return drop(&ctx, HOOK, reason::NO_TUNNEL_KEY, sender);
    }
    count(reason::ENCAPSULATED, ctx.len());
    TC_ACT_OK
}

/// What the policy of a pod says of a packet from another node. If the stack delivers it, `cm_to_pod` asks,
/// and has the identity from the packet's mark.
#[inline(always)]
fn admit(
    ctx: &TcContext,
    config: &Config,
    pod: &EndpointValue,
    addresses: &Addresses,
    sender: u32,
    cluster: u16,
) -> Result<(), u8> {
    if !policy::selects(pod) {
        return Ok(());
    }
    if is_via_stack(pod) {
        mark::set(ctx, sender);
        return Ok(());
    }
    let source = &addresses.source;
    let mut flow = MaybeUninit::uninit();
    let flow =
        policy::flow(ctx, &mut flow, event_hook::FROM_OVERLAY, source.family, (cluster, config.cluster));
    policy::check(ctx, flow, pod, direction::INGRESS, peer::remote(sender, source))
}

/// What a packet's tunnel is, of the underlay's family: of a decapsulated packet its sender, on egress where it goes.
#[inline(always)]
fn tunnel<'a>(
    ctx: &TcContext,
    config: &Config,
    place: &'a mut MaybeUninit<bpf_tunnel_key>,
) -> Option<&'a bpf_tunnel_key> {
    // SAFETY: integers only.
    let key = unsafe { zero(place) };
    let size = size_of::<bpf_tunnel_key>() as u32;
    // The helper fails for a tunnel of the other family.
    let flags = if over_ipv6(config) { BPF_F_TUNINFO_IPV6 } else { 0 };
    // SAFETY: the context is the program's own, and the key has the size that is passed.
    let failed = unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, key, size, flags.into()) };
    (failed == 0).then_some(key)
}

/// Whether `set_tunnel` has been here.
#[inline(always)]
fn has_tunnel(ctx: &TcContext, config: &Config) -> bool {
    tunnel(ctx, config, &mut MaybeUninit::uninit()).is_some()
}

/// VNI and outer source of a decapsulated packet, and the node that is the latter.
#[inline(always)]
fn tunnel_origin(ctx: &TcContext, config: &Config) -> Option<(OverlayKey, Option<&'static NodeValue>)> {
    let mut place = MaybeUninit::uninit();
    let key = tunnel(ctx, config, &mut place)?;
    let is_v6 = over_ipv6(config);
    let remote = &key.__bindgen_anon_1;
    // SAFETY: both members are integers, and all of them are initialised. The kernel gives IPv4 in host order.
    let ip = unsafe { if is_v6 { remote.remote_ipv6 } else { [remote.remote_ipv4.to_be(), 0, 0, 0] } };
    let node = node(is_v6, ip);
    let node_ip = if is_v6 { node.map_or(0, |node| node.number) } else { ip[0] };
    Some((OverlayKey { identity: key.tunnel_id, node_ip: node_ip.to_ne_bytes() }, node))
}

/// The node that is the outer source, if it may speak for this identity, and in clear if it does.
#[inline(always)]
fn speaker(
    config: &Config,
    origin: &OverlayKey,
    node: Option<&'static NodeValue>,
    decrypted: bool,
) -> Result<&'static NodeValue, u8> {
    let Some(node) = node else { return Err(reason::UNKNOWN_SENDER) };
    if config.flags & CONFIG_STRICT != 0 && !decrypted && node.flags & NODE_CLEAR == 0 {
        return Err(reason::UNENCRYPTED);
    }
    if origin.identity < identity::FIRST_USER {
        return match origin.identity {
            identity::REMOTE_NODE | identity::WORLD | identity::INGRESS => Ok(node),
            _ => Err(reason::INVALID_IDENTITY),
        };
    }
    let claimed = origin.identity >> (config.identity_shift & 31);
    if claimed == u32::from(node.cluster) { Ok(node) } else { Err(reason::INVALID_CLUSTER_ID) }
}

/// Whether the stack of this node is where the packet has to go: otherwise any node of the mesh
/// could use this one as its router.
#[inline(always)]
fn belongs_here(config: &Config, addresses: &Addresses) -> bool {
    let destination = &addresses.destination;
    if peer::is_this_node(config, destination) {
        return true;
    }
    // SAFETY: as above.
    if let Some(entry) = unsafe { IPCACHE.get(destination) } {
        return entry.node_ip == config.node_ip;
    }
    match prefix_of(destination) {
        Some(prefix) => prefix.cluster == config.cluster && prefix.node_ip == config.node_ip,
        None => false,
    }
}

/// The prefix of a destination, and the node behind which it lives.
#[inline(always)]
fn node_of(addresses: &Addresses) -> Option<(&'static PrefixValue, [u8; 4])> {
    let mut destination = addresses.destination;
    let prefix = prefix_of(&destination)?;
    destination.cluster = prefix.cluster;
    // SAFETY: as above.
    let node_ip = match unsafe { IPCACHE.get(destination) } {
        Some(entry) => entry.node_ip,
        None => prefix.node_ip,
    };
    (node_ip != [0; 4]).then_some((prefix, node_ip))
}
