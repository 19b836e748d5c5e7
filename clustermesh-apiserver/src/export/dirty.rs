use std::collections::BTreeSet;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::PolicyName;

use crate::endpoints::selects;
use crate::objects::{EndpointSlice, Namespace, Node, Object, Objects, Pod};

/// What has to be computed again. More than needed is fine, less is not.
#[derive(Default)]
pub(super) struct Dirty {
    pub(super) nodes: BTreeSet<String>,
    pub(super) pods: BTreeSet<NamespacedName>,
    pub(super) ips: BTreeSet<IpAddr>,
    pub(super) services: BTreeSet<NamespacedName>,
    pub(super) policies: BTreeSet<PolicyName>,
    /// Of Cilium's identities, the names.
    pub(super) cilium_identities: BTreeSet<String>,
    /// Which identities are shown at all may have changed.
    pub(super) identities: bool,
}

impl Dirty {
    /// Marks all that may look different since one object has changed, which `objects` knows already.
    pub(super) fn mark(&mut self, before: Option<&Object>, after: Option<&Object>, objects: &Objects) {
        for object in [before, after].into_iter().flatten() {
            self.mark_object(object, objects);
        }
        self.mark_node(node(before), node(after), objects);
        if global(before) != global(after)
            && let Some(namespace) = namespace(before).or(namespace(after))
        {
            self.mark_contents(&namespace.name, objects);
        }
    }

    /// Marks everything in a namespace.
    fn mark_contents(&mut self, namespace: &str, objects: &Objects) {
        self.identities = true;
        self.pods.extend(objects.pods_in(namespace).map(|pod| pod.name.clone()));
        self.ips.extend(objects.pods_in(namespace).flat_map(|pod| &pod.ips));
        self.services.extend(objects.services_in(namespace).map(|service| service.name.clone()));
        self.ips.extend(objects.cilium_endpoints_in(namespace).flat_map(|endpoint| &endpoint.ips));
        let identities = objects.cilium_identities().filter(|o| o.namespace.as_deref() == Some(namespace));
        self.cilium_identities.extend(identities.map(|identity| identity.name.clone()));
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
            Object::CiliumIdentity(identity) => {
                self.cilium_identities.insert(identity.name.clone());
            }
            Object::CiliumNode(node) => {
                self.nodes.insert(node.record.name.clone());
            }
            Object::Policy(policy) => {
                self.policies.insert(policy.name.clone());
            }
            // Who owns which address tells what changes: see `Owners`.
            Object::CiliumEndpoint(_) | Object::CiliumEndpointSlice(_) => {}
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

fn namespace(object: Option<&Object>) -> Option<&Namespace> {
    match object {
        Some(Object::Namespace(namespace)) => Some(namespace),
        _ => None,
    }
}

/// What a namespace says of itself; that it is not there is something else again.
fn global(object: Option<&Object>) -> Option<Option<bool>> {
    namespace(object).map(|namespace| namespace.global)
}

fn node(object: Option<&Object>) -> Option<&Node> {
    match object {
        Some(Object::Node(node)) => Some(node),
        _ => None,
    }
}
