// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//! Which backend answers: first a cluster (by weight and health), then a slot of that cluster.
//!
//! User space changes services while programs read them. It writes backends, then slots, then the
//! service, and deletes the other way round, so each step here can miss only in a race; the answer
//! to a miss is to look again.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_loop;
use ebpf_global_svc_abi::{
    BackendValue, EVENT_BOUND, EVENT_DRAINING, EVENT_STANDBY, ServiceKey, ServiceValue, SlotKey,
    backend_state, call, cluster_state, reason,
};

use crate::{
    affinity,
    counters::{count, count_call},
    maps::{BACKEND, CLUSTER, SERVICE, SLOT},
};

/// Looks at a service before giving up. A race is over in microseconds; more than two in a row means
/// that the service really has nothing to offer.
const ATTEMPTS: u32 = 4;

/// Never allocated as the ID of a backend.
const NO_BACKEND: u32 = 0;

/// What became of a frontend.
pub enum Selection {
    /// Nobody's frontend: leave the address alone.
    NotAService,
    /// A service without a usable backend in any cluster.
    NoBackend,
    /// A backend of service `service`. `how`: `EVENT_BOUND` and those like it.
    Backend { backend: BackendValue, service: u32, how: u8 },
}

/// Chooses a backend. The same `seed` gives the same backend as long as the service does not change, on every node that
/// has the same slots; and so does the same `client` if the service has session affinity.
#[inline(always)]
pub fn select(frontend: &ServiceKey, seed: u32, client: impl Fn() -> u64) -> Selection {
    // No options, and IDs rather than backends: the compiler leaves unwritten what an option would hold, and reads it
    // ahead of the test, which kernels before 6.3 refuse; and the stack is full.
    let (mut terminating, mut service_id) = (NO_BACKEND, 0);
    for attempt in 0..ATTEMPTS {
        // SAFETY: the element stays readable until the program ends; what it holds is checked below.
        let Some(service) = (unsafe { SERVICE.get(frontend) }) else {
            if attempt == 0 {
                return Selection::NotAService;
            }
            break;
        };
        service_id = service.id;
        let random = mix(seed.wrapping_add(attempt));
        let Some(group) = choose_group(service, random) else { break };

        let timeout = service.affinity_timeout;
        let bound = if timeout != 0 && attempt == 0 {
            affinity::bound(client(), service_id, timeout)
        } else {
            NO_BACKEND
        };
        if bound != NO_BACKEND {
            if let Some(backend) = backend(bound, frontend)
                && affinity::is_usable(&backend, group.rank >= rank::DRAINING)
            {
                count(reason::LB_SELECTED, 0);
                count(reason::LB_AFFINITY, 0);
                count_call(service_id, backend.cluster.into(), call::CHOSEN.into());
                return Selection::Backend { backend, service: service_id, how: EVENT_BOUND };
            }
            continue;
        }
        let slot = SlotKey {
            service: service_id,
            slot: below(mix(random ^ 0x9e37_79b9), group.count),
            cluster: group.cluster,
            pad: 0,
        };
        match backend_of(&slot, frontend) {
            Some(backend) if backend.state == backend_state::ACTIVE => {
                count(reason::LB_SELECTED, 0);
                let how = count_rank(group.rank);
                count_call(service_id, backend.cluster.into(), call::CHOSEN.into());
                if timeout != 0 && affinity::can_bind(&backend) {
                    affinity::bind(client(), service_id, backend.generation);
                }
                return Selection::Backend { backend, service: service_id, how };
            }
            // Serves until it is gone: better than refusing, if nothing else turns up.
            Some(backend) => terminating = backend.generation,
            None => count(reason::LB_NO_BACKEND_SLOT, 0),
        }
    }
    if terminating != NO_BACKEND
        && let Some(backend) = backend(terminating, frontend)
    {
        count(reason::LB_SELECTED, 0);
        count_call(service_id, backend.cluster.into(), call::CHOSEN.into());
        return Selection::Backend { backend, service: service_id, how: 0 };
    }
    count(reason::LB_NO_BACKEND, 0);
    count_call(service_id, 0, call::REFUSED.into());
    Selection::NoBackend
}

