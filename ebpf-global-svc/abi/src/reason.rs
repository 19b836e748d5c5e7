// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Indices of `cm_metrics`. Codes from 130 on are drops, and are Cilium's where it has one; our own
//! begin at 250.

/// Delivered from pod to pod on this node.
pub const FORWARDED: u8 = 0;
/// Sent into the overlay.
pub const ENCAPSULATED: u8 = 1;
/// Accepted from the overlay.
pub const DECAPSULATED: u8 = 2;
/// Left to the kernel's routing.
pub const TO_STACK: u8 = 3;
/// A backend was chosen.
pub const LB_SELECTED: u8 = 4;
/// A slot or backend was being replaced; the selection looked again.
pub const LB_NO_BACKEND_SLOT: u8 = 5;
/// A service had no usable backend: the system call was refused.
pub const LB_NO_BACKEND: u8 = 6;
/// The backend chosen is of a standby group (weight 0).
pub const LB_STANDBY: u8 = 7;
/// The backend chosen is in a draining cluster.
pub const LB_DRAINING: u8 = 8;
/// Larger than the overlay's MTU; sent in fragments.
pub const TOO_BIG: u8 = 9;
/// Policy would have dropped it, and only audits.
pub const POLICY_AUDITED: u8 = 10;
/// The backend chosen is the one that its client is bound to by session affinity.
pub const LB_AFFINITY: u8 = 11;
/// A packet to a frontend got a backend's address, and was sent on.
pub const SERVED: u8 = 12;
/// An answer got the frontend's address, and was sent on.
pub const ANSWERED: u8 = 13;
/// One of those that were served and encapsulated, by the XDP program.
pub const ACCELERATED: u8 = 14;
/// Drop: a pod sent from an address that is not its own, or a node from one of another cluster.
pub const INVALID_SOURCE_IP: u8 = 132;
/// Drop: no rule of a policy that selects the pod allows it.
pub const POLICY: u8 = 133;
/// Drop: truncated or malformed.
pub const INVALID_PACKET: u8 = 134;
/// Drop: larger than the overlay's MTU; the pod that sent it has been told.
pub const FRAG_NEEDED: u8 = 136;
/// Drop: a packet on the overlay without tunnel metadata.
pub const NO_TUNNEL_KEY: u8 = 147;
/// Drop: came from the overlay and is for nobody on this node.
pub const UNKNOWN_TARGET: u8 = 150;
/// Drop: a packet to a service without a usable backend.
pub const NO_BACKEND: u8 = 158;
/// Drop: the destination is in the mesh, but its node is not known (or there is no overlay).
pub const NO_TUNNEL_ENDPOINT: u8 = 160;
/// Drop: a virtual address that stands for none.
pub const NO_MAPPING: u8 = 167;
/// Drop: a pod speaks the overlay's protocol itself, to pass for its node.
pub const ENCAPSULATION_PROHIBITED: u8 = 170;
/// Drop: a later fragment whose first one has not been seen, so that policy cannot be asked.
pub const FRAGMENT_NOT_FOUND: u8 = 175;
/// Drop: a policy selects the pod, and the other end is in the mesh but not known (yet).
pub const UNKNOWN_IDENTITY: u8 = 250;
/// Drop: a reserved identity that must not be on the wire.
pub const INVALID_IDENTITY: u8 = 171;
/// Drop: the outer source is not a node of the mesh.
pub const UNKNOWN_SENDER: u8 = 172;
/// Drop: a rule of a policy that selects the pod denies it.
pub const POLICY_DENY: u8 = 181;
/// Drop: the identity belongs to another cluster than the node that sent it.
pub const INVALID_CLUSTER_ID: u8 = 192;
/// Drop: a tunnel packet that should be encrypted would go out, or has come, in clear.
pub const UNENCRYPTED: u8 = 195;
/// Drop: the datapath is not configured.
pub const NOT_READY: u8 = 202;

/// As people write it: `to-stack`; none of a number that is no reason.
#[must_use]
pub const fn name(reason: u8) -> Option<&'static str> {
    Some(match reason {
        FORWARDED => "forwarded",
        ENCAPSULATED => "encapsulated",
        DECAPSULATED => "decapsulated",
        TO_STACK => "to-stack",
        LB_SELECTED => "lb-selected",
        LB_NO_BACKEND_SLOT => "lb-no-backend-slot",
        LB_NO_BACKEND => "lb-no-backend",
        LB_STANDBY => "lb-standby",
        LB_DRAINING => "lb-draining",
        TOO_BIG => "too-big",
        POLICY_AUDITED => "policy-audited",
        LB_AFFINITY => "lb-affinity",
        SERVED => "served",
        ANSWERED => "answered",
        ACCELERATED => "accelerated",
        NO_BACKEND => "no-backend",
        INVALID_SOURCE_IP => "invalid-source-ip",
        POLICY => "policy",
        INVALID_PACKET => "invalid-packet",
        FRAG_NEEDED => "frag-needed",
        NO_TUNNEL_KEY => "no-tunnel-key",
        UNKNOWN_TARGET => "unknown-target",
        NO_TUNNEL_ENDPOINT => "no-tunnel-endpoint",
        NO_MAPPING => "no-mapping",
        ENCAPSULATION_PROHIBITED => "encapsulation-prohibited",
        FRAGMENT_NOT_FOUND => "fragment-not-found",
        UNKNOWN_IDENTITY => "unknown-identity",
        INVALID_IDENTITY => "invalid-identity",
        UNKNOWN_SENDER => "unknown-sender",
        POLICY_DENY => "policy-deny",
        INVALID_CLUSTER_ID => "invalid-cluster-id",
        UNENCRYPTED => "unencrypted",
        NOT_READY => "not-ready",
        _ => return None,
    })
}

/// Whether it is one of a packet that is dropped.
#[must_use]
pub const fn is_drop(reason: u8) -> bool {
    reason >= FIRST_DROP
}

/// Reasons from here on are drops.
pub const FIRST_DROP: u8 = 130;
