//! By which addresses the kernel knows the pods of clusters that are known by virtual ones.

use std::collections::{BTreeMap, BTreeSet};

use clustermesh_kvstore::cluster::ClusterId;
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ebpf_global_svc::abi::{TranslateKey, TranslateValue};

use super::Mesh;
use crate::wire_key;

/// Of all clusters.
#[derive(Debug, Default)]
pub(super) struct Translations {
    wanted: BTreeMap<TranslateKey, TranslateValue>,
    changed: BTreeSet<TranslateKey>,
}

impl Translations {
    /// What was installed before stays until something else is said of its cluster.
    pub(super) fn restore(restored: Vec<(TranslateKey, TranslateValue)>) -> Self {
        Self { wanted: restored.into_iter().collect(), changed: BTreeSet::new() }
    }

    /// Clusters that have any.
    pub(super) fn clusters(&self) -> impl Iterator<Item = u16> {
        self.wanted.keys().map(|key| key.cluster)
    }

    /// These are a cluster's, and no others.
    pub(super) fn set(&mut self, cluster: u16, cidrs: &VirtualCidrs) {
        let after: BTreeMap<_, _> = cidrs
            .iter()
            .flat_map(|(real, virtual_)| wire_key::translations(cluster, real, virtual_))
            .collect();
        let gone =
            |key: &TranslateKey, _: &mut TranslateValue| key.cluster == cluster && !after.contains_key(key);
        self.changed.extend(self.wanted.extract_if(.., gone).map(|(key, _)| key));
        for (key, value) in after {
            if self.wanted.insert(key, value) != Some(value) {
                self.changed.insert(key);
            }
        }
    }

    /// What has changed since the last call.
    pub(super) fn compute(&mut self) -> Vec<(TranslateKey, Option<TranslateValue>)> {
        let changed = std::mem::take(&mut self.changed).into_iter();
        changed.map(|key| (key, self.wanted.get(&key).copied())).collect()
    }
}

impl Mesh {
    /// By which addresses the pods of `cluster` are known, by the operator's word; its records come with those.
    pub fn set_virtual_cidrs(&mut self, cluster: ClusterId, cidrs: &VirtualCidrs) {
        if cluster.get() != self.own {
            self.translations.set(cluster.get(), cidrs);
        }
    }

    /// Of `cm_translate`.
    pub fn wanted_translation(&self, key: &TranslateKey) -> Option<TranslateValue> {
        self.translations.wanted.get(key).copied()
    }

    /// Keys of `cm_translate`.
    pub fn translation_keys(&self) -> impl Iterator<Item = TranslateKey> {
        self.translations.wanted.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs(pairs: &[(&str, &str)]) -> VirtualCidrs {
        let parsed = pairs.iter().map(|(real, virtual_)| (real.parse().unwrap(), virtual_.parse().unwrap()));
        VirtualCidrs::new(parsed).unwrap()
    }

    /// Written and removed keys.
    fn changes(all: &mut Translations) -> (usize, usize) {
        let (written, removed): (Vec<_>, Vec<_>) =
            all.compute().into_iter().partition(|(_, value)| value.is_some());
        (written.len(), removed.len())
    }

    #[test]
    fn only_what_is_another_changes() {
        let mut all = Translations::default();
        let two = cidrs(&[("10.1.0.0/16", "241.2.0.0/16"), ("10.7.0.0/16", "241.7.0.0/16")]);
        all.set(2, &two);
        all.set(3, &cidrs(&[("10.1.0.0/16", "241.3.0.0/16")]));
        assert_eq!(changes(&mut all), (6, 0));
        all.set(2, &two);
        assert_eq!(changes(&mut all), (0, 0));
        all.set(2, &cidrs(&[("10.1.0.0/16", "241.2.0.0/16"), ("10.7.0.0/16", "241.8.0.0/16")]));
        // The way from the real prefix leads elsewhere; the virtual one is another.
        assert_eq!(changes(&mut all), (2, 1));
        let installed = all.wanted.clone();

        // The agent starts anew.
        let mut all = Translations::restore(installed.into_iter().collect());
        assert_eq!(all.clusters().collect::<BTreeSet<_>>(), [2, 3].into());
        assert_eq!(changes(&mut all), (0, 0));
        all.set(2, &VirtualCidrs::default());
        assert_eq!(changes(&mut all), (0, 4));
        assert_eq!(all.clusters().collect::<BTreeSet<_>>(), [3].into());
    }
}
