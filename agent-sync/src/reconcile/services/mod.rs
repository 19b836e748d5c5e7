//! Services in the kernel: values that count slots, slots that name backends.
//!
//! A program reads value, slot and backend one after the other, so at every instant
//! * each visible count's slots exist, and
//! * each such slot's backend exists.
//!
//! Growth is therefore written bottom-up. Shrinking first overwrites holes with the last slots, then
//! lowers the count; the surplus slots and orphaned backends go to the [`garbage`] and are deleted a
//! grace period later, when no program can still be following the old count. A backend that leaves
//! costs two slot writes and one service write, whatever the size of the service.
//!
//! Services share the IDs of backends that they have in common, but for those with session affinity: a client
//! is bound to an ID, which has to prove that it is one of that service's. When a service gets session affinity, its
//! slots get new IDs one by one before its value says so.

mod backends;
mod garbage;
mod layout;
pub(in crate::reconcile) mod maglev;
mod restore;
mod wanted;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Instant;

use ebpf_global_svc::Tables;
use ebpf_global_svc::abi::{Group, MAX_GROUPS, ServiceKey, ServiceValue, SlotKey};

use super::write::{Round, remove_each, upsert_each};
use crate::desired::{BackendKey, ServicePlan};
use backends::Backends;
use garbage::Garbage;

/// Mirror of the installed services, and what has to become of them.
#[derive(Debug, Default)]
pub(super) struct Services {
    installed: HashMap<ServiceKey, Installed>,
    backends: Backends,
    last_service_id: u32,
    fresh: BTreeMap<ServiceKey, Option<ServicePlan>>,
    failed: BTreeMap<ServiceKey, Option<ServicePlan>>,
    garbage: Garbage,
    /// Removed since the start.
    gone: u64,
}

/// One service as it stands in the tables.
///
/// A call that failed may have done its work all the same. Both outcomes are then kept as possible:
/// nothing that either could reach is deleted, and the next attempt writes in any case.
#[derive(Debug)]
struct Installed {
    id: u32,
    /// None while there is no value.
    visible: Option<Shown>,
    /// What may be visible instead.
    doubtful: Vec<Shown>,
    /// Slots by cluster; [`NO_BACKEND`] where a slot is missing or unknown.
    slots: BTreeMap<u16, Vec<u32>>,
    /// Backends that unknown slots may name.
    doubtful_slots: HashMap<(u16, u32), Vec<u32>>,
    /// By cluster, what the first slots are known to hold: the start for the next change.
    settled: BTreeMap<u16, Settled>,
    /// Whose backends those are.
    settled_for: Owner,
}

/// What a value says of its service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shown {
    affinity_timeout: u16,
    groups: Vec<Group>,
}

/// The only service, by ID, whose slots name a backend; [`ANYONE`] if it is shared.
type Owner = u32;

/// Never allocated as the ID of a service.
const ANYONE: Owner = 0;

/// Backends that the first slots of a cluster hold, each once, and nothing else.
#[derive(Debug, Default)]
struct Settled {
    /// Ascending.
    backends: Vec<BackendKey>,
    /// In the same order.
    ids: Vec<u32>,
}

/// Never allocated as an ID.
const NO_BACKEND: u32 = 0;

/// A service on its way into the tables.
struct Draft {
    key: ServiceKey,
    plan: ServicePlan,
    owner: Owner,
    members: Vec<Members>,
    groups: Vec<Group>,
    blocked: bool,
}

/// The IDs of a group's backends, in the same order.
struct Members {
    ids: Vec<u32>,
    difference: Option<Difference>,
}

/// What differs from what is settled.
struct Difference {
    before: usize,
    /// Ascending.
    removed: Vec<u32>,
    added: Vec<u32>,
}

impl Services {
    pub(super) fn accept(&mut self, changes: Vec<(ServiceKey, Option<ServicePlan>)>) {
        for (key, plan) in changes {
            self.failed.remove(&key);
            self.fresh.insert(key, plan);
        }
    }

    pub(super) fn retry(&mut self) {
        for (key, plan) in std::mem::take(&mut self.failed) {
            self.fresh.entry(key).or_insert(plan);
        }
    }

