//! Tables whose entries stand alone: ipcache, prefixes, nodes, endpoints, states of clusters.
//!
//! No mirror of the installed state is kept: desired state starts as what was restored, so a key is
//! either as desired or in here.

use std::collections::HashMap;
use std::hash::Hash;

use ebpf_global_svc::table::Table;

use super::drift::Want;
use super::write::{Round, remove_each, upsert_each};

/// Changes of one table that are not installed yet.
#[derive(Debug)]
pub(super) struct Plain<K, V> {
    fresh: HashMap<K, Option<V>>,
    failed: HashMap<K, Option<V>>,
}

impl<K, V> Default for Plain<K, V> {
    fn default() -> Self {
        Self { fresh: HashMap::new(), failed: HashMap::new() }
    }
}

impl<K: Copy + Eq + Hash, V: Copy> Plain<K, V> {
    pub(super) fn accept(&mut self, changes: Vec<(K, Option<V>)>) {
        for (key, value) in changes {
            self.failed.remove(&key);
            self.fresh.insert(key, value);
        }
    }

    /// Puts what failed among what is written next.
    pub(super) fn retry(&mut self) {
        for (key, value) in self.failed.drain() {
            self.fresh.entry(key).or_insert(value);
        }
    }

    /// Puts entries that could not be written among what is written next, if `those` takes their value.
    pub(super) fn retry_those(&mut self, those: fn(&V) -> bool) {
        for (key, value) in self.failed.extract_if(|_, value| value.as_ref().is_some_and(those)) {
            self.fresh.entry(key).or_insert(value);
        }
    }

    /// Entries that could not be written.
    pub(super) fn failed(&self) -> impl Iterator<Item = (&K, &V)> {
        self.failed.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)))
    }

    /// An entry that was as desired has been removed for want of room.
    pub(super) fn displaced(&mut self, key: K, value: V) {
        if !self.fresh.contains_key(&key) {
            self.failed.entry(key).or_insert(Some(value));
        }
    }

    pub(super) fn upsert(&mut self, table: &mut dyn Table<K, V>, round: &mut Round) {
        self.upsert_those(table, round, |_, _| true);
    }

    /// Writes the entries that `those` takes; the others wait.
    pub(super) fn upsert_those(
        &mut self,
        table: &mut dyn Table<K, V>,
        round: &mut Round,
        those: impl Fn(&K, &V) -> bool,
    ) {
        let wanted = self.fresh.iter().filter_map(|(key, value)| Some((*key, (*value)?)));
        let entries: Vec<(K, V)> = wanted.filter(|(key, value)| those(key, value)).collect();
        let written = upsert_each(table, &entries, round);
        for ((key, value), written) in entries.into_iter().zip(written) {
            self.settle(key, Some(value), written);
        }
    }

    pub(super) fn remove(&mut self, table: &mut dyn Table<K, V>, round: &mut Round) {
        let keys: Vec<K> =
            self.fresh.iter().filter(|(_, value)| value.is_none()).map(|(key, _)| *key).collect();
        let written = remove_each(table, &keys, round);
        for (key, written) in keys.into_iter().zip(written) {
            self.settle(key, None, written);
        }
        if self.fresh.is_empty() {
            // An initial sync passes a whole table through here; do not keep its size for ever.
            self.fresh.shrink_to(64);
        }
    }

    /// What is to be installed under a key by now, if `value` is desired.
    pub(super) fn want(&self, key: &K, value: Option<V>) -> Want<V> {
        match self.fresh.contains_key(key) || self.failed.contains_key(key) {
            true => Want::Unsettled,
            false => value.map_or(Want::Nothing, Want::Value),
        }
    }

    pub(super) fn pending(&self) -> usize {
        self.fresh.len() + self.failed.len()
    }

    fn settle(&mut self, key: K, value: Option<V>, written: bool) {
        self.fresh.remove(&key);
        if !written {
            self.failed.insert(key, value);
        }
    }
}
