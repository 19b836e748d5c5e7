//! The manifests as a cluster would serve them: what was asked for, completed with what a control plane
//! and kubelets add (addresses, status, ClusterIPs). The apiserver watches the directory they are in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use anyhow::Context;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateWaiting, ContainerStatus, HostIP, Namespace,
    Node as KubeNode, NodeAddress, NodeCondition, NodeSpec, NodeStatus, Pod, PodCondition, PodIP, PodStatus,
    Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use serde::Serialize;
use serde_json::{Value, json};

use super::addressing::cluster_ip;
use super::objects::{ObjectName, PolicyKind};
use super::state::{ClusterState, PodState, write_atomically};
use super::topology::{Cluster, Node};

/// Files by name. One per namespace and kind, so that a change rewrites only what it concerns.
pub(crate) type Files = BTreeMap<String, String>;

/// Gives every service that needs one its ClusterIPs, and takes back those of services that are gone.
///
/// # Errors
/// A requested address that is taken, outside of the cluster's ranges, or no address left.
pub(crate) fn assign_cluster_ips(cluster: &Cluster, state: &mut ClusterState) -> Result<(), String> {
    let services = &state.objects.services;
    state.cluster_ips.retain(|name, _| services.contains_key(name));
    // Requested addresses first: an allocated one gives way to nobody.
    for requested in [true, false] {
        for (name, service) in services {
            let wanted = requested_ips(service);
            if !needs_cluster_ip(service) {
                state.cluster_ips.remove(name);
            } else if requested != wanted.is_empty() {
                let current = state.cluster_ips.get(name);
                let others: BTreeSet<IpAddr> = state
                    .cluster_ips
                    .iter()
                    .filter(|(n, _)| *n != name)
                    .flat_map(|(_, ips)| ips.clone())
                    .collect();
                let ips = choose_ips(cluster, name, service, current, &others)?;
                state.cluster_ips.insert(name.clone(), ips);
            }
        }
    }
    Ok(())
}

/// All files of a cluster.
///
/// # Errors
/// If an object cannot be written as YAML, which would be a defect of this program.
pub(crate) fn render(cluster: &Cluster, state: &ClusterState) -> anyhow::Result<Files> {
    let mut documents: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    let mut add = |file: String, object: Value| documents.entry(file).or_default().push(object);
    for namespace in namespaces(state) {
        add("namespaces.yaml".to_owned(), document("v1", "Namespace", &namespace)?);
    }
    for node in &cluster.nodes {
        add("nodes.yaml".to_owned(), document("v1", "Node", &kube_node(node))?);
    }
    for pod in state.pods.values() {
        let host = cluster.nodes.iter().find(|n| n.name == pod.node);
        add(format!("{}.pods.yaml", pod.name.namespace), document("v1", "Pod", &kube_pod(pod, host))?);
    }
    for (name, service) in &state.objects.services {
        let service = kube_service(name, service, state.cluster_ips.get(name));
        add(format!("{}.services.yaml", name.namespace), document("v1", "Service", &service)?);
    }
    for (name, slice) in &state.objects.endpoint_slices {
        let mut slice = slice.clone();
        slice.metadata.namespace = Some(name.namespace.clone());
        let slice = document("discovery.k8s.io/v1", "EndpointSlice", &slice)?;
        add(format!("{}.endpointslices.yaml", name.namespace), slice);
    }
    for (kind, policies) in &state.objects.policies {
        for (name, policy) in policies {
            let mut policy = policy.clone();
            let is_clusterwide = *kind == PolicyKind::CiliumClusterwide;
            policy.metadata.namespace = (!is_clusterwide).then(|| name.namespace.clone());
            let (version, kind) = kind.written();
            add(format!("{}.policies.yaml", name.namespace), document(version, kind, &policy)?);
        }
    }
    let mut files = Files::new();
    for (file, documents) in documents {
        let texts: Result<Vec<String>, _> = documents.iter().map(serde_saphyr::to_string).collect();
        files.insert(file, texts.context("cannot write an object as YAML")?.join("---\n"));
    }
    Ok(files)
}

