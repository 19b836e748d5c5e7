// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Whether a pod of this node may send or receive a packet.
//!
//! A pod that no policy selects costs the test of its flags. For others: an answer to a flow that was let
//! through passes; what begins a flow, and what follows in its direction, is looked up in `cm_policy` twice,
//! for the very peer and for any. A denial in either denies.
//!
//! The three functions with C names are global to the verifier: it looks at each once, whatever calls it, and
//! knows nothing of what it returns. Walked from within every path of every program they would exceed its limit.

use core::mem::MaybeUninit;

use aya_ebpf::programs::TcContext;
use ebpf_global_svc_abi::{
    ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, EVENT_EGRESS, EVENT_POLICY,
    EndpointValue, POLICY_DENY, POLICY_PORT_BITS, POLICY_PROTO_BITS, PolicyValue, VerdictKey, direction,
    event_kind, identity, reason, verdict,
};

use crate::{
    conntrack::{self, is_about_flow},
    counters::{count, count_verdict},
    events::{What, report, wanted},
    flow::{Flow, read_packet, traits},
    maps::{PolicyBytes, config, policy_of},
};

/// What [`judge`] says of what passes.
const PASSES: u32 = 0;

/// Whether a policy selects the pod, in whatever direction.
#[inline(always)]
pub fn selects(pod: &EndpointValue) -> bool {
    pod.flags & (ENDPOINT_ENFORCE_INGRESS | ENDPOINT_ENFORCE_EGRESS) != 0
}

/// The packet, for [`check`]. `hook`: see `event_hook`; `clusters` are those of source and destination, 0 outside of the mesh.
#[inline(always)]
pub fn flow<'a>(
    ctx: &TcContext,
    place: &'a mut MaybeUninit<Flow>,
    hook: u8,
    family: u8,
    clusters: (u16, u16),
) -> &'a Flow {
    read_packet(ctx, place, hook, family, clusters)
}

/// Lets a packet of a pod pass, or says why it must not. `toward` is its direction, seen from the pod, and
/// `peer` the identity of the other end.
#[inline(always)]
pub fn check(ctx: &TcContext, flow: &Flow, pod: &EndpointValue, toward: u8, peer: u32) -> Result<(), u8> {
    if !selects(pod) {
        return Ok(());
    }
    if flow.is(traits::TOO_BIG) || (flow.is(traits::NEIGHBOUR) && peer == identity::HOST) {
        return Ok(());
    }
    if flow.embedded != 0 {
        // SAFETY: the context is the program's own.
        let is = unsafe { is_about_flow(ctx.skb.skb, flow, toward.into()) };
        if is != 0 {
            return Ok(());
        }
    }
    match judge(flow, pod.identity, pod.flags, toward.into(), peer) {
        PASSES => Ok(()),
        reason => Err(reason as u8),
    }
}

/// A reason to drop the packet, or [`PASSES`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn judge(flow: *const Flow, subject: u32, flags: u32, toward: u32, peer: u32) -> u32 {
    // SAFETY: callers pass a reference; the verifier does not know.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return reason::INVALID_PACKET.into() };
    let toward = toward as u8;
    let readable = flow.unreadable == 0;
    if readable && conntrack::is_answer(flow, toward) {
        return PASSES;
    }
    let enforced =
        if toward == direction::INGRESS { ENDPOINT_ENFORCE_INGRESS } else { ENDPOINT_ENFORCE_EGRESS };
    if flags & enforced != 0 {
        let decision = decide(flow, subject, toward, peer);
        let denied = u32::from(decision.reason) != PASSES;
        let verdict = match denied {
            false => verdict::ALLOWED,
            true if flags & ENDPOINT_AUDIT != 0 => verdict::AUDITED,
            true => verdict::DENIED,
        };
        let key = VerdictKey { subject, rule: decision.rule, direction: toward, verdict, pad: 0 };
        count_verdict(&key, flow.bytes);
        if verdict == verdict::DENIED {
            if readable {
                conntrack::forget(flow, toward);
            }
            tell(flow, event_kind::DROP, decision.reason, decision.rule, subject, toward, peer);
            return decision.reason.into();
        }
        if denied {
            count(reason::POLICY_AUDITED, flow.bytes);
        }
        // What follows the first packet of a flow is decided likewise, and nothing new.
        if !readable || conntrack::remember(flow, toward, peer) {
            let kind = if denied { event_kind::AUDIT } else { event_kind::ALLOW };
            tell(flow, kind, decision.reason, decision.rule, subject, toward, peer);
        }
    } else if readable {
        conntrack::remember(flow, toward, peer);
    }
    PASSES
}

/// Tells what was decided, if somebody wants to know.
#[inline(always)]
fn tell(flow: &Flow, kind: u8, reason: u8, rule: u32, subject: u32, toward: u8, peer: u32) {
    let Some(config) = config() else { return };
    if !wanted(config, kind) {
        return;
    }
    if toward == direction::EGRESS {
        let what = What::new(kind, reason, flow.hook, EVENT_POLICY | EVENT_EGRESS);
        report(flow, what.word(), subject, peer, rule);
    } else {
        report(flow, What::new(kind, reason, flow.hook, EVENT_POLICY).word(), peer, subject, rule);
    }
}

struct Decision {
    /// Why not; 0: it is allowed.
    reason: u8,
    /// The rule that has decided; 0: none.
    rule: u32,
}

#[inline(always)]
fn decide(flow: &Flow, subject: u32, direction: u8, peer: u32) -> Decision {
    if flow.unreadable != 0 {
        return Decision { reason: flow.unreadable, rule: 0 };
    }
    if peer == identity::UNKNOWN {
        return Decision { reason: reason::UNKNOWN_IDENTITY, rule: 0 };
    }
    let bits = if flow.is(traits::PORTS) { POLICY_PORT_BITS } else { POLICY_PROTO_BITS };
    let bytes = PolicyBytes { subject, peer, direction, proto: flow.proto, port: flow.service };
    let by_peer = policy_of(bits, bytes);
    if let Some(entry) = by_peer
        && denies(entry)
    {
        return Decision { reason: reason::POLICY_DENY, rule: entry.rule };
    }
    let by_any = policy_of(bits, PolicyBytes { peer: 0, ..bytes });
    match (by_any, by_peer) {
        (Some(entry), _) if denies(entry) => Decision { reason: reason::POLICY_DENY, rule: entry.rule },
        (_, Some(entry)) | (Some(entry), None) => Decision { reason: 0, rule: entry.rule },
        (None, None) => Decision { reason: reason::POLICY, rule: 0 },
    }
}

#[inline(always)]
fn denies(entry: &PolicyValue) -> bool {
    entry.flags & POLICY_DENY != 0
}