    /// Brings all new plans into the tables. Plans of which a part failed stay pending.
    pub(super) fn write(&mut self, now: Instant, tables: &mut Tables, round: &mut Round) {
        if self.fresh.is_empty() {
            return;
        }
        let (mut drafts, removals) = self.take_fresh();
        self.write_backends(&mut drafts, tables, round);
        self.write_slots(&mut drafts, tables, round);
        self.write_values(drafts, tables, round);
        self.remove_values(removals, tables, round);
        self.garbage.add_orphans(self.backends.take_unreferenced());
        self.garbage.schedule(now);
    }

    pub(super) fn pending(&self) -> usize {
        self.fresh.len() + self.failed.len()
    }

    /// How many were removed since the start.
    pub(super) fn gone(&self) -> u64 {
        self.gone
    }

    /// Frontends of services with these IDs.
    pub(super) fn frontends_of(&self, ids: &BTreeSet<u32>) -> BTreeMap<u32, ServiceKey> {
        let known = self.installed.iter().filter(|(_, installed)| ids.contains(&installed.id));
        known.map(|(key, installed)| (installed.id, *key)).collect()
    }

    /// When [`sweep`](Self::sweep) has something to do.
    pub(super) fn sweep_at(&self) -> Option<Instant> {
        self.garbage.sweep_at()
    }

    fn take_fresh(&mut self) -> (Vec<Draft>, Vec<ServiceKey>) {
        let (mut drafts, mut removals) = (Vec::new(), Vec::new());
        for (key, plan) in std::mem::take(&mut self.fresh) {
            match plan {
                Some(plan) => {
                    let last_id = &mut self.last_service_id;
                    let installed = self.installed.entry(key).or_insert_with(|| {
                        *last_id = next_id(*last_id);
                        Installed::new(*last_id)
                    });
                    let owner = if plan.affinity_timeout == 0 { ANYONE } else { installed.id };
                    let (members, groups) = (Vec::new(), Vec::new());
                    drafts.push(Draft { key, plan, owner, members, groups, blocked: false });
                }
                None if self.installed.contains_key(&key) => removals.push(key),
                None => {}
            }
        }
        (drafts, removals)
    }

    fn write_backends(&mut self, drafts: &mut [Draft], tables: &mut Tables, round: &mut Round) {
        let mut entries = Vec::new();
        for draft in drafts.iter_mut() {
            let owner = draft.owner;
            let installed = self.installed.get(&draft.key).filter(|known| known.settled_for == owner);
            for group in &mut draft.plan.groups {
                if draft.plan.table != 0 {
                    group.backends = maglev::members(&group.backends);
                }
                let settled = installed.and_then(|installed| installed.settled.get(&group.cluster));
                let backends = &mut self.backends;
                let mut allocate = |key: BackendKey| {
                    let (id, is_new) = backends.allocate(key, owner);
                    if is_new {
                        entries.push((id, key.value(id, owner != ANYONE)));
                    }
                    id
                };
                draft.members.push(match settled {
                    Some(settled) => settled.change_to(&group.backends, allocate),
                    None => {
                        let ids = group.backends.iter().map(|key| allocate(*key)).collect();
                        Members { ids, difference: None }
                    }
                });
            }
        }
        let written = upsert_each(&mut *tables.backend, &entries, round);
        let failed: HashSet<u32> =
            entries.iter().zip(written).filter(|(_, written)| !written).map(|((id, _), _)| *id).collect();
        if !failed.is_empty() {
            failed.iter().for_each(|id| self.backends.disown(*id));
            for draft in drafts {
                draft.blocked =
                    draft.members.iter().flat_map(|members| &members.ids).any(|id| failed.contains(id));
            }
        }
    }

