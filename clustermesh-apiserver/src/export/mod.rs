//! Facts in, keys out: what the cluster's etcd has to say about its objects.
//!
//! [`Exporter`] keeps the facts and the keys that follow from them. Each batch of changes marks what
//! may look different now (pods, addresses, services), computes those again from the facts alone, and
//! returns the keys that did change. What a key says never depends on the order of changes, but for
//! the numbers of identities, which last longer than the pods that need them.

mod dirty;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::key::{self, Kind, Layout};
use clustermesh_kvstore::record::{MAX_VALUE, Record};

use crate::identity::{self, Allocator, Exhausted};
use crate::objects::{Change, Object, ObjectKind, Objects, Pod};

use dirty::Dirty;

/// The cluster that is exported.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Name.
    pub name: ClusterName,
    /// ID.
    pub id: ClusterId,
}

/// A key of the etcd that changes: its value, or `None` if it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyChange {
    /// The whole key.
    pub key: String,
    /// The value.
    pub value: Option<Vec<u8>>,
}

/// Computes keys from objects, incrementally.
pub struct Exporter {
    cluster: Cluster,
    objects: Objects,
    identities: Allocator,
    /// The state of `identities` that is published.
    identities_revision: u64,
    /// For each pod with addresses of its own: its label string, which it holds an identity of.
    labels: BTreeMap<NamespacedName, String>,
    /// Pods that got no identity, to be tried again.
    starved: BTreeSet<NamespacedName>,
    /// Who says of itself to have an address. More than one for a moment when addresses are re-used.
    claims: BTreeMap<IpAddr, BTreeSet<Claim>>,
    published: BTreeMap<Kind, BTreeMap<String, Vec<u8>>>,
    prefixes: BTreeMap<Kind, String>,
    problems: Vec<Problem>,
}

/// Whose address it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    /// A node's own address in the pod network.
    Node(String),
    /// A pod's.
    Pod(NamespacedName),
}

/// Something that could not be exported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A pod is unreachable from other clusters for want of an identity.
    #[error("pod {pod} has no identity: {error}")]
    NoIdentity {
        /// The pod.
        pod: NamespacedName,
        /// Why.
        error: Exhausted,
    },
    /// etcd would refuse the value; the last one that fitted stays.
    #[error(
        "{key} would have {size} bytes, more than the {MAX_VALUE} that etcd takes: it keeps its last value"
    )]
    TooLarge {
        /// The key.
        key: String,
        /// Bytes of the value.
        size: usize,
    },
}

impl Exporter {
    /// The kinds of keys that come out.
    pub const KINDS: [Kind; 5] =
        [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::Services, Kind::LocalServices];

    /// An exporter without objects. What `identities` has adopted is published from the first batch on.
    pub fn new(cluster: Cluster, identities: Allocator) -> Self {
        let prefixes =
            Self::KINDS.map(|kind| (kind, key::data_prefix(kind, &cluster.name, Layout::State))).into();
        Self {
            cluster,
            objects: Objects::default(),
            identities,
            identities_revision: 0,
            labels: BTreeMap::new(),
            starved: BTreeSet::new(),
            claims: BTreeMap::new(),
            published: Self::KINDS.map(|kind| (kind, BTreeMap::new())).into(),
            prefixes,
            problems: Vec::new(),
        }
    }

    /// Applies changes of objects; returns the changes of keys.
    ///
    /// Upserts come before deletes, and identities before the addresses that refer to them.
    pub fn apply(&mut self, changes: Vec<Change>, now: Instant) -> Vec<KeyChange> {
        let mut dirty = Dirty::default();
        for change in changes {
            let (before, after) = self.objects.apply(change);
            if before != after {
                for object in [before.as_ref(), after.as_ref()].into_iter().flatten() {
                    self.claim(object, &mut dirty);
                }
                dirty.mark(before.as_ref(), after.as_ref(), &self.objects);
            }
        }
        self.recompute(dirty, now)
    }

