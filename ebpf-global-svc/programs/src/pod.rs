// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Both directions of the host side of a pod's veth: what the pod sends, and what the node's stack sends to
//! it. What comes straight from another pod or from the overlay does not pass the second.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};
use ebpf_global_svc_abi::{
    CONFIG_PACKET_SERVICES, Config, EVENT_EGRESS, EndpointValue, PREFIX_VIRTUAL, direction, event_hook,
    event_kind, identity, reason, scope,
};

use crate::{
    counters::count,
    delivery::{as_frontend, drop, drop_untold, is_via_stack, to_node, to_outside, to_pod, to_stack},
    events::{What, clusters, trace_packet, wanted},
    flow::traits,
    maps::{ENDPOINT, IPCACHE, config, prefix_of},
    mark, nat,
    packet::{Addresses, Packet, is_overlays},
    peer, pmtu, policy, translate,
};

/// Ingress: a packet from the pod.
#[classifier]
pub fn cm_from_pod(ctx: TcContext) -> i32 {
    const HOOK: u8 = event_hook::FROM_POD;
    let Some(config) = config() else { return drop(&ctx, HOOK, reason::NOT_READY, 0) };
    // The sender is known by its address; nobody else has a say.
    mark::clear(&ctx);
    let mut addresses = MaybeUninit::uninit();
    let addresses = match Addresses::read(&ctx, config.cluster, &mut addresses) {
        Packet::Ip(addresses) => addresses,
        Packet::NotIp => return to_stack(&ctx),
        Packet::Malformed => return drop(&ctx, HOOK, reason::INVALID_PACKET, 0),
    };
    let on_link = addresses.stay_on_link();
    if on_link && !addresses.to_ipv4_link_local() {
        return to_stack(&ctx);
    }
    // SAFETY: the element is only read; user space replaces elements, it does not write into them.
    let sender = match unsafe { ENDPOINT.get(&addresses.source) } {
        // SAFETY: the context is valid for the program's run.
        Some(endpoint) if endpoint.ifindex == unsafe { (*ctx.skb.skb).ifindex } => endpoint,
        _ if on_link => return to_stack(&ctx),
        _ => return drop(&ctx, HOOK, reason::INVALID_SOURCE_IP, 0),
    };
    let mut way = match way(&ctx, config, sender, addresses) {
        Ok(way) => way,
        Err(reason) => return drop(&ctx, HOOK, reason, sender.identity),
    };
    // Perhaps a frontend, or a client of one.
    if way.cluster == 0
        && matches!(way.to, To::Stack)
        && let Err(reason) = elsewhere(&ctx, config, sender, addresses, &mut way)
    {
        return drop(&ctx, HOOK, reason, sender.identity);
    }
    if let Err(reason) = allow(&ctx, config, sender, addresses, &way) {
        return drop_untold(&ctx, reason);
    }
    if matches!(way.to, To::Node)
        && way.traits & Way::SERVED == 0
        && let refused @ 1.. = pmtu::refuse(&ctx, sender.identity)
    {
        return refused;
    }
    if wanted(config, event_kind::TRACE) {
        tell(&ctx, config, sender, &way);
    }
    match way.to {
        To::Stack => to_stack(&ctx),
        To::Pod => {
            let Some(pod) = way.pod else { return to_stack(&ctx) };
            if nat::is_used()
                && let nat::Answer::ToPod = nat::answer(&ctx, config.cluster)
                && let Err(reason) = as_frontend(&ctx)
            {
                return drop(&ctx, HOOK, reason, sender.identity);
            }
            count(reason::FORWARDED, ctx.len());
            to_pod(&ctx, HOOK, pod, sender.identity)
        }
        To::Outside => match as_frontend(&ctx) {
            Ok(()) => to_outside(way.ifindex),
            Err(reason) => drop(&ctx, HOOK, reason, sender.identity),
        },
        To::Node => {
            if way.traits & Way::VIRTUAL != 0
                && let Err(reason) = translate::leave(&ctx, way.cluster)
            {
                return drop(&ctx, HOOK, reason, sender.identity);
            }
            to_node(&ctx, config, HOOK, sender.identity, way.node_ip)
        }
    }
}

