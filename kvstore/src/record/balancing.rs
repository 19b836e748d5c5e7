use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::json::null_is_empty;
use super::{RecordError, Text};
use crate::cluster::ClusterName;

/// How the callers of a cluster spread their calls of a service, beyond [`super::Affinity`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balancing {
    /// Seconds that a client keeps its backend after its last call, 1 to [`Self::MAX_SESSION`]; none: no session
    /// affinity.
    pub session: Option<u32>,
    /// Clusters in the order in which they are used: all of the first tier, then those of the second. Those
    /// that are not named come last, together.
    pub order: Vec<BTreeSet<ClusterName>>,
    /// Shares of calls, not all of them 0. Those that are not named get none while others can answer.
    pub weights: BTreeMap<ClusterName, u16>,
    /// Which of the own cluster's backends are used.
    pub nearness: Nearness,
}

/// Which of the own cluster's backends a node calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Nearness {
    /// All.
    #[default]
    Any,
    /// Those of the node's zone; all, if it has none.
    PreferZone,
    /// Those of the node; those of its zone, if it has none; all, if that has none.
    PreferNode,
    /// Those of the node, whether it has any or not; and none of other clusters.
    OnlyNode,
}

impl Balancing {
    /// The longest session in seconds, as Kubernetes has it.
    pub const MAX_SESSION: u32 = 86_400;
    /// Tiers that an order can have: one byte counts them, and those that are not named have one of their own.
    pub const MAX_TIERS: usize = 255;
    /// Clusters that an order or weights can name: as many as a mesh can have.
    pub const MAX_CLUSTERS: usize = 511;

    /// Whether it says which clusters are used how: then [`super::Affinity`] says nothing.
    pub fn names_clusters(&self) -> bool {
        !self.order.is_empty() || !self.weights.is_empty()
    }

    pub(super) fn decode(wire: WireBalancing) -> Result<Self, RecordError> {
        let bad = |field, value: String| RecordError::BadValue { field, value: value.into() };
        if let Some(seconds) = wire.session.filter(|seconds| !(1..=Self::MAX_SESSION).contains(seconds)) {
            return Err(bad("session", seconds.to_string()));
        }
        if wire.order.len() > Self::MAX_TIERS {
            return Err(bad("order", format!("{} tiers", wire.order.len())));
        }
        let mut order = Vec::with_capacity(wire.order.len());
        let mut named = BTreeSet::new();
        for tier in wire.order {
            let tier: BTreeSet<ClusterName> =
                tier.into_iter().map(|text| name("order", text)).collect::<Result<_, _>>()?;
            let twice = tier.iter().find(|name| !named.insert((*name).clone()));
            match twice {
                Some(twice) => return Err(bad("order", twice.to_string())),
                None if tier.is_empty() => return Err(bad("order", "an empty tier".into())),
                None => order.push(tier),
            }
        }
        let weights = wire.weights.into_iter().map(|(text, weight)| Ok((name("weights", text)?, weight)));
        let weights: BTreeMap<ClusterName, u16> = weights.collect::<Result<_, RecordError>>()?;
        if named.len().max(weights.len()) > Self::MAX_CLUSTERS {
            return Err(bad("balancing", "more clusters than a mesh can have".into()));
        }
        if !weights.is_empty() && weights.values().all(|weight| *weight == 0) {
            return Err(bad("weights", "all 0".into()));
        }
        Ok(Self { session: wire.session, order, weights, nearness: wire.nearness })
    }

    pub(super) fn encode(&self) -> WireBalancing {
        let names = |tier: &BTreeSet<ClusterName>| tier.iter().map(ClusterName::to_string).collect();
        WireBalancing {
            session: self.session,
            order: self.order.iter().map(names).collect(),
            weights: self.weights.iter().map(|(name, weight)| (name.to_string(), *weight)).collect(),
            nearness: self.nearness,
        }
    }
}

fn name(field: &'static str, text: String) -> Result<ClusterName, RecordError> {
    text.parse().map_err(|_| RecordError::BadName { field, name: Text::from(text) })
}

/// Part of [`super::LocalService`]'s JSON.
#[derive(Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WireBalancing {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<u32>,
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    order: Vec<Vec<String>>,
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    weights: BTreeMap<String, u16>,
    #[serde(default, skip_serializing_if = "is_any")]
    nearness: Nearness,
}

impl WireBalancing {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_any(nearness: &Nearness) -> bool {
    *nearness == Nearness::Any
}
