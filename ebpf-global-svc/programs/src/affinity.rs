// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Session affinity: a client stays at its backend.
//!
//! `cm_affinity` says which backend that was. Its ID alone proves that it still is one of this service: only slots
//! of one service name it, it is never given away again, and its entry in `cm_backend` goes with its last slot.
//!
//! Functions of their own, so that keys and values leave the stack again.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use ebpf_global_svc_abi::{
    AFFINITY_REFRESH_NS, AFFINITY_UNIT_SECONDS, AffinityKey, AffinityValue, BACKEND_EXCLUSIVE, BackendValue,
    backend_state, cluster_state,
};

use crate::maps::{AFFINITY, CLUSTER};

/// What one unit of a time-out is.
const UNIT_NS: u64 = AFFINITY_UNIT_SECONDS as u64 * 1_000_000_000;

/// The ID of the backend that `client` is bound to, whose time begins anew; 0 if there is none. Whether it may be
/// used is another question: see [`is_usable`].
#[inline(never)]
pub fn bound(client: u64, service: u32, timeout: u16) -> u32 {
    let Some(binding) = AFFINITY.get_ptr_mut(AffinityKey { client, service, pad: 0 }) else { return 0 };
    // SAFETY: the element stays readable until the program ends; what it holds is checked.
    let (used, word) =
        unsafe { ((&raw const (*binding).used).read_volatile(), backend_and_service(binding)) };
    // SAFETY: no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // Another CPU may have noted a call that came a little later.
    let idle = now.saturating_sub(used);
    if (word >> 32) as u32 != service || idle >= u64::from(timeout) * UNIT_NS {
        return 0;
    }
    if idle > AFFINITY_REFRESH_NS {
        // SAFETY: as above. If it is somebody else's by now, that binding lives a little longer.
        unsafe { (&raw mut (*binding).used).write_volatile(now) };
    }
    word as u32
}

/// From now on `client` talks to this backend. A failure costs a binding, never a call.
#[inline(never)]
pub fn bind(client: u64, service: u32, backend: u32) -> i64 {
    // SAFETY: no preconditions.
    let used = unsafe { bpf_ktime_get_ns() };
    let binding = AffinityValue { used, backend, service };
    AFFINITY.insert(AffinityKey { client, service, pad: 0 }, binding, 0).is_err().into()
}

/// Whether clients can be bound to it. While a service gets session affinity, there are backends that others name too.
#[inline(always)]
pub fn can_bind(backend: &BackendValue) -> bool {
    backend.flags & BACKEND_EXCLUSIVE != 0
}

/// Whether those who are bound to it stay. `draining`: so are the clusters of all others.
#[inline(always)]
pub fn is_usable(backend: &BackendValue, draining: bool) -> bool {
    let Some(cluster) = CLUSTER.get(backend.cluster.into()) else { return false };
    let stays =
        cluster.state == cluster_state::HEALTHY || draining && cluster.state == cluster_state::DRAINING;
    stays && backend.state == backend_state::ACTIVE && can_bind(backend)
}

/// Whether flows may begin in a cluster.
#[inline(always)]
pub fn is_in_reach(cluster: u16) -> bool {
    CLUSTER.get(cluster.into()).is_some_and(|cluster| cluster.state <= cluster_state::DRAINING)
}

/// Both in one read, lest they belong to different clients.
///
/// # Safety
/// `binding` can be read.
#[inline(always)]
unsafe fn backend_and_service(binding: *const AffinityValue) -> u64 {
    const { assert!(core::mem::offset_of!(AffinityValue, backend) == 8 && cfg!(target_endian = "little")) }
    // SAFETY: the caller's promise; the second word of two, aligned.
    unsafe { binding.cast::<u64>().add(1).read_volatile() }
}
