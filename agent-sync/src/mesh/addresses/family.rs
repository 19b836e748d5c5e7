use std::collections::HashMap;
use std::collections::hash_map::Entry as NodeEntry;
use std::hash::{BuildHasher as _, Hash, RandomState};

use ebpf_global_svc::abi::IpValue;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::super::lists::Lists;

/// Addresses of one family.
///
/// Entries lie side by side and are found by a table of their numbers, so that the slack of a hash table
/// costs five bytes an entry, and not all of it.
#[derive(Debug)]
pub(super) struct Family<K> {
    entries: Vec<Held<K>>,
    numbers: HashTable<u32>,
    /// The first entry behind each node.
    nodes: HashMap<[u8; 4], u32>,
    hasher: RandomState,
    lists: Lists,
    /// Sum of the hashes of all records, modulo 2^64.
    digest: u64,
}

/// A record without alignment: an IPv4 address has 31 bytes.
#[derive(Clone, Copy, Debug)]
struct Held<K> {
    ip: K,
    identity: [u8; 4],
    node_ip: [u8; 4],
    key: u8,
    flags: u8,
    /// Of the record as its cluster wrote it, native order; zero if it was restored.
    hash: [u8; 8],
    /// The list that it was seen in last.
    list: u8,
    /// Neighbours among those behind the same node.
    before: Link,
    after: Link,
}

/// The number of an entry, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link([u8; 4]);

/// Behind no node.
const NOWHERE: [u8; 4] = [0; 4];
/// A family this much larger than its content gives memory back.
const SLACK: usize = 8;
/// Families up to this size keep what they have.
const SMALL: usize = 64;
/// Room grows by this part of what there is.
const GROWTH: usize = 8;

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            numbers: HashTable::new(),
            nodes: HashMap::new(),
            hasher: RandomState::new(),
            lists: Lists::default(),
            digest: 0,
        }
    }
}

impl<K: Copy + Eq + Hash> Family<K> {
    /// Stores an address and tells whether it is new or another one than before.
    pub(super) fn upsert(&mut self, ip: K, value: IpValue, hash: u64) -> bool {
        self.digest = self.digest.wrapping_add(hash);
        let (number, before) = self.put(ip, value, hash, self.lists.number());
        self.digest = self.digest.wrapping_sub(before.map_or(0, |before| before.hash()));
        if before.is_some_and(|before| before.value() == value) {
            return false;
        }
        self.move_to(number, before.map(|before| before.node_ip));
        true
    }

    /// Tells whether there was such an address.
    pub(super) fn delete(&mut self, ip: &K) -> bool {
        let Some(number) = self.find(ip) else { return false };
        self.remove(number);
        self.shrink();
        true
    }

    /// An address that is held is no more what its cluster writes.
    pub(super) fn disown(&mut self, ip: &K) {
        if let Some(number) = self.find(ip) {
            let held = &mut self.entries[index(number)];
            self.digest = self.digest.wrapping_sub(held.hash());
            held.hash = [0; 8];
        }
    }

    /// An address that nobody has confirmed yet.
    pub(super) fn restore(&mut self, ip: K, value: IpValue) {
        let (number, before) = self.put(ip, value, 0, Lists::UNSEEN);
        self.digest = self.digest.wrapping_sub(before.map_or(0, |before| before.hash()));
        self.move_to(number, before.map(|before| before.node_ip));
    }

    pub(super) fn begin_list(&mut self) {
        let entries = &mut self.entries;
        self.lists.begin(|| entries.iter_mut().for_each(|held| held.list = Lists::UNSEEN));
    }

    /// The list is complete: gives back what it did not confirm.
    pub(super) fn finish_list(&mut self) -> Vec<(K, IpValue)> {
        self.lists.finish();
        let mut stale = Vec::new();
        // From behind: the last one moves into each gap, and it has been looked at by then.
        for number in (0..self.entries.len()).rev() {
            let held = self.entries[number];
            if held.list != self.lists.number() {
                stale.push((held.ip, held.value()));
                self.remove(narrow(number));
            }
        }
        self.shrink();
        stale
    }

    pub(super) fn is_listing(&self) -> bool {
        self.lists.is_open()
    }

    pub(super) fn is_synced(&self) -> bool {
        self.lists.is_synced()
    }

    pub(super) fn get(&self, ip: &K) -> Option<IpValue> {
        self.find(ip).map(|number| self.entries[index(number)].value())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, IpValue)> {
        self.entries.iter().map(|held| (held.ip, held.value()))
    }

    /// Nodes that records name.
    pub(super) fn nodes(&self) -> impl Iterator<Item = [u8; 4]> {
        self.nodes.keys().copied()
    }

