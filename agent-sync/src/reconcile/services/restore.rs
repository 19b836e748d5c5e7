//! Reading back what a predecessor installed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use ebpf_global_svc::abi::{
    BACKEND_EXCLUSIVE, BackendValue, Group, MAX_GROUPS, ServiceKey, ServiceValue, SlotKey,
};
use ebpf_global_svc::{DatapathError, Tables};

use super::backends::Backends;
use super::{ANYONE, Installed, NO_BACKEND, Services, Shown, maglev, next_id};
use crate::desired::{BackendKey, GroupPlan, ServicePlan};

/// Slots by service ID, cluster and number.
type SlotIndex = HashMap<u32, BTreeMap<u16, BTreeMap<u32, u32>>>;

impl Services {
    /// Rebuilds the mirror from the tables. Damage (a count without its slots, a slot without its
    /// backend, an ID held twice) is scheduled for repair; what nothing reaches, for deletion.
    pub(in crate::reconcile) fn restore(
        tables: &Tables,
        now: Instant,
    ) -> Result<(Self, Vec<(ServiceKey, ServicePlan)>), DatapathError> {
        let installed_slots = tables.slot.dump()?;
        let (backends, foreign) = restore_backends(tables, &installed_slots)?;
        let mut services = Self { backends, ..Self::default() };
        services.garbage.add_orphans(foreign);
        let mut slots = SlotIndex::new();
        for (key, backend) in installed_slots {
            let of_service = slots.entry(key.service).or_default();
            of_service.entry(key.cluster).or_default().insert(key.slot, backend);
            services.last_service_id = services.last_service_id.max(key.service);
        }
        let mut values = tables.service.dump()?;
        values.sort_by_key(|(key, _)| *key);
        for (_, value) in &values {
            services.last_service_id = services.last_service_id.max(value.id);
        }
        let mut plans = Vec::with_capacity(values.len());
        let mut ids = HashSet::new();
        for (key, value) in values {
            let plan = services.restore_service(key, &value, ids.insert(value.id), &mut slots);
            plans.push((key, plan));
        }
        services.retire_strays(slots);
        let orphans: Vec<u32> = services.backends.by_id.keys().copied().collect();
        services
            .garbage
            .add_orphans(orphans.into_iter().filter(|id| services.backends.is_orphan(*id)).collect());
        services.garbage.schedule(now);
        Ok((services, plans))
    }

    fn restore_service(
        &mut self,
        key: ServiceKey,
        value: &ServiceValue,
        id_is_unique: bool,
        slots: &mut SlotIndex,
    ) -> ServicePlan {
        let groups = &value.groups[..usize::from(value.n_groups).min(MAX_GROUPS)];
        let affinity_timeout = value.affinity_timeout;
        let shown = Shown { affinity_timeout, groups: groups.to_vec() };
        let mut installed = Installed { visible: Some(shown), ..Installed::new(value.id) };
        let mut damaged = !id_is_unique;
        if !id_is_unique {
            // Its slots are somebody else's: build it anew under an ID of its own.
            self.last_service_id = next_id(self.last_service_id);
            installed.id = self.last_service_id;
            installed.visible = None;
        }
        for (cluster, found) in slots.remove(&installed.id).unwrap_or_default() {
            installed.slots.insert(cluster, self.restore_slots(&found));
        }
        let mut plan = ServicePlan { affinity_timeout, ..ServicePlan::default() };
        let owner = if affinity_timeout == 0 { ANYONE } else { installed.id };
        for group in groups {
            let Group { cluster, weight, .. } = *group;
            let count = group.count() as usize;
            let found = installed.slots.get(&cluster).map_or(&[][..], Vec::as_slice);
            let visible = &found[..found.len().min(count)];
            let known = visible.iter().filter_map(|id| self.backends.by_id.get(id));
            // It was about to get session affinity, or to lose it.
            damaged |= known.clone().any(|backend| backend.owner != owner);
            let mut backends: Vec<BackendKey> = known.map(|backend| backend.key).collect();
            backends.sort_unstable();
            backends.dedup();
            if maglev::is_table(group.count(), backends.len()) && visible.len() == count {
                plan.table = group.count();
            } else {
                damaged |= backends.len() != count;
            }
            if !backends.is_empty() {
                plan.groups.push(GroupPlan { cluster, weight, tier: group.tier(), backends });
            }
        }
        if damaged {
            self.fresh.insert(key, Some(plan.clone()));
        }
        if installed.has_surplus() {
            self.garbage.add_surplus(key);
        }
        self.installed.insert(key, installed);
        plan
    }

