//! What the mesh tells the policies, and what follows for the pods of this node.

use std::collections::BTreeSet;

use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::labels::Labels;
use clustermesh_kvstore::record::PolicyName;

use super::Mesh;
use super::records::Records;
use crate::desired::Changes;
use crate::policy::Policies;

impl Mesh {
    /// What would be dropped by policy is counted and passes.
    pub fn audit_policies(&mut self, audit: bool) {
        self.policies.set_audit(audit);
    }

    /// Policies, compiled.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// The labels of an identity of any cluster, as they are written.
    pub fn labels_of(&self, id: u32) -> Option<&str> {
        self.clusters.values().find_map(|records| records.labels(id))
    }

    /// An identity came, went, or is in another list than before.
    pub(super) fn labels_changed(&mut self, cluster: u16, id: u32) {
        let text = self.clusters.get(&cluster).and_then(|records| records.labels(id));
        // They were read once, or they would not be here.
        let labels = text.and_then(|text| Labels::parse(text).ok());
        self.policies.identity_changed(id, labels.as_ref());
    }

    /// A policy of the own cluster came, changed or went.
    pub(super) fn policy_changed(&mut self, name: &PolicyName) {
        let Self { clusters, policies, own, .. } = self;
        let policy = clusters.get(own).and_then(|records| records.local_policies.get(name));
        policies.policy_changed(name, policy);
    }

    /// A list that policies wait for is complete.
    pub(super) fn identities_told(&mut self, cluster: u16) {
        let Some(records) = self.clusters.get(&cluster) else { return };
        if cluster != self.own {
            return self.policies.set_known(cluster);
        }
        let needed = [Kind::Identities, Kind::LocalIdentities, Kind::LocalPolicies];
        if needed.into_iter().all(|kind| records.is_synced(kind)) {
            self.policies.set_known(cluster);
            self.policies.set_complete();
        }
    }

    /// The cluster is no part of the mesh any more.
    pub(super) fn forget_identities(&mut self, cluster: u16, records: &Records) {
        let ids: BTreeSet<u32> = records.labelled().map(|(id, _)| id).collect();
        for id in ids {
            self.policies.identity_changed(id, None);
        }
        // What was restored of it goes now; who takes its ID has to tell its identities first.
        self.policies.forget_cluster(cluster);
    }

    /// Policies of this node's pods, before their flags are computed.
    pub(super) fn compute_policies(&mut self, changes: &mut Changes) {
        let Self { clusters, policies, endpoints, own, .. } = self;
        let Some(own) = clusters.get(own) else { return };
        if let Some(subjects) = endpoints.take_subjects(own) {
            policies.set_subjects(&subjects);
        }
        let computed = policies.compute(|| clusters.values().flat_map(Records::labelled));
        changes.policy.extend(computed.policy);
        changes.cidr.extend(computed.cidr);
        endpoints.policies_changed(&computed.subjects, own);
    }
}
