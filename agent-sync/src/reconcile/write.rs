//! Batches, and what to do when one fails.

use std::collections::BTreeMap;

use ebpf_global_svc::DatapathError;
use ebpf_global_svc::table::Table;

/// Entries per call. When a call fails, its entries are written one by one to find the guilty.
const BATCH: usize = 256;

/// What a round came to.
#[derive(Debug, Default)]
pub(super) struct Round {
    /// Why a write failed.
    pub(super) error: Option<String>,
    /// Entries written or removed, by table.
    pub(super) writes: BTreeMap<&'static str, u64>,
}

impl Round {
    pub(super) fn record(&mut self, error: &DatapathError) {
        self.error = Some(error.to_string());
    }
}

/// Upserts all entries that can be; tells for each whether it is installed.
pub(super) fn upsert_each<K: Copy, V: Copy>(
    table: &mut dyn Table<K, V>,
    entries: &[(K, V)],
    round: &mut Round,
) -> Vec<bool> {
    each(table.name(), entries, |batch| table.upsert(batch), round)
}

/// Removes all keys that can be; tells for each whether it is gone.
pub(super) fn remove_each<K: Copy, V>(
    table: &mut dyn Table<K, V>,
    keys: &[K],
    round: &mut Round,
) -> Vec<bool> {
    each(table.name(), keys, |batch| table.remove(batch), round)
}

fn each<T>(
    table: &'static str,
    items: &[T],
    mut write: impl FnMut(&[T]) -> Result<(), DatapathError>,
    round: &mut Round,
) -> Vec<bool> {
    if items.is_empty() {
        return Vec::new();
    }
    *round.writes.entry(table).or_default() += items.len() as u64;
    let mut written = Vec::with_capacity(items.len());
    for batch in items.chunks(BATCH) {
        if write(batch).is_ok() {
            written.resize(written.len() + batch.len(), true);
            continue;
        }
        for item in batch {
            let result = write(std::slice::from_ref(item));
            if let Err(error) = &result {
                round.record(error);
            }
            written.push(result.is_ok());
        }
    }
    written
}
