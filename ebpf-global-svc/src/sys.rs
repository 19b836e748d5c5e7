//! System calls that aya does not offer: batches on maps, replacing the program of a pinned link.
//!
//! All `unsafe` code of this crate is here.
#![allow(unsafe_code)]

mod raw;

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Duration,
};

pub(crate) use self::raw::{Elements, Existing, RawMap};
use crate::abi::Plain;

/// `bpf(2)` commands, from `linux/bpf.h`.
mod command {
    pub(super) const MAP_LOOKUP_ELEM: i64 = 1;
    pub(super) const MAP_UPDATE_ELEM: i64 = 2;
    pub(super) const MAP_DELETE_ELEM: i64 = 3;
    pub(super) const MAP_GET_NEXT_KEY: i64 = 4;
    pub(super) const OBJ_GET: i64 = 7;
    pub(super) const OBJ_GET_INFO_BY_FD: i64 = 15;
    pub(super) const MAP_LOOKUP_BATCH: i64 = 24;
    pub(super) const MAP_UPDATE_BATCH: i64 = 26;
    pub(super) const MAP_DELETE_BATCH: i64 = 27;
    pub(super) const LINK_UPDATE: i64 = 29;
    pub(super) const LINK_DETACH: i64 = 34;
}

/// The kernel has its own error number for "not supported", without a name in libc.
pub(crate) const ENOTSUPP: i32 = 524;

/// A batch that stopped: `done` elements are through, element `done` met `error`.
pub(crate) struct Stopped {
    pub(crate) done: usize,
    pub(crate) error: io::Error,
}

/// Inserts or replaces `keys[n] -> values[n]` in order.
pub(crate) fn update_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), Stopped> {
    assert_eq!(keys.len(), values.len());
    let mut attributes = Batch::new(map, keys.len());
    attributes.keys = address(keys.as_ptr());
    attributes.values = address(values.as_ptr());
    // SAFETY: the kernel reads `count` keys and values, which both slices have; its element sizes
    // are those of K and V, as every map's are checked when it is opened.
    unsafe { run_batch(command::MAP_UPDATE_BATCH, &mut attributes) }
}

/// Deletes keys in order.
pub(crate) fn delete_batch<K: Plain>(map: BorrowedFd<'_>, keys: &[K]) -> Result<(), Stopped> {
    let mut attributes = Batch::new(map, keys.len());
    attributes.keys = address(keys.as_ptr());
    // SAFETY: the kernel reads `count` keys of the size of K.
    unsafe { run_batch(command::MAP_DELETE_BATCH, &mut attributes) }
}

/// Where a batched walk stands. Opaque to us; at most a key long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    _opaque: [u8; 48],
}

/// One step of a walk: up to `limit` elements behind `from`, each value `per_key` long (more than 1
/// for per-CPU maps). `None` instead of a cursor at the end.
pub(crate) fn lookup_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    from: Option<&Cursor>,
    limit: usize,
    per_key: usize,
) -> io::Result<(Vec<K>, Vec<V>, Option<Cursor>)> {
    const { assert!(size_of::<K>() <= size_of::<Cursor>()) };
    let mut keys = Vec::<K>::with_capacity(limit);
    let mut values = Vec::<V>::with_capacity(limit * per_key);
    let mut next = Cursor { _opaque: [0; 48] };
    let mut attributes = Batch::new(map, limit);
    attributes.in_batch = from.map_or(0, |cursor| address(cursor));
    attributes.out_batch = address(&raw mut next);
    attributes.keys = address(keys.as_mut_ptr());
    attributes.values = address(values.as_mut_ptr());
    // SAFETY: the kernel writes at most `count` keys and `count * per_key` values, for which there
    // is room, and a cursor, which is at most a key long.
    let result = unsafe { run_batch(command::MAP_LOOKUP_BATCH, &mut attributes) };
    let (done, end) = match result {
        Ok(()) => (attributes.count as usize, false),
        Err(stopped) if stopped.error.raw_os_error() == Some(libc::ENOENT) => (stopped.done, true),
        Err(stopped) => return Err(stopped.error),
    };
    // SAFETY: the kernel has written `done` elements; every bit pattern of a Plain type is valid.
    unsafe {
        keys.set_len(done.min(limit));
        values.set_len(done.min(limit) * per_key);
    }
    Ok((keys, values, (!end).then_some(next)))
}

