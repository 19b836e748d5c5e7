//! Facts in, keys out: what the cluster's etcd has to say about its objects.
//!
//! [`Exporter`] keeps the facts and the keys that follow from them. Each batch of changes marks what
//! may look different now (pods, addresses, services), computes those again from the facts alone, and
//! returns the keys that did change. What a key says never depends on the order of changes, but for
//! the numbers of identities, which last longer than the pods that need them, and who of several has an
//! address.
//!
//! Where Cilium runs, its own objects say what identities, addresses and nodes there are; [`Basis`] tells
//! whose word counts. [`Rules`] say what of a cluster other clusters get to know.

mod announced;
mod basis;
mod dirty;
mod identities;
mod owners;
mod policies;
mod record;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, NamespacedName};
use clustermesh_kvstore::key::{self, Kind, Layout};
use clustermesh_kvstore::record::{MAX_VALUE, PolicyName, Record};

use crate::endpoints;
use crate::identity::{Allocator, Exhausted};
use crate::objects::{Change, Gap, Object, ObjectKind, Objects};

use announced::Announced;
use basis::Choice;
use dirty::Dirty;
use owners::Owners;

pub use announced::AnnouncementError;
pub use basis::Basis;
pub use rules::Rules;

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
    /// The value; the exporter keeps it too.
    pub value: Option<Arc<[u8]>>,
}

/// Computes keys from objects, incrementally.
pub struct Exporter {
    cluster: Cluster,
    rules: Rules,
    objects: Objects,
    choice: Choice,
    identities: Allocator,
    /// The state of `identities` that is published.
    identities_revision: u64,
    /// For each pod with addresses of its own: its label string, which it holds an identity of.
    labels: BTreeMap<NamespacedName, String>,
    /// Pods that got no identity, to be tried again.
    starved: BTreeSet<NamespacedName>,
    /// Who says of itself to have an address. More than one for a moment when addresses are re-used.
    claims: BTreeMap<IpAddr, BTreeSet<Claim>>,
    /// The same of Cilium's endpoints.
    owners: Owners,
    announced: Announced,
    published: BTreeMap<Kind, BTreeMap<String, Arc<[u8]>>>,
    /// Keys that stand elsewhere now, and when they go; see [`MOVE`].
    moved: BTreeMap<(Kind, String), Instant>,
    prefixes: BTreeMap<Kind, String>,
    /// Parts of policies that are not understood.
    gaps: BTreeMap<PolicyName, Vec<Gap>>,
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
    /// What an agent says of its node does not count.
    #[error("announcement of node {node:?}: {error}")]
    Announcement {
        /// The node, as the key names it.
        node: String,
        /// Why not.
        error: AnnouncementError,
    },
    /// A part of a policy is not understood.
    #[error("policy {policy}: {gap}")]
    Policy {
        /// The policy.
        policy: PolicyName,
        /// What it is, and what becomes of it.
        gap: Gap,
    },
}

impl Exporter {
    /// The kinds of keys that come out.
    pub const KINDS: [Kind; 8] = [
        Kind::Nodes,
        Kind::Identities,
        Kind::LocalIdentities,
        Kind::Ip,
        Kind::LocalIp,
        Kind::Services,
        Kind::LocalServices,
        Kind::LocalPolicies,
    ];

