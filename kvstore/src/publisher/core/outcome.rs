use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{Core, RETRY_MAX, RETRY_MIN, Retry};
use crate::publisher::keys::{Actual, Class, Trouble};
use crate::publisher::message::Op;

/// What became of effects.
impl Core {
    /// A transaction was committed at `revision`.
    pub fn txn_done(&mut self, id: u64, revision: i64) {
        let Some(ops) = self.in_flight.remove(&id) else { return };
        self.retry = None;
        self.status.last_error.clear();
        for (op, origin) in ops {
            let written = match &op {
                Op::Put { value, lease, .. } => Some(Actual { value: value.clone(), lease: *lease }),
                Op::Delete { .. } => None,
            };
            match written {
                Some(_) => self.status.written += 1,
                None => self.status.deleted += 1,
            }
            let key = op.key().clone();
            if let Op::Put { lease, .. } = &op {
                self.leases.unreserve(*lease);
            }
            let listed_at = self.keys.get(&key).map_or(0, |state| self.streams.listed_at(state.class));
            if let Some(state) = self.keys.get_mut(&key) {
                if let Class::Owned(index) = state.class {
                    let value = written.as_ref().map(|written| &*written.value);
                    self.digests.confirm(index, &key, &mut state.ours, value, revision);
                    if let Some(origin) = origin {
                        self.digests.changed(index, revision, origin);
                    }
                }
                // A watch may have told of something newer before this answer came; a newer list that had
                // nothing to tell of the key, that it is gone again.
                if revision > state.revision.max(listed_at) {
                    Self::move_lease(&mut self.leases, state.actual.as_ref(), written.as_ref());
                    state.actual = written;
                    state.revision = revision;
                }
                state.trouble = state.trouble.filter(|t| !t.alone);
            }
            self.keys.set_uncertain(&key, false);
            self.keys.landed(&key);
        }
    }

    /// A transaction failed, or nobody knows whether it was committed; `lease_missing` if etcd said that a
    /// lease of it does not exist; `refused` if etcd will refuse the same request again (too large ...).
    pub fn txn_failed(&mut self, id: u64, error: &str, lease_missing: bool, refused: bool, now: Instant) {
        let Some(ops) = self.in_flight.remove(&id) else { return };
        self.status.last_error = error.to_string();
        let is_digest = |key: &str| matches!(self.class_of(key), Some(Class::Digest(_)));
        let only_digests = ops.iter().all(|(op, _)| is_digest(op.key()));
        if lease_missing {
            let used: BTreeSet<i64> = ops
                .iter()
                .filter_map(|(op, _)| match op {
                    Op::Put { lease, .. } => Some(*lease),
                    Op::Delete { .. } => None,
                })
                .collect();
            for lease in used {
                self.lease_gone(lease);
            }
        } else if !refused && !only_digests {
            self.hold_back(now);
        }
        let alone = ops.len() == 1;
        for (op, origin) in ops {
            let (key, written) = match op {
                Op::Put { key, value, lease } => {
                    self.leases.unreserve(lease);
                    (key, Some(value))
                }
                Op::Delete { key } => (key, None),
            };
            let still_wanted = self.keys.get(&key).is_some_and(|state| state.desired == written);
            if let Some(origin) = origin.filter(|_| still_wanted) {
                self.origins.entry(key.clone()).or_insert(origin);
            }
            if !refused && !lease_missing {
                self.keys.set_uncertain(&key, true);
            }
            let Some(state) = self.keys.get_mut(&key) else { continue };
            // A digest that cannot be written must not hold back the data.
            if refused || (only_digests && !lease_missing) {
                state.trouble = Some(Trouble::refused(state.trouble, alone, now));
            }
            self.keys.landed(&key);
        }
    }

    /// A lease was granted.
    pub fn granted(&mut self, lease: i64, ttl: Duration, now: Instant) {
        self.leases.granted(lease, ttl, now);
    }

    /// Granting failed; it is asked for again after a while.
    pub fn grant_failed(&mut self, error: &str, now: Instant) {
        self.status.last_error = error.to_string();
        self.leases.grant_failed();
        self.hold_back(now);
    }

    /// A lease was refreshed.
    pub fn lease_alive(&mut self, lease: i64, ttl: Duration, now: Instant) {
        if self.leases.alive(lease, ttl, now) {
            // Adopted: keys that hang on it are as they should be.
            self.touch_lease(lease);
        }
    }

    /// A lease does not exist any more; its keys are written again under another.
    pub fn lease_gone(&mut self, lease: i64) {
        if self.leases.gone(lease) {
            self.touch_lease(lease);
        }
    }

    /// Whether a lease lives is unknown; it is asked again soon.
    pub fn keep_alive_failed(&mut self, lease: i64, now: Instant) {
        self.leases.unknown(lease, now);
    }

    fn touch_lease(&mut self, lease: i64) {
        self.keys.touch_all(|key| key.actual.as_ref().is_some_and(|a| a.lease == lease));
    }

    fn hold_back(&mut self, now: Instant) {
        let delay = self.retry.as_ref().map_or(RETRY_MIN, |r| (r.delay * 2).min(RETRY_MAX));
        self.retry = Some(Retry { at: now + delay, delay });
    }
}
