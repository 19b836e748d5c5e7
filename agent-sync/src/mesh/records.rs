//! One cluster's records, as last seen.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::LocalService;
use ebpf_global_svc::abi::IpValue;

use super::fact::{NodeFact, RemoteService};

/// All records of a cluster.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) nodes: Store<String, NodeFact>,
    pub(super) ips: Store<IpAddr, IpValue>,
    pub(super) identities: Store<u32, ()>,
    pub(super) services: Store<NamespacedName, RemoteService>,
    pub(super) local_services: Store<NamespacedName, LocalService>,
}

impl Records {
    pub(super) fn is_synced(&self, kind: Kind) -> bool {
        match kind {
            Kind::Nodes => self.nodes.synced,
            Kind::Ip => self.ips.synced,
            Kind::Identities => self.identities.synced,
            Kind::Services => self.services.synced,
            Kind::LocalServices => self.local_services.synced,
            Kind::ServiceExports => false,
        }
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::Nodes => self.nodes.len(),
            Kind::Ip => self.ips.len(),
            Kind::Identities => self.identities.len(),
            Kind::Services => self.services.len(),
            Kind::LocalServices => self.local_services.len(),
            Kind::ServiceExports => 0,
        }
    }
}

/// Records of one kind. Between the begin of a list and its end, records that were not seen again are
/// stale: they count as before, and go when the list is complete.
#[derive(Debug)]
pub(super) struct Store<K, V> {
    entries: HashMap<K, V>,
    stale: HashSet<K>,
    pub(super) synced: bool,
}

impl<K, V> Default for Store<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::new(), stale: HashSet::new(), synced: false }
    }
}

impl<K: Clone + Eq + Hash, V: PartialEq> Store<K, V> {
    /// Stores a value and tells whether it is another one than before.
    pub(super) fn upsert(&mut self, key: K, value: V) -> Change<V> {
        self.stale.remove(&key);
        match self.entries.get_mut(&key) {
            Some(held) if *held == value => Change::None,
            Some(held) => Change::Replaced(std::mem::replace(held, value)),
            None => {
                self.entries.insert(key, value);
                Change::New
            }
        }
    }

    pub(super) fn delete(&mut self, key: &K) -> Option<V> {
        self.stale.remove(key);
        self.entries.remove(key)
    }

    /// A value that nobody has confirmed yet.
    pub(super) fn restore(&mut self, key: K, value: V) {
        self.stale.insert(key.clone());
        self.entries.insert(key, value);
    }

    pub(super) fn begin_list(&mut self) {
        self.synced = false;
        self.stale = self.entries.keys().cloned().collect();
    }

    /// The list is complete: gives back what it did not confirm.
    pub(super) fn finish_list(&mut self) -> Vec<(K, V)> {
        self.synced = true;
        let stale = std::mem::take(&mut self.stale);
        stale.into_iter().filter_map(|key| self.entries.remove_entry(&key)).collect()
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// Effect of an upsert.
pub(super) enum Change<V> {
    None,
    New,
    Replaced(V),
}

impl<V> Change<V> {
    pub(super) fn is_change(&self) -> bool {
        !matches!(self, Self::None)
    }
}
