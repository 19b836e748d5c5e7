use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use clustermesh_kvstore::cluster::NamespacedName;

use super::{Change, EndpointSlice, Namespace, Node, Object, ObjectKey, ObjectKind, Pod, Service};

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

    /// How many objects of a kind there are.
    pub fn count(&self, kind: ObjectKind) -> usize {
        match kind {
            ObjectKind::Namespace => self.namespaces.len(),
            ObjectKind::Node => self.nodes.len(),
            ObjectKind::Pod => self.pods.len(),
            ObjectKind::Service => self.services.len(),
            ObjectKind::EndpointSlice => self.slices.len(),
        }
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
