//! What the tables of services should hold by now, by the mirror of what was written to them.

use std::collections::{HashMap, HashSet};

use ebpf_global_svc::abi::{BackendValue, ServiceKey, ServiceValue, SlotKey};

use super::super::drift::Want;
use super::{ANYONE, Installed, NO_BACKEND, Services, service_value};

/// The mirror by service ID.
pub(in crate::reconcile) struct Slots<'a> {
    services: HashMap<u32, (&'a ServiceKey, &'a Installed)>,
    /// Of services that are gone; they are deleted in a moment.
    retired: HashSet<SlotKey>,
    all: &'a Services,
}

impl Services {
    /// Of `cm_service`.
    pub(in crate::reconcile) fn want_value(&self, key: &ServiceKey) -> Want<ServiceValue> {
        match self.installed.get(key) {
            _ if self.is_pending(key) => Want::Unsettled,
            None => Want::Nothing,
            Some(installed) => match &installed.visible {
                Some(shown) if installed.doubtful.is_empty() => {
                    Want::Value(service_value(installed.id, shown))
                }
                _ => Want::Unsettled,
            },
        }
    }

    /// Of `cm_backend`. One that no slot names is about to go, or about to be named.
    pub(in crate::reconcile) fn want_backend(&self, id: u32) -> Want<BackendValue> {
        match self.backends.by_id.get(&id) {
            Some(backend) if backend.references > 0 => {
                Want::Value(backend.key.value(id, backend.owner != ANYONE))
            }
            Some(_) => Want::Unsettled,
            None if self.garbage.has_orphan(id) => Want::Unsettled,
            None => Want::Nothing,
        }
    }

    /// Of `cm_slot`.
    pub(in crate::reconcile) fn slots(&self) -> Slots<'_> {
        let services = self.installed.iter().map(|(key, installed)| (installed.id, (key, installed)));
        Slots { services: services.collect(), retired: self.garbage.slots().collect(), all: self }
    }

    /// Keys of `cm_service`.
    pub(in crate::reconcile) fn keys(&self) -> impl Iterator<Item = ServiceKey> {
        self.installed.keys().copied()
    }

    /// Keys of `cm_backend`.
    pub(in crate::reconcile) fn backend_ids(&self) -> impl Iterator<Item = u32> {
        self.backends.by_id.keys().copied()
    }

    /// Keys of `cm_slot`.
    pub(in crate::reconcile) fn slot_keys(&self) -> impl Iterator<Item = SlotKey> {
        self.installed.values().flat_map(|installed| {
            let id = installed.id;
            installed.slots.iter().flat_map(move |(cluster, slots)| {
                let numbers = (0..).zip(slots).map(|(slot, _)| slot);
                numbers.map(move |slot| SlotKey { service: id, slot, cluster: *cluster, pad: 0 })
            })
        })
    }

    fn is_pending(&self, key: &ServiceKey) -> bool {
        self.fresh.contains_key(key) || self.failed.contains_key(key)
    }
}

impl Slots<'_> {
    pub(in crate::reconcile) fn want(&self, key: &SlotKey) -> Want<u32> {
        let Some((service, installed)) = self.services.get(&key.service) else {
            return if self.retired.contains(key) { Want::Unsettled } else { Want::Nothing };
        };
        let doubtful = installed.doubtful_slots.contains_key(&(key.cluster, key.slot));
        if doubtful || self.all.is_pending(service) || self.retired.contains(key) {
            return Want::Unsettled;
        }
        let slots = installed.slots.get(&key.cluster).filter(|_| key.pad == 0);
        match slots.and_then(|slots| slots.get(usize::try_from(key.slot).ok()?)) {
            None | Some(&NO_BACKEND) => Want::Nothing,
            Some(backend) => Want::Value(*backend),
        }
    }
}
