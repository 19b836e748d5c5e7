//! Pinned maps of another size or layout: what is in them goes into new ones.
//!
//! The new map is made beside the old one, filled, and takes its name; then the programs on the hooks are replaced by
//! those that use it. The old programs go on with the old map until then, and it ends with the last of them. Whatever
//! fails before the names change leaves everything as it was; whatever dies afterwards, the next start completes.
//!
//! Flows may begin while programs are replaced one by one. So programs that know both maps of flows come in between, if
//! the layout is the same: no program ever meets a flow that another one has put where it does not look.
//!
//! Layouts grow at their end, and zero in a new field means what versions without it meant: so a value is carried over
//! by its bytes, cut off or filled up with zeros. A change that cannot keep this rule is another `SCHEMA_VERSION`.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
};

use aya::maps::MapType;

use super::{
    maps::{self, MapSpec, PER_CPU_ALIGNMENT, Shape, is_per_cpu, map_failed},
    pins::{self, Pins},
};
use crate::{
    DatapathError,
    sys::{Elements, Existing, RawMap},
};

/// Maps that programs write while this is going on.
const WRITTEN_BY_PROGRAMS: [&str; 8] = [
    "cm_affinity",
    "cm_sock_rev",
    "cm_ct",
    "cm_nat",
    "cm_fragment",
    "cm_overlay_rx",
    "cm_verdict",
    "cm_calls",
];

/// Elements per system call.
const BATCH: usize = 4096;

/// A map that has been replaced by one of another size or layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// Its name.
    pub map: &'static str,
    /// Entries that fit, before and now. Bytes for the ring of events.
    pub capacity: [u32; 2],
    /// Bytes of a value, before and now.
    pub value_size: [usize; 2],
    /// Entries that were carried over.
    pub entries: u64,
}

/// All maps that are to be replaced.
#[derive(Debug)]
pub(super) struct Migration {
    moves: Vec<Move>,
    committed: bool,
}

/// One of them.
#[derive(Debug)]
struct Move {
    spec: MapSpec,
    found: Shape,
    pin: PathBuf,
    next_pin: PathBuf,
    old: RawMap,
    entries: u64,
    /// Keys that have been carried over, of a map that programs write.
    known: HashSet<Box<[u8]>>,
}

impl Migration {
    /// Looks at all pinned maps, and changes nothing but what an earlier attempt has left.
    pub(super) fn plan(pins: &Pins, specs: &[MapSpec]) -> Result<Self, DatapathError> {
        let mut moves = Vec::new();
        for spec in specs {
            let (pin, next_pin) = (pins.map(spec.name), pins.next_map(spec.name));
            if !pin.exists() {
                continue;
            }
            let found = maps::shape(&pin, spec.name)?;
            if found == spec.shape() {
                continue;
            }
            if !can_carry(&found, spec) {
                let (is, wanted) = (found, spec.shape());
                let reason = format!("it is {is:?}, wanted {wanted:?}");
                return Err(DatapathError::PinMismatch { map: spec.name.to_owned(), path: pin, reason });
            }
            let old = maps::raw(&pin, spec.name, &found)?;
            moves.push(Move { spec: *spec, found, pin, next_pin, old, entries: 0, known: HashSet::new() });
        }
        specs.iter().try_for_each(|spec| pins::remove(&pins.next_map(spec.name)))?;
        Ok(Self { moves, committed: false })
    }

    /// Where the map of this name is, or is to be made.
    pub(super) fn pin(&self, pins: &Pins, name: &str) -> PathBuf {
        match self.moves.iter().find(|moved| moved.spec.name == name && !self.committed) {
            Some(moved) => moved.next_pin.clone(),
            None => pins.map(name),
        }
    }

    /// Where the old map of flows is until [`Self::commit`], if its layout is ours: programs can use it and the new one
    /// at once.
    pub(super) fn flows_before(&self) -> Option<&Path> {
        let moved = self.moves.iter().find(|moved| moved.spec.name == "cm_ct")?;
        let same = Shape { max_entries: moved.found.max_entries, ..moved.spec.shape() };
        (same == moved.found).then_some(&*moved.pin)
    }

    /// Fills the maps that the agent writes, which nobody does now.
    pub(super) fn copy_tables(&mut self) -> Result<(), DatapathError> {
        self.moves.iter_mut().filter(|moved| !moved.is_written_by_programs()).try_for_each(Move::copy)
    }

    /// Fills the maps that programs write, and gives all new ones their names. Programs should be replaced at once.
    pub(super) fn commit(&mut self) -> Result<(), DatapathError> {
        self.moves.iter_mut().filter(|moved| moved.is_written_by_programs()).try_for_each(Move::copy)?;
        for moved in &self.moves {
            pins::replace(&moved.next_pin, &moved.pin)?;
            // From the first one on, the way back is the way forward.
            self.committed = true;
        }
        Ok(())
    }