/// Egress: a packet from the node's stack. Whoever comes next on this hook has a say too.
#[classifier]
pub fn cm_to_pod(ctx: TcContext) -> i32 {
    const HOOK: u8 = event_hook::TO_POD;
    let Some(config) = config() else { return drop(&ctx, HOOK, reason::NOT_READY, 0) };
    let mut addresses = MaybeUninit::uninit();
    let addresses = match Addresses::read(&ctx, config.cluster, &mut addresses) {
        Packet::Ip(addresses) => addresses,
        Packet::NotIp => return TC_ACT_UNSPEC,
        Packet::Malformed => return drop(&ctx, HOOK, reason::INVALID_PACKET, 0),
    };
    let source = &addresses.source;
    // SAFETY: as above.
    let pod = match unsafe { ENDPOINT.get(&addresses.destination) } {
        Some(pod) if policy::selects(pod) => pod,
        // Multicast and link-local addresses are no endpoints.
        _ => return TC_ACT_UNSPEC,
    };
    let prefix = prefix_of(source);
    let sender = peer::through_stack(&ctx, config, source, prefix);
    let cluster = prefix.map_or(0, |prefix| prefix.cluster);
    let mut flow = MaybeUninit::uninit();
    let flow = policy::flow(&ctx, &mut flow, HOOK, source.family, (cluster, config.cluster));
    match policy::check(&ctx, flow, pod, direction::INGRESS, sender) {
        Ok(()) => TC_ACT_UNSPEC,
        Err(reason) => drop_untold(&ctx, reason),
    }
}

/// Where a packet goes, and who is there. No enum with fields: of those that a variant does not have the compiler reads
/// what nobody wrote, which kernels before 6.3 refuse.
struct Way {
    to: To,
    /// With [`To::Pod`].
    pod: Option<&'static EndpointValue>,
    /// With [`To::Node`].
    node_ip: [u8; 4],
    /// With [`To::Outside`].
    ifindex: u32,
    /// See [`peer`]; not looked for if no policy selects the sender.
    peer: u32,
    /// 0: outside of the mesh.
    cluster: u16,
    /// [`Way::VIRTUAL`], [`Way::SERVED`].
    traits: u8,
}

impl Way {
    /// The destination is an address that nobody has there.
    const VIRTUAL: u8 = 1;
    /// It got a backend's address here: its sender would not know whom "too big" is about.
    const SERVED: u8 = 2;

    #[inline(always)]
    fn outside(peer: u32) -> Self {
        Self { to: To::Stack, pod: None, node_ip: [0; 4], ifindex: 0, peer, cluster: 0, traits: 0 }
    }
}

/// Tells of a packet that is about to be passed on.
#[inline(always)]
fn tell(ctx: &TcContext, config: &Config, sender: &EndpointValue, way: &Way) {
    let (reason, receiver) = match way.to {
        To::Stack => (reason::TO_STACK, way.peer),
        To::Outside => (reason::ANSWERED, way.peer),
        To::Pod => (reason::FORWARDED, way.pod.map_or(0, |pod| pod.identity)),
        To::Node => (reason::ENCAPSULATED, way.peer),
    };
    let what = What::new(event_kind::TRACE, reason, event_hook::FROM_POD, EVENT_EGRESS);
    let clusters = clusters(config.cluster, way.cluster);
    // SAFETY: the context is the program's own.
    unsafe { trace_packet(ctx.skb.skb, what.word(), sender.identity, receiver, clusters) };
}

enum To {
    Stack,
    /// An answer to a client outside of the mesh, through an interface of the node.
    Outside,
    /// Of this node.
    Pod,
    Node,
}

