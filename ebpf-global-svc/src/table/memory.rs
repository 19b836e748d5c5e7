//! A table without a kernel, with the same rules as the kernel's maps.

use std::collections::BTreeMap;

use super::{At, Cursor, Table};
use crate::DatapathError;

/// [`Table`] in memory, in key order.
#[derive(Clone, Debug)]
pub struct MemoryTable<K, V> {
    name: &'static str,
    capacity: u64,
    /// Arrays have no holes: an element with this value counts as absent.
    absent: Option<V>,
    entries: BTreeMap<K, V>,
}

impl<K: Ord, V> MemoryTable<K, V> {
    /// An empty table that behaves like a hash map of `capacity` entries.
    #[must_use]
    pub fn new(name: &'static str, capacity: u64) -> Self {
        Self { name, capacity, absent: None, entries: BTreeMap::new() }
    }

    /// An empty table that behaves like an array of `capacity` elements, all of them `absent`.
    #[must_use]
    pub fn array(name: &'static str, capacity: u64, absent: V) -> Self {
        Self { name, capacity, absent: Some(absent), entries: BTreeMap::new() }
    }
}

impl<K, V> Table<K, V> for MemoryTable<K, V>
where
    K: Ord + Copy + Send,
    V: PartialEq + Copy + Send,
{
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError> {
        for (key, value) in entries {
            if self.absent.as_ref() == Some(value) {
                self.entries.remove(key);
                continue;
            }
            if !self.entries.contains_key(key) && self.entries.len() as u64 >= self.capacity {
                return Err(DatapathError::MapFull { map: self.name.to_owned(), capacity: self.capacity });
            }
            self.entries.insert(*key, *value);
        }
        Ok(())
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError> {
        for key in keys {
            self.entries.remove(key);
        }
        Ok(())
    }

    fn dump(&self) -> Result<Vec<(K, V)>, DatapathError> {
        Ok(self.entries.iter().map(|(key, value)| (*key, *value)).collect())
    }

    fn count(&self) -> Result<u64, DatapathError> {
        Ok(self.entries.len() as u64)
    }

    fn page(&self, cursor: &mut Option<Cursor>, limit: usize) -> Result<Vec<(K, V)>, DatapathError> {
        let from = match cursor {
            Some(Cursor(At::Memory(from))) => *from,
            _ => 0,
        };
        let to = from.saturating_add(limit.max(1));
        *cursor = (to < self.entries.len()).then_some(Cursor(At::Memory(to)));
        Ok(self.entries.iter().skip(from).take(to - from).map(|(key, value)| (*key, *value)).collect())
    }

    fn get(&self, keys: &[K]) -> Result<Vec<Option<V>>, DatapathError> {
        Ok(keys.iter().map(|key| self.entries.get(key).copied()).collect())
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upsert_replaces_and_remove_ignores_what_is_missing() {
        let mut table = MemoryTable::new("t", 8);
        table.upsert(&[(1_u32, 10_u32), (2, 20)]).unwrap();
        table.upsert(&[(1, 11)]).unwrap();
        table.remove(&[2, 3]).unwrap();
        assert_eq!(table.dump().unwrap(), [(1, 11)]);
    }

    #[test]
    fn a_full_table_refuses_new_keys_but_replaces_values() {
        let mut table = MemoryTable::new("t", 2);
        table.upsert(&[(1_u32, 10_u32), (2, 20)]).unwrap();
        table.upsert(&[(2, 21)]).unwrap();
        let error = table.upsert(&[(3, 30)]).unwrap_err();
        assert!(matches!(error, DatapathError::MapFull { capacity: 2, .. }), "{error}");
        assert_eq!(table.dump().unwrap(), [(1, 10), (2, 21)]);
    }

    #[test]
    fn an_array_has_no_entry_at_its_default() {
        let mut table = MemoryTable::array("t", 2, 0_u32);
        table.upsert(&[(0_u32, 5_u32), (1, 0)]).unwrap();
        assert_eq!(table.dump().unwrap(), [(0, 5)]);
        table.upsert(&[(0, 0)]).unwrap();
        assert_eq!(table.dump().unwrap(), []);
    }
}
