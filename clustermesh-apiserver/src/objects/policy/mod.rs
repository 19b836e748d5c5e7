//! Network policies: Kubernetes' and both of Cilium's in one plain form, that of the record.
//!
//! `network` and `cilium` read one object each; `selector`, `peers` and `ports` read its parts. What comes out
//! has all defaults spelled out but one: which clusters a selector means that names none. That is up to who
//! exports the policy and knows the cluster.
//!
//! Not all that Cilium knows is understood here. Such a part never widens what is let through: see [`Effect`].

mod cilium;
mod network;
mod peers;
mod ports;
mod selector;

use std::fmt;

use clustermesh_kvstore::record::{PolicyName, PolicyRule};

pub(crate) use cilium::{ClusterwideResource, NamespacedResource};

use super::meta::{Check, ObjectError};

/// A policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Which object it is.
    pub name: PolicyName,
    /// What it says. Empty if it says nothing, or was refused.
    pub rules: Vec<PolicyRule>,
    /// What of it is not understood.
    pub gaps: Vec<Gap>,
}

/// A part of a policy that is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Where it stands.
    pub field: String,
    /// What it is.
    pub reason: GapReason,
    /// What becomes of the policy.
    pub effect: Effect,
}

/// What becomes of a policy with a part that is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// An entry that would allow something is left out. Its section denies by default as before.
    LeftOut,
    /// An entry denies more than it says.
    Widened,
    /// The whole policy is as if it were not there.
    Refused,
}

/// Kinds of things that are not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GapReason {
    /// The policy is about nodes.
    NodeSelector,
    /// DNS names of the other end.
    Fqdns,
    /// Services as the other end.
    Services,
    /// Nodes as the other end, by labels.
    Nodes,
    /// Groups of cloud providers.
    Groups,
    /// A group with a name that has no members here.
    Entity,
    /// Labels of a source that pods do not have.
    Selector,
    /// Ports with a name.
    NamedPort,
    /// Ports that are said in a way whose meaning is not certain.
    Ports,
    /// Something above TCP and UDP: HTTP, DNS, TLS, listeners.
    Layer7,
    /// Mutual authentication.
    Authentication,
    /// Parts that cannot be combined.
    Combination,
    /// A field that is not known here.
    Unknown,
}

impl GapReason {
    /// Every reason.
    pub const ALL: [Self; 13] = [
        Self::NodeSelector,
        Self::Fqdns,
        Self::Services,
        Self::Nodes,
        Self::Groups,
        Self::Entity,
        Self::Selector,
        Self::NamedPort,
        Self::Ports,
        Self::Layer7,
        Self::Authentication,
        Self::Combination,
        Self::Unknown,
    ];

    /// As metrics name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NodeSelector => "node_selector",
            Self::Fqdns => "fqdns",
            Self::Services => "services",
            Self::Nodes => "nodes",
            Self::Groups => "groups",
            Self::Entity => "entity",
            Self::Selector => "selector",
            Self::NamedPort => "named_port",
            Self::Ports => "ports",
            Self::Layer7 => "layer7",
            Self::Authentication => "authentication",
            Self::Combination => "combination",
            Self::Unknown => "unknown_field",
        }
    }

    /// What a field is that stands in the entry of a rule.
    fn of_field(field: &str) -> Self {
        match field {
            "toFQDNs" => Self::Fqdns,
            "toServices" => Self::Services,
            "fromNodes" | "toNodes" => Self::Nodes,
            "fromGroups" | "toGroups" => Self::Groups,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.reason {
            GapReason::NodeSelector => "policies of nodes are not enforced",
            GapReason::Fqdns => "names of the other end are not understood",
            GapReason::Services => "services as the other end are not understood: name pods or addresses",
            GapReason::Nodes => "nodes by labels are not understood: use the entities host and remote-node",
            GapReason::Groups => "groups of cloud providers are not understood",
            GapReason::Entity => "there is no such entity here",
            GapReason::Selector => "labels of this source cannot be selected here",
            GapReason::NamedPort => "ports are understood by number only",
            GapReason::Ports => "say which ports, the last one not below the first",
            GapReason::Layer7 => "nothing above TCP and UDP is looked at",
            GapReason::Authentication => "authentication is not understood",
            GapReason::Combination => {
                "this cannot be combined with what stands beside it: use entries of their own"
            }
            GapReason::Unknown => "this field is not known",
        };
        let effect = match self.effect {
            Effect::LeftOut => "the entry is left out, so that it allows nothing",
            Effect::Widened => "the entry denies more than it says",
            Effect::Refused => "the policy is refused and does nothing",
        };
        write!(f, "{}: {what}; {effect}", self.field)
    }
}

/// Why a part of a policy cannot be read.
enum Flaw {
    /// It is wrong.
    Invalid(ObjectError),
    /// It may well be right.
    Gap(String, GapReason),
}

impl From<ObjectError> for Flaw {
    fn from(error: ObjectError) -> Self {
        Self::Invalid(error)
    }
}

/// Records have bounds, so that readers have some. Whoever goes beyond them has to split the policy.
fn bounded(check: &Check<'_>, policy: Policy) -> Result<Policy, ObjectError> {
    match PolicyRule::check_all(&policy.rules) {
        Ok(()) => Ok(policy),
        Err(error) => Err(check.error("spec", error)),
    }
}

#[cfg(test)]
mod cilium_tests;
#[cfg(test)]
mod network_tests;
