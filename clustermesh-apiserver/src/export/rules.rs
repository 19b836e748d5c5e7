use clustermesh_kvstore::cluster::NamespacedName;

use crate::objects::Objects;

/// What of a cluster other clusters get to know, and how far the source can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Whether a namespace is shown that does not say itself whether it is.
    pub default_global: bool,
    /// The source knows everything that there is. Then a service without endpoint slices has no backends,
    /// and nothing is shown of a namespace before the namespace itself is known.
    pub complete: bool,
    /// Whether selectors of policies that name no cluster mean pods of the own one, or of all.
    pub policy_default_local_cluster: bool,
}

impl Default for Rules {
    /// All namespaces; objects that refer to others may be all that there is; policies are about the own cluster.
    fn default() -> Self {
        Self { default_global: true, complete: false, policy_default_local_cluster: true }
    }
}

impl Rules {
    /// Whether other clusters get to know what is in the namespace.
    pub(super) fn shows(self, namespace: &str, objects: &Objects) -> bool {
        match objects.namespace(namespace) {
            Some(known) => known.global.unwrap_or(self.default_global),
            None => self.default_global && !self.complete,
        }
    }

    /// Whether the namespace is known to be none of other clusters' business.
    pub(super) fn hides(self, namespace: &str, objects: &Objects) -> bool {
        let global = objects.namespace(namespace).and_then(|known| known.global);
        !global.unwrap_or(self.default_global)
    }
}

/// Endpoints by which parts of a control plane once elected their leader: no services.
pub(super) fn is_pseudo_service(name: &NamespacedName) -> bool {
    name.namespace == "kube-system"
        && matches!(name.name.as_str(), "kube-scheduler" | "kube-controller-manager")
}