/// Brings the directory in line with `files`; what did not change is not touched.
///
/// # Errors
/// If the directory cannot be written.
pub(crate) fn write(dir: &Path, files: &Files) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for (name, text) in files {
        let path = dir.join(name);
        if std::fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
            write_atomically(&path, text.as_bytes(), 0o644)?;
        }
    }
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !files.contains_key(&name) {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn requested_ips(service: &Service) -> Vec<String> {
    let Some(spec) = &service.spec else { return Vec::new() };
    match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(ips), _) if !ips.is_empty() => ips.clone(),
        (_, Some(ip)) if !ip.is_empty() => vec![ip.clone()],
        _ => Vec::new(),
    }
}

fn needs_cluster_ip(service: &Service) -> bool {
    let kind = service.spec.as_ref().and_then(|s| s.type_.as_deref());
    kind != Some("ExternalName") && requested_ips(service).first().map(String::as_str) != Some("None")
}

fn choose_ips(
    cluster: &Cluster,
    name: &ObjectName,
    service: &Service,
    current: Option<&Vec<IpAddr>>,
    others: &BTreeSet<IpAddr>,
) -> Result<Vec<IpAddr>, String> {
    let spec = service.spec.clone().unwrap_or_default();
    let mut ips: Vec<IpAddr> = Vec::new();
    for text in requested_ips(service) {
        let ip: IpAddr =
            text.parse().map_err(|_| format!("service {name}: clusterIP {text:?} is not an address"))?;
        if !cluster.service_cidrs.iter().any(|cidr| cidr.contains(&ip)) {
            return Err(format!(
                "service {name}: clusterIP {ip} is not in serviceCIDRs {}",
                cluster.service_cidrs
            ));
        }
        if others.contains(&ip) {
            return Err(format!("service {name}: clusterIP {ip} belongs to another service"));
        }
        ips.push(ip);
    }
    let families = spec.ip_families.unwrap_or_default();
    let single = spec.ip_family_policy.as_deref() == Some("SingleStack");
    let preferred_v6 = families.first().map(String::as_str) == Some("IPv6");
    let mut cidrs: Vec<_> = cluster.service_cidrs.iter().collect();
    if preferred_v6 {
        cidrs.reverse();
    }
    if single {
        cidrs.truncate(1);
    }
    for cidr in cidrs {
        let same_family = |ip: &IpAddr| ip.is_ipv4() == matches!(cidr, ipnet::IpNet::V4(_));
        if ips.iter().any(same_family) || (single && !ips.is_empty()) {
            continue;
        }
        let kept = current.into_iter().flatten().copied().find(|ip| same_family(ip) && cidr.contains(ip));
        let ip = kept.or_else(|| cluster_ip(cidr, &name.to_string(), others));
        ips.push(ip.ok_or_else(|| {
            format!("service {name}: no address is left in {cidr}; use a larger serviceCIDR")
        })?);
    }
    Ok(ips)
}

fn document<T: Serialize>(version: &str, kind: &str, object: &T) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(object).context("cannot write an object as JSON")?;
    value["apiVersion"] = json!(version);
    value["kind"] = json!(kind);
    Ok(value)
}

/// The namespaces that were written, and those that other objects are in.
fn namespaces(state: &ClusterState) -> Vec<Namespace> {
    let objects = &state.objects;
    let mut namespaces = objects.namespaces.clone();
    let used = state
        .pods
        .keys()
        .chain(objects.services.keys())
        .chain(objects.deployments.keys())
        .chain(objects.endpoint_slices.keys());
    for name in used.map(|n| n.namespace.as_str()).chain(["default"]) {
        namespaces.entry(name.to_owned()).or_default();
    }
    for (name, namespace) in &mut namespaces {
        namespace.metadata.name = Some(name.clone());
        namespace.metadata.namespace = None;
        let labels = namespace.metadata.labels.get_or_insert_default();
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.clone());
    }
    namespaces.into_values().collect()
}

fn kube_node(node: &Node) -> KubeNode {
    let cidrs: Vec<String> = node.pod_cidrs.iter().map(|net| net.to_string()).collect();
    let mut labels = node.labels.clone();
    labels.entry("kubernetes.io/hostname".to_owned()).or_insert_with(|| node.name.clone());
    labels.entry("kubernetes.io/os".to_owned()).or_insert_with(|| "linux".to_owned());
    let annotations = node.internal_ips().into_iter().map(|ip| {
        let family = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
        (format!("network.cilium.io/{family}-cilium-host"), ip.to_string())
    });
    let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
    KubeNode {
        metadata: ObjectMeta {
            name: Some(node.name.clone()),
            labels: Some(labels),
            annotations: Some(annotations.collect()),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            pod_cidr: cidrs.first().cloned(),
            pod_cidrs: Some(cidrs),
            ..NodeSpec::default()
        }),
        status: Some(NodeStatus {
            addresses: Some(
                node.underlay_ips()
                    .map(|ip| address("InternalIP", ip.to_string()))
                    .chain([address("Hostname", node.name.clone())])
                    .collect(),
            ),
            conditions: Some(vec![NodeCondition {
                type_: "Ready".to_owned(),
                status: "True".to_owned(),
                ..NodeCondition::default()
            }]),
            ..NodeStatus::default()
        }),
    }
}

