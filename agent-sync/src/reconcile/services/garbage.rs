//! What programs can no longer reach, but may have been about to read.
//!
//! A program runs for microseconds; what was made unreachable at least [`GRACE`] ago is not being
//! followed by anyone. Two generations give each piece between one and two such periods. Slots go
//! first and orphaned backends a generation later, so a slot never outlives its backend.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use ebpf_global_svc::Tables;
use ebpf_global_svc::abi::{ServiceKey, SlotKey};

use super::super::write::{Round, remove_each};
use super::{Installed, NO_BACKEND, Services};

const GRACE: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
pub(super) struct Garbage {
    young: Generation,
    old: Generation,
    sweep_at: Option<Instant>,
}

#[derive(Debug, Default)]
struct Generation {
    /// Services with more slots than they count.
    surplus: HashSet<ServiceKey>,
    /// Slots of services that are gone, and the backends they name.
    slots: Vec<(SlotKey, u32)>,
    /// Backends without slots.
    orphans: HashSet<u32>,
}

impl Garbage {
    pub(super) fn add_surplus(&mut self, service: ServiceKey) {
        self.young.surplus.insert(service);
    }

    pub(super) fn add_slots(&mut self, slots: Vec<(SlotKey, u32)>) {
        self.young.slots.extend(slots);
    }

    pub(super) fn add_orphans(&mut self, backends: Vec<u32>) {
        self.young.orphans.extend(backends);
    }

    /// Slots of services that are gone.
    pub(super) fn slots(&self) -> impl Iterator<Item = SlotKey> {
        self.young.slots.iter().chain(&self.old.slots).map(|(key, _)| *key)
    }

    /// Whether this backend is to be deleted.
    pub(super) fn has_orphan(&self, id: u32) -> bool {
        self.young.orphans.contains(&id) || self.old.orphans.contains(&id)
    }

    pub(super) fn schedule(&mut self, now: Instant) {
        if self.sweep_at.is_none() && !(self.young.is_empty() && self.old.is_empty()) {
            self.sweep_at = Some(now + GRACE);
        }
    }

    pub(super) fn sweep_at(&self) -> Option<Instant> {
        self.sweep_at
    }
}

impl Generation {
    fn is_empty(&self) -> bool {
        self.surplus.is_empty() && self.slots.is_empty() && self.orphans.is_empty()
    }
}

impl Services {
    /// Deletes what has been unreachable for long enough.
    pub(in crate::reconcile) fn sweep(&mut self, now: Instant, tables: &mut Tables, round: &mut Round) {
        if self.garbage.sweep_at.is_none_or(|at| at > now) {
            return;
        }
        self.garbage.sweep_at = None;
        let Generation { mut surplus, slots, mut orphans } = std::mem::take(&mut self.garbage.old);
        // What changed again meanwhile waits as long as its youngest part.
        surplus.retain(|service| !self.garbage.young.surplus.contains(service));
        orphans.retain(|id| !self.garbage.young.orphans.contains(id));
        for service in surplus {
            self.sweep_surplus(service, tables, round);
        }
        self.sweep_slots(slots, tables, round);
        self.sweep_orphans(orphans, tables, round);
        self.garbage.old = std::mem::take(&mut self.garbage.young);
        self.garbage.add_orphans(self.backends.take_unreferenced());
        self.garbage.schedule(now);
    }

    fn sweep_surplus(&mut self, service: ServiceKey, tables: &mut Tables, round: &mut Round) {
        let Some(installed) = self.installed.get_mut(&service) else { return };
        let mut keys = Vec::new();
        for cluster in installed.slots.keys() {
            let slots = (0_u32..).zip(&installed.slots[cluster]).skip(installed.count(*cluster));
            keys.extend(slots.map(|(slot, _)| SlotKey {
                service: installed.id,
                slot,
                cluster: *cluster,
                pad: 0,
            }));
        }
        let removed = remove_each(&mut *tables.slot, &keys, round);
        if removed.contains(&false) {
            self.garbage.young.surplus.insert(service);
        }
        for (key, removed) in keys.iter().zip(removed) {
            if removed {
                installed.note_slot(key.cluster, key.slot, NO_BACKEND, &mut self.backends);
            } else {
                installed.doubt_slot(key.cluster, key.slot, NO_BACKEND);
            }
        }
        installed.forget_last_slots();
    }

    fn sweep_slots(&mut self, slots: Vec<(SlotKey, u32)>, tables: &mut Tables, round: &mut Round) {
        let keys: Vec<SlotKey> = slots.iter().map(|(key, _)| *key).collect();
        let removed = remove_each(&mut *tables.slot, &keys, round);
        for ((key, backend), removed) in slots.into_iter().zip(removed) {
            if removed {
                self.backends.release(backend);
            } else {
                self.garbage.young.slots.push((key, backend));
            }
        }
    }

    fn sweep_orphans(&mut self, mut orphans: HashSet<u32>, tables: &mut Tables, round: &mut Round) {
        orphans.retain(|id| self.backends.is_orphan(*id));
        let ids: Vec<u32> = orphans.into_iter().collect();
        let removed = remove_each(&mut *tables.backend, &ids, round);
        for (id, removed) in ids.into_iter().zip(removed) {
            if removed {
                self.backends.forget(id);
            } else {
                self.backends.disown(id);
                self.garbage.young.orphans.insert(id);
            }
        }
    }
}

impl Installed {
    /// Shortens the mirror by slots that are known to be missing.
    fn forget_last_slots(&mut self) {
        let doubtful = &self.doubtful_slots;
        self.slots.retain(|cluster, slots| {
            while let Some(last) = slots.len().checked_sub(1)
                && slots[last] == NO_BACKEND
                && !u32::try_from(last).is_ok_and(|slot| doubtful.contains_key(&(*cluster, slot)))
            {
                slots.pop();
            }
            !slots.is_empty()
        });
    }
}
