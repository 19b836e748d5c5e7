//! Which backends a service has: from its endpoint slices where it has some, else from its selector
//! and the pods, by the rules of Kubernetes' endpoint slice controller.
//!
//! Plain functions over [`Objects`]; nothing is kept.

mod selected;
mod sliced;

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::record::{BackendState, PortMap};

use crate::objects::{Objects, Service};

pub(crate) use selected::selects;

/// What is known of one backend address of a service.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend {
    /// Its port for each port name of the service. Numbers may differ between backends.
    pub ports: PortMap,
    /// Active, or terminating but still serving.
    pub state: BackendState,
    /// Host name in DNS, of headless services.
    pub hostname: Option<String>,
    /// Node that it runs on.
    pub node: Option<String>,
    /// Failure zone.
    pub zone: Option<String>,
}

/// The backends of a service that may get traffic, by address.
///
/// A pod that is not ready is absent; one that terminates and still serves is there, marked. A backend
/// that has none of the service's ports is left out, but of a headless service, where DNS does without.
pub fn backends(service: &Service, objects: &Objects) -> BTreeMap<IpAddr, Backend> {
    let mut backends = if service.external_name {
        BTreeMap::new()
    } else if objects.slices_of(&service.name).next().is_some() {
        sliced::backends(service, objects)
    } else {
        selected::backends(service, objects)
    };
    backends.retain(|_, backend| service.headless || !backend.ports.is_empty());
    backends
}

/// Addresses that the service would have as backends if all its pods were ready.
pub fn expected(service: &Service, objects: &Objects) -> usize {
    if service.external_name {
        return 0;
    }
    match objects.slices_of(&service.name).next() {
        Some(_) => sliced::expected(service, objects).len(),
        None => selected::expected(service, objects).len(),
    }
}

/// The zone of a node that is known.
fn zone_of(node: Option<&str>, objects: &Objects) -> Option<String> {
    objects.node(node?)?.zone().map(str::to_owned)
}

/// How a backend with these conditions takes part; `None` if it does not.
fn state(ready: bool, serving: bool, terminating: bool) -> Option<BackendState> {
    match (ready, serving && terminating) {
        (true, _) => Some(BackendState::Active),
        (false, true) => Some(BackendState::Terminating),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests;