    /// Consecutive slots as a list; a slot that is missing, or whose backend is, names none.
    fn restore_slots(&mut self, found: &BTreeMap<u32, u32>) -> Vec<u32> {
        // We never leave gaps, so anything far beyond the number of slots is not ours to index by.
        let limit = found.len().saturating_mul(2).saturating_add(16);
        let mut slots = Vec::with_capacity(found.len());
        for (slot, id) in found.iter().map(|(slot, id)| (*slot as usize, *id)).filter(|(s, _)| *s < limit) {
            slots.resize(slot, NO_BACKEND);
            let exists = self.backends.by_id.contains_key(&id);
            if exists {
                self.backends.acquire(id);
            }
            slots.push(if exists { id } else { NO_BACKEND });
        }
        slots
    }

    /// Slots of service IDs that no frontend has.
    fn retire_strays(&mut self, slots: SlotIndex) {
        for (service, clusters) in slots {
            for (cluster, slots) in clusters {
                let key = |slot| SlotKey { service, slot, cluster, pad: 0 };
                let keys: Vec<_> = slots.into_iter().map(|(slot, backend)| (key(slot), backend)).collect();
                keys.iter().for_each(|(_, backend)| self.backends.acquire(*backend));
                self.garbage.add_slots(keys);
            }
        }
    }
}

/// The backends by ID, and the IDs of entries that we would never write.
fn restore_backends(
    tables: &Tables,
    slots: &[(SlotKey, u32)],
) -> Result<(Backends, Vec<u32>), DatapathError> {
    let mut backends = Backends::default();
    let mut foreign = Vec::new();
    let mut rows = tables.backend.dump()?;
    rows.sort_unstable_by_key(|(id, _)| *id);
    let owners = owners(&rows, slots);
    for (id, value) in rows {
        backends.last_id = backends.last_id.max(id);
        let key = BackendKey::of(id, &value).filter(|_| id != NO_BACKEND);
        let owner = if is_exclusive(&value) { owners.get(&id).copied() } else { Some(ANYONE) };
        match key.zip(owner) {
            Some((key, owner)) => backends.restore(id, key, owner),
            // Also one that was to be a single service's and is not: whoever wants it gets a new one.
            None => foreign.push(id),
        }
    }
    // Clients may still be bound to backends that are gone: their IDs must not become others'.
    for (_, binding) in tables.affinity.dump()? {
        backends.last_id = backends.last_id.max(binding.backend);
    }
    Ok((backends, foreign))
}

/// The services that exclusive backends belong to: those that name them, unless several do.
fn owners(backends: &[(u32, BackendValue)], slots: &[(SlotKey, u32)]) -> HashMap<u32, u32> {
    let exclusive: HashSet<u32> =
        backends.iter().filter(|(_, value)| is_exclusive(value)).map(|(id, _)| *id).collect();
    let mut owners = HashMap::with_capacity(exclusive.len());
    let mut torn = HashSet::new();
    for (slot, id) in slots.iter().filter(|(_, id)| exclusive.contains(id)) {
        if *owners.entry(*id).or_insert(slot.service) != slot.service {
            torn.insert(*id);
        }
    }
    owners.retain(|id, _| !torn.contains(id));
    owners
}

fn is_exclusive(value: &BackendValue) -> bool {
    value.flags & BACKEND_EXCLUSIVE != 0
}