    /// Carries over what the old programs have begun since [`Self::commit`], once they are off their hooks.
    pub(super) fn finish(&mut self) -> Result<Vec<Migrated>, DatapathError> {
        self.moves
            .iter_mut()
            .filter(|moved| moved.is_written_by_programs())
            .try_for_each(Move::copy_what_is_new)?;
        Ok(self.moves.iter().map(Move::report).collect())
    }
}

impl Drop for Migration {
    fn drop(&mut self) {
        if !self.committed {
            for moved in &self.moves {
                // The next start removes what stays.
                let _ = pins::remove(&moved.next_pin);
            }
        }
    }
}

impl Move {
    fn is_written_by_programs(&self) -> bool {
        WRITTEN_BY_PROGRAMS.contains(&self.spec.name)
    }

    fn copy(&mut self) -> Result<(), DatapathError> {
        if self.found.kind == MapType::RingBuf {
            // Who reads it opens the new one.
            return Ok(());
        }
        let new = maps::raw(&self.next_pin, self.spec.name, &self.spec.shape())?;
        let remember = self.is_written_by_programs();
        let (mut entries, mut known) = (0, HashSet::new());
        self.each(|key, value| {
            if self.insert(&new, key, value, Existing::Replace)? {
                entries += 1;
            }
            if remember {
                known.insert(key.into());
            }
            Ok(())
        })?;
        (self.entries, self.known) = (entries, known);
        Ok(())
    }

    /// What is gone again in the new map must not come back.
    fn copy_what_is_new(&mut self) -> Result<(), DatapathError> {
        let new = maps::raw(&self.pin, self.spec.name, &self.spec.shape())?;
        let mut entries = 0;
        self.each(|key, value| {
            if !self.known.contains(key) && self.insert(&new, key, value, Existing::Keep)? {
                entries += 1;
            }
            Ok(())
        })?;
        self.entries += entries;
        Ok(())
    }

    /// False if the element need not, or must not, be there.
    fn insert(
        &self,
        new: &RawMap,
        key: &[u8],
        value: &[u8],
        existing: Existing,
    ) -> Result<bool, DatapathError> {
        let nothing = value.iter().all(|byte| *byte == 0);
        match new.insert(key, &self.converted(value, new.value_size()), existing) {
            Ok(inserted) => Ok(inserted && !(nothing && is_array(self.found.kind))),
            // Arrays have all their elements, also those that nobody uses.
            Err(_) if nothing && is_array(self.found.kind) => Ok(false),
            Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) => {
                Err(DatapathError::TooSmall {
                    map: self.spec.name.to_owned(),
                    capacity: self.spec.max_entries.into(),
                })
            }
            Err(error) => Err(map_failed(self.spec.name, "fill", error)),
        }
    }

    /// The value in the new layout, or the values of all CPUs.
    fn converted(&self, value: &[u8], size: usize) -> Vec<u8> {
        let (from, to) = (self.found.value_size, self.spec.value_size);
        if !is_per_cpu(self.found.kind) {
            return resized(value, to);
        }
        let stride = |size: usize| size.next_multiple_of(PER_CPU_ALIGNMENT);
        let mut values = Vec::with_capacity(size);
        for value in value.chunks(stride(from)) {
            values.extend(resized(&resized(&value[..from], to), stride(to)));
        }
        values
    }

    /// Calls `each` with every key and value of the old map.
    fn each(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), DatapathError>,
    ) -> Result<(), DatapathError> {
        let mut limit = BATCH;
        let mut cursor = None;
        loop {
            match self.old.batch(cursor.as_ref(), limit) {
                Ok(Elements { keys, values, next }) => {
                    let keys = keys.chunks_exact(self.found.key_size);
                    for (key, value) in keys.zip(values.chunks_exact(self.old.value_size())) {
                        each(key, value)?;
                    }
                    if next.is_none() {
                        return Ok(());
                    }
                    cursor = next;
                }
                // One bucket holds more than the limit.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => limit *= 2,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(map_failed(self.spec.name, "read", error)),
            }
        }
    }

    fn report(&self) -> Migrated {
        Migrated {
            map: self.spec.name,
            capacity: [self.found.max_entries, self.spec.max_entries],
            value_size: [self.found.value_size, self.spec.value_size],
            entries: self.entries,
        }
    }
}

/// Whether the entries of a map can go into one of ours.
fn can_carry(found: &Shape, spec: &MapSpec) -> bool {
    let same = |kind| match kind {
        MapType::LruHash => MapType::Hash,
        MapType::LruPerCpuHash => MapType::PerCpuHash,
        kind => kind,
    };
    same(found.kind) == same(spec.kind) && found.key_size == spec.key_size
}

fn is_array(kind: MapType) -> bool {
    matches!(kind, MapType::Array | MapType::PerCpuArray)
}

/// Cut off, or filled up with zeros.
fn resized(value: &[u8], size: usize) -> Vec<u8> {
    let mut value = value[..value.len().min(size)].to_vec();
    value.resize(size, 0);
    value
}