    /// Lets time pass: frees identities that nobody has used for long.
    pub fn tick(&mut self, now: Instant) -> Vec<KeyChange> {
        let mut dirty = Dirty::default();
        if !self.identities.expire(now).is_empty() {
            dirty.pods = std::mem::take(&mut self.starved);
        }
        self.recompute(dirty, now)
    }

    /// What could not be exported since the last call.
    pub fn take_problems(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.problems)
    }

    /// All keys that should be there now, with their values.
    pub fn published(&self) -> impl Iterator<Item = (String, &[u8])> {
        self.published.iter().flat_map(|(kind, keys)| {
            let prefix = &self.prefixes[kind];
            keys.iter().map(move |(suffix, value)| (format!("{prefix}{suffix}"), value.as_slice()))
        })
    }

    /// How many keys of a kind there should be.
    pub fn published_count(&self, kind: Kind) -> usize {
        self.published.get(&kind).map_or(0, BTreeMap::len)
    }

    /// How many objects of a kind there are.
    pub fn object_count(&self, kind: ObjectKind) -> usize {
        self.objects.count(kind)
    }

    /// How many pods wait for an identity.
    pub fn starved_count(&self) -> usize {
        self.starved.len()
    }

    /// Enters or leaves the addresses of an object, whichever holds now.
    fn claim(&mut self, object: &Object, dirty: &mut Dirty) {
        let (claim, ips) = match object {
            Object::Node(node) => (Claim::Node(node.name.clone()), &node.cilium_internal_ips),
            Object::Pod(pod) => (Claim::Pod(pod.name.clone()), &pod.ips),
            _ => return,
        };
        for ip in ips {
            let holds = match &claim {
                Claim::Node(name) => {
                    self.objects.node(name).is_some_and(|node| node.cilium_internal_ips.contains(ip))
                }
                Claim::Pod(name) => {
                    self.objects.pod(name).is_some_and(|pod| pod.owns_its_ips() && pod.ips.contains(ip))
                }
            };
            if holds {
                self.claims.entry(*ip).or_default().insert(claim.clone());
            } else if let Some(claims) = self.claims.get_mut(ip) {
                claims.remove(&claim);
                if claims.is_empty() {
                    self.claims.remove(ip);
                }
            }
            dirty.ips.insert(*ip);
        }
    }

    fn recompute(&mut self, mut dirty: Dirty, now: Instant) -> Vec<KeyChange> {
        let mut out = Output::default();
        self.recompute_identities(&mut dirty, now, &mut out);
        for name in dirty.nodes {
            let record = self.objects.node(&name).map(|node| record::node(node, &self.cluster));
            self.publish(&name, record, &mut out);
        }
        for ip in dirty.ips {
            let record = self.ip_record(ip);
            self.publish(&ip.to_string(), record, &mut out);
        }
        for name in dirty.services {
            let service = self.objects.service(&name).filter(|service| !service.external_name);
            let local = service.map(|service| record::local_service(service, &self.objects, &self.cluster));
            let shared = service
                .zip(local.as_ref())
                .filter(|(service, _)| service.global && service.shared)
                .map(|(service, local)| record::shared_service(service, local));
            self.publish(&name.to_string(), local, &mut out);
            self.publish(&name.to_string(), shared, &mut out);
        }
        out.upserts.append(&mut out.deletes);
        out.upserts
    }

    /// Moves the dirty pods to the identities of their labels. Label sets come in order of their text,
    /// so that a restart that finds nothing in etcd gives the same numbers also where hashes collide.
    fn recompute_identities(&mut self, dirty: &mut Dirty, now: Instant, out: &mut Output) {
        let mut wanted: Vec<(Option<String>, NamespacedName)> = dirty
            .pods
            .iter()
            .map(|name| {
                let pod = self.objects.pod(name).filter(|pod| pod.owns_its_ips() && !pod.ips.is_empty());
                (pod.map(|pod| self.label_string(pod)), name.clone())
            })
            .collect();
        wanted.sort();
        for (labels, name) in wanted {
            if labels.is_none() || self.labels.get(&name) != labels.as_ref() {
                self.move_pod(name, labels, now, dirty);
            }
        }
        if self.identities_revision != self.identities.revision() {
            self.identities_revision = self.identities.revision();
            self.publish_identities(out);
        }
    }

    fn label_string(&self, pod: &Pod) -> String {
        let namespace = self.objects.namespace(&pod.name.namespace);
        identity::security_labels(pod, namespace, &self.cluster.name).to_string()
    }

    fn move_pod(&mut self, name: NamespacedName, labels: Option<String>, now: Instant, dirty: &mut Dirty) {
        if let Some(pod) = self.objects.pod(&name) {
            dirty.ips.extend(&pod.ips);
        }
        if let Some(old) = self.labels.remove(&name) {
            self.identities.release(&old, now);
        }
        self.starved.remove(&name);
        let Some(labels) = labels else { return };
        match self.identities.acquire(&labels) {
            Ok(_) => {
                self.labels.insert(name, labels);
            }
            Err(error) => {
                self.starved.insert(name.clone());
                self.problems.push(Problem::NoIdentity { pod: name, error });
            }
        }
    }

    /// New label sets are rare, so this compares all of them.
    fn publish_identities(&mut self, out: &mut Output) {
        let published = self.published.entry(Kind::Identities).or_default();
        let prefix = &self.prefixes[&Kind::Identities];
        let wanted: BTreeMap<String, &str> =
            self.identities.assignments().map(|(identity, labels)| (identity.to_string(), labels)).collect();
        published.retain(|suffix, _| {
            let keep = wanted.contains_key(suffix);
            if !keep {
                out.deletes.push(KeyChange { key: format!("{prefix}{suffix}"), value: None });
            }
            keep
        });
        for (suffix, labels) in wanted {
            if published.get(&suffix).is_none_or(|value| value != labels.as_bytes()) {
                let value = labels.as_bytes().to_vec();
                out.upserts.push(KeyChange { key: format!("{prefix}{suffix}"), value: Some(value.clone()) });
                published.insert(suffix, value);
            }
        }
    }

    fn ip_record(&self, ip: IpAddr) -> Option<clustermesh_kvstore::record::IpRecord> {
        match record::holder(self.claims.get(&ip)?, &self.objects)? {
            record::Holder::Node(node) => Some(record::node_ip(ip, node)),
            record::Holder::Pod(pod) => {
                let identity = self.identity_of(&pod.name)?;
                Some(record::pod_ip(ip, pod, identity, &self.objects))
            }
        }
    }

    fn identity_of(&self, pod: &NamespacedName) -> Option<Identity> {
        self.identities.find(self.labels.get(pod)?)
    }

    /// Compares with what was published under the suffix before.
    fn publish<R: Record>(&mut self, suffix: &str, record: Option<R>, out: &mut Output) {
        let published = self.published.entry(R::KIND).or_default();
        let key = || format!("{}{suffix}", self.prefixes[&R::KIND]);
        let Some(record) = record else {
            if published.remove(suffix).is_some() {
                out.deletes.push(KeyChange { key: key(), value: None });
            }
            return;
        };
        let value = record.encode();
        if value.len() > MAX_VALUE {
            self.problems.push(Problem::TooLarge { key: key(), size: value.len() });
        } else if published.get(suffix) != Some(&value) {
            out.upserts.push(KeyChange { key: key(), value: Some(value.clone()) });
            published.insert(suffix.to_owned(), value);
        }
    }
}

/// Changes in the order in which readers should see them.
#[derive(Default)]
struct Output {
    upserts: Vec<KeyChange>,
    deletes: Vec<KeyChange>,
}

#[cfg(test)]
mod tests;