    /// Addresses whose records name this node.
    pub(super) fn behind(&self, node_ip: [u8; 4]) -> impl Iterator<Item = (K, IpValue)> {
        let first = self.nodes.get(&node_ip).copied();
        std::iter::successors(first, |number| self.entries[index(*number)].after.number())
            .map(|number| &self.entries[index(number)])
            .map(|held| (held.ip, held.value()))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Sum of the hashes of all records, modulo 2^64: independent of their order.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// Writes an entry without chaining it anew. Gives its number, and what it was before.
    fn put(&mut self, ip: K, value: IpValue, hash: u64, list: u8) -> (u32, Option<Held<K>>) {
        let IpValue { identity, node_ip, key, flags, pad: _ } = value;
        let (identity, hash) = (identity.to_ne_bytes(), hash.to_ne_bytes());
        let (entries, hasher) = (&self.entries, &self.hasher);
        let entry = self.numbers.entry(
            hasher.hash_one(ip),
            |number| entries[index(*number)].ip == ip,
            |number| hasher.hash_one(entries[index(*number)].ip),
        );
        match entry {
            Entry::Occupied(entry) => {
                let number = *entry.get();
                let held = &mut self.entries[index(number)];
                let before = *held;
                *held = Held { identity, node_ip, key, flags, hash, list, ..before };
                (number, Some(before))
            }
            Entry::Vacant(entry) => {
                let number = narrow(self.entries.len());
                entry.insert(number);
                if self.entries.len() == self.entries.capacity() {
                    self.entries.reserve_exact((self.entries.len() / GROWTH).max(4));
                }
                let (before, after) = (Link::NONE, Link::NONE);
                self.entries.push(Held { ip, identity, node_ip, key, flags, hash, list, before, after });
                (number, None)
            }
        }
    }

    fn find(&self, ip: &K) -> Option<u32> {
        self.numbers.find(self.hasher.hash_one(ip), |number| self.entries[index(*number)].ip == *ip).copied()
    }

    /// Chains an entry behind its node, which was `before`.
    fn move_to(&mut self, number: u32, before: Option<[u8; 4]>) {
        let node_ip = self.entries[index(number)].node_ip;
        if before == Some(node_ip) {
            return;
        }
        if let Some(before) = before {
            self.unchain(number, before);
        }
        if node_ip == NOWHERE {
            return;
        }
        let after = match self.nodes.entry(node_ip) {
            NodeEntry::Occupied(mut first) => Some(first.insert(number)),
            NodeEntry::Vacant(first) => {
                first.insert(number);
                None
            }
        };
        if let Some(after) = after {
            self.entries[index(after)].before = Link::to(number);
        }
        let held = &mut self.entries[index(number)];
        (held.before, held.after) = (Link::NONE, after.map_or(Link::NONE, Link::to));
    }

    /// Takes an entry out of the chain of `node_ip`.
    fn unchain(&mut self, number: u32, node_ip: [u8; 4]) {
        if node_ip == NOWHERE {
            return;
        }
        let held = &mut self.entries[index(number)];
        let (before, after) = (held.before, held.after);
        (held.before, held.after) = (Link::NONE, Link::NONE);
        if let Some(after) = after.number() {
            self.entries[index(after)].before = before;
        }
        match (before.number(), after.number()) {
            (Some(before), _) => self.entries[index(before)].after = after,
            (None, Some(after)) => drop(self.nodes.insert(node_ip, after)),
            (None, None) => drop(self.nodes.remove(&node_ip)),
        }
    }

    fn remove(&mut self, number: u32) {
        let held = self.entries[index(number)];
        self.digest = self.digest.wrapping_sub(held.hash());
        self.unchain(number, held.node_ip);
        self.forget_number(held.ip, number);
        self.entries.swap_remove(index(number));
        // The last one has its number now.
        let Some(moved) = self.entries.get(index(number)).copied() else { return };
        let last = narrow(self.entries.len());
        if let Some(entry) = self.numbers.find_mut(self.hasher.hash_one(moved.ip), |other| *other == last) {
            *entry = number;
        }
        if let Some(after) = moved.after.number() {
            self.entries[index(after)].before = Link::to(number);
        }
        match moved.before.number() {
            Some(before) => self.entries[index(before)].after = Link::to(number),
            None if moved.node_ip != NOWHERE => drop(self.nodes.insert(moved.node_ip, number)),
            None => {}
        }
    }

    fn forget_number(&mut self, ip: K, number: u32) {
        if let Ok(entry) = self.numbers.find_entry(self.hasher.hash_one(ip), |other| *other == number) {
            entry.remove();
        }
    }

    fn shrink(&mut self) {
        let (len, capacity) = (self.entries.len(), self.entries.capacity());
        if capacity > SMALL && len < capacity / SLACK {
            self.entries.shrink_to(2 * len);
            self.nodes.shrink_to(2 * self.nodes.len());
            let (entries, hasher) = (&self.entries, &self.hasher);
            self.numbers.shrink_to(2 * len, |number| hasher.hash_one(entries[index(*number)].ip));
        }
    }
}

impl<K> Held<K> {
    fn hash(&self) -> u64 {
        u64::from_ne_bytes(self.hash)
    }

