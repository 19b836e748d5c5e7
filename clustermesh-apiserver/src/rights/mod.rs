//! Who may do what in a cluster's etcd.
//!
//! [`Rights`] are users, roles and permissions as they should be or as they are; [`Rights::steps`] says how
//! to get from the one to the other. That is plain code; [`found`] and [`apply`] talk to etcd. The users of
//! the cluster itself are made by [`crate::etcdinit`], those of other clusters come from a file: [`users`].
//!
//! No user has a password: who a client is, its certificate's CN says.

mod etcd;
pub mod users;

use std::collections::{BTreeMap, BTreeSet};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::{Access, KeyRange, KeySpan};
use clustermesh_kvstore::key;

pub use etcd::{apply, found};

/// The role that may do everything. etcd knows it without being told.
pub const ROOT: &str = "root";
/// The role of other clusters.
pub const REMOTE: &str = "remote";

/// Users with their roles, and roles with what they permit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Roles of each user.
    pub users: BTreeMap<String, BTreeSet<String>>,
    /// Permissions of each role. `root` is not among them.
    pub roles: BTreeMap<String, BTreeMap<KeySpan, Access>>,
}

/// A change of the rights in an etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Adds a role that permits nothing.
    AddRole(String),
    /// Lets a role access a span.
    Permit(String, KeySpan, Access),
    /// Takes a span from a role.
    Forbid(String, KeySpan),
    /// Adds a user without password and roles.
    AddUser(String),
    /// Gives a user (first) a role (second).
    Grant(String, String),
    /// Takes a role (second) from a user (first).
    Revoke(String, String),
    /// Removes a user.
    DeleteUser(String),
}

impl Rights {
    /// The rights in the etcd of `cluster`: those that Cilium sets up, so that its agents and its
    /// kvstoremesh can use the etcd, and for this cluster's own agents a user `agent-CLUSTER`, who may
    /// read what other clusters may not, and announce nodes to the exporter.
    pub fn of(cluster: &ClusterName) -> Self {
        let read = |spans: &[KeySpan]| -> BTreeMap<_, _> {
            spans.iter().map(|span| (span.clone(), Access::Read)).collect()
        };
        // Without a slash, as Cilium has it.
        let heartbeat = prefix(key::HEARTBEAT);
        let local = [
            heartbeat.clone(),
            prefix("cilium/cache/"),
            prefix("cilium/cluster-config/"),
            prefix("cilium/synced/"),
        ];
        let remote = [
            heartbeat,
            prefix("cilium/state/"),
            one_key(&key::cluster_config_key(cluster)),
            prefix(&format!("cilium/synced/{cluster}/")),
        ];
        let agent = [&local[..], &[prefix("cilium/state/"), prefix("clustermesh/local/")]].concat();
        let announced = (prefix(&key::announcement_prefix(cluster)), Access::ReadWrite);
        let external: BTreeMap<_, _> = [
            (KeySpan { start: vec![0], end: vec![0] }, Access::Read),
            (prefix("cilium/.initlock/"), Access::ReadWrite),
            (prefix("cilium/state/noderegister/v1/"), Access::ReadWrite),
        ]
        .into();
        let user = |name: String, role: &str| (name, BTreeSet::from([role.to_owned()]));
        Self {
            users: [
                user(ROOT.into(), ROOT),
                user(format!("admin-{cluster}"), ROOT),
                user(format!("local-{cluster}"), "local"),
                user(format!("agent-{cluster}"), "agent"),
                user(REMOTE.into(), REMOTE),
                user("externalworkload".into(), "externalworkload"),
            ]
            .into(),
            roles: [
                ("local".into(), read(&local)),
                ("agent".into(), read(&agent).into_iter().chain([announced]).collect()),
                (REMOTE.into(), read(&remote)),
                ("externalworkload".into(), external),
            ]
            .into(),
        }
    }

    /// What has to change so that all users and roles of `self` are exactly as here. Others that are
    /// `found` stay as they are. A role gets what it lacks before it loses what it has too much, and is
    /// complete before a user gets it.
    pub fn steps(&self, found: &Self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (role, wanted) in &self.roles {
            let existing = found.roles.get(role);
            if existing.is_none() {
                steps.push(Step::AddRole(role.clone()));
            }
            let existing = existing.into_iter().flatten().collect::<BTreeMap<_, _>>();
            let lacking = wanted.iter().filter(|(span, access)| existing.get(span) != Some(access));
            steps.extend(lacking.map(|(span, access)| Step::Permit(role.clone(), span.clone(), *access)));
            let extra = existing.keys().filter(|span| !wanted.contains_key(span));
            steps.extend(extra.map(|span| Step::Forbid(role.clone(), (*span).clone())));
        }
        for (user, wanted) in &self.users {
            let existing = found.users.get(user);
            if existing.is_none() {
                steps.push(Step::AddUser(user.clone()));
            }
            let none = BTreeSet::new();
            let existing = existing.unwrap_or(&none);
            steps.extend(wanted.difference(existing).map(|role| Step::Grant(user.clone(), role.clone())));
            steps.extend(existing.difference(wanted).map(|role| Step::Revoke(user.clone(), role.clone())));
        }
        steps
    }
}

fn prefix(start: &str) -> KeySpan {
    KeySpan { start: start.into(), end: KeyRange::Prefix(start.into()).end() }
}

fn one_key(key: &str) -> KeySpan {
    KeySpan { start: key.into(), end: Vec::new() }
}

#[cfg(test)]
mod tests;
