use super::Core;
use crate::publisher::spec::PublisherStatus;

/// How far it is.
impl Core {
    /// Progress so far.
    pub fn status(&self) -> PublisherStatus {
        let mut status = self.status.clone();
        self.update(&mut status);
        status
    }

    /// Brings `status`, which is of this publisher or new, up to date; tells whether that changed it. It is
    /// asked for all the time, so it copies nothing that is the same.
    pub fn update(&self, status: &mut PublisherStatus) -> bool {
        let sizes = [self.keys.pending(), self.leases.len()];
        let sums = [self.status.written, self.status.deleted, self.status.repaired];
        let mut changed = sizes != [status.pending, status.leases]
            || sums != [status.written, status.deleted, status.repaired];
        [status.pending, status.leases] = sizes;
        [status.written, status.deleted, status.repaired] = sums;
        if status.last_error != self.status.last_error {
            status.last_error.clone_from(&self.status.last_error);
            changed = true;
        }
        for (index, owned) in self.spec.owned.iter().enumerate() {
            let now = self.is_synced(index);
            match status.synced.get_mut(&owned.prefix) {
                Some(known) => changed |= std::mem::replace(known, now) != now,
                None => {
                    status.synced.insert(owned.prefix.clone(), now);
                    changed = true;
                }
            }
        }
        changed
    }

    /// Everything owned is complete, written, and its canaries are too.
    pub fn is_flushed(&self) -> bool {
        (0..self.complete.len()).all(|index| self.is_synced(index))
    }

    /// Nothing is left to state.
    #[cfg(test)]
    pub(in crate::publisher) fn all_stated(&self) -> bool {
        let stands = |index: &usize| {
            let key = self.spec.owned[*index].digest.as_deref().and_then(|key| self.keys.get(key));
            key.is_some_and(|key| key.desired.is_some() && key.is_clean())
        };
        self.digests.active().is_empty()
            && (0..self.complete.len()).filter(|index| self.digests.has(*index)).all(|index| stands(&index))
    }

    /// Everything of the prefix but its canary is as desired.
    pub(super) fn is_settled(&self, index: usize) -> bool {
        self.complete[index] && self.keys.unsettled(index) == 0 && self.streams.is_listed(index)
    }

    fn is_synced(&self, index: usize) -> bool {
        let canary = self.spec.owned[index].canary.as_deref();
        let canary_stands =
            canary.is_none_or(|c| self.keys.get(c).is_some_and(|k| k.actual.is_some() && k.is_clean()));
        self.is_settled(index) && canary_stands
    }
}