#[inline(always)]
fn way(ctx: &TcContext, config: &Config, sender: &EndpointValue, addresses: &Addresses) -> Result<Way, u8> {
    let destination = &addresses.destination;
    let Some(prefix) = prefix_of(destination) else {
        // Masquerading would make a pod's own VXLAN packet one of this node, with any identity.
        if is_overlays(ctx, config, destination) {
            return Err(reason::ENCAPSULATION_PROHIBITED);
        }
        return match policy::selects(sender) {
            false => Ok(Way::outside(identity::UNKNOWN)),
            true => Ok(Way::outside(peer::outside(config, destination))),
        };
    };

    let local = prefix.cluster == config.cluster;
    if local {
        // SAFETY: as above.
        if let Some(pod) = unsafe { ENDPOINT.get(destination) } {
            let way = Way::outside(pod.identity);
            return Ok(Way { to: To::Pod, pod: Some(pod), cluster: prefix.cluster, ..way });
        }
    }
    let mut destination = *destination;
    destination.cluster = prefix.cluster;
    // SAFETY: as above.
    let entry = unsafe { IPCACHE.get(&destination) };
    // Not known (yet): its node may know better.
    let node_ip = entry.map_or(prefix.node_ip, |entry| entry.node_ip);
    let to = match node_ip {
        // The node's own address in its pod CIDR, or a pod that the agent has not seen yet.
        ip if local && (ip == config.node_ip || ip == [0; 4]) => To::Stack,
        [0, 0, 0, 0] => return Err(reason::NO_TUNNEL_ENDPOINT),
        _ => To::Node,
    };
    let traits = if prefix.flags & PREFIX_VIRTUAL != 0 { Way::VIRTUAL } else { 0 };
    let way = Way::outside(peer::inside(config, entry));
    Ok(Way { to, node_ip, cluster: prefix.cluster, traits, ..way })
}

/// The way of a packet whose destination is in no pod CIDR, and that would go to the stack.
#[inline(always)]
fn elsewhere(
    ctx: &TcContext,
    config: &Config,
    sender: &EndpointValue,
    addresses: &mut Addresses,
    found: &mut Way,
) -> Result<(), u8> {
    if nat::is_used() {
        match nat::answer(ctx, config.cluster) {
            nat::Answer::Outside(ifindex) => {
                (found.to, found.ifindex) = (To::Outside, ifindex);
                return Ok(());
            }
            nat::Answer::ByNode(ip) => {
                (found.to, found.node_ip) = (To::Node, ip);
                return Ok(());
            }
            nat::Answer::ToPod | nat::Answer::Not => {}
        }
    }
    if config.flags & CONFIG_PACKET_SERVICES == 0 {
        return Ok(());
    }
    match nat::serve(ctx, config.cluster, scope::MESH) {
        nat::Served::Not => return Ok(()),
        nat::Served::Yes => count(reason::SERVED, ctx.len()),
        nat::Served::Refused => return Err(reason::NO_BACKEND),
        nat::Served::Broken => return Err(reason::INVALID_PACKET),
    }
    if !addresses.again(ctx) {
        return Err(reason::INVALID_PACKET);
    }
    *found = way(ctx, config, sender, addresses)?;
    found.traits |= Way::SERVED;
    Ok(())
}

/// What the policies of the sender, and of a receiver on this node, say of a packet.
#[inline(always)]
fn allow(
    ctx: &TcContext,
    config: &Config,
    sender: &EndpointValue,
    addresses: &Addresses,
    way: &Way,
) -> Result<(), u8> {
    let receiver = match way.to {
        To::Pod => way.pod.filter(|pod| policy::selects(pod)),
        _ => None,
    };
    if !policy::selects(sender) && receiver.is_none() {
        return Ok(());
    }
    let mut flow = MaybeUninit::uninit();
    let flow = policy::flow(
        ctx,
        &mut flow,
        event_hook::FROM_POD,
        addresses.source.family,
        (config.cluster, way.cluster),
    );
    // Its gateway, whatever address that has there: a pod whose neighbour cannot find it has no network.
    let is_link = matches!(way.to, To::Stack) && way.cluster != 0;
    if !(is_link && flow.is(traits::NEIGHBOUR)) {
        policy::check(ctx, flow, sender, direction::EGRESS, way.peer)?;
    }
    match receiver {
        // `cm_to_pod` will ask.
        Some(pod) if is_via_stack(pod) => mark::set(ctx, sender.identity),
        Some(pod) => {
            policy::check(ctx, flow, pod, direction::INGRESS, sender.identity)?;
        }
        None => {}
    }
    Ok(())
}