    fn write_slots(&mut self, drafts: &mut [Draft], tables: &mut Tables, round: &mut Round) {
        let mut writes: Vec<(usize, SlotKey, u32)> = Vec::new();
        for (number, draft) in drafts.iter_mut().enumerate().filter(|(_, draft)| !draft.blocked) {
            let Some(installed) = self.installed.get(&draft.key) else { continue };
            for (group, members) in draft.plan.groups.iter().zip(&draft.members) {
                let current = installed.slots.get(&group.cluster).map_or(&[][..], Vec::as_slice);
                if draft.plan.table != 0 {
                    let table = maglev::table(&group.backends, draft.plan.table);
                    for (slot, index) in (0_u32..).zip(table) {
                        let backend = members.ids[index];
                        if current.get(slot as usize) != Some(&backend) {
                            let key = SlotKey { service: installed.id, slot, cluster: group.cluster, pad: 0 };
                            writes.push((number, key, backend));
                        }
                    }
                    draft.groups.push(Group::new(group.cluster, group.weight, group.tier, draft.plan.table));
                    continue;
                }
                let known = members.difference.as_ref().filter(|known| known.before <= current.len());
                let moves = match known {
                    Some(Difference { before, removed, added }) => {
                        layout::change(&current[..*before], members.ids.len(), removed, added)
                    }
                    None => layout::assign(current, &members.ids),
                };
                for (slot, backend) in moves {
                    let key = SlotKey { service: installed.id, slot, cluster: group.cluster, pad: 0 };
                    writes.push((number, key, backend));
                }
                // There are no more than a group can have: the table of slots has no room for so many.
                let count = u32::try_from(members.ids.len()).unwrap_or(u32::MAX);
                draft.groups.push(Group::new(group.cluster, group.weight, group.tier, count));
            }
        }
        let entries: Vec<(SlotKey, u32)> = writes.iter().map(|(_, key, backend)| (*key, *backend)).collect();
        let written = upsert_each(&mut *tables.slot, &entries, round);
        for ((index, key, backend), written) in writes.into_iter().zip(written) {
            let Some(installed) = self.installed.get_mut(&drafts[index].key) else { continue };
            self.backends.acquire(backend);
            if written {
                installed.note_slot(key.cluster, key.slot, backend, &mut self.backends);
            } else {
                drafts[index].blocked = true;
                installed.doubt_slot(key.cluster, key.slot, backend);
            }
        }
        for draft in drafts {
            if let Some(installed) = self.installed.get_mut(&draft.key) {
                installed.settle(draft);
            }
        }
    }

    fn write_values(&mut self, drafts: Vec<Draft>, tables: &mut Tables, round: &mut Round) {
        let mut entries = Vec::new();
        let mut owners = Vec::new();
        for mut draft in drafts {
            if draft.blocked {
                self.failed.insert(draft.key, Some(draft.plan));
                continue;
            }
            let Some(installed) = self.installed.get(&draft.key) else { continue };
            let shown = draft.show();
            if installed.visible.as_ref() == Some(&shown) && installed.doubtful.is_empty() {
                if installed.has_surplus() {
                    self.garbage.add_surplus(draft.key);
                }
                continue;
            }
            entries.push((draft.key, service_value(installed.id, &shown)));
            owners.push((draft, shown));
        }
        let written = upsert_each(&mut *tables.service, &entries, round);
        for ((draft, shown), written) in owners.into_iter().zip(written) {
            let Some(installed) = self.installed.get_mut(&draft.key) else { continue };
            if !written {
                installed.doubt_value(shown);
                self.failed.insert(draft.key, Some(draft.plan));
            } else {
                installed.visible = Some(shown);
                installed.doubtful.clear();
                if installed.has_surplus() {
                    self.garbage.add_surplus(draft.key);
                }
            }
        }
    }

    fn remove_values(&mut self, keys: Vec<ServiceKey>, tables: &mut Tables, round: &mut Round) {
        let removed = remove_each(&mut *tables.service, &keys, round);
        for (key, removed) in keys.into_iter().zip(removed) {
            if removed {
                if let Some(installed) = self.installed.remove(&key) {
                    self.gone += 1;
                    self.garbage.add_slots(installed.slot_keys());
                }
                continue;
            }
            self.failed.insert(key, None);
            if let Some(installed) = self.installed.get_mut(&key)
                && let Some(shown) = installed.visible.take()
            {
                installed.doubt_value(shown);
            }
        }
    }
}

impl Draft {
    /// What its value is to say.
    fn show(&mut self) -> Shown {
        let groups = std::mem::take(&mut self.groups);
        Shown { affinity_timeout: self.plan.affinity_timeout, groups }
    }
}

impl Installed {
    fn new(id: u32) -> Self {
        Self {
            id,
            visible: None,
            doubtful: Vec::new(),
            slots: BTreeMap::new(),
            doubtful_slots: HashMap::new(),
            settled: BTreeMap::new(),
            settled_for: ANYONE,
        }
    }

