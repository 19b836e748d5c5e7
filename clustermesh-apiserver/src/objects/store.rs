use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::record::{PolicyKind, PolicyName};

use super::{
    Change, CiliumEndpoint, CiliumEndpointSlice, CiliumIdentity, CiliumNode, EndpointSlice, Namespace, Node,
    Object, ObjectKey, ObjectKind, Pod, Policy, Service,
};

/// All facts, with the look-ups that computing records needs. Maps are ordered by namespace first,
/// so that everything of one namespace is one range.
#[derive(Default)]
pub struct Objects {
    namespaces: BTreeMap<String, Arc<Namespace>>,
    nodes: BTreeMap<String, Arc<Node>>,
    pods: BTreeMap<NamespacedName, Arc<Pod>>,
    services: BTreeMap<NamespacedName, Arc<Service>>,
    slices: BTreeMap<NamespacedName, Arc<EndpointSlice>>,
    slices_of: BTreeMap<NamespacedName, BTreeSet<NamespacedName>>,
    pods_on: BTreeMap<String, BTreeSet<NamespacedName>>,
    cilium_identities: BTreeMap<String, Arc<CiliumIdentity>>,
    cilium_endpoints: BTreeMap<NamespacedName, Arc<CiliumEndpoint>>,
    cilium_slices: BTreeMap<String, Arc<CiliumEndpointSlice>>,
    cilium_nodes: BTreeMap<String, Arc<CiliumNode>>,
    policies: BTreeMap<PolicyKind, BTreeMap<NamespacedName, Arc<Policy>>>,
}

impl Objects {
    /// Applies a change; returns the object before and after it. Equal ones mean: nothing happened.
    pub fn apply(&mut self, change: Change) -> (Option<Object>, Option<Object>) {
        match change {
            Change::Upsert(object) => (self.insert(object.clone()), Some(object)),
            Change::Delete(key) => (self.remove(&key), None),
        }
    }

    fn insert(&mut self, object: Object) -> Option<Object> {
        match object {
            Object::Namespace(o) => self.namespaces.insert(o.name.clone(), o).map(Object::Namespace),
            Object::Node(o) => self.nodes.insert(o.name.clone(), o).map(Object::Node),
            Object::Service(o) => self.services.insert(o.name.clone(), o).map(Object::Service),
            Object::CiliumIdentity(o) => {
                self.cilium_identities.insert(o.name.clone(), o).map(Object::CiliumIdentity)
            }
            Object::CiliumEndpoint(o) => {
                self.cilium_endpoints.insert(o.name.clone(), o).map(Object::CiliumEndpoint)
            }
            Object::CiliumEndpointSlice(o) => {
                self.cilium_slices.insert(o.name.clone(), o).map(Object::CiliumEndpointSlice)
            }
            Object::CiliumNode(o) => {
                self.cilium_nodes.insert(o.record.name.clone(), o).map(Object::CiliumNode)
            }
            Object::Policy(o) => {
                let PolicyName { kind, namespace, name } = o.name.clone();
                let of_kind = self.policies.entry(kind).or_default();
                of_kind.insert(NamespacedName { namespace, name }, o).map(Object::Policy)
            }
            Object::Pod(o) => {
                let old = self.pods.insert(o.name.clone(), Arc::clone(&o));
                if let Some(old) = &old {
                    unindex(&mut self.pods_on, old.node.as_ref(), &old.name);
                }
                index(&mut self.pods_on, o.node.as_ref(), &o.name);
                old.map(Object::Pod)
            }
            Object::EndpointSlice(o) => {
                let old = self.slices.insert(o.name.clone(), Arc::clone(&o));
                if let Some(old) = &old {
                    unindex(&mut self.slices_of, old.service.as_ref(), &old.name);
                }
                index(&mut self.slices_of, o.service.as_ref(), &o.name);
                old.map(Object::EndpointSlice)
            }
        }
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        match key.kind {
            ObjectKind::Namespace => self.namespaces.remove(&key.name.name).map(Object::Namespace),
            ObjectKind::Node => self.nodes.remove(&key.name.name).map(Object::Node),
            ObjectKind::Service => self.services.remove(&key.name).map(Object::Service),
            ObjectKind::CiliumIdentity => {
                self.cilium_identities.remove(&key.name.name).map(Object::CiliumIdentity)
            }
            ObjectKind::CiliumEndpoint => self.cilium_endpoints.remove(&key.name).map(Object::CiliumEndpoint),
            ObjectKind::CiliumEndpointSlice => {
                self.cilium_slices.remove(&key.name.name).map(Object::CiliumEndpointSlice)
            }
            ObjectKind::CiliumNode => self.cilium_nodes.remove(&key.name.name).map(Object::CiliumNode),
            ObjectKind::NetworkPolicy => self.remove_policy(PolicyKind::Network, &key.name),
            ObjectKind::CiliumNetworkPolicy => self.remove_policy(PolicyKind::Cilium, &key.name),
            ObjectKind::CiliumClusterwideNetworkPolicy => {
                self.remove_policy(PolicyKind::CiliumClusterwide, &key.name)
            }
            ObjectKind::Pod => {
                let old = self.pods.remove(&key.name)?;
                unindex(&mut self.pods_on, old.node.as_ref(), &old.name);
                Some(Object::Pod(old))
            }
            ObjectKind::EndpointSlice => {
                let old = self.slices.remove(&key.name)?;
                unindex(&mut self.slices_of, old.service.as_ref(), &old.name);
                Some(Object::EndpointSlice(old))
            }
        }
    }