/// Inserts or replaces one element.
pub(crate) fn update<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attributes = Element { map: fd(map), pad: 0, key: address(key), value: address(value), flags: 0 };
    // SAFETY: the kernel reads one key and one value of the sizes of K and V.
    unsafe { bpf(command::MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
}

/// Deletes one element.
pub(crate) fn delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attributes = Element { map: fd(map), pad: 0, key: address(key), value: 0, flags: 0 };
    // SAFETY: the kernel reads one key of the size of K.
    unsafe { bpf(command::MAP_DELETE_ELEM, &mut attributes) }.map(drop)
}

/// The value of one element; `per_key` values for a per-CPU map.
pub(crate) fn lookup<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: &K,
    per_key: usize,
) -> io::Result<Option<Vec<V>>> {
    let mut values = Vec::<V>::with_capacity(per_key);
    let mut attributes =
        Element { map: fd(map), pad: 0, key: address(key), value: address(values.as_mut_ptr()), flags: 0 };
    // SAFETY: the kernel reads one key and writes `per_key` values, for which there is room.
    match unsafe { bpf(command::MAP_LOOKUP_ELEM, &mut attributes) } {
        Ok(_) => {
            // SAFETY: the kernel has written all of them; every bit pattern is valid.
            unsafe { values.set_len(per_key) };
            Ok(Some(values))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The key behind `key` (the first one for `None`); `None` at the end.
pub(crate) fn next_key<K: Plain>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = Vec::<K>::with_capacity(1);
    let mut attributes = Element {
        map: fd(map),
        pad: 0,
        key: key.map_or(0, |key| address(key)),
        value: address(next.as_mut_ptr()),
        flags: 0,
    };
    // SAFETY: the kernel reads one key and writes one, for which there is room.
    match unsafe { bpf(command::MAP_GET_NEXT_KEY, &mut attributes) } {
        Ok(_) => {
            // SAFETY: the kernel has written it; every bit pattern is valid.
            unsafe { next.set_len(1) };
            Ok(next.pop())
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens what is pinned at `path`.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Object { path: address(path.as_ptr()), fd: 0, flags: 0 };
    // SAFETY: the kernel reads a string that ends in NUL and outlives the call.
    let fd = unsafe { bpf(command::OBJ_GET, &mut attributes) }?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Atomically replaces the program of a link.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkUpdate { link: fd(link), program: fd(program), flags: 0, old_program: 0 };
    // SAFETY: the kernel reads two descriptors.
    unsafe { bpf(command::LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Takes the program of a link off its hook, now. Closing or unpinning a link does so too, but some
/// time later.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = LinkDetach { link: fd(link) };
    // SAFETY: the kernel reads one descriptor.
    unsafe { bpf(command::LINK_DETACH, &mut attributes) }.map(drop)
}

/// What a link is attached to: `cgroup.cgroup_id` or `tcx.ifindex` of `bpf_link_info`, by the kind of
/// link that the caller knows it to be. Zero: no longer attached.
pub(crate) enum LinkTarget {
    /// Inode number of the cgroup.
    Cgroup(u64),
    /// Interface index.
    Interface(u32),
}

impl LinkTarget {
    /// Whether `link` is attached to exactly this.
    pub(crate) fn is_target_of(&self, link: BorrowedFd<'_>) -> io::Result<bool> {
        // type, id, prog_id, (padding), then a union of which we know the first two words.
        let mut info = [0_u32; 64];
        let mut attributes = Info {
            fd: fd(link),
            length: u32::try_from(size_of_val(&info)).unwrap_or(0),
            info: address(&raw mut info),
        };
        // SAFETY: the kernel writes at most `length` bytes, which `info` has.
        unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attributes) }?;
        Ok(match self {
            Self::Cgroup(id) => u64::from(info[4]) | u64::from(info[5]) << 32 == *id,
            Self::Interface(index) => info[4] == *index,
        })
    }
}

/// Name of an interface of the calling thread's network namespace.
pub(crate) fn interface_name(index: u32) -> io::Result<String> {
    let mut name = [0_u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the function demands.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

/// Whether `path` is in a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> io::Result<bool> {
    const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut info = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a string that ends in NUL, and room for the result.
    if unsafe { libc::statfs(path.as_ptr(), info.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the result is there.
    let kind = unsafe { info.assume_init() }.f_type;
    // The type of the field differs between architectures; the magic number has 32 bits.
    Ok(kind as u64 & 0xffff_ffff == u64::from(BPF_FS_MAGIC))
}

/// Mounts a BPF file system.
pub(crate) fn mount_bpffs(on: &Path) -> io::Result<()> {
    let on = CString::new(on.as_os_str().as_bytes())?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: strings that end in NUL; this file system needs no data.
    let result = unsafe {
        libc::mount(c"bpf".as_ptr(), on.as_ptr(), c"bpf".as_ptr(), flags, c"mode=0700".as_ptr().cast())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Locks a file or folder until it is closed. `WouldBlock` if somebody else has it and `wait` is false.
pub(crate) fn lock(file: &File, wait: bool) -> io::Result<()> {
    let operation = if wait { libc::LOCK_EX } else { libc::LOCK_EX | libc::LOCK_NB };
    // SAFETY: a valid descriptor.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives a lock back now, also if a child that is about to execute something still has the file.
pub(crate) fn unlock(file: &File) {
    // SAFETY: a valid descriptor. It fails only for an invalid one.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// Moves the calling thread into a network namespace.
#[cfg(test)]
pub(crate) fn enter_netns(path: &Path) -> io::Result<()> {
    let namespace = File::open(path)?;
    // SAFETY: a valid descriptor; only the calling thread moves.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

impl Batch {
    fn new(map: BorrowedFd<'_>, count: usize) -> Self {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        Self {
            in_batch: 0,
            out_batch: 0,
            keys: 0,
            values: 0,
            count,
            map: fd(map),
            element_flags: 0,
            flags: 0,
        }
    }
}

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Info {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct LinkUpdate {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetach {
    link: u32,
}

/// # Safety
/// The pointers in `attributes` must be good for what the kernel does with `count` elements.
unsafe fn run_batch(command: i64, attributes: &mut Batch) -> Result<(), Stopped> {
    let asked = attributes.count;
    // SAFETY: the caller's promise.
    match unsafe { bpf(command, attributes) } {
        Ok(_) => Ok(()),
        // A kernel that refuses the command as such has not touched the count.
        Err(error) if attributes.count == asked && asked != 0 && is_unsupported(&error) => {
            Err(Stopped { done: 0, error })
        }
        Err(error) => Err(Stopped { done: attributes.count as usize, error }),
    }
}

/// The kernel has no batch for this map type.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EOPNOTSUPP | libc::EINVAL))
}

/// Time of the clock that programs have (`bpf_ktime_get_ns`).
pub fn program_time() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place to write to. It cannot fail: the clock exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // It counts from the start of the machine: nothing is negative.
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// # Safety
/// `attributes` must be what the kernel expects for `command`, with pointers good for what it does.
unsafe fn bpf<A>(command: i64, attributes: &mut A) -> io::Result<RawFd> {
    // SAFETY: the caller's promise; the size is that of the attributes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<A>()) };
    // A descriptor or 0; both fit.
    RawFd::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

fn address<T>(pointer: *const T) -> u64 {
    pointer as u64
}

fn fd(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd().unsigned_abs()
}
