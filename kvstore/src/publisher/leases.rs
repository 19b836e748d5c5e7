//! The publisher's leases: which are ours, how full they are, when each is to be refreshed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Keys attached to one lease at most, as Cilium does: etcd's cost per attached write grows with the
/// keys of a lease (etcd issue 15993).
pub(super) const KEYS_PER_LEASE: usize = 1000;
/// With room for fewer keys than this, the next lease is asked for: writes need not wait for it then.
const AHEAD: usize = KEYS_PER_LEASE / 2;
/// After an unanswered keep-alive the next one follows after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What is known of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaseState {
    /// Granted to us or adopted, and refreshed.
    Ours,
    /// Found on a key; whether it lives is being asked.
    Asked,
    /// Never heard of.
    Unknown,
    /// Expired, revoked, or no lease at all (0).
    Gone,
}

/// All leases that keys hang on.
pub(super) struct Leases {
    ttl: Duration,
    known: BTreeMap<i64, Lease>,
    /// Had room when it was asked for last.
    filling: i64,
    grant: Grant,
}

struct Lease {
    state: LeaseState,
    /// Keys attached to it in etcd, as far as is known.
    keys: usize,
    /// Keys about to be attached by transactions under way.
    reserved: usize,
    due: Option<Instant>,
}

#[derive(PartialEq, Eq)]
enum Grant {
    Idle,
    Wanted,
    Asked,
}

impl Leases {
    pub(super) fn new(ttl: Duration) -> Self {
        Self { ttl, known: BTreeMap::new(), filling: 0, grant: Grant::Idle }
    }

    /// Those in use.
    pub(super) fn len(&self) -> usize {
        self.known.values().filter(|l| l.state == LeaseState::Ours).count()
    }

    pub(super) fn state(&self, lease: i64) -> LeaseState {
        match lease {
            0 => LeaseState::Gone,
            _ => self.known.get(&lease).map_or(LeaseState::Unknown, |l| l.state),
        }
    }

    /// A lease for one more key, of perhaps `more`: `current` if that is ours, else one with room; none: a
    /// grant is wanted.
    pub(super) fn pick(&mut self, current: Option<i64>, more: usize) -> Option<i64> {
        let ours = |l: &Lease| l.state == LeaseState::Ours;
        if let Some(lease) = current.filter(|id| self.known.get(id).is_some_and(ours)) {
            return Some(lease);
        }
        let room = |l: &Lease| if ours(l) { KEYS_PER_LEASE.saturating_sub(l.keys + l.reserved) } else { 0 };
        let filling = self.known.get(&self.filling).map_or(0, room);
        let (lease, left) = if filling > 0 {
            (Some(self.filling), filling)
        } else {
            let other = self.known.iter().map(|(id, l)| (*id, room(l))).find(|(_, room)| *room > 0);
            other.map_or((None, 0), |(id, room)| (Some(id), room))
        };
        self.filling = lease.unwrap_or(self.filling);
        if left < more.clamp(1, AHEAD) && self.grant == Grant::Idle {
            self.grant = Grant::Wanted;
        }
        lease
    }

    pub(super) fn reserve(&mut self, lease: i64) {
        if let Some(l) = self.known.get_mut(&lease) {
            l.reserved += 1;
        }
    }

    pub(super) fn unreserve(&mut self, lease: i64) {
        if let Some(l) = self.known.get_mut(&lease) {
            l.reserved = l.reserved.saturating_sub(1);
        }
    }

    /// A key hangs on the lease now.
    pub(super) fn attach(&mut self, lease: i64) {
        if lease != 0 {
            let entry = self.known.entry(lease).or_insert(Lease {
                state: LeaseState::Unknown,
                keys: 0,
                reserved: 0,
                due: None,
            });
            entry.keys += 1;
        }
    }

    /// A key hangs on it no more. A foreign lease without keys is none of our business.
    pub(super) fn detach(&mut self, lease: i64) {
        if let Some(l) = self.known.get_mut(&lease) {
            l.keys = l.keys.saturating_sub(1);
            if l.keys == 0 && matches!(l.state, LeaseState::Unknown | LeaseState::Gone) {
                self.known.remove(&lease);
            }
        }
    }

    /// A key that is as desired hangs on a lease nobody told us of: ask whether it lives.
    pub(super) fn adopt(&mut self, lease: i64) {
        if let Some(l) = self.known.get_mut(&lease)
            && l.state == LeaseState::Unknown
        {
            l.state = LeaseState::Asked;
            l.due = None;
        }
    }

    pub(super) fn wants_grant(&self) -> bool {
        self.grant == Grant::Wanted
    }

    pub(super) fn granting(&mut self) {
        self.grant = Grant::Asked;
    }

    pub(super) fn granted(&mut self, lease: i64, ttl: Duration, now: Instant) {
        self.grant = Grant::Idle;
        let due = Some(now + refresh_after(ttl));
        self.known.insert(lease, Lease { state: LeaseState::Ours, keys: 0, reserved: 0, due });
    }

    pub(super) fn grant_failed(&mut self) {
        self.grant = Grant::Wanted;
    }

    /// Leases to refresh now; each is asked once until answered.
    pub(super) fn due(&mut self, now: Instant) -> Vec<i64> {
        let ttl = self.ttl;
        let mut due = Vec::new();
        for (id, lease) in &mut self.known {
            let ask = match lease.state {
                LeaseState::Ours => lease.due.is_some_and(|at| at <= now),
                LeaseState::Asked => lease.due.is_none_or(|at| at <= now),
                LeaseState::Unknown | LeaseState::Gone => false,
            };
            if ask {
                // Should the answer get lost, the question is repeated.
                lease.due = Some(now + refresh_after(ttl));
                due.push(*id);
            }
        }
        due
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.known.values().filter_map(|l| l.due).min()
    }

    /// Refreshed; tells whether it became ours by that.
    pub(super) fn alive(&mut self, lease: i64, ttl: Duration, now: Instant) -> bool {
        let Some(l) = self.known.get_mut(&lease) else { return false };
        l.due = Some(now + refresh_after(ttl));
        std::mem::replace(&mut l.state, LeaseState::Ours) != LeaseState::Ours
    }

    /// Expired; tells whether anything hung on it.
    pub(super) fn gone(&mut self, lease: i64) -> bool {
        let Some(l) = self.known.get_mut(&lease) else { return false };
        l.state = LeaseState::Gone;
        l.due = None;
        if l.keys == 0 {
            self.known.remove(&lease);
            return false;
        }
        true
    }

    pub(super) fn unknown(&mut self, lease: i64, now: Instant) {
        if let Some(l) = self.known.get_mut(&lease) {
            l.due = Some(now + ASK_AGAIN.min(refresh_after(self.ttl)));
        }
    }

    pub(super) fn forget_all(&mut self) {
        self.known.clear();
        self.grant = Grant::Idle;
    }
}

/// A third of the time to live, as etcd's own clients do.
fn refresh_after(ttl: Duration) -> Duration {
    (ttl / 3).max(Duration::from_millis(500))
}
