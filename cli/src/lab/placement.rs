//! Which pods there should be, and where: the lab's controllers and its scheduler, as plain functions.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodSpec;

use super::addressing::{fnv1a, next_pod_number};
use super::objects::{ObjectName, Objects};
use super::state::{ClusterState, PodState};
use super::topology::{Cluster, Node, is_dns_label};

/// A pod that should exist.
#[derive(Clone, Debug)]
pub(crate) struct DesiredPod {
    owner: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    spec: PodSpec,
}

/// The pods that the objects ask for; those of deployments are called `DEPLOYMENT-0`, `DEPLOYMENT-1`, …
///
/// # Errors
/// Two pods of one name, or a pod without containers.
pub(crate) fn desired(objects: &Objects) -> Result<BTreeMap<ObjectName, DesiredPod>, String> {
    let mut desired = BTreeMap::new();
    for (name, pod) in &objects.pods {
        let spec = pod.spec.clone().unwrap_or_default();
        let meta = &pod.metadata;
        desired.insert(
            name.clone(),
            DesiredPod {
                owner: None,
                labels: meta.labels.clone().unwrap_or_default(),
                annotations: meta.annotations.clone().unwrap_or_default(),
                spec,
            },
        );
    }
    for (name, deployment) in &objects.deployments {
        let spec = &deployment.spec;
        let meta = spec.template.metadata.clone().unwrap_or_default();
        let pod = DesiredPod {
            owner: Some(name.name.clone()),
            labels: meta.labels.unwrap_or_default(),
            annotations: meta.annotations.unwrap_or_default(),
            spec: spec.template.spec.clone().unwrap_or_default(),
        };
        for index in 0..spec.replicas.unwrap_or(1) {
            let pod_name = ObjectName::new(&name.namespace, &format!("{}-{index}", name.name));
            if desired.insert(pod_name.clone(), pod.clone()).is_some() {
                return Err(format!(
                    "deployment {name} and another object both make a pod {pod_name}; rename one"
                ));
            }
        }
    }
    for (name, pod) in &desired {
        if !is_dns_label(&name.name) {
            return Err(format!(
                "pod {name}: in a lab a pod's name has up to 63 lower-case letters, digits and '-'"
            ));
        }
        let names: BTreeSet<_> = pod.spec.containers.iter().map(|c| &c.name).collect();
        if names.is_empty()
            || names.len() != pod.spec.containers.len()
            || !names.iter().all(|n| is_dns_label(n))
        {
            return Err(format!("pod {name}: give it one or more containers with different names"));
        }
    }
    Ok(desired)
}

/// The pods that have to go: no longer asked for, to be replaced by another spec, or dead. Highest
/// numbers of a deployment first.
pub(crate) fn surplus(
    state: &ClusterState,
    desired: &BTreeMap<ObjectName, DesiredPod>,
    dead: &BTreeSet<ObjectName>,
) -> Vec<ObjectName> {
    let keep = |name: &ObjectName, pod: &PodState| {
        pod.deleted.is_none() && !dead.contains(name) && desired.get(name).is_some_and(|d| d.spec == pod.spec)
    };
    state.pods.iter().filter(|(name, pod)| !keep(name, pod)).map(|(name, _)| name.clone()).rev().collect()
}

/// Labels and annotations change without a restart.
pub(crate) fn relabel(state: &mut ClusterState, desired: &BTreeMap<ObjectName, DesiredPod>) {
    for (name, pod) in &mut state.pods {
        if let Some(wanted) = desired.get(name) {
            pod.labels.clone_from(&wanted.labels);
            pod.annotations.clone_from(&wanted.annotations);
            pod.owner.clone_from(&wanted.owner);
        }
    }
}

/// Adds the missing pods to `state`, each with a node and addresses, and returns them.
///
/// # Errors
/// A pod that no node suits, or a node without addresses left.
pub(crate) fn place(
    cluster: &Cluster,
    state: &mut ClusterState,
    desired: &BTreeMap<ObjectName, DesiredPod>,
    now: Timestamp,
) -> Result<Vec<PodState>, String> {
    let mut placed = Vec::new();
    for (name, wanted) in desired {
        if state.pods.contains_key(name) {
            continue;
        }
        let node = choose_node(cluster, state, name, wanted)?;
        let used: BTreeSet<u32> =
            state.pods.values().filter(|p| p.node == node.name).map(|p| p.number).collect();
        let last = state.last_pod_number.get(&node.name).copied().unwrap_or_default();
        let number = next_pod_number(&node.pod_cidrs, last, &used).ok_or_else(|| {
            format!("pod {name}: node {} has no address left in {}", node.name, node.pod_cidrs)
        })?;
        state.last_pod_number.insert(node.name.clone(), number);
        let pod = PodState {
            name: name.clone(),
            uid: uid(&format!("{}/{name}/{}", cluster.name, now.as_nanosecond())),
            owner: wanted.owner.clone(),
            node: node.name.clone(),
            number,
            ips: node.pod_cidrs.nth(number),
            created: now,
            labels: wanted.labels.clone(),
            annotations: wanted.annotations.clone(),
            spec: wanted.spec.clone(),
            ready: false,
            deleted: None,
        };
        state.pods.insert(name.clone(), pod.clone());
        placed.push(pod);
    }
    Ok(placed)
}

