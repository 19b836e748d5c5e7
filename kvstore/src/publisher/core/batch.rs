use std::sync::Arc;
use std::time::Instant;

use super::Core;
use crate::publisher::keys::{Class, Place};
use crate::publisher::leases::LeaseState;
use crate::publisher::message::Op;

/// Bytes of keys and values in one transaction; etcd refuses requests above 1.5 MiB.
const TXN_BYTES: usize = 512 * 1024;

enum Difference {
    None,
    Write(Op),
    /// None if its lease is found alive.
    Asking,
    /// Differs, but waits for a lease to be granted.
    NoLease,
}

/// What the next transaction writes.
impl Core {
    /// The next transaction: keys that truly differ, up to the limits of one request.
    pub(super) fn batch(&mut self, now: Instant, wall: &str) -> Vec<Op> {
        let mut ops: Vec<Op> = Vec::new();
        let mut bytes = 0;
        let mut digests = false;
        while ops.len() < self.spec.batch.clamp(1, 128) {
            // Others are touched again when they are listed, or settled.
            let Some((class, key)) = self.keys.first_dirty(|class| self.may_write(class)) else { break };
            let trouble = self.keys.get(&key).and_then(|s| s.trouble);
            let held = trouble.and_then(|t| t.holds_until(now));
            match self.difference(class, &key, wall) {
                Difference::None => {
                    if let Some(state) = self.keys.get_mut(&key) {
                        state.settled = true;
                        if let Class::Owned(index) = class {
                            let (desired, revision) = (state.desired.as_deref(), state.revision);
                            self.digests.confirm(index, &key, &mut state.ours, desired, revision);
                        }
                    }
                    self.origins.remove(&key);
                    self.keys.place(&key, Place::Clean);
                    if let Class::Owned(index) = class {
                        self.check_canary(index);
                    }
                }
                Difference::Asking => self.keys.place(&key, Place::Asking),
                // All others would wait for it, too.
                Difference::NoLease => break,
                Difference::Write(_) if held.is_some() => {
                    if let Some(at) = held {
                        self.keys.place(&key, Place::Waiting(at));
                    }
                }
                Difference::Write(op) => {
                    let alone = trouble.is_some_and(|t| t.alone);
                    // Should etcd not take digests, data must not fail with them.
                    let mixed = matches!(class, Class::Digest(_)) && !digests;
                    if !ops.is_empty() && (alone || mixed || bytes + op.bytes() > TXN_BYTES) {
                        break;
                    }
                    if let Op::Put { lease, .. } = &op {
                        self.leases.reserve(*lease);
                    }
                    bytes += op.bytes();
                    digests = matches!(class, Class::Digest(_));
                    self.keys.place(&key, Place::InFlight);
                    ops.push(op);
                    if alone {
                        break;
                    }
                }
            }
        }
        ops
    }

    /// Before a prefix is listed nobody knows what differs; a canary waits for its prefix.
    fn may_write(&self, class: Class) -> bool {
        match class {
            Class::Owned(index) => self.streams.is_listed(index),
            Class::Canary(index) => self.is_settled(index) && self.streams.are_canaries_listed(),
            Class::Digest(index) => self.streams.is_digest_listed(index),
            Class::Heartbeat => true,
        }
    }

    fn difference(&mut self, class: Class, key: &Arc<str>, wall: &str) -> Difference {
        let Some(state) = self.keys.get(key) else { return Difference::None };
        let desired = match class {
            // Any value will do: it says "since then", and a standing one was written by the same rule.
            Class::Canary(_) => {
                let standing = state.actual.as_ref().map(|a| a.value.clone());
                Some(standing.unwrap_or_else(|| wall.as_bytes().into()))
            }
            Class::Owned(_) | Class::Heartbeat | Class::Digest(_) => state.desired.clone(),
        };
        let Some(value) = desired else {
            let complete = match class {
                Class::Owned(index) => self.complete[index],
                Class::Canary(_) | Class::Heartbeat | Class::Digest(_) => false,
            };
            return match &state.actual {
                actual if complete && (actual.is_some() || state.is_uncertain()) => {
                    Difference::Write(Op::Delete { key: key.clone() })
                }
                _ => Difference::None,
            };
        };
        let same = state.actual.as_ref().filter(|a| a.value == value && !state.is_uncertain());
        if let Some(actual) = same {
            match self.leases.state(actual.lease) {
                LeaseState::Ours => return Difference::None,
                LeaseState::Asked => return Difference::Asking,
                LeaseState::Unknown => {
                    self.leases.adopt(actual.lease);
                    return Difference::Asking;
                }
                LeaseState::Gone => {}
            }
        }
        match self.leases.pick(state.actual.as_ref().map(|a| a.lease), self.keys.dirty()) {
            Some(lease) => Difference::Write(Op::Put { key: key.clone(), value, lease }),
            None => Difference::NoLease,
        }
    }
}
