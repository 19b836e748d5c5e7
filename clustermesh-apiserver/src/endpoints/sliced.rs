use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Backend;
use crate::objects::{EndpointSlice, Objects, Service};

/// Backends by the service's slices.
pub(super) fn backends(service: &Service, objects: &Objects) -> BTreeMap<IpAddr, Backend> {
    let mut backends = BTreeMap::new();
    for slice in objects.slices_of(&service.name) {
        add(slice, objects, &mut backends);
    }
    backends
}

/// Addresses of the endpoints that are to be backends, ready or not.
pub(super) fn expected(service: &Service, objects: &Objects) -> BTreeSet<IpAddr> {
    let endpoints = objects.slices_of(&service.name).flat_map(|slice| &slice.endpoints);
    endpoints
        .filter(|endpoint| !endpoint.terminating)
        .flat_map(|endpoint| &endpoint.addresses)
        .copied()
        .collect()
}

/// A service with many ports may have several slices that name the same address: its ports add up,
/// and one active entry makes it active.
fn add(slice: &EndpointSlice, objects: &Objects, backends: &mut BTreeMap<IpAddr, Backend>) {
    for endpoint in &slice.endpoints {
        let Some(state) = super::state(endpoint.ready, endpoint.serving, endpoint.terminating) else {
            continue;
        };
        let zone = endpoint.zone.clone().or_else(|| super::zone_of(endpoint.node.as_deref(), objects));
        for ip in &endpoint.addresses {
            let backend = backends.entry(*ip).or_insert_with(|| Backend {
                ports: slice.ports.clone(),
                state,
                hostname: endpoint.hostname.clone(),
                node: endpoint.node.clone(),
                zone: zone.clone(),
            });
            backend.state = backend.state.min(state);
            for (name, port) in &slice.ports {
                backend.ports.entry(name.clone()).or_insert(*port);
            }
        }
    }
}
