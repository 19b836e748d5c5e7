//! Policies: what their selectors mean in this cluster.

use std::collections::BTreeMap;

use clustermesh_kvstore::labels::{CLUSTER_LABEL, SOURCE_K8S};
use clustermesh_kvstore::record::{LabelSelector, LocalPolicy, Peer, PolicyName, PolicyRule, Requirement};

use super::{Cluster, Exporter, Output, Problem, Rules};
use crate::objects::{GapReason, Policy};

impl Exporter {
    pub(super) fn recompute_policy(&mut self, name: &PolicyName, out: &mut Output) {
        let policy = self.objects.policy(name);
        let gaps = policy.map(|policy| policy.gaps.clone()).unwrap_or_default();
        let policy = policy.filter(|policy| !policy.rules.is_empty());
        let record = policy.map(|policy| record(policy, &self.cluster, self.rules));
        self.publish(&name.to_string(), record, out);

        let known = self.gaps.get(name).map(Vec::as_slice).unwrap_or_default();
        let new = gaps.iter().filter(|gap| !known.contains(gap));
        self.problems.extend(new.map(|gap| Problem::Policy { policy: name.clone(), gap: gap.clone() }));
        match gaps.is_empty() {
            true => self.gaps.remove(name),
            false => self.gaps.insert(name.clone(), gaps),
        };
    }

    /// How many parts of policies are not understood, by reason.
    pub fn policy_gaps(&self) -> BTreeMap<GapReason, usize> {
        let mut counts: BTreeMap<_, _> = GapReason::ALL.map(|reason| (reason, 0)).into();
        for gap in self.gaps.values().flatten() {
            *counts.entry(gap.reason).or_default() += 1;
        }
        counts
    }

    /// How many policies there are of which a part is not understood.
    pub fn flawed_policies(&self) -> usize {
        self.gaps.len()
    }
}

/// The record of a policy that says something.
fn record(policy: &Policy, cluster: &Cluster, rules: Rules) -> LocalPolicy {
    let own = Requirement::is(SOURCE_K8S, CLUSTER_LABEL, cluster.name.as_str());
    let confine = |rule: &PolicyRule| {
        let mut rule = rule.clone();
        if !rule.subject.0.contains(&own) {
            rule.subject.0.push(own.clone());
        }
        if rules.policy_default_local_cluster {
            selectors(&mut rule).filter(|selector| !names_clusters(selector)).for_each(|selector| {
                selector.0.push(own.clone());
            });
        }
        rule
    };
    LocalPolicy {
        cluster: cluster.name.to_string(),
        cluster_id: cluster.id.get().into(),
        name: policy.name.clone(),
        rules: policy.rules.iter().map(confine).collect(),
    }
}

/// The selectors of other ends.
fn selectors(rule: &mut PolicyRule) -> impl Iterator<Item = &mut LabelSelector> {
    let sections = [&mut rule.ingress, &mut rule.egress].into_iter().flatten();
    let traffic = sections.flat_map(|section| section.allow.iter_mut().chain(&mut section.deny));
    traffic.flat_map(|traffic| &mut traffic.peers).filter_map(|peer| match peer {
        Peer::Labels(selector) => Some(selector),
        Peer::Entity(_) | Peer::Cidr { .. } => None,
    })
}

fn names_clusters(LabelSelector(requirements): &LabelSelector) -> bool {
    let of_kubernetes = |source: &str| source.is_empty() || source == SOURCE_K8S;
    requirements.iter().any(|it| it.key == CLUSTER_LABEL && of_kubernetes(&it.source))
}

#[cfg(test)]
mod tests;