    fn value(&self) -> IpValue {
        let Self { identity, node_ip, key, flags, .. } = *self;
        IpValue { identity: u32::from_ne_bytes(identity), node_ip, key, flags, pad: 0 }
    }
}

impl Link {
    const NONE: Self = Self([0xff; 4]);

    fn to(number: u32) -> Self {
        Self(number.to_ne_bytes())
    }

    fn number(self) -> Option<u32> {
        (self != Self::NONE).then(|| u32::from_ne_bytes(self.0))
    }
}

fn index(number: u32) -> usize {
    number as usize
}

/// There is no memory for as many entries as a `u32` has no number for.
fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn value(node: u8, identity: u32) -> IpValue {
        IpValue { identity, node_ip: [0, 0, 0, node], key: 0, flags: 0, pad: 0 }
    }

    /// Nodes with what is behind each, by walking the chains and by looking at all.
    fn check(family: &Family<u16>, model: &BTreeMap<u16, (IpValue, u64, bool)>) {
        let all: BTreeMap<u16, IpValue> = family.iter().collect();
        assert_eq!(all, model.iter().map(|(ip, (value, ..))| (*ip, *value)).collect());
        assert!(model.iter().all(|(ip, (value, ..))| family.get(ip) == Some(*value)));
        assert_eq!(family.digest(), model.values().map(|(_, hash, _)| hash).sum::<u64>());
        for node in 0..5 {
            let behind: Vec<u16> = family.behind([0, 0, 0, node]).map(|(ip, _)| ip).collect();
            let of_node = |value: &IpValue| node != 0 && value.node_ip == [0, 0, 0, node];
            let wanted: BTreeSet<u16> = all.iter().filter(|(_, v)| of_node(v)).map(|(ip, _)| *ip).collect();
            assert_eq!((behind.len(), behind.into_iter().collect::<BTreeSet<_>>()), (wanted.len(), wanted));
        }
    }

    #[test]
    fn it_does_what_a_map_does_and_knows_what_is_behind_each_node() {
        let mut seed = 7_u32;
        let mut random = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        for _ in 0..50 {
            let mut family: Family<u16> = Family::default();
            // The value, its hash, and whether the list has confirmed it.
            let mut model: BTreeMap<u16, (IpValue, u64, bool)> = BTreeMap::new();
            for _ in 0..300 {
                let ip = u16::try_from(random(60)).unwrap();
                let new = value(u8::try_from(random(5)).unwrap(), random(2));
                match random(12) {
                    0..6 => {
                        let hash = u64::from(random(1000));
                        let before = model.insert(ip, (new, hash, true));
                        let is_change = before.is_none_or(|(before, ..)| before != new);
                        assert_eq!(family.upsert(ip, new, hash), is_change);
                    }
                    6..9 => assert_eq!(family.delete(&ip), model.remove(&ip).is_some()),
                    9 => {
                        family.restore(ip, new);
                        model.insert(ip, (new, 0, false));
                    }
                    10 => {
                        family.disown(&ip);
                        model.entry(ip).and_modify(|(_, hash, _)| *hash = 0);
                    }
                    _ if random(3) == 0 => {
                        family.begin_list();
                        model.values_mut().for_each(|(.., confirmed)| *confirmed = false);
                    }
                    _ if random(3) == 0 => {
                        let stale: BTreeSet<u16> = family.finish_list().iter().map(|(ip, _)| *ip).collect();
                        assert!(stale.iter().eq(model.iter().filter(|(_, (.., c))| !c).map(|(ip, _)| ip)));
                        model.retain(|_, (.., confirmed)| *confirmed);
                    }
                    _ => {}
                }
                check(&family, &model);
            }
        }
    }

    #[test]
    fn an_entry_is_as_small_as_it_can_be() {
        assert_eq!((size_of::<Held<[u8; 4]>>(), align_of::<Held<[u8; 4]>>()), (31, 1));
    }

    #[test]
    fn an_emptied_family_gives_its_memory_back() {
        let mut family: Family<[u8; 4]> = Family::default();
        for ip in 0..10_000_u32 {
            family.upsert(ip.to_be_bytes(), value(1, 1), 0);
        }
        for ip in 0..9_999_u32 {
            family.delete(&ip.to_be_bytes());
        }
        assert!(family.entries.capacity() <= 2 * SMALL, "{}", family.entries.capacity());
        assert!(family.numbers.capacity() <= 2 * SMALL, "{}", family.numbers.capacity());
    }
}
