//! One cluster's records, as last seen.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{LocalPolicy, LocalService, PolicyName};
use ebpf_global_svc::abi::IpValue;

use super::addresses::Addresses;
use super::fact::{NodeFact, RemoteService};
use super::lists::Lists;

/// All records of a cluster.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) nodes: Store<String, NodeFact>,
    pub(super) ips: Addresses,
    /// With their labels, as they are written.
    pub(super) identities: Store<u32, Box<str>>,
    pub(super) services: Store<NamespacedName, RemoteService>,
    pub(super) local_services: Store<NamespacedName, LocalService>,
    /// What the own cluster keeps to itself. An address moves between this and `ips` when its namespace
    /// becomes private or public; it may be in both meanwhile.
    pub(super) local_ips: Addresses,
    pub(super) local_identities: Store<u32, Box<str>>,
    pub(super) local_policies: Store<PolicyName, LocalPolicy>,
}

impl Records {
    /// An address, in whichever list it is.
    pub(super) fn address(&self, ip: &IpAddr) -> Option<IpValue> {
        self.ips.get(ip).or_else(|| self.local_ips.get(ip))
    }

    /// All addresses of both lists.
    pub(super) fn addresses(&self) -> impl Iterator<Item = (IpAddr, IpValue)> {
        let local = self.local_ips.iter().filter(|(ip, _)| self.ips.get(ip).is_none());
        self.ips.iter().chain(local)
    }

    /// The labels of an identity, in whichever list it is.
    pub(super) fn labels(&self, id: u32) -> Option<&str> {
        self.identities.get(&id).or_else(|| self.local_identities.get(&id)).map(|labels| &**labels)
    }

    /// All identities of both lists.
    pub(super) fn labelled(&self) -> impl Iterator<Item = (u32, &str)> {
        let local = self.local_identities.iter().filter(|(id, _)| self.identities.get(id).is_none());
        let all = self.identities.iter().chain(local);
        all.map(|(id, labels)| (*id, &**labels))
    }

    /// Whether an address that is in no list is none of the cluster's.
    pub(super) fn knows_addresses(&self) -> bool {
        self.ips.is_synced() && !self.local_ips.is_listing()
    }

    /// A list of addresses is complete: gives back those that it did not confirm. What the other list may
    /// yet tell of stays with that one.
    pub(super) fn finish_addresses(&mut self, kind: Kind) -> Vec<IpAddr> {
        let (list, other) = match kind {
            Kind::LocalIp => (&mut self.local_ips, &mut self.ips),
            _ => (&mut self.ips, &mut self.local_ips),
        };
        let stale = list.finish_list();
        if other.is_listing() {
            for (ip, value) in stale.iter().filter(|(ip, _)| other.get(ip).is_none()).collect::<Vec<_>>() {
                other.restore(*ip, *value);
            }
        }
        stale.into_iter().map(|(ip, _)| ip).collect()
    }

    pub(super) fn is_synced(&self, kind: Kind) -> bool {
        match kind {
            Kind::Nodes => self.nodes.is_synced(),
            Kind::Ip => self.ips.is_synced(),
            Kind::Identities => self.identities.is_synced(),
            Kind::Services => self.services.is_synced(),
            Kind::LocalServices => self.local_services.is_synced(),
            Kind::LocalIdentities => self.local_identities.is_synced(),
            Kind::LocalIp => self.local_ips.is_synced(),
            Kind::LocalPolicies => self.local_policies.is_synced(),
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
            Kind::LocalIdentities => self.local_identities.len(),
            Kind::LocalIp => self.local_ips.len(),
            Kind::LocalPolicies => self.local_policies.len(),
            Kind::ServiceExports => 0,
        }
    }

    /// Sum of the hashes of all records of a kind, modulo 2^64.
    pub(super) fn digest(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Nodes => self.nodes.digest(),
            Kind::Ip => self.ips.digest(),
            Kind::Identities => self.identities.digest(),
            Kind::Services => self.services.digest(),
            Kind::LocalServices => self.local_services.digest(),
            Kind::LocalIdentities => self.local_identities.digest(),
            Kind::LocalIp => self.local_ips.digest(),
            Kind::LocalPolicies => self.local_policies.digest(),
            Kind::ServiceExports => 0,
        }
    }
}

/// Records of one kind.
#[derive(Debug)]
pub(super) struct Store<K, V> {
    entries: HashMap<K, Held<V>>,
    lists: Lists,
    /// Sum of the hashes of all records, modulo 2^64.
    digest: u64,
}

