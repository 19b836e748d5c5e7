use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::record::{Port, PortMap};

use super::Backend;
use crate::objects::{IpFamily, Objects, Pod, Service, ServicePort, TargetPort};

/// Backends by the service's selector. Without one, nobody but slices can tell.
pub(super) fn backends(service: &Service, objects: &Objects) -> BTreeMap<IpAddr, Backend> {
    let mut backends = BTreeMap::new();
    if service.selector.is_none() {
        return backends;
    }
    for pod in objects.pods_in(&service.name.namespace).filter(|pod| selects(service, pod)) {
        let Some(backend) = backend(service, pod, objects) else { continue };
        for ip in addresses(service, pod) {
            backends.entry(ip).and_modify(|other| prefer(other, &backend)).or_insert_with(|| backend.clone());
        }
    }
    backends
}

/// Addresses of the pods that are to be backends, ready or not.
pub(super) fn expected(service: &Service, objects: &Objects) -> BTreeSet<IpAddr> {
    objects
        .pods_in(&service.name.namespace)
        .filter(|pod| selects(service, pod) && !pod.finished && !pod.terminating)
        .flat_map(|pod| addresses(service, pod))
        .collect()
}

/// Of each family a service uses a pod's first address only.
fn addresses(service: &Service, pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let first = |family: &IpFamily| pod.ips.iter().copied().find(|ip| IpFamily::of(*ip) == *family);
    service.families.iter().filter_map(first)
}

/// Whether the service's selector takes the pod, whatever its condition.
pub(crate) fn selects(service: &Service, pod: &Pod) -> bool {
    service
        .selector
        .as_ref()
        .is_some_and(|selector| selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value)))
}

fn backend(service: &Service, pod: &Pod, objects: &Objects) -> Option<Backend> {
    if pod.finished {
        return None;
    }
    let ready = service.publish_not_ready || (pod.ready && !pod.terminating);
    let state = super::state(ready, pod.ready, pod.terminating)?;
    let in_dns = pod.subdomain.as_deref() == Some(service.name.name.as_str());
    Some(Backend {
        ports: ports(service, pod),
        state,
        hostname: pod.hostname.clone().filter(|_| in_dns),
        node: pod.node.clone(),
        zone: super::zone_of(pod.node.as_deref(), objects),
    })
}

/// A pod that lacks a named port does without it; its other ports count.
fn ports(service: &Service, pod: &Pod) -> PortMap {
    service
        .ports
        .iter()
        .filter_map(|port| {
            let number = target(port, pod)?;
            Some((port.name.clone(), Port { protocol: port.protocol, port: number }))
        })
        .collect()
}

fn target(port: &ServicePort, pod: &Pod) -> Option<u16> {
    match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod
            .ports
            .iter()
            .find(|declared| declared.name == *name && declared.protocol == port.protocol)
            .map(|declared| declared.number),
    }
}

/// Two pods of one service with one address: host network pods on one node, or an address that was
/// given to a new pod before the old one is gone. One that is active counts more.
fn prefer(kept: &mut Backend, other: &Backend) {
    if other.state < kept.state {
        *kept = other.clone();
    } else if other.state == kept.state {
        for (name, port) in &other.ports {
            kept.ports.entry(name.clone()).or_insert(*port);
        }
    }
}
