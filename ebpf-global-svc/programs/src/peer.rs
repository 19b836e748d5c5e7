// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Who the other end is, as policies see it. Who sends from the overlay says so itself; everybody else is
//! known by address.

use aya_ebpf::programs::TcContext;
use ebpf_global_svc_abi::{Config, FAMILY_V4, FAMILY_V6, IpKey, IpValue, NodeKey, PrefixValue, identity};

use crate::{
    maps::{NODE, cidr_of, over_ipv6},
    mark,
};

/// Whether that is this node's own underlay address.
#[inline(always)]
pub fn is_this_node(config: &Config, address: &IpKey) -> bool {
    let ip = &address.ip;
    if over_ipv6(config) {
        return address.family == FAMILY_V6 && is_same(ip, &config.node_ip6);
    }
    address.family == FAMILY_V4 && [ip[0], ip[1], ip[2], ip[3]] == config.node_ip
}

/// By words: as arrays they would be compared by a call.
#[inline(always)]
fn is_same(address: &[u8; 16], other: &[u8; 16]) -> bool {
    let (address, other): (*const u32, *const u32) = ((&raw const *address).cast(), (&raw const *other).cast());
    // SAFETY: four words each, read wherever they are.
    (0..4).all(|n| unsafe { address.add(n).read() == other.add(n).read() })
}

/// Somebody whose address is in no pod CIDR of the mesh. Apart, for its keys to leave the stack again.
#[inline(never)]
pub fn outside(config: &Config, address: &IpKey) -> u32 {
    if is_this_node(config, address) {
        return identity::HOST;
    }
    let key = NodeKey { family: address.family, pad: [0; 3], ip: address.ip };
    // SAFETY: the element is only read; user space replaces elements, it does not write into them.
    if unsafe { NODE.get(&key) }.is_some() {
        return identity::REMOTE_NODE;
    }
    world(address)
}

/// Somebody outside of the mesh who is no node either.
#[inline(always)]
pub fn world(address: &IpKey) -> u32 {
    cidr_of(address).unwrap_or(identity::WORLD)
}

/// Somebody whose address is in a pod CIDR and no pod's of this node. What `cm_ipcache` does not know is
/// [`identity::UNKNOWN`].
#[inline(always)]
pub fn inside(config: &Config, entry: Option<&IpValue>) -> u32 {
    match entry {
        Some(entry) if entry.identity == identity::REMOTE_NODE && entry.node_ip == config.node_ip => {
            identity::HOST
        }
        Some(entry) => entry.identity,
        None => identity::UNKNOWN,
    }
}

/// Who sends through the overlay with this VNI.
#[inline(always)]
pub fn remote(vni: u32, source: &IpKey) -> u32 {
    if vni == identity::WORLD { world(source) } else { vni }
}

/// Who sends a packet that this node's stack is about to deliver.
#[inline(always)]
pub fn through_stack(ctx: &TcContext, config: &Config, source: &IpKey, prefix: Option<&PrefixValue>) -> u32 {
    // SAFETY: the context is valid for the program's run.
    if unsafe { (*ctx.skb.skb).ingress_ifindex } == 0 {
        // It came in nowhere: this node has made it.
        return identity::HOST;
    }
    match (mark::identity(ctx), prefix) {
        (Some(identity), _) => remote(identity, source),
        // Whoever sends from there passes our programs, which would have left a mark.
        (None, Some(_)) => identity::UNKNOWN,
        (None, None) => outside(config, source),
    }
}
