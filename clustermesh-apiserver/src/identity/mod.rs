//! Security identities: which labels of a pod make its identity, and which number stands for them.

mod allocator;
mod filter;

use std::collections::BTreeMap;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::labels::{CLUSTER_LABEL, Labels, SOURCE_K8S};

pub use allocator::{AdoptError, Allocator, Exhausted};

use crate::objects::{Namespace, Pod};

/// The labels that tell what a pod may talk to: those of its own that matter, those of its namespace,
/// its namespace, service account and cluster.
///
/// `namespace` is `None` if nobody described it; it then has the one label that the API server gives
/// to each.
pub fn security_labels(pod: &Pod, namespace: Option<&Namespace>, cluster: &ClusterName) -> Labels {
    // By key, so that what we know of the pod replaces what its author may claim.
    let mut wanted: BTreeMap<String, &str> = pod
        .labels
        .iter()
        .filter(|(key, _)| !is_ours(key))
        .map(|(key, value)| (key.clone(), value.as_str()))
        .collect();
    wanted.insert(format!("{NAMESPACE_LABELS}.kubernetes.io/metadata.name"), &pod.name.namespace);
    for (key, value) in namespace.iter().flat_map(|namespace| &namespace.labels) {
        wanted.insert(format!("{NAMESPACE_LABELS}.{key}"), value);
    }
    wanted.insert(NAMESPACE.to_owned(), &pod.name.namespace);
    wanted.insert(SERVICE_ACCOUNT.to_owned(), &pod.service_account);
    wanted.insert(CLUSTER_LABEL.to_owned(), cluster.as_str());

    let mut labels = Labels::default();
    for (key, value) in wanted {
        if filter::is_relevant(&key) {
            labels.insert(SOURCE_K8S, &key, value);
        }
    }
    labels
}

/// The namespace that a text of labels names.
pub(crate) fn namespace_of(labels: &str) -> Option<&str> {
    labels.split(';').find_map(|label| label.strip_prefix("k8s:io.kubernetes.pod.namespace="))
}

/// Key of the label with the namespace of a pod.
pub(crate) const NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// What the keys of labels begin with that a pod has from its namespace; a dot follows.
pub(crate) const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels";
const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";

/// Keys that only the control plane may set: a pod that could set them could name its own policy.
fn is_ours(key: &str) -> bool {
    key.starts_with("io.cilium.k8s.") || key == NAMESPACE
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::fixtures;

    #[test]
    fn the_labels_of_cilium() {
        let mut pod = fixtures::pod("shop", "cart-0");
        pod.labels = [("app", "cart"), ("pod-template-hash", "5d8f")].map(own).into();
        let namespace =
            Namespace { name: "shop".into(), labels: [own(("team", "retail"))].into(), global: None };
        let labels = security_labels(&pod, Some(&namespace), &"alpha".parse().unwrap());
        assert_eq!(
            labels.to_string(),
            "k8s:app=cart;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop;\
             k8s:io.cilium.k8s.namespace.labels.team=retail;k8s:io.cilium.k8s.policy.cluster=alpha;\
             k8s:io.cilium.k8s.policy.serviceaccount=default;k8s:io.kubernetes.pod.namespace=shop;"
        );
    }

    #[test]
    fn a_pod_cannot_name_its_own_cluster_or_namespace() {
        let mut pod = fixtures::pod("shop", "cart-0");
        pod.labels = BTreeMap::from([
            own((CLUSTER_LABEL, "beta")),
            own((NAMESPACE, "kube-system")),
            own((SERVICE_ACCOUNT, "admin")),
            own(("io.cilium.k8s.namespace.labels.team", "root")),
        ]);
        let plain = fixtures::pod("shop", "cart-1");
        let cluster = "alpha".parse().unwrap();
        assert_eq!(security_labels(&pod, None, &cluster), security_labels(&plain, None, &cluster));
    }

    fn own((key, value): (&str, &str)) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }
}
