//! What nodes claim, and whose claims were refused.

use std::collections::{BTreeMap, BTreeSet};

/// A node, by cluster and name. What an earlier life of the agent installed is nobody's and counts least; of
/// several nodes of a cluster the last by name counts, whichever came first.
pub(super) type Claimant = (u16, Option<Box<str>>);

/// Claims to things of one kind.
#[derive(Clone, Debug)]
pub(super) struct Claims<K, T> {
    by_key: BTreeMap<K, BTreeMap<Claimant, T>>,
    /// Clusters whose claim was refused, and for whom.
    refused: BTreeMap<(K, u16), u16>,
    /// What was installed before and is in question until its cluster's nodes are known.
    restored: BTreeMap<u16, Vec<K>>,
    /// To be decided.
    dirty: BTreeSet<K>,
}

impl<K: Copy + Ord, T> Claims<K, T> {
    pub(super) fn claim(&mut self, key: K, claimant: Claimant, what: T) {
        self.by_key.entry(key).or_default().insert(claimant, what);
        self.dirty.insert(key);
    }

    pub(super) fn withdraw(&mut self, key: K, claimant: &Claimant) {
        if let Some(claims) = self.by_key.get_mut(&key) {
            claims.remove(claimant);
        }
        self.dirty.insert(key);
    }

    /// What an earlier life of the agent installed for a cluster.
    pub(super) fn restore(&mut self, key: K, cluster: u16, what: T) {
        self.restored.entry(cluster).or_default().push(key);
        self.claim(key, (cluster, None), what);
    }

    /// The cluster's nodes are all known: what was restored of it counts no more.
    pub(super) fn forget_restored(&mut self, cluster: u16) {
        for key in self.restored.remove(&cluster).unwrap_or_default() {
            self.withdraw(key, &(cluster, None));
        }
    }

    /// To be decided anew though its claims are the same.
    pub(super) fn touch(&mut self, keys: impl IntoIterator<Item = K>) {
        self.dirty.extend(keys);
    }

    #[cfg(test)]
    pub(super) fn touch_all(&mut self) {
        self.dirty.extend(self.by_key.keys().copied());
    }

    #[cfg(test)]
    pub(super) fn withdraw_all(&mut self) {
        self.by_key.values_mut().for_each(BTreeMap::clear);
        self.touch_all();
    }

    /// What has to be decided.
    pub(super) fn take_dirty(&mut self) -> BTreeSet<K> {
        let dirty = std::mem::take(&mut self.dirty);
        for key in &dirty {
            if self.by_key.get(key).is_some_and(BTreeMap::is_empty) {
                self.by_key.remove(key);
            }
        }
        dirty
    }

    pub(super) fn refuse(&mut self, key: K, cluster: u16, holder: u16) {
        self.refused.insert((key, cluster), holder);
    }

    /// Of the keys from `first` on as long as they are `within` nothing is refused any more.
    pub(super) fn forget_refused(&mut self, first: K, within: impl Fn(K) -> bool) {
        let refused = self.refused.range((first, 0)..).map(|(refused, _)| *refused);
        let refused: Vec<_> = refused.take_while(|(key, _)| within(*key)).collect();
        for refused in &refused {
            self.refused.remove(refused);
        }
    }

    /// What was refused to whom, and for whom.
    pub(super) fn refused(&self) -> &BTreeMap<(K, u16), u16> {
        &self.refused
    }

    pub(super) fn is_claimed(&self, key: &K) -> bool {
        self.by_key.contains_key(key)
    }

    /// Who claims one thing.
    pub(super) fn of(&self, key: &K) -> impl DoubleEndedIterator<Item = (&Claimant, &T)> {
        self.by_key.get(key).into_iter().flatten()
    }

    /// Who claims what, from `first` on.
    pub(super) fn range_from(&self, first: K) -> impl Iterator<Item = (K, &BTreeMap<Claimant, T>)> {
        self.by_key.range(first..).map(|(key, claims)| (*key, claims))
    }

    /// All claims.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &T)> {
        self.by_key.iter().flat_map(|(key, claims)| claims.values().map(move |what| (key, what)))
    }
}

impl<K, T> Default for Claims<K, T> {
    fn default() -> Self {
        let (by_key, refused, restored) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { by_key, refused, restored, dirty: BTreeSet::new() }
    }
}
