use std::collections::BTreeMap;
use std::time::Instant;

use clustermesh_kvstore::cluster::{Identity, NamespacedName};

use super::dirty::Dirty;
use super::{Basis, Exporter, IDENTITIES, Output, Problem};
use crate::identity;
use crate::objects::Pod;

/// Which identities there are, by the basis that holds.
impl Exporter {
    pub(super) fn recompute_identities(&mut self, dirty: &mut Dirty, now: Instant, out: &mut Output) {
        match self.choice.current() {
            Basis::Pods => self.recompute_own(dirty, now, out),
            Basis::Endpoints | Basis::Slices => {
                for name in std::mem::take(&mut dirty.cilium_identities) {
                    match self.cilium_labels(&name) {
                        Some((labels, shown)) => {
                            self.publish_in(IDENTITIES, shown, &name, labels.into_bytes(), now, out);
                        }
                        None => self.withdraw_all(IDENTITIES, &name, out),
                    }
                }
            }
        }
    }

    pub(super) fn identity_of(&self, pod: &NamespacedName) -> Option<Identity> {
        self.identities.find(self.labels.get(pod)?)
    }

    /// Takes over the numbers that somebody else gave, so that pods keep them.
    pub(super) fn adopt_published(&mut self, now: Instant) {
        let published = IDENTITIES.iter().filter_map(|kind| self.published.get(kind));
        for (suffix, labels) in published.flatten() {
            let number = suffix.parse().map(Identity);
            if let (Ok(identity), Ok(labels)) = (number, std::str::from_utf8(labels))
                && let Err(error) = self.identities.adopt(identity, labels, now)
            {
                tracing::debug!("not taken over: {error}");
            }
        }
    }

    /// Moves the dirty pods to the identities of their labels. Label sets come in order of their text,
    /// so that a restart that finds nothing in etcd gives the same numbers also where hashes collide.
    fn recompute_own(&mut self, dirty: &mut Dirty, now: Instant, out: &mut Output) {
        let mut wanted: Vec<(Option<String>, NamespacedName)> = dirty
            .pods
            .iter()
            .map(|name| {
                let pod = self.objects.pod(name);
                let pod = pod.filter(|pod| pod.owns_its_ips() && !pod.ips.is_empty());
                (pod.map(|pod| self.label_string(pod)), name.clone())
            })
            .collect();
        wanted.sort();
        for (labels, name) in wanted {
            if labels.is_none() || self.labels.get(&name) != labels.as_ref() {
                self.move_pod(name, labels, now, dirty);
            }
        }
        if self.identities_revision != self.identities.revision() || dirty.identities {
            self.identities_revision = self.identities.revision();
            self.publish_own(now, out);
        }
    }

    fn label_string(&self, pod: &Pod) -> String {
        let namespace = self.objects.namespace(&pod.name.namespace);
        identity::security_labels(pod, namespace, &self.cluster.name).to_string()
    }

    fn move_pod(&mut self, name: NamespacedName, labels: Option<String>, now: Instant, dirty: &mut Dirty) {
        if let Some(pod) = self.objects.pod(&name) {
            dirty.ips.extend(&pod.ips);
        }
        if let Some(old) = self.labels.remove(&name) {
            self.identities.release(&old, now);
        }
        self.starved.remove(&name);
        let Some(labels) = labels else { return };
        match self.identities.acquire(&labels) {
            Ok(_) => {
                self.labels.insert(name, labels);
            }
            Err(error) => {
                self.starved.insert(name.clone());
                self.problems.push(Problem::NoIdentity { pod: name, error });
            }
        }
    }

    /// New label sets are rare, so this compares all of them.
    fn publish_own(&mut self, now: Instant, out: &mut Output) {
        let hidden = |labels: &str| {
            identity::namespace_of(labels).is_some_and(|ns| self.rules.hides(ns, &self.objects))
        };
        let wanted: BTreeMap<String, (String, bool)> = self
            .identities
            .assignments()
            .map(|(identity, labels)| (identity.to_string(), (labels.to_owned(), !hidden(labels))))
            .collect();
        let published = IDENTITIES.iter().filter_map(|kind| self.published.get(kind));
        let published = published.flat_map(BTreeMap::keys);
        let gone: Vec<String> = published.filter(|suffix| !wanted.contains_key(*suffix)).cloned().collect();
        for suffix in gone {
            self.withdraw_all(IDENTITIES, &suffix, out);
        }
        for (suffix, (labels, shown)) in wanted {
            self.publish_in(IDENTITIES, shown, &suffix, labels.into_bytes(), now, out);
        }
    }

    /// Its labels, and whether other clusters get to know them.
    fn cilium_labels(&self, name: &str) -> Option<(String, bool)> {
        let identity = self.objects.cilium_identity(name)?;
        let namespace = identity.namespace.as_deref();
        let shown = namespace.is_none_or(|namespace| self.rules.shows(namespace, &self.objects));
        Some((identity.labels.clone()?, shown))
    }
}
