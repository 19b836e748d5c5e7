//! A table over a map in the kernel.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, OwnedFd},
};

use super::{At, Cursor, EntryCounter, Table};
use crate::{
    DatapathError,
    abi::Plain,
    sys::{self, Stopped},
};

/// Elements per system call: large enough that its cost vanishes, small enough not to hold a CPU long.
const BATCH: usize = 4096;

/// [`Table`] over a map. Several tables may be open on one map, but only one should write.
#[derive(Debug)]
pub struct KernelTable<K, V> {
    map: OwnedFd,
    name: &'static str,
    capacity: u64,
    /// Arrays have no holes: an element with this value counts as absent.
    absent: Option<V>,
    entries: PhantomData<fn(K) -> V>,
}

impl<K: Plain, V: Plain> KernelTable<K, V> {
    /// A table over a hash map or trie whose key and value sizes the caller has checked.
    pub(crate) fn new(map: OwnedFd, name: &'static str, capacity: u32) -> Self {
        Self { map, name, capacity: capacity.into(), absent: None, entries: PhantomData }
    }

    /// A table over an array, whose elements count as absent while they are `absent`.
    pub(crate) fn array(map: OwnedFd, name: &'static str, capacity: u32, absent: V) -> Self {
        Self { absent: Some(absent), ..Self::new(map, name, capacity) }
    }

    fn failed(&self, operation: &'static str, error: io::Error) -> DatapathError {
        match error.raw_os_error() {
            // Hash maps say E2BIG, tries ENOSPC.
            Some(libc::E2BIG | libc::ENOSPC) => {
                DatapathError::MapFull { map: self.name.to_owned(), capacity: self.capacity }
            }
            Some(libc::EPERM | libc::EACCES) => {
                DatapathError::NotPermitted { action: format!("{operation} map {}", self.name) }
            }
            _ => DatapathError::Map { map: self.name.to_owned(), operation, source: error },
        }
    }

    fn update(&self, mut keys: &[K], mut values: &[V]) -> Result<(), DatapathError> {
        while !keys.is_empty() {
            match sys::update_batch(self.map.as_fd(), keys, values) {
                Ok(()) => return Ok(()),
                Err(Stopped { error, .. }) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(Stopped { done: 0, error }) if sys::is_unsupported(&error) => {
                    // No batches for this map, or a key that the kernel refuses: one by one tells.
                    for (key, value) in keys.iter().zip(values) {
                        sys::update(self.map.as_fd(), key, value)
                            .map_err(|error| self.failed("update", error))?;
                    }
                    return Ok(());
                }
                Err(Stopped { done, error }) if sys::is_unsupported(&error) => {
                    keys = &keys[done..];
                    values = &values[done..];
                }
                Err(Stopped { error, .. }) => return Err(self.failed("update", error)),
            }
        }
        Ok(())
    }

    fn delete(&self, mut keys: &[K]) -> Result<(), DatapathError> {
        while !keys.is_empty() {
            match sys::delete_batch(self.map.as_fd(), keys) {
                Ok(()) => return Ok(()),
                // The batch stops at a key that is not there: go on behind it.
                Err(Stopped { done, error }) if error.raw_os_error() == Some(libc::ENOENT) => {
                    keys = &keys[done + 1..]
                }
                Err(Stopped { error, .. }) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(Stopped { error, .. }) if sys::is_unsupported(&error) => {
                    for key in keys {
                        match sys::delete(self.map.as_fd(), key) {
                            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                                return Err(self.failed("delete from", error));
                            }
                            _ => {}
                        }
                    }
                    return Ok(());
                }
                Err(Stopped { error, .. }) => return Err(self.failed("delete from", error)),
            }
        }
        Ok(())
    }
}

