//! Pins as another version might have left them: maps of any layout, made by hand.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

/// `BPF_MAP_TYPE_HASH` of `linux/bpf.h`.
pub const HASH: u32 = 1;

const MAP_CREATE: i64 = 0;
const MAP_UPDATE_ELEM: i64 = 2;
const OBJ_PIN: i64 = 6;

/// Puts a hash map with these entries in place of what is pinned at `path`; all keys, and all values, are equally
/// long.
pub fn pin_hash_map(path: &Path, max_entries: u32, entries: &[(Vec<u8>, Vec<u8>)]) {
    let (key, value) = &entries[0];
    let mut create = [0_u32; 18];
    create[..4].copy_from_slice(&[HASH, length(key), length(value), max_entries]);
    // SAFETY: the kernel reads integers.
    let map = unsafe { bpf(MAP_CREATE, &mut create) };
    // SAFETY: the kernel has just given us this descriptor.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    for (key, value) in entries {
        let mut update =
            [u64::from(map.as_raw_fd().unsigned_abs()), key.as_ptr() as u64, value.as_ptr() as u64, 0];
        // SAFETY: key and value have the sizes that the map was made with.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut update) };
    }
    if path.exists() {
        std::fs::remove_file(path).unwrap();
    }
    let name = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut pin = [name.as_ptr() as u64, u64::from(map.as_raw_fd().unsigned_abs())];
    // SAFETY: a string that ends in NUL and outlives the call.
    unsafe { bpf(OBJ_PIN, &mut pin) };
}

/// The bytes of plain data, cut off or filled up with `fill`.
pub fn bytes<T: ebpf_global_svc::abi::Plain>(value: &T, length: usize, fill: u8) -> Vec<u8> {
    // SAFETY: plain data has no padding, so all its bytes are initialised.
    let all = unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) };
    let mut bytes = all[..length.min(all.len())].to_vec();
    bytes.resize(length, fill);
    bytes
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap()
}

/// # Safety
/// `attributes` must be what the kernel expects for `command`.
unsafe fn bpf<A>(command: i64, attributes: &mut A) -> i32 {
    // SAFETY: the caller's promise; the size is that of the attributes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<A>()) };
    assert!(result >= 0, "bpf command {command}: {}", io::Error::last_os_error());
    i32::try_from(result).unwrap()
}
