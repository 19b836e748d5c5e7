//! Cilium's default label filter ("Limiting Identity-Relevant Labels" in its documentation).
//!
//! Both sides of a mesh have to agree on which labels make an identity only in so far as policies
//! select by them; but a cluster that moves from Cilium to us, or back, keeps its identities if the
//! lists are the same.

/// Whether a label takes part in the identity.
///
/// Rules match at the start of the key. A label that no exclusion matches takes part; else the longest
/// matching inclusion has to be longer than the shortest matching exclusion.
pub(super) fn is_relevant(key: &str) -> bool {
    let excluded = EXCLUDE
        .iter()
        .copied()
        .filter(|prefix| key.starts_with(prefix))
        .map(str::len)
        .chain(wildcards(key))
        .min();
    let Some(excluded) = excluded else { return true };
    INCLUDE.iter().any(|prefix| key.starts_with(prefix) && prefix.len() > excluded)
}

const INCLUDE: [&str; 4] = [
    "io.kubernetes.pod.namespace",
    "io.cilium.k8s.namespace.labels",
    "io.cilium.k8s.policy.cluster",
    "app.kubernetes.io",
];

/// Prefixes of labels that say nothing on what a pod is, or differ from pod to pod and so would cost
/// one identity each.
const EXCLUDE: [&str; 13] = [
    "io.kubernetes",
    "kubernetes.io",
    "k8s.io",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/job-completion-index",
    "batch.kubernetes.io/controller-uid",
    "topology.kubernetes.io",
    "pod-template-generation",
    "pod-template-hash",
    "controller-revision-hash",
    "controller-uid",
    "etcd_node",
];

/// Lengths of what the two patterns with a `.*` match.
fn wildcards(key: &str) -> impl Iterator<Item = usize> {
    const BETA: &str = "beta.kubernetes.io";
    let beta = key.rfind(BETA).map(|start| start + BETA.len());
    let annotation = key.starts_with("annotation").then_some(key.len());
    beta.into_iter().chain(annotation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_workload_is_takes_part() {
        for key in [
            "app",
            "app.kubernetes.io/name",
            "io.kubernetes.pod.namespace",
            "io.cilium.k8s.policy.cluster",
            "io.cilium.k8s.policy.serviceaccount",
            "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
            "io.cilium.k8s.namespace.labels.app.kubernetes.io/part-of",
            "job-name",
            "batch.kubernetes.io/job-name",
            "k8s-app",
            "my-pod-template-hash",
        ] {
            assert!(is_relevant(key), "{key}");
        }
    }

    #[test]
    fn what_differs_from_pod_to_pod_does_not() {
        for key in [
            "io.kubernetes.container.name",
            "kubernetes.io/hostname",
            "k8s.io/cluster",
            "beta.kubernetes.io/arch",
            "failure-domain.beta.kubernetes.io/zone",
            "io.cilium.k8s.namespace.labels.x.beta.kubernetes.io/zone",
            "statefulset.kubernetes.io/pod-name",
            "apps.kubernetes.io/pod-index",
            "batch.kubernetes.io/controller-uid",
            "controller-uid",
            "topology.kubernetes.io/zone",
            "pod-template-hash",
            "annotation.kubectl",
            "etcd_node",
        ] {
            assert!(!is_relevant(key), "{key}");
        }
    }
}
