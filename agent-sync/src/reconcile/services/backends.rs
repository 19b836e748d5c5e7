//! IDs of backends, and who uses them.

use std::collections::HashMap;

use super::{Owner, next_id};
use crate::desired::BackendKey;

/// IDs, content and use of the backends in the table.
#[derive(Debug, Default)]
pub(super) struct Backends {
    pub(super) by_id: HashMap<u32, Backend>,
    by_key: HashMap<(BackendKey, Owner), u32>,
    pub(super) last_id: u32,
    /// Lost their last reference, or never had one, since the last [`Self::take_unreferenced`].
    unreferenced: Vec<u32>,
}

#[derive(Debug)]
pub(super) struct Backend {
    pub(super) key: BackendKey,
    pub(super) owner: Owner,
    /// Installed slots that name it, reachable or not.
    pub(super) references: u32,
}

impl Backends {
    /// One that a predecessor has installed. Of several with the same content the first counts.
    pub(super) fn restore(&mut self, id: u32, key: BackendKey, owner: Owner) {
        self.by_id.insert(id, Backend { key, owner, references: 0 });
        self.by_key.entry((key, owner)).or_insert(id);
    }

    /// The ID of a backend, and whether it was made up now. IDs count upwards, so that one that
    /// was freed does not come back while anything may remember it.
    pub(super) fn allocate(&mut self, key: BackendKey, owner: Owner) -> (u32, bool) {
        if let Some(id) = self.by_key.get(&(key, owner)) {
            return (*id, false);
        }
        let mut id = next_id(self.last_id);
        while self.by_id.contains_key(&id) {
            id = next_id(id);
        }
        self.last_id = id;
        self.by_id.insert(id, Backend { key, owner, references: 0 });
        self.by_key.insert((key, owner), id);
        self.unreferenced.push(id);
        (id, true)
    }

    pub(super) fn acquire(&mut self, id: u32) {
        if let Some(backend) = self.by_id.get_mut(&id) {
            backend.references += 1;
        }
    }

    pub(super) fn release(&mut self, id: u32) {
        if let Some(backend) = self.by_id.get_mut(&id) {
            backend.references = backend.references.saturating_sub(1);
            if backend.references == 0 {
                self.unreferenced.push(id);
            }
        }
    }

    pub(super) fn is_orphan(&self, id: u32) -> bool {
        self.by_id.get(&id).is_none_or(|backend| backend.references == 0)
    }

    /// It may or may not be in the table: nothing new refers to it.
    pub(super) fn disown(&mut self, id: u32) {
        if let Some(backend) = self.by_id.get(&id)
            && self.by_key.get(&(backend.key, backend.owner)) == Some(&id)
        {
            self.by_key.remove(&(backend.key, backend.owner));
        }
    }

    pub(super) fn forget(&mut self, id: u32) {
        self.disown(id);
        self.by_id.remove(&id);
    }

    pub(super) fn take_unreferenced(&mut self) -> Vec<u32> {
        let mut ids = std::mem::take(&mut self.unreferenced);
        ids.retain(|id| self.by_id.get(id).is_some_and(|backend| backend.references == 0));
        ids
    }
}
