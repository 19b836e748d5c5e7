//! Associations that are not of a present agreement: who may still use them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{StateId, StateUse};

/// One goes when nothing has gone by it for so long: the other end has moved, too.
pub(super) const QUIET: Duration = Duration::from_secs(30);
/// So many there may be between two addresses. More come only of agents that start again and again.
pub(super) const MAX: usize = 8;

/// Those that there are.
#[derive(Clone, Debug, Default)]
pub(super) struct OldStates(BTreeMap<StateId, Old>);

#[derive(Clone, Copy, Debug)]
struct Old {
    /// When it was needed last, or something has gone by it.
    used: Duration,
    packets: u64,
}

impl OldStates {
    /// The account of `states` at `now`. `is_needed`: there is nothing to take its place yet. `asked`: when its sender
    /// has said last that it had not moved.
    pub(super) fn noted<'a>(
        &self,
        states: impl Iterator<Item = (&'a StateId, &'a StateUse)>,
        is_needed: impl Fn(&StateId) -> bool,
        asked: impl Fn(&StateId) -> Option<Duration>,
        now: Duration,
    ) -> Self {
        let noted = states.map(|(id, state)| {
            let known = self.0.get(id).filter(|old| old.packets == state.packets && !is_needed(id));
            let used = known.map_or(now, |old| old.used.max(asked(id).unwrap_or_default()));
            (*id, Old { used, packets: state.packets })
        });
        Self(noted.collect())
    }

    /// Those that can go at `now`, but for those that stay in any case.
    pub(super) fn unused(&self, stays: impl Fn(&StateId) -> bool, now: Duration) -> Vec<StateId> {
        let mut unused = Vec::new();
        let mut kept: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (id, old) in self.0.iter().filter(|(id, _)| !stays(id)) {
            if now >= old.used + QUIET {
                unused.push(*id);
            } else {
                kept.entry((id.source, id.destination)).or_default().push((old.packets > 0, old.used, *id));
            }
        }
        for mut same in kept.into_values() {
            // First those by which nothing has ever come.
            same.sort();
            let excess = same.len().saturating_sub(MAX);
            unused.extend(same.into_iter().take(excess).map(|(.., id)| id));
        }
        unused
    }

    pub(super) fn forget(&mut self, id: &StateId) {
        self.0.remove(id);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
