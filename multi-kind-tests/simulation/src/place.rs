//! Where a cluster's etcd stands, whichever it is at the moment.

use std::time::Instant;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::key::{Kind, Layout, canary_key, data_prefix};

use crate::etcd::Etcd;

/// An address at which etcds come and go.
pub struct Place {
    /// The cluster's name.
    pub name: ClusterName,
    /// The etcd that answers there.
    pub etcd: Etcd,
    /// Counts them.
    pub incarnation: u64,
    /// It can be reached.
    pub up: bool,
    /// It takes connections but says nothing.
    pub stalled: bool,
    /// Somebody in the mesh has claimed what is not theirs: addresses may go because of that.
    pub contested: bool,
    /// Those that were, for the questions of [`Etcd::could_be_gone`].
    buried: Vec<Etcd>,
}

impl Place {
    /// With an empty etcd.
    pub fn new(name: ClusterName, number: u64) -> Self {
        Self {
            name,
            etcd: Etcd::new(number * 100, 0),
            incarnation: 1,
            up: true,
            stalled: false,
            contested: false,
            buried: Vec::new(),
        }
    }

    /// The etcd is another one from now on.
    pub fn replace(&mut self, with: Etcd) {
        self.buried.push(std::mem::replace(&mut self.etcd, with));
        self.incarnation += 1;
        self.stalled = false;
    }

    /// Back to a revision, with all leases until then.
    pub fn restore(&mut self, revision: i64, leases_until: Instant) {
        let mut old = self.etcd.clone();
        old.go_back(revision);
        old.renew_leases(leases_until);
        self.replace(old);
    }

    /// See [`Etcd::could_be_gone`].
    pub fn could_be_gone(&self, kind: Kind, suffix: &str, tick: u64) -> bool {
        let key = data_prefix(kind, &self.name, Layout::State) + suffix;
        let canary = canary_key(kind, &self.name, Layout::State);
        let later = self.buried.iter().filter(|etcd| etcd.tick() > tick);
        later.chain([&self.etcd]).any(|etcd| etcd.could_be_gone(&key, &canary, tick))
    }

    /// What happened to a key and its canary, in each of the etcds.
    pub fn history(&self, kind: Kind, suffix: &str) -> String {
        let key = data_prefix(kind, &self.name, Layout::State) + suffix;
        let canary = canary_key(kind, &self.name, Layout::State);
        let etcds = self.buried.iter().chain([&self.etcd]);
        etcds.map(|etcd| etcd.history([&key, &canary])).collect::<Vec<_>>().join("; then ")
    }

    /// What happened to one key.
    pub fn history_of(&self, key: &str) -> String {
        let etcds = self.buried.iter().chain([&self.etcd]);
        etcds.map(|etcd| etcd.history([key, key])).collect::<Vec<_>>().join("; then ")
    }
}