fn kube_pod(pod: &PodState, host: Option<&Node>) -> Pod {
    let mut spec = pod.spec.clone();
    spec.node_name = Some(pod.node.clone());
    spec.service_account_name.get_or_insert_with(|| "default".to_owned());
    let owner = pod.owner.as_ref().map(|deployment| OwnerReference {
        api_version: "apps/v1".to_owned(),
        kind: "Deployment".to_owned(),
        name: deployment.clone(),
        controller: Some(true),
        ..OwnerReference::default()
    });
    let truth = |ready: bool| if ready { "True" } else { "False" }.to_owned();
    let ready = pod.ready && pod.deleted.is_none();
    let condition = |kind: &str, status: bool| PodCondition {
        type_: kind.to_owned(),
        status: truth(status),
        ..PodCondition::default()
    };
    let started = Time(pod.created);
    let containers = pod.spec.containers.iter().map(|container| ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        image_id: String::new(),
        ready,
        started: Some(pod.ready),
        state: Some(if pod.ready {
            let running = ContainerStateRunning { started_at: Some(started.clone()) };
            ContainerState { running: Some(running), ..ContainerState::default() }
        } else {
            let reason = Some("ContainerCreating".to_owned());
            let waiting = ContainerStateWaiting { reason, ..ContainerStateWaiting::default() };
            ContainerState { waiting: Some(waiting), ..ContainerState::default() }
        }),
        ..ContainerStatus::default()
    });
    let host_ips = host.map(|node| node.underlay_ips().map(|ip| HostIP { ip: ip.to_string() }).collect());
    Pod {
        metadata: ObjectMeta {
            name: Some(pod.name.name.clone()),
            namespace: Some(pod.name.namespace.clone()),
            uid: Some(pod.uid.clone()),
            labels: Some(pod.labels.clone()),
            annotations: Some(pod.annotations.clone()).filter(|a| !a.is_empty()),
            creation_timestamp: Some(Time(pod.created)),
            deletion_timestamp: pod.deleted.map(Time),
            deletion_grace_period_seconds: pod.deleted.and(pod.spec.termination_grace_period_seconds),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: Some(PodStatus {
            phase: Some(if pod.ready || pod.deleted.is_some() { "Running" } else { "Pending" }.to_owned()),
            conditions: Some(vec![
                condition("PodScheduled", true),
                condition("Initialized", true),
                condition("ContainersReady", ready),
                condition("Ready", ready),
            ]),
            container_statuses: Some(containers.collect()),
            host_ip: host.map(|node| node.address.to_string()),
            host_ips,
            pod_ip: pod.ips.first().map(ToString::to_string),
            pod_ips: Some(pod.ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
            start_time: Some(Time(pod.created)),
            ..PodStatus::default()
        }),
    }
}

fn kube_service(name: &ObjectName, service: &Service, ips: Option<&Vec<IpAddr>>) -> Service {
    let mut service = service.clone();
    service.metadata.namespace = Some(name.namespace.clone());
    let spec = service.spec.get_or_insert_default();
    spec.type_.get_or_insert_with(|| "ClusterIP".to_owned());
    for port in spec.ports.iter_mut().flatten() {
        port.protocol.get_or_insert_with(|| "TCP".to_owned());
        port.target_port
            .get_or_insert(k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(port.port));
    }
    if let Some(ips) = ips {
        let family = |ip: &IpAddr| if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned();
        spec.cluster_ip = ips.first().map(ToString::to_string);
        spec.cluster_ips = Some(ips.iter().map(ToString::to_string).collect());
        spec.ip_families = Some(ips.iter().map(family).collect());
        let policy = if ips.len() > 1 { "PreferDualStack" } else { "SingleStack" };
        spec.ip_family_policy.get_or_insert_with(|| policy.to_owned());
    }
    service
}

#[cfg(test)]
#[path = "effective_tests.rs"]
mod tests;