/// A record, packed behind its key: there may be millions.
#[derive(Debug)]
struct Held<V> {
    value: V,
    /// Of the record as its cluster wrote it, native order; zero if it writes another one by now.
    hash: [u8; 8],
    /// The list that it was seen in last.
    list: u8,
}

/// A table this much larger than its content gives memory back.
const SLACK: usize = 8;
/// Tables up to this size keep what they have.
const SMALL: usize = 64;

impl<K, V> Default for Store<K, V> {
    fn default() -> Self {
        Self { entries: HashMap::new(), lists: Lists::default(), digest: 0 }
    }
}

impl<K: Clone + Eq + Hash, V: PartialEq> Store<K, V> {
    /// Stores a value and tells whether it is another one than before. `hash` is of the whole record, of
    /// which `value` may be only a part.
    pub(super) fn upsert(&mut self, key: K, value: V, hash: u64) -> Change<V> {
        let list = self.lists.number();
        self.digest = self.digest.wrapping_add(hash);
        let hash = hash.to_ne_bytes();
        match self.entries.entry(key) {
            Entry::Occupied(mut entry) => {
                let held = entry.get_mut();
                self.digest = self.digest.wrapping_sub(held.hash());
                held.hash = hash;
                held.list = list;
                if held.value == value {
                    Change::None
                } else {
                    Change::Replaced(std::mem::replace(&mut held.value, value))
                }
            }
            Entry::Vacant(entry) => {
                entry.insert(Held { value, hash, list });
                Change::New
            }
        }
    }

    pub(super) fn delete(&mut self, key: &K) -> Option<V> {
        let held = self.entries.remove(key)?;
        self.digest = self.digest.wrapping_sub(held.hash());
        self.shrink();
        Some(held.value)
    }

    /// A record that is held is no more what its cluster writes.
    pub(super) fn disown(&mut self, key: &K) {
        if let Some(held) = self.entries.get_mut(key) {
            self.digest = self.digest.wrapping_sub(held.hash());
            held.hash = [0; 8];
        }
    }

    pub(super) fn begin_list(&mut self) {
        let entries = &mut self.entries;
        self.lists.begin(|| entries.values_mut().for_each(|held| held.list = Lists::UNSEEN));
    }

    pub(super) fn is_synced(&self) -> bool {
        self.lists.is_synced()
    }

    /// The list is complete: gives back what it did not confirm.
    pub(super) fn finish_list(&mut self) -> Vec<(K, V)> {
        self.lists.finish();
        let (list, digest) = (self.lists.number(), &mut self.digest);
        let stale = self.entries.extract_if(|_, held| held.list != list);
        let stale = stale.map(|(key, held)| {
            *digest = digest.wrapping_sub(held.hash());
            (key, held.value)
        });
        let stale = stale.collect();
        self.shrink();
        stale
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|held| &held.value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, held)| (key, &held.value))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Sum of the hashes of all records, modulo 2^64: independent of their order.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    fn shrink(&mut self) {
        let (len, capacity) = (self.entries.len(), self.entries.capacity());
        if capacity > SMALL && len < capacity / SLACK {
            self.entries.shrink_to(2 * len);
        }
    }
}

impl<V> Held<V> {
    fn hash(&self) -> u64 {
        u64::from_ne_bytes(self.hash)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_removes_what_it_did_not_confirm() {
        let mut store = Store::default();
        store.upsert(1, 'r', 10);
        store.upsert(2, 'a', 20);
        store.begin_list();
        store.upsert(3, 'b', 300);
        assert_eq!((store.len(), store.digest()), (3, 330));
        assert!(!store.upsert(2, 'a', 20).is_change());
        assert_eq!(store.finish_list(), [(1, 'r')]);
        assert_eq!((store.len(), store.digest()), (2, 320));
        store.upsert(3, 'b', 301);
        store.delete(&2);
        assert_eq!(store.digest(), 301);
    }

    #[test]
    fn numbers_of_lists_may_run_out() {
        let mut store = Store::default();
        for lists in 0..1000 {
            store.upsert(lists, (), 0);
            store.begin_list();
        }
        store.upsert(7, (), 0);
        assert_eq!(store.finish_list().len(), 999);
        assert_eq!(store.len(), 1);
    }

    #[test]
    fn an_emptied_table_gives_its_memory_back() {
        let mut store = Store::default();
        for key in 0..10_000 {
            store.upsert(key, (), 0);
        }
        for key in 0..9_999 {
            store.delete(&key);
        }
        assert!(store.entries.capacity() <= 2 * SMALL, "{}", store.entries.capacity());
    }
}
