// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! `cm_metrics`, `cm_overlay_rx`, `cm_verdict` and `cm_calls`.

use ebpf_global_svc_abi::{CallKey, Counter, OverlayKey, VerdictKey};

use crate::maps::{CALLS, METRICS, OVERLAY_RX, VERDICT};

/// Adds one event of `bytes` bytes under a reason code.
#[inline(always)]
pub fn count(reason: u8, bytes: u32) {
    if let Some(counter) = METRICS.get_ptr_mut(reason.into()) {
        // SAFETY: the element belongs to this CPU, and programs do not migrate.
        unsafe { add(counter, bytes) };
    }
}

/// Adds one packet to what `key` has sent us.
#[inline(always)]
pub fn count_overlay(key: &OverlayKey, bytes: u32) {
    match OVERLAY_RX.get_ptr_mut(key) {
        // SAFETY: the element belongs to this CPU, and programs do not migrate.
        Some(counter) => unsafe { add(counter, bytes) },
        None => {
            // A failure loses a count, never a packet.
            let first = Counter { packets: 1, bytes: bytes.into() };
            let _ = OVERLAY_RX.insert(key, first, 0);
        }
    }
}

/// Adds one packet to what a rule has decided.
#[inline(always)]
pub fn count_verdict(key: &VerdictKey, bytes: u32) {
    match VERDICT.get_ptr_mut(key) {
        // SAFETY: the element belongs to this CPU, and programs do not migrate.
        Some(counter) => unsafe { add(counter, bytes) },
        None => {
            // A failure loses a count, never a packet.
            let first = Counter { packets: 1, bytes: bytes.into() };
            let _ = VERDICT.insert(key, first, 0);
        }
    }
}

/// Adds one call of a service. Global to the verifier, which would walk through it once for each way to a backend; and
/// apart, for its key to leave the stack again.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn count_call(service: u32, cluster: u32, outcome: u32) -> u32 {
    let key = CallKey { service, cluster: cluster as u16, outcome: outcome as u16 };
    match CALLS.get_ptr_mut(&key) {
        // SAFETY: the element belongs to this CPU, and programs do not migrate.
        Some(counter) => unsafe { add(counter, 0) },
        None => {
            // A failure loses a count, never a call.
            let first = Counter { packets: 1, bytes: 0 };
            let _ = CALLS.insert(&key, first, 0);
        }
    }
    0
}

/// # Safety
/// `counter` points to a map element that no other CPU writes.
#[inline(always)]
unsafe fn add(counter: *mut Counter, bytes: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(bytes);
    }
}
