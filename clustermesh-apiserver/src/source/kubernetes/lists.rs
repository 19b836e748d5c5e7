use std::collections::{BTreeMap, HashSet};

use clustermesh_kvstore::cluster::NamespacedName;

use super::kinds::KINDS;
use crate::objects::{Change, Object, ObjectKey, ObjectKind};
use crate::source::SourceEvent;

/// What the watch of one kind says.
#[derive(Clone, Debug)]
pub(super) enum Heard {
    /// From here on everything is told that there is.
    Begin,
    /// An object that is there, or is different now.
    Object(Item),
    /// That was everything: what was not told since the beginning is gone.
    End,
    /// An object is gone.
    Gone(NamespacedName),
    /// The cluster does not have such a kind.
    Absent,
    /// Why nothing more is heard, or that it goes on.
    Trouble(Option<String>),
}

/// An object, if it can be made sense of.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) name: NamespacedName,
    /// Or what is wrong with it.
    pub(super) object: Result<Object, String>,
}

/// Makes one story of what the watches of all kinds say.
///
/// Nothing is told of any kind until all have been listed, so that nobody draws conclusions from half a
/// cluster; likewise of a kind that appears later. Objects go when the server says so, or are missing
/// in a list that is complete.
///
/// Where Cilium's objects are, they say all that pods could, and pods, the most and the largest of all
/// objects, need not be read. That the last of Cilium's objects is gone is told together with the pods.
#[derive(Default)]
pub(super) struct Lists {
    kinds: BTreeMap<ObjectKind, Kind>,
    synced: bool,
    broken: BTreeMap<ObjectKey, String>,
    told_broken: usize,
    told_trouble: Option<String>,
}

#[derive(Default)]
struct Kind {
    /// Objects that were told of.
    known: HashSet<NamespacedName>,
    /// While a list is in progress: what it has had so far.
    listing: Option<HashSet<NamespacedName>>,
    /// A list has been complete.
    listed: bool,
    /// What is yet to be told.
    changes: Vec<Change>,
    trouble: Option<String>,
}

impl Lists {
    /// Takes in what a watch says.
    pub(super) fn hear(&mut self, kind: ObjectKind, heard: Heard) {
        match heard {
            Heard::Begin => self.kind(kind).listing = Some(HashSet::new()),
            Heard::Object(item) => self.hear_object(kind, item),
            Heard::Gone(name) => self.remove(kind, name),
            Heard::End => {
                let state = self.kind(kind);
                let found = state.listing.take().unwrap_or_default();
                state.listed = true;
                for name in state.known.difference(&found).cloned().collect::<Vec<_>>() {
                    self.remove(kind, name);
                }
            }
            Heard::Absent => {
                self.hear(kind, Heard::Begin);
                self.hear(kind, Heard::End);
                self.hear(kind, Heard::Trouble(None));
            }
            Heard::Trouble(trouble) => self.kind(kind).trouble = trouble,
        }
    }

    /// What there is to tell now.
    pub(super) fn take(&mut self) -> Vec<SourceEvent> {
        let mut events = Vec::new();
        let waits_for_pods = self.wants_pods() && !self.is_listed(ObjectKind::Pod);
        let is_known = |kind| self.is_listed(kind) || (kind == ObjectKind::Pod && !waits_for_pods);
        if self.synced || ObjectKind::ALL.into_iter().all(is_known) {
            let may_tell = |kind| !waits_for_pods || !is_cilium(kind);
            let told = self.kinds.iter_mut().filter(|(kind, state)| state.listed && may_tell(**kind));
            let changes: Vec<Change> = told.flat_map(|(_, kind)| std::mem::take(&mut kind.changes)).collect();
            if !changes.is_empty() {
                events.push(SourceEvent::Changes(changes));
            }
            if !self.synced {
                self.synced = true;
                events.push(SourceEvent::Synced);
            }
            if self.told_broken != self.broken.len() {
                self.told_broken = self.broken.len();
                events.push(SourceEvent::Broken(self.told_broken));
            }
        }
        // One of them stands for all as long as it lasts.
        let troubles = || self.kinds.values().filter_map(|kind| kind.trouble.as_ref());
        let told = self.told_trouble.as_ref();
        let trouble = troubles().find(|trouble| told == Some(*trouble)).or(troubles().next()).cloned();
        if trouble != self.told_trouble {
            self.told_trouble.clone_from(&trouble);
            events.push(SourceEvent::Trouble(trouble));
        }
        events
    }

    /// Pods have to be read: it is known that there is no object of Cilium's.
    pub(super) fn wants_pods(&self) -> bool {
        let mut kinds = KINDS.iter().filter(|resource| resource.speaks_for_cilium());
        kinds.all(|resource| {
            self.kinds.get(&resource.kind).is_some_and(|kind| kind.listed && kind.known.is_empty())
        })
    }

    fn is_listed(&self, kind: ObjectKind) -> bool {
        self.kinds.get(&kind).is_some_and(|kind| kind.listed)
    }

    /// An object that makes no sense any more keeps its last good state.
    fn hear_object(&mut self, kind: ObjectKind, item: Item) {
        let state = self.kind(kind);
        if let Some(listing) = &mut state.listing {
            listing.insert(item.name.clone());
        }
        let key = ObjectKey { kind, name: item.name };
        match item.object {
            Ok(object) => {
                state.known.insert(key.name.clone());
                state.changes.push(Change::Upsert(object));
                self.broken.remove(&key);
            }
            Err(error) => {
                if self.broken.insert(key, error.clone()).as_ref() != Some(&error) {
                    tracing::warn!("{error}; its last good state stands");
                }
            }
        }
    }

    fn remove(&mut self, kind: ObjectKind, name: NamespacedName) {
        let state = self.kind(kind);
        if let Some(listing) = &mut state.listing {
            listing.remove(&name);
        }
        let key = ObjectKey { kind, name };
        if state.known.remove(&key.name) {
            state.changes.push(Change::Delete(key.clone()));
        }
        self.broken.remove(&key);
    }

    fn kind(&mut self, kind: ObjectKind) -> &mut Kind {
        self.kinds.entry(kind).or_default()
    }
}

fn is_cilium(kind: ObjectKind) -> bool {
    KINDS.iter().any(|resource| resource.kind == kind && resource.speaks_for_cilium())
}

#[cfg(test)]
#[path = "lists_tests.rs"]
mod tests;