    fn remove_policy(&mut self, kind: PolicyKind, name: &NamespacedName) -> Option<Object> {
        self.policies.get_mut(&kind)?.remove(name).map(Object::Policy)
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: ObjectKind) -> usize {
        match kind {
            ObjectKind::Namespace => self.namespaces.len(),
            ObjectKind::Node => self.nodes.len(),
            ObjectKind::Pod => self.pods.len(),
            ObjectKind::Service => self.services.len(),
            ObjectKind::EndpointSlice => self.slices.len(),
            ObjectKind::CiliumIdentity => self.cilium_identities.len(),
            ObjectKind::CiliumEndpoint => self.cilium_endpoints.len(),
            ObjectKind::CiliumEndpointSlice => self.cilium_slices.len(),
            ObjectKind::CiliumNode => self.cilium_nodes.len(),
            ObjectKind::NetworkPolicy => self.count_policies(PolicyKind::Network),
            ObjectKind::CiliumNetworkPolicy => self.count_policies(PolicyKind::Cilium),
            ObjectKind::CiliumClusterwideNetworkPolicy => self.count_policies(PolicyKind::CiliumClusterwide),
        }
    }

    fn count_policies(&self, kind: PolicyKind) -> usize {
        self.policies.get(&kind).map_or(0, BTreeMap::len)
    }

    /// A policy.
    pub fn policy(&self, name: &PolicyName) -> Option<&Policy> {
        let PolicyName { kind, namespace, name } = name.clone();
        self.policies.get(&kind)?.get(&NamespacedName { namespace, name }).map(Arc::as_ref)
    }

    /// A namespace.
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name).map(Arc::as_ref)
    }

    /// A node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(Arc::as_ref)
    }

    /// A pod.
    pub fn pod(&self, name: &NamespacedName) -> Option<&Pod> {
        self.pods.get(name).map(Arc::as_ref)
    }

    /// A service.
    pub fn service(&self, name: &NamespacedName) -> Option<&Service> {
        self.services.get(name).map(Arc::as_ref)
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().map(Arc::as_ref)
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(Arc::as_ref)
    }

    /// An identity of Cilium's.
    pub fn cilium_identity(&self, name: &str) -> Option<&CiliumIdentity> {
        self.cilium_identities.get(name).map(Arc::as_ref)
    }

    /// All identities of Cilium's.
    pub fn cilium_identities(&self) -> impl Iterator<Item = &CiliumIdentity> {
        self.cilium_identities.values().map(Arc::as_ref)
    }

    /// An endpoint of Cilium's.
    pub fn cilium_endpoint(&self, name: &NamespacedName) -> Option<&CiliumEndpoint> {
        self.cilium_endpoints.get(name).map(Arc::as_ref)
    }

    /// The endpoints of Cilium's in a namespace, in objects of their own or in slices.
    pub fn cilium_endpoints_in(&self, namespace: &str) -> impl Iterator<Item = &CiliumEndpoint> {
        let sliced = self.cilium_slices.values().flat_map(|slice| &slice.endpoints);
        let wanted = namespace.to_owned();
        in_namespace(&self.cilium_endpoints, namespace)
            .chain(sliced.filter(move |endpoint| endpoint.name.namespace == wanted))
    }

    /// A slice of Cilium's endpoints.
    pub fn cilium_slice(&self, name: &str) -> Option<&CiliumEndpointSlice> {
        self.cilium_slices.get(name).map(Arc::as_ref)
    }

    /// A node of Cilium's.
    pub fn cilium_node(&self, name: &str) -> Option<&CiliumNode> {
        self.cilium_nodes.get(name).map(Arc::as_ref)
    }

    /// All nodes of Cilium's.
    pub fn cilium_nodes(&self) -> impl Iterator<Item = &CiliumNode> {
        self.cilium_nodes.values().map(Arc::as_ref)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(Arc::as_ref)
    }

    /// The pods of a namespace, by name.
    pub fn pods_in(&self, namespace: &str) -> impl Iterator<Item = &Pod> {
        in_namespace(&self.pods, namespace)
    }

    /// The services of a namespace, by name.
    pub fn services_in(&self, namespace: &str) -> impl Iterator<Item = &Service> {
        in_namespace(&self.services, namespace)
    }

    /// The pods that are bound to a node.
    pub fn pods_on(&self, node: &str) -> impl Iterator<Item = &NamespacedName> {
        self.pods_on.get(node).into_iter().flatten()
    }

    /// The endpoint slices of a service, by name.
    pub fn slices_of(&self, service: &NamespacedName) -> impl Iterator<Item = &EndpointSlice> {
        let names = self.slices_of.get(service).into_iter().flatten();
        names.filter_map(|name| self.slices.get(name)).map(Arc::as_ref)
    }
}

fn in_namespace<'a, T>(
    map: &'a BTreeMap<NamespacedName, Arc<T>>,
    namespace: &str,
) -> impl Iterator<Item = &'a T> {
    let first = NamespacedName { namespace: namespace.to_owned(), name: String::new() };
    let wanted = first.namespace.clone();
    map.range(first..)
        .take_while(move |(name, _)| name.namespace == wanted)
        .map(|(_, object)| object.as_ref())
}

fn index<K: Ord + Clone>(
    map: &mut BTreeMap<K, BTreeSet<NamespacedName>>,
    key: Option<&K>,
    name: &NamespacedName,
) {
    if let Some(key) = key {
        map.entry(key.clone()).or_default().insert(name.clone());
    }
}

fn unindex<K: Ord>(map: &mut BTreeMap<K, BTreeSet<NamespacedName>>, key: Option<&K>, name: &NamespacedName) {
    let Some(key) = key else { return };
    if let Some(names) = map.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            map.remove(key);
        }
    }
}
