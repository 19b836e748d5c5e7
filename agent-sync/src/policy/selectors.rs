//! Which identities each label selector selects. Equal selectors of all policies are kept once. What new
//! ones select is found for all of them together: there may be many more identities than anything else.

use std::collections::{BTreeSet, HashMap, HashSet};

use clustermesh_kvstore::labels::{CLUSTER_LABEL, Labels};
use clustermesh_kvstore::record::{LabelSelector, Operator, Requirement};

/// Number of a selector, while somebody uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SelectorId(usize);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Selectors {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    by_value: HashMap<LabelSelector, SelectorId>,
    /// Selectors that ask for one of some values of a label, under each of them.
    by_label: HashMap<(String, String), Vec<SelectorId>>,
    /// All others: they have to be asked for every identity.
    others: Vec<SelectorId>,
    /// Those that were not compared with all identities yet.
    unresolved: BTreeSet<SelectorId>,
    /// Identities whose labels are known.
    known: HashSet<u32>,
    /// Selectors by the identities that they select.
    selecting: HashMap<u32, Vec<SelectorId>>,
    /// Selectors by the subjects whose rules name them.
    of_subject: HashMap<u32, Vec<SelectorId>>,
}

#[derive(Debug)]
struct Slot {
    selector: LabelSelector,
    uses: usize,
    selected: BTreeSet<u32>,
    /// Pods of this node with a rule about peers that it selects.
    subjects: BTreeSet<u32>,
}

/// The label that nearly all identities of a namespace share.
const NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

impl Selectors {
    /// The number of a selector, used once more. What a new one selects is known after [`Self::resolve`].
    pub(super) fn acquire(&mut self, selector: &LabelSelector) -> SelectorId {
        if let Some(id) = self.by_value.get(selector).copied() {
            if let Some(slot) = &mut self.slots[id.0] {
                slot.uses += 1;
            }
            return id;
        }
        let id = SelectorId(self.free.pop().unwrap_or(self.slots.len()));
        if id.0 == self.slots.len() {
            self.slots.push(None);
        }
        match indexed(selector) {
            Some(Requirement { key, values, .. }) => {
                for value in values {
                    self.by_label.entry((key.clone(), value.clone())).or_default().push(id);
                }
            }
            None => self.others.push(id),
        }
        self.by_value.insert(selector.clone(), id);
        let slot = Slot {
            selector: selector.clone(),
            uses: 1,
            selected: BTreeSet::new(),
            subjects: BTreeSet::new(),
        };
        self.slots[id.0] = Some(slot);
        self.unresolved.insert(id);
        id
    }