    /// The slots of a draft have been written, or not all of them.
    fn settle(&mut self, draft: &mut Draft) {
        self.settled.clear();
        self.settled_for = draft.owner;
        // A table has each backend many times.
        if !draft.blocked && draft.plan.table == 0 {
            let groups = draft.plan.groups.iter().zip(std::mem::take(&mut draft.members));
            self.settled = groups
                .map(|(group, members)| {
                    (group.cluster, Settled { backends: group.backends.clone(), ids: members.ids })
                })
                .collect();
        }
    }

    /// A slot was written; the caller has acquired `backend`.
    fn note_slot(&mut self, cluster: u16, slot: u32, backend: u32, backends: &mut Backends) {
        let before = std::mem::replace(self.slot_mut(cluster, slot), backend);
        backends.release(before);
        for doubtful in self.doubtful_slots.remove(&(cluster, slot)).unwrap_or_default() {
            backends.release(doubtful);
        }
    }

    /// A slot may hold `backend`, which the caller has acquired, or what it held before.
    fn doubt_slot(&mut self, cluster: u16, slot: u32, backend: u32) {
        let before = std::mem::replace(self.slot_mut(cluster, slot), NO_BACKEND);
        self.doubtful_slots.entry((cluster, slot)).or_default().extend([before, backend]);
    }

    fn slot_mut(&mut self, cluster: u16, slot: u32) -> &mut u32 {
        let slots = self.slots.entry(cluster).or_default();
        let index = slot as usize;
        if slots.len() <= index {
            slots.resize(index + 1, NO_BACKEND);
        }
        &mut slots[index]
    }

    fn doubt_value(&mut self, shown: Shown) {
        if !self.doubtful.contains(&shown) {
            self.doubtful.push(shown);
        }
    }

    /// Slots of `cluster` that programs can reach.
    fn count(&self, cluster: u16) -> usize {
        let groups = self.visible.iter().chain(&self.doubtful).flat_map(|shown| &shown.groups);
        groups.filter(|group| group.cluster == cluster).map(|group| group.count() as usize).max().unwrap_or(0)
    }

    fn has_surplus(&self) -> bool {
        self.slots.iter().any(|(cluster, slots)| slots.len() > self.count(*cluster))
    }

    fn slot_keys(&self) -> Vec<(SlotKey, u32)> {
        let mut keys = Vec::new();
        for (cluster, slots) in &self.slots {
            for (slot, backend) in (0..).zip(slots) {
                let doubtful = self.doubtful_slots.get(&(*cluster, slot)).into_iter().flatten();
                for backend in doubtful.chain([backend]) {
                    keys.push((SlotKey { service: self.id, slot, cluster: *cluster, pad: 0 }, *backend));
                }
            }
        }
        keys
    }
}

impl Settled {
    /// The IDs of `wanted`, which is ascending, and what differs: one pass, in which only what is new is
    /// looked up.
    fn change_to(&self, wanted: &[BackendKey], mut allocate: impl FnMut(BackendKey) -> u32) -> Members {
        let mut ids = Vec::with_capacity(wanted.len());
        let (mut removed, mut added) = (Vec::new(), Vec::new());
        let mut held = self.backends.iter().zip(&self.ids).peekable();
        for key in wanted {
            while let Some((_, id)) = held.next_if(|(held, _)| *held < key) {
                removed.push(*id);
            }
            let id = match held.next_if(|(held, _)| *held == key) {
                Some((_, id)) => *id,
                None => {
                    let id = allocate(*key);
                    added.push(id);
                    id
                }
            };
            ids.push(id);
        }
        removed.extend(held.map(|(_, id)| *id));
        removed.sort_unstable();
        Members { ids, difference: Some(Difference { before: self.ids.len(), removed, added }) }
    }
}

fn next_id(id: u32) -> u32 {
    id.checked_add(1).unwrap_or(1)
}

fn service_value(id: u32, shown: &Shown) -> ServiceValue {
    let Shown { affinity_timeout, groups } = shown;
    let mut value = ServiceValue {
        id,
        n_groups: 0,
        affinity_timeout: *affinity_timeout,
        groups: [Group::default(); MAX_GROUPS],
    };
    for (slot, group) in value.groups.iter_mut().zip(groups) {
        *slot = *group;
        value.n_groups += 1;
    }
    value
}
