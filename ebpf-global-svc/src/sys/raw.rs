//! Elements of maps as bytes: for maps whose layout is known only when they are met.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
};

use super::{Batch, Cursor, Element, address, bpf, command, fd, run_batch};

/// An opened map, and the sizes that the kernel says its elements have.
#[derive(Debug)]
pub(crate) struct RawMap {
    map: OwnedFd,
    key_size: usize,
    /// Of all that the kernel gives for a key: one value, or one per CPU.
    value_size: usize,
}

/// Keys and values, one behind the other.
pub(crate) struct Elements {
    pub(crate) keys: Vec<u8>,
    pub(crate) values: Vec<u8>,
    /// Where the next ones are; none at the end.
    pub(crate) next: Option<Cursor>,
}

/// What is to become of an element that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It gets the new value.
    Replace,
    /// It stays.
    Keep,
}

impl RawMap {
    /// `key_size` and `value_size` must be at least what the kernel reads and writes for this map: they are those
    /// that it names, the value's rounded up to 8 bytes and times the CPUs for a per-CPU map.
    pub(crate) fn new(map: OwnedFd, key_size: usize, value_size: usize) -> Self {
        Self { map, key_size, value_size }
    }

    /// One step of a walk, as [`super::lookup_batch`].
    pub(crate) fn batch(&self, from: Option<&Cursor>, limit: usize) -> io::Result<Elements> {
        if self.key_size > size_of::<Cursor>() {
            return Err(io::Error::other(format!("keys of {} bytes", self.key_size)));
        }
        let mut keys = vec![0_u8; limit * self.key_size];
        let mut values = vec![0_u8; limit * self.value_size];
        let mut next = Cursor { _opaque: [0; 48] };
        let mut attributes = Batch::new(self.descriptor(), limit);
        attributes.in_batch = from.map_or(0, |cursor| address(cursor));
        attributes.out_batch = address(&raw mut next);
        attributes.keys = address(keys.as_mut_ptr());
        attributes.values = address(values.as_mut_ptr());
        // SAFETY: the kernel writes at most `limit` keys and values of the sizes that it has named, for which there
        // is room, and a cursor, which is at most a key long.
        let (done, end) = match unsafe { run_batch(command::MAP_LOOKUP_BATCH, &mut attributes) } {
            Ok(()) => (attributes.count as usize, false),
            Err(stopped) if stopped.error.raw_os_error() == Some(libc::ENOENT) => (stopped.done, true),
            Err(stopped) => return Err(stopped.error),
        };
        keys.truncate(done * self.key_size);
        values.truncate(done * self.value_size);
        Ok(Elements { keys, values, next: (!end).then_some(next) })
    }

    /// Inserts an element. False: it was there already, and was to be kept.
    pub(crate) fn insert(&self, key: &[u8], value: &[u8], existing: Existing) -> io::Result<bool> {
        const NOEXIST: u64 = 1;
        assert_eq!((key.len(), value.len()), (self.key_size, self.value_size));
        let mut attributes = self.element(address(key.as_ptr()), value.as_ptr().cast_mut());
        attributes.flags = if existing == Existing::Keep { NOEXIST } else { 0 };
        // SAFETY: the kernel reads one key and one value (or one per CPU) of the sizes that it has named.
        match unsafe { bpf(command::MAP_UPDATE_ELEM, &mut attributes) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && existing == Existing::Keep => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn value_size(&self) -> usize {
        self.value_size
    }

    fn element(&self, key: u64, value: *mut u8) -> Element {
        Element { map: fd(self.descriptor()), pad: 0, key, value: address(value), flags: 0 }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}