    /// Compares new selectors with all identities, given with their labels as they are written: one look at
    /// each, however many selectors are new.
    pub(super) fn resolve<'a, I: Iterator<Item = (u32, &'a str)>>(&mut self, identities: impl FnOnce() -> I) {
        let new = std::mem::take(&mut self.unresolved);
        let new: Vec<(SelectorId, LabelSelector)> = new
            .into_iter()
            .filter_map(|id| Some((id, self.slots[id.0].as_ref()?.selector.clone())))
            .collect();
        if new.is_empty() {
            return;
        }
        let (mut by_label, mut others) = (HashMap::<(&str, &str), Vec<_>>::new(), Vec::new());
        for entry in &new {
            match indexed(&entry.1) {
                Some(Requirement { key, values, .. }) => {
                    values.iter().for_each(|value| by_label.entry((key, value)).or_default().push(entry));
                }
                None => others.push(entry),
            }
        }
        for (identity, text) in identities() {
            let asking = pairs(text).filter_map(|pair| by_label.get(&pair)).flatten();
            let mut asking = asking.chain(&others).peekable();
            // Most are asked for by none, and need not be parsed.
            if asking.peek().is_none() {
                continue;
            }
            let Ok(labels) = Labels::parse(text) else { continue };
            for (id, _) in asking.filter(|(_, selector)| selector.matches(&labels)) {
                self.select(*id, identity);
            }
        }
    }

    /// Undoes one [`Self::acquire`].
    pub(super) fn release(&mut self, id: SelectorId) {
        let Some(slot) = &mut self.slots[id.0] else { return };
        slot.uses -= 1;
        if slot.uses > 0 {
            return;
        }
        let Some(slot) = self.slots[id.0].take() else { return };
        self.free.push(id.0);
        self.unresolved.remove(&id);
        self.by_value.remove(&slot.selector);
        for identity in &slot.selected {
            forget(&mut self.selecting, identity, id);
        }
        for subject in &slot.subjects {
            forget(&mut self.of_subject, subject, id);
        }
        match indexed(&slot.selector) {
            Some(Requirement { key, values, .. }) => {
                for value in values {
                    forget(&mut self.by_label, &(key.clone(), value.clone()), id);
                }
            }
            None => self.others.retain(|other| *other != id),
        }
    }

    /// An identity has these labels from now on; none: it is gone. Gives the selectors that select it and
    /// did not, or the other way round.
    pub(super) fn identity_changed(&mut self, identity: u32, labels: Option<&Labels>) -> Vec<SelectorId> {
        match labels {
            Some(_) => self.known.insert(identity),
            None => self.known.remove(&identity),
        };
        let before: BTreeSet<SelectorId> = self.selecting.remove(&identity).into_iter().flatten().collect();
        let after: BTreeSet<SelectorId> = labels.map_or_else(BTreeSet::new, |labels| self.matching(labels));
        let changed: Vec<SelectorId> = before.symmetric_difference(&after).copied().collect();
        for id in &changed {
            if let Some(slot) = &mut self.slots[id.0] {
                match after.contains(id) {
                    true => slot.selected.insert(identity),
                    false => slot.selected.remove(&identity),
                };
            }
        }
        if !after.is_empty() {
            self.selecting.insert(identity, after.into_iter().collect());
        }
        changed
    }

    /// Whether the labels of an identity are known.
    pub(super) fn knows(&self, identity: u32) -> bool {
        self.known.contains(&identity)
    }

    /// Identities that a selector selects.
    pub(super) fn selected(&self, id: SelectorId) -> &BTreeSet<u32> {
        static NONE: BTreeSet<u32> = BTreeSet::new();
        self.slots[id.0].as_ref().map_or(&NONE, |slot| &slot.selected)
    }

    /// Pods of this node with a rule about peers that a selector selects.
    pub(super) fn subjects_of(&self, id: SelectorId) -> impl Iterator<Item = u32> {
        self.slots[id.0].iter().flat_map(|slot| slot.subjects.iter().copied())
    }

    /// A rule about a pod of this node names a selector.
    pub(super) fn add_subject(&mut self, id: SelectorId, subject: u32) {
        if let Some(slot) = &mut self.slots[id.0]
            && slot.subjects.insert(subject)
        {
            self.of_subject.entry(subject).or_default().push(id);
        }
    }

    /// No rule about it does any more.
    pub(super) fn forget_subject(&mut self, subject: u32) {
        for id in self.of_subject.remove(&subject).into_iter().flatten() {
            if let Some(slot) = &mut self.slots[id.0] {
                slot.subjects.remove(&subject);
            }
        }
    }

    fn select(&mut self, id: SelectorId, identity: u32) {
        if let Some(slot) = &mut self.slots[id.0]
            && slot.selected.insert(identity)
        {
            self.selecting.entry(identity).or_default().push(id);
        }
    }

    fn matching(&self, labels: &Labels) -> BTreeSet<SelectorId> {
        let by_label = labels
            .iter()
            .filter_map(|label| self.by_label.get(&(label.key.clone(), label.value.clone())))
            .flatten();
        let matches =
            |id: &&SelectorId| self.slots[id.0].as_ref().is_some_and(|slot| slot.selector.matches(labels));
        by_label.chain(&self.others).filter(matches).copied().collect()
    }
}

/// The requirement by which a selector is found: one that few identities fulfil.
fn indexed(selector: &LabelSelector) -> Option<&Requirement> {
    let mut wanted: Vec<_> = selector.0.iter().filter(|asked| asked.operator == Operator::In).collect();
    wanted.sort_by_key(|asked| [CLUSTER_LABEL, NAMESPACE_LABEL].contains(&asked.key.as_str()));
    wanted.first().copied()
}

/// Keys and values of labels as [`Labels`] write them: `source:key=value;` each.
fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split(';').filter_map(|label| label.split_once(':')?.1.split_once('='))
}

fn forget<K: std::hash::Hash + Eq>(map: &mut HashMap<K, Vec<SelectorId>>, key: &K, id: SelectorId) {
    if let Some(ids) = map.get_mut(key) {
        ids.retain(|other| *other != id);
        if ids.is_empty() {
            map.remove(key);
        }
    }
}
