use std::collections::BTreeSet;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;

use crate::endpoints::selects;
use crate::objects::{EndpointSlice, Node, Object, Objects, Pod};

/// What has to be computed again. More than needed is fine, less is not.
#[derive(Default)]
pub(super) struct Dirty {
    pub(super) nodes: BTreeSet<String>,
    pub(super) pods: BTreeSet<NamespacedName>,
    pub(super) ips: BTreeSet<IpAddr>,
    pub(super) services: BTreeSet<NamespacedName>,
}

impl Dirty {
    /// Marks all that may look different since one object has changed, which `objects` knows already.
    pub(super) fn mark(&mut self, before: Option<&Object>, after: Option<&Object>, objects: &Objects) {
        for object in [before, after].into_iter().flatten() {
            self.mark_object(object, objects);
        }
        self.mark_node(node(before), node(after), objects);
    }

    fn mark_object(&mut self, object: &Object, objects: &Objects) {
        match object {
            Object::Namespace(namespace) => {
                self.pods.extend(objects.pods_in(&namespace.name).map(|pod| pod.name.clone()));
            }
            Object::Pod(pod) => self.mark_pod(pod, objects),
            Object::Service(service) => {
                self.services.insert(service.name.clone());
            }
            Object::EndpointSlice(slice) => self.mark_slice(slice),
            // What of it differs decides: see `mark_node`.
            Object::Node(_) => {}
        }
    }

    fn mark_pod(&mut self, pod: &Pod, objects: &Objects) {
        self.pods.insert(pod.name.clone());
        let services = objects.services_in(&pod.name.namespace).filter(|service| selects(service, pod));
        self.services.extend(services.map(|service| service.name.clone()));
    }

    fn mark_slice(&mut self, slice: &EndpointSlice) {
        self.services.extend(slice.service.clone());
    }

    /// A node that reports its state changes often; what others take from it hardly ever.
    fn mark_node(&mut self, before: Option<&Node>, after: Option<&Node>, objects: &Objects) {
        let Some(name) = before.or(after).map(|node| &node.name) else { return };
        self.nodes.insert(name.clone());
        let tunnel = |node: Option<&Node>| node.map(|node| (node.tunnel_ip(), node.encryption_key));
        if tunnel(before) != tunnel(after) {
            for pod in objects.pods_on(name).filter_map(|pod| objects.pod(pod)) {
                self.ips.extend(&pod.ips);
            }
        }
        let zone = |node: Option<&Node>| node.and_then(Node::zone).map(str::to_owned);
        if zone(before) != zone(after) {
            // Which slices name the node is not indexed: zones of nodes do not change.
            self.services.extend(objects.services().map(|service| service.name.clone()));
        }
    }
}

fn node(object: Option<&Object>) -> Option<&Node> {
    match object {
        Some(Object::Node(node)) => Some(node),
        _ => None,
    }
}