/// The node that has the fewest pods of the same deployment, then the fewest pods, then comes first.
fn choose_node<'a>(
    cluster: &'a Cluster,
    state: &ClusterState,
    name: &ObjectName,
    wanted: &DesiredPod,
) -> Result<&'a Node, String> {
    let suits = |node: &&Node| {
        let named = wanted.spec.node_name.as_ref().is_none_or(|wanted| *wanted == node.name);
        let selected = wanted.spec.node_selector.iter().flatten().all(|(key, value)| {
            node.labels.get(key) == Some(value) || (key == "kubernetes.io/hostname" && *value == node.name)
        });
        named && selected
    };
    let load = |node: &&Node| {
        let here = state.pods.values().filter(|p| p.node == node.name);
        let siblings = here.clone().filter(|p| {
            wanted.owner.is_some() && p.owner == wanted.owner && p.name.namespace == name.namespace
        });
        (siblings.count(), here.count())
    };
    cluster.nodes.iter().filter(suits).min_by_key(load).ok_or_else(|| {
        format!("pod {name}: no node of cluster {} has its nodeName and nodeSelector", cluster.name)
    })
}

fn uid(seed: &str) -> String {
    let (high, low) = (fnv1a(seed.as_bytes()), fnv1a(format!("{seed}/").as_bytes()));
    let hex = format!("{high:016x}{low:016x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::testing;

    const SHOP: &str = "
{apiVersion: apps/v1, kind: Deployment, metadata: {name: orders, namespace: shop}, spec: {replicas: 3, selector: {}, template: {metadata: {labels: {app: orders}}, spec: {containers: [{name: web, image: web}]}}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop}, spec: {nodeName: node2, containers: [{name: main}]}}
";

    fn settle(state: &mut ClusterState) -> (Vec<String>, Vec<String>) {
        let topology = testing::topology();
        let wanted = desired(&state.objects).unwrap();
        let gone = surplus(state, &wanted, &BTreeSet::new());
        state.pods.retain(|name, _| !gone.contains(name));
        let placed = place(&topology.clusters[0], state, &wanted, Timestamp::UNIX_EPOCH).unwrap();
        (gone.iter().map(ToString::to_string).collect(), placed.iter().map(|p| p.name.to_string()).collect())
    }

    #[test]
    fn deployments_spread_over_nodes_and_scale_from_the_end() {
        let mut state = testing::cluster_state(SHOP);
        let (_, placed) = settle(&mut state);
        assert_eq!(placed, ["shop/client", "shop/orders-0", "shop/orders-1", "shop/orders-2"]);
        let node = |name: &str| state.pods[&ObjectName::new("shop", name)].node.clone();
        assert_eq!([node("client"), node("orders-0"), node("orders-1")], ["node2", "node1", "node2"]);
        let addresses: BTreeSet<_> = state.pods.values().flat_map(|p| p.ips.clone()).collect();
        assert_eq!(addresses.len(), 8);

        state.objects.scale(&"deploy/shop/orders".parse().unwrap(), 1).unwrap();
        let (gone, placed) = settle(&mut state);
        assert_eq!((gone, placed.len()), (vec!["shop/orders-2".to_owned(), "shop/orders-1".to_owned()], 0));
    }

    #[test]
    fn another_spec_replaces_the_pod_and_another_label_does_not() {
        let mut state = testing::cluster_state(SHOP);
        settle(&mut state);
        let key = ObjectName::new("shop", "client");
        let pod = state.objects.pods.get_mut(&key).unwrap();
        pod.metadata.labels = Some(BTreeMap::from([("a".to_owned(), "b".to_owned())]));
        assert_eq!(settle(&mut state).0.len(), 0);
        let wanted = desired(&state.objects).unwrap();
        relabel(&mut state, &wanted);
        assert_eq!(state.pods[&key].labels["a"], "b");

        let before = state.pods[&key].ips.clone();
        state.objects.pods.get_mut(&key).unwrap().spec.as_mut().unwrap().containers[0].image =
            Some("x".to_owned());
        let (gone, placed) = settle(&mut state);
        assert_eq!(
            (gone.as_slice(), placed.as_slice()),
            (&["shop/client".to_owned()][..], &["shop/client".to_owned()][..])
        );
        assert_ne!(state.pods[&key].ips, before, "an address is not used again at once");
    }

    #[test]
    fn impossible_pods_are_refused() {
        for (from, to, expected) in [
            ("nodeName: node2", "nodeName: node9", "no node"),
            ("name: client", "name: orders-1", "both make a pod"),
            ("containers: [{name: main}]", "containers: []", "one or more containers"),
        ] {
            let mut state = testing::cluster_state(&SHOP.replace(from, to));
            let topology = testing::topology();
            let result = desired(&state.objects)
                .and_then(|wanted| place(&topology.clusters[0], &mut state, &wanted, Timestamp::UNIX_EPOCH));
            assert!(result.unwrap_err().contains(expected), "{to}");
        }
    }
}