impl<K, V> Table<K, V> for KernelTable<K, V>
where
    K: Plain + Send,
    V: Plain + PartialEq + Send,
{
    fn upsert(&mut self, entries: &[(K, V)]) -> Result<(), DatapathError> {
        for batch in entries.chunks(BATCH) {
            let (keys, values): (Vec<K>, Vec<V>) = batch.iter().copied().unzip();
            self.update(&keys, &values)?;
        }
        Ok(())
    }

    fn remove(&mut self, keys: &[K]) -> Result<(), DatapathError> {
        match self.absent {
            None => keys.chunks(BATCH).try_for_each(|batch| self.delete(batch)),
            Some(absent) => {
                keys.chunks(BATCH).try_for_each(|batch| self.update(batch, &vec![absent; batch.len()]))
            }
        }
    }

    fn dump(&self) -> Result<Vec<(K, V)>, DatapathError> {
        let mut entries = Vec::new();
        dump(&self.map, 1, |key, values: &[V]| {
            if let [value] = values
                && self.absent.as_ref() != Some(value)
            {
                entries.push((key, *value));
            }
        })
        .map_err(|error| self.failed("read", error))?;
        Ok(entries)
    }

    fn count(&self) -> Result<u64, DatapathError> {
        let mut count = 0;
        dump(&self.map, 1, |_: K, values: &[V]| {
            count += u64::from(self.absent.as_ref() != values.first());
        })
        .map_err(|error| self.failed("read", error))?;
        Ok(count)
    }

    fn counter(&self) -> Result<EntryCounter, DatapathError> {
        let map = self.map.try_clone().map_err(|error| self.failed("read", error))?;
        let table = Self { map, ..*self };
        Ok(Box::new(move || table.count()))
    }

    fn page(&self, cursor: &mut Option<Cursor>, limit: usize) -> Result<Vec<(K, V)>, DatapathError> {
        let mut limit = limit.clamp(1, BATCH);
        let from = match cursor {
            Some(Cursor(At::Kernel(from))) => Some(*from),
            _ => None,
        };
        loop {
            match sys::lookup_batch::<K, V>(self.map.as_fd(), from.as_ref(), limit, 1) {
                Ok((keys, values, next)) => {
                    *cursor = next.map(|next| Cursor(At::Kernel(next)));
                    let entries = keys.into_iter().zip(values);
                    return Ok(entries.filter(|(_, value)| self.absent.as_ref() != Some(value)).collect());
                }
                // One bucket holds more than the limit.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => limit *= 2,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No batches for this map: it is read as a whole.
                Err(error) if from.is_none() && sys::is_unsupported(&error) => return self.dump(),
                Err(error) => return Err(self.failed("read", error)),
            }
        }
    }

    fn get(&self, keys: &[K]) -> Result<Vec<Option<V>>, DatapathError> {
        let one = |key: &K| {
            let values = sys::lookup(self.map.as_fd(), key, 1).map_err(|error| self.failed("read", error))?;
            let value = values.and_then(|values: Vec<V>| values.first().copied());
            Ok(value.filter(|value| self.absent.as_ref() != Some(value)))
        };
        keys.iter().map(one).collect()
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn name(&self) -> &'static str {
        self.name
    }
}

/// Calls `each` with every key and its values (`per_key` of them: one, or one per CPU).
pub(crate) fn dump<K: Plain, V: Plain>(
    map: &OwnedFd,
    per_key: usize,
    mut each: impl FnMut(K, &[V]),
) -> io::Result<()> {
    let mut limit = BATCH;
    let mut cursor = None;
    loop {
        match sys::lookup_batch::<K, V>(map.as_fd(), cursor.as_ref(), limit, per_key) {
            Ok((keys, values, next)) => {
                for (key, values) in keys.into_iter().zip(values.chunks_exact(per_key)) {
                    each(key, values);
                }
                if next.is_none() {
                    return Ok(());
                }
                cursor = next;
            }
            // One bucket holds more than the limit.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => limit *= 2,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if cursor.is_none() && sys::is_unsupported(&error) => return walk(map, per_key, each),
            Err(error) => return Err(error),
        }
    }
}

/// The same for maps without batches, one element at a time.
fn walk<K: Plain, V: Plain>(map: &OwnedFd, per_key: usize, mut each: impl FnMut(K, &[V])) -> io::Result<()> {
    let mut key = None;
    while let Some(next) = sys::next_key(map.as_fd(), key.as_ref())? {
        if let Some(values) = sys::lookup(map.as_fd(), &next, per_key)? {
            each(next, &values);
        }
        key = Some(next);
    }
    Ok(())
}