/// How good a group is, less is better; a group counts only while there is none of a better rank.
mod rank {
    /// Of all groups of a tier, those without weight come last.
    pub const STANDBY: u32 = 1;
    /// For each tier.
    pub const TIER: u32 = 2;
    /// After all tiers of healthy clusters.
    pub const DRAINING: u32 = 256 * TIER;
    pub const NONE: u32 = 2 * DRAINING;
}

/// The state of drawing a group.
#[repr(C)]
struct Draw<'a> {
    service: &'a ServiceValue,
    random: u32,
    /// Sum of the shares of `rank` so far.
    total: u32,
    /// Best rank so far.
    rank: u32,
    /// Slots of the group that leads.
    count: u32,
    /// The group that leads.
    cluster: u16,
}

/// Draws one of the best-ranked groups in one pass: each group replaces the choice so far with the
/// probability of its share in the sum so far.
#[inline(always)]
fn choose_group(service: &ServiceValue, random: u32) -> Option<Draw<'_>> {
    let mut draw = Draw { service, random, total: 0, rank: rank::NONE, count: 0, cluster: 0 };
    // A callback is verified once, the body of a loop once per round: 32 rounds in each of several
    // attempts would exceed the verifier's patience.
    // SAFETY: `consider` gets what it expects, and the draw outlives the call.
    unsafe { bpf_loop(service.n_groups.into(), consider as *mut c_void, (&raw mut draw).cast(), 0) };
    (draw.rank != rank::NONE).then_some(draw)
}

/// One group. Returns 1 to stop.
extern "C" fn consider(n: u32, draw: *mut c_void) -> i64 {
    // SAFETY: `choose_group` passes a draw that nobody else uses meanwhile.
    let draw = unsafe { &mut *draw.cast::<Draw<'_>>() };
    let Some(group) = draw.service.groups.get(n as usize) else { return 1 };
    let Some(cluster) = CLUSTER.get(group.cluster.into()) else { return 0 };
    let count = group.count();
    if count == 0 || cluster.state > cluster_state::DRAINING {
        return 0;
    }
    // Healthy and draining are 0 and 1.
    let best = cluster.state * rank::DRAINING + u32::from(group.tier()) * rank::TIER;
    let (rank, share) = match group.weight {
        0 => (best + rank::STANDBY, count),
        weight => (best, weight.into()),
    };
    if rank > draw.rank {
        return 0;
    }
    if rank < draw.rank {
        draw.rank = rank;
        draw.total = 0;
    }
    draw.total = draw.total.wrapping_add(share);
    draw.random = mix(draw.random);
    if below(draw.random, draw.total) < share {
        draw.cluster = group.cluster;
        draw.count = count;
    }
    0
}

/// The backend in a slot, copied. `None` if the slot or the backend is being replaced.
#[inline(always)]
fn backend_of(slot: &SlotKey, frontend: &ServiceKey) -> Option<BackendValue> {
    // SAFETY: read once; a recycled element yields another ID, whose backend is checked.
    backend(*unsafe { SLOT.get(slot) }?, frontend)
}

/// The backend of an ID, copied. `None` if it is gone or being replaced.
#[inline(always)]
pub fn backend(id: u32, frontend: &ServiceKey) -> Option<BackendValue> {
    // SAFETY: copied at once.
    let backend = *unsafe { BACKEND.get(id) }?;
    // A freed element may hold another backend already. And a frontend never turns into another
    // family or protocol: the socket could not follow.
    let intact =
        backend.generation == id && backend.family == frontend.family && backend.proto == frontend.proto;
    intact.then_some(backend)
}

/// Counts what is not as usual, and says it in flags of an event.
#[inline(always)]
fn count_rank(rank: u32) -> u8 {
    if rank >= rank::DRAINING {
        count(reason::LB_DRAINING, 0);
        EVENT_DRAINING
    } else if rank & rank::STANDBY != 0 {
        count(reason::LB_STANDBY, 0);
        EVENT_STANDBY
    } else {
        0
    }
}

/// A number below `n` (0 if `n` is 0). Multiplication, not remainder: cheaper, and unbiased enough.
#[inline(always)]
pub fn below(random: u32, n: u32) -> u32 {
    ((u64::from(random) * u64::from(n)) >> 32) as u32
}

/// A bijection whose every output bit depends on every input bit ("lowbias32" by Chris Wellons).
#[inline(always)]
pub fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}
