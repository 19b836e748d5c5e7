//! Batches, and what to do when one fails.

use ebpf_global_svc::DatapathError;
use ebpf_global_svc::table::Table;

/// Entries per call. When a call fails, its entries are written one by one to find the guilty.
const BATCH: usize = 256;

/// What went wrong in a round.
#[derive(Debug, Default)]
pub(super) struct Errors {
    pub(super) last: Option<String>,
}

impl Errors {
    pub(super) fn record(&mut self, error: &DatapathError) {
        self.last = Some(error.to_string());
    }
}

/// Upserts all entries that can be; tells for each whether it is installed.
pub(super) fn upsert_each<K: Copy, V: Copy>(
    table: &mut dyn Table<K, V>,
    entries: &[(K, V)],
    errors: &mut Errors,
) -> Vec<bool> {
    each(entries, |batch| table.upsert(batch), errors)
}

/// Removes all keys that can be; tells for each whether it is gone.
pub(super) fn remove_each<K: Copy, V>(
    table: &mut dyn Table<K, V>,
    keys: &[K],
    errors: &mut Errors,
) -> Vec<bool> {
    each(keys, |batch| table.remove(batch), errors)
}

fn each<T>(
    items: &[T],
    mut write: impl FnMut(&[T]) -> Result<(), DatapathError>,
    errors: &mut Errors,
) -> Vec<bool> {
    let mut written = Vec::with_capacity(items.len());
    for batch in items.chunks(BATCH) {
        if write(batch).is_ok() {
            written.resize(written.len() + batch.len(), true);
            continue;
        }
        for item in batch {
            let result = write(std::slice::from_ref(item));
            if let Err(error) = &result {
                errors.record(error);
            }
            written.push(result.is_ok());
        }
    }
    written
}