    /// An exporter without objects. What `identities` has adopted is published from the first batch on.
    pub fn new(cluster: Cluster, identities: Allocator, rules: Rules) -> Self {
        let prefixes =
            Self::KINDS.map(|kind| (kind, key::data_prefix(kind, &cluster.name, Layout::State))).into();
        Self {
            cluster,
            rules,
            objects: Objects::default(),
            choice: Choice::new(),
            identities,
            identities_revision: 0,
            labels: BTreeMap::new(),
            starved: BTreeSet::new(),
            claims: BTreeMap::new(),
            owners: Owners::default(),
            announced: Announced::default(),
            published: Self::KINDS.map(|kind| (kind, BTreeMap::new())).into(),
            moved: BTreeMap::new(),
            prefixes,
            gaps: BTreeMap::new(),
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
                self.owners.update(before.as_ref(), after.as_ref(), &mut dirty.ips);
                dirty.mark(before.as_ref(), after.as_ref(), &self.objects);
            }
        }
        if let Some(before) = self.choice.decide(&self.objects, now) {
            self.start_over(before, now, &mut dirty);
        }
        self.recompute(dirty, now)
    }

    /// Lets time pass: frees identities that nobody has used for long, and settles whose word counts.
    pub fn tick(&mut self, now: Instant) -> Vec<KeyChange> {
        let mut dirty = Dirty::default();
        if !self.identities.expire(now).is_empty() {
            dirty.pods = std::mem::take(&mut self.starved);
        }
        if self.choice.is_decided()
            && let Some(before) = self.choice.decide(&self.objects, now)
        {
            self.start_over(before, now, &mut dirty);
        }
        let mut changes = self.recompute(dirty, now);
        let due: Vec<_> = self.moved.extract_if(.., |_, at| *at <= now).map(|(key, _)| key).collect();
        for (kind, suffix) in due {
            changes.extend(self.withdraw(kind, &suffix));
        }
        changes
    }

    /// An agent says this of its node; none: no more. Returns the changes of keys.
    pub fn announced(&mut self, node: &str, value: Option<&[u8]>, now: Instant) -> Vec<KeyChange> {
        match self.announced.take(&self.cluster.name, node, value) {
            Ok(true) => {
                let nodes = BTreeSet::from([node.to_owned()]);
                self.recompute(Dirty { nodes, ..Dirty::default() }, now)
            }
            Ok(false) => Vec::new(),
            Err(error) => {
                self.problems.push(Problem::Announcement { node: node.to_owned(), error });
                Vec::new()
            }
        }
    }

    /// Announcements whose nodes have been gone for long: names of the nodes.
    pub fn orphaned_announcements(&mut self, now: Instant) -> Vec<String> {
        let objects = &self.objects;
        let is_node = |name: &str| objects.node(name).is_some() || objects.cilium_node(name).is_some();
        self.announced.orphans(is_node, now)
    }

    /// What could not be exported since the last call.
    pub fn take_problems(&mut self) -> Vec<Problem> {
        std::mem::take(&mut self.problems)
    }

    /// All keys that should be there now, with their values.
    pub fn published(&self) -> impl Iterator<Item = (String, &[u8])> {
        self.published.iter().flat_map(|(kind, keys)| {
            let prefix = &self.prefixes[kind];
            keys.iter().map(move |(suffix, value)| (format!("{prefix}{suffix}"), &**value))
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
        if !self.choice.is_frozen() {
            self.recompute_identities(&mut dirty, now, &mut out);
            for name in dirty.nodes {
                let record = self.node_record(&name);
                self.publish(&name, record, &mut out);
            }
            for ip in dirty.ips {
                let suffix = ip.to_string();
                match self.ip_record(ip) {
                    Some((record, shown)) => {
                        self.publish_in(ADDRESSES, shown, &suffix, record.encode(), now, &mut out);
                    }
                    None => self.withdraw_all(ADDRESSES, &suffix, &mut out),
                }
            }
        }
        for name in dirty.services {
            self.recompute_service(&name, &mut out);
        }
        for name in dirty.policies {
            self.recompute_policy(&name, &mut out);
        }
        out.upserts.append(&mut out.deletes);
        out.upserts
    }

    fn node_record(&self, name: &str) -> Option<clustermesh_kvstore::record::Node> {
        let mut record = match self.choice.current() {
            Basis::Pods => record::node(self.objects.node(name)?, &self.cluster),
            Basis::Endpoints | Basis::Slices => {
                record::cilium_node(self.objects.cilium_node(name)?, &self.cluster)
            }
        };
        self.announced.complete(&mut record);
        Some(record)
    }

    /// What there is to say of an address, and whether other clusters get to know.
    fn ip_record(&self, ip: IpAddr) -> Option<(clustermesh_kvstore::record::IpRecord, bool)> {
        let basis = self.choice.current();
        let shows = |namespace: &str| self.rules.shows(namespace, &self.objects);
        if basis != Basis::Pods {
            let owners = || self.owners.of(ip, basis, &self.objects);
            let shown = owners().find(|endpoint| shows(&endpoint.name.namespace));
            let endpoint = shown.or_else(|| owners().next())?;
            return Some((record::cilium_ip(ip, endpoint), shown.is_some()));
        }
        match record::holder(self.claims.get(&ip)?, &self.objects)? {
            record::Holder::Node(node) => Some((record::node_ip(ip, node), true)),
            record::Holder::Pod(pod) => {
                let identity = self.identity_of(&pod.name)?;
                Some((record::pod_ip(ip, pod, identity, &self.objects), shows(&pod.name.namespace)))
            }
        }
    }

    fn recompute_service(&mut self, name: &NamespacedName, out: &mut Output) {
        let service = self.objects.service(name);
        let service = service.filter(|service| !service.external_name && !rules::is_pseudo_service(name));
        let shown = self.rules.shows(&name.namespace, &self.objects);
        let local = service.map(|service| {
            let by_selector = !self.rules.complete || self.objects.slices_of(name).next().is_some();
            let backends = match by_selector {
                true => endpoints::backends(service, &self.objects),
                false => BTreeMap::new(),
            };
            let expected = || endpoints::expected(service, &self.objects);
            record::local_service(service, shown, backends, expected, &self.cluster)
        });
        let shared = service
            .zip(local.as_ref())
            .filter(|(_, local)| local.global && local.shared)
            .map(|(service, local)| record::shared_service(service, local));
        self.publish(&name.to_string(), local, out);
        self.publish(&name.to_string(), shared, out);
    }

    /// The basis is another one than before: everything that depends on it is to be told anew. What both
    /// say alike stays as it is, and what only the new one says comes before what only the old one said
    /// goes.
    fn start_over(&mut self, before: Basis, now: Instant, dirty: &mut Dirty) {
        tracing::info!(now = ?self.choice.current(), ?before, "another basis for identities, addresses, nodes");
        if before == Basis::Pods {
            for labels in std::mem::take(&mut self.labels).into_values() {
                self.identities.release(&labels, now);
            }
            self.starved.clear();
        }
        if self.choice.current() == Basis::Pods {
            self.adopt_published(now);
        }
        let published = |kind| self.published.get(&kind).into_iter().flat_map(BTreeMap::keys);
        dirty.identities = true;
        dirty.cilium_identities.extend(IDENTITIES.into_iter().flat_map(published).cloned());
        dirty
            .cilium_identities
            .extend(self.objects.cilium_identities().map(|identity| identity.name.clone()));
        dirty.pods.extend(self.objects.pods().map(|pod| pod.name.clone()));
        dirty.nodes.extend(published(Kind::Nodes).cloned());
        dirty.nodes.extend(self.objects.nodes().map(|node| node.name.clone()));
        dirty.nodes.extend(self.objects.cilium_nodes().map(|node| node.record.name.clone()));
        dirty.ips.extend(
            ADDRESSES.into_iter().flat_map(published).filter_map(|suffix| suffix.parse::<IpAddr>().ok()),
        );
        dirty.ips.extend(self.claims.keys().copied().chain(self.owners.ips()));
    }

    /// Compares with what was published under the suffix before.
    fn publish<R: Record>(&mut self, suffix: &str, record: Option<R>, out: &mut Output) {
        match record {
            Some(record) => self.put(R::KIND, suffix, record.encode(), out),
            None => out.deletes.extend(self.withdraw(R::KIND, suffix)),
        }
    }

    /// Publishes in one of two places: where others look too if it is `shown`, or where only the own
    /// cluster's agents do. If it stood in the other one, it goes from there a little later.
    fn publish_in(
        &mut self,
        [public, private]: [Kind; 2],
        shown: bool,
        suffix: &str,
        value: Vec<u8>,
        now: Instant,
        out: &mut Output,
    ) {
        let (kind, other) = if shown { (public, private) } else { (private, public) };
        self.put(kind, suffix, value, out);
        self.moved.remove(&(kind, suffix.to_owned()));
        if self.published.get(&other).is_some_and(|keys| keys.contains_key(suffix)) {
            self.moved.entry((other, suffix.to_owned())).or_insert(now + MOVE);
        }
    }

    fn withdraw_all(&mut self, kinds: [Kind; 2], suffix: &str, out: &mut Output) {
        out.deletes.extend(kinds.into_iter().filter_map(|kind| self.withdraw(kind, suffix)));
    }

    fn withdraw(&mut self, kind: Kind, suffix: &str) -> Option<KeyChange> {
        self.moved.remove(&(kind, suffix.to_owned()));
        self.published.get_mut(&kind)?.remove(suffix)?;
        Some(KeyChange { key: format!("{}{suffix}", self.prefixes[&kind]), value: None })
    }

    fn put(&mut self, kind: Kind, suffix: &str, value: Vec<u8>, out: &mut Output) {
        let published = self.published.entry(kind).or_default();
        let key = || format!("{}{suffix}", self.prefixes[&kind]);
        if value.len() > MAX_VALUE {
            self.problems.push(Problem::TooLarge { key: key(), size: value.len() });
        } else if published.get(suffix).is_none_or(|known| **known != *value) {
            let value: Arc<[u8]> = value.into();
            out.upserts.push(KeyChange { key: key(), value: Some(Arc::clone(&value)) });
            published.insert(suffix.to_owned(), value);
        }
    }
}

/// Where addresses and identities stand: for everybody, and for the own cluster's agents alone.
const ADDRESSES: [Kind; 2] = [Kind::Ip, Kind::LocalIp];
const IDENTITIES: [Kind; 2] = [Kind::Identities, Kind::LocalIdentities];

/// What moves between the two stands in both this long: agents follow them by two watches, of which
/// either may be behind, and must not see it gone.
const MOVE: Duration = Duration::from_secs(1);

/// Changes in the order in which readers should see them.
#[derive(Default)]
struct Output {
    upserts: Vec<KeyChange>,
    deletes: Vec<KeyChange>,
}

#[cfg(test)]
mod cilium_tests;
#[cfg(test)]
mod tests;
