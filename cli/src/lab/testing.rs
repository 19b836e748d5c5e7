//! Inputs that the lab's unit tests share.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::objects::{ObjectName, Objects};
use super::state::{ClusterState, PodState};
use super::topology::{Topology, TopologyFile};

/// A ConfigMap and a service with an address.
pub(crate) const SERVICES: &str = "
{apiVersion: v1, kind: ConfigMap, metadata: {name: page, namespace: shop}, data: {index.html: hello}}
---
{apiVersion: v1, kind: Service, metadata: {name: orders, namespace: shop}, spec: {clusterIP: 10.101.0.20, ports: [{name: http, port: 80}]}}
";

/// One dual-stack cluster of two nodes.
pub(crate) fn topology() -> Topology {
    let file: TopologyFile = serde_saphyr::from_str(
        "{name: t, clusters: [{name: alpha, id: 1, podCIDRs: [10.1.0.0/16, 'fd00:1::/48'], \
         serviceCIDRs: [10.101.0.0/16, 'fd00:101::/112'], nodes: 2}]}",
    )
    .unwrap();
    Topology::check(&file).unwrap()
}

/// The state of a cluster that was asked for `manifests` and has assigned its ClusterIPs.
pub(crate) fn cluster_state(manifests: &str) -> ClusterState {
    let mut state = ClusterState { objects: objects(manifests), ..ClusterState::default() };
    super::effective::assign_cluster_ips(&topology().clusters[0], &mut state).unwrap();
    state
}

/// `pod` as it runs on the first node.
pub(crate) fn pod_state(pod: &str) -> PodState {
    let (name, pod): (ObjectName, Pod) = objects(pod).pods.into_iter().next().unwrap();
    PodState {
        name,
        uid: "u".to_owned(),
        owner: None,
        node: "node1".to_owned(),
        number: 2,
        ips: topology().clusters[0].nodes[0].pod_cidrs.nth(2),
        created: Timestamp::UNIX_EPOCH,
        labels: pod.metadata.labels.unwrap_or_default(),
        annotations: pod.metadata.annotations.unwrap_or_default(),
        spec: pod.spec.unwrap(),
        ready: true,
        deleted: None,
    }
}

fn objects(manifests: &str) -> Objects {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.yaml");
    std::fs::write(&file, manifests).unwrap();
    let mut objects = Objects::default();
    objects.read(&file).unwrap();
    objects
}
