//! The state of the whole mesh as this node sees it, and the tables that follow from it.
//!
//! In: facts about clusters (records that passed the import policy, begin and end of their lists,
//! clusters that joined or went) and about this node's interfaces. Out: [`Changes`], the keys whose
//! desired value differs from before. No I/O, no clock.
//!
//! What a predecessor left in the kernel is the mesh's first state: each restored entry counts as a
//! claim of its cluster that nobody has confirmed. It goes when that cluster's list of that kind is
//! complete without it, or when no configured cluster has that ID; never before. So the writer behind
//! this needs to know nothing of pruning: it only ever installs differences.

mod addresses;
mod endpoint;
mod ends;
mod fact;
mod lists;
mod lookup;
mod moves;
mod placement;
mod policed;
mod records;
mod routes;
mod service;
mod topology;
mod translate;
mod underlay;
mod view;
mod wanted;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{LocalService, Nearness};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ebpf_global_svc::abi::{ClusterState, IpKey, IpValue, cluster_state};

use crate::desired::{Changes, Restored};
use crate::policy::Policies;
use crate::tunnels::{Tunnels, UnderlayProtocol};
use crate::wire_key;
use endpoint::Endpoints;
use placement::Placement;
use records::{Change, Records};
use service::{Here, Services};
use topology::Topology;
use translate::Translations;
use underlay::Underlay;

pub use fact::{Fact, FactKey, Link, Links, Macs, NodeFact, RemoteService};
pub use lookup::InUse;
pub use moves::Work;
pub use placement::PlacementRules;
pub use service::{LeftOut, LetIn};
pub use topology::Conflict;
pub use view::Counts;

/// Merged state of all clusters.
#[derive(Debug)]
pub struct Mesh {
    own: u16,
    node_name: String,
    /// Of the other clusters.
    names: BTreeMap<u16, ClusterName>,
    clusters: BTreeMap<u16, Records>,
    topology: Topology,
    own_node_changed: bool,
    /// This node's, as its record says.
    zone: Option<String>,
    ipcache: HashMap<IpKey, Option<IpValue>>,
    placement: Placement,
    translations: Translations,
    endpoints: Endpoints,
    services: Services,
    policies: Policies,
    /// Clusters that are not healthy; what they are in the kernel.
    states: BTreeMap<u16, ClusterState>,
    changed_states: BTreeSet<u16>,
    /// Removals of entries that make no sense on this node, restored from before.
    foreign: Changes,
    work: Work,
}

impl Mesh {
    /// Starts from what is installed.
    pub fn new(
        own: ClusterId,
        max: MaxConnectedClusters,
        node_name: &str,
        tunnels: Tunnels,
        restored: Restored,
    ) -> Self {
        let own = own.get();
        let named = restored.ipcache.iter().map(|(_, value)| value.node_ip);
        let named = named.chain(restored.prefix.iter().map(|(_, value)| value.node_ip));
        let named = named.chain(restored.node.iter().map(|(_, value)| value.number.to_ne_bytes()));
        let mut underlay = Underlay::restore(tunnels.protocol, restored.underlay, named);
        let node_ip = tunnels.node_ip.map(|ip| underlay.name(ip)).filter(|node_ip| *node_ip != [0; 4]);
        let (endpoints, foreign_endpoints) = Endpoints::new(own, node_ip, restored.endpoint);
        let mut mesh = Self {
            own,
            node_name: node_name.to_owned(),
            names: BTreeMap::new(),
            clusters: BTreeMap::new(),
            topology: Topology::new(underlay),
            own_node_changed: false,
            zone: None,
            ipcache: HashMap::new(),
            placement: Placement::default(),
            translations: Translations::restore(restored.translate),
            endpoints,
            services: Services::new(own, restored.service),
            policies: Policies::new(max, restored.policy, restored.cidr),
            states: BTreeMap::new(),
            changed_states: BTreeSet::new(),
            foreign: Changes { endpoint: foreign_endpoints, ..Changes::default() },
            work: Work::default(),
        };
        mesh.clusters.insert(own, Records::default());
        for (key, value) in restored.ipcache {
            match wire_key::address(key.family, key.ip) {
                Some(ip) => mesh.clusters.entry(key.cluster).or_default().ips.restore(ip, value),
                None => mesh.foreign.ipcache.push((key, None)),
            }
        }
        for (key, value) in restored.prefix {
            match mesh.topology.restore_prefix(key, value) {
                true => drop(mesh.clusters.entry(value.cluster).or_default()),
                false => mesh.foreign.prefix.push((key, None)),
            }
        }
        for (key, value) in restored.node {
            match mesh.topology.restore_address(key, value) {
                true => drop(mesh.clusters.entry(value.cluster).or_default()),
                false => mesh.foreign.node.push((key, None)),
            }
        }
        // Until this node's record comes.
        if let Some(node_ip) = node_ip {
            let ips =
                mesh.topology.beside(node_ip).filter(|ip| mesh.topology.address_holder(*ip) == Some(own));
            let ips: Vec<IpAddr> = ips.collect();
            mesh.endpoints.also_here(ips.iter().filter_map(|ip| mesh.topology.underlay.find(*ip)));
            mesh.services.set_node_ips(ips.into_iter(), &Records::default());
        }
        for cluster in mesh.services.restored_clusters() {
            mesh.clusters.entry(cluster).or_default();
        }
        for cluster in mesh.policies.restored_clusters() {
            mesh.clusters.entry(cluster).or_default();
        }
        for cluster in mesh.translations.clusters() {
            mesh.clusters.entry(cluster).or_default();
        }
        for (cluster, state) in restored.cluster {
            mesh.clusters.entry(cluster).or_default();
            mesh.states.insert(cluster, state);
        }
        mesh
    }

    /// A record of `cluster` is so from now on. `hash` is of its key and value as they were written.
    pub fn upsert(&mut self, cluster: ClusterId, fact: Fact, hash: u64) {
        let cluster = cluster.get();
        let records = self.clusters.entry(cluster).or_default();
        match fact {
            Fact::Identity(id, labels) => {
                if records.identities.upsert(id, labels, hash).is_change() {
                    self.labels_changed(cluster, id);
                }
            }
            Fact::LocalIdentity(id, labels) => {
                if records.local_identities.upsert(id, labels, hash).is_change() {
                    self.labels_changed(cluster, id);
                }
            }
            Fact::LocalPolicy(policy) => {
                let name = policy.name.clone();
                if records.local_policies.upsert(name.clone(), *policy, hash).is_change() {
                    self.policy_changed(&name);
                }
            }
            Fact::Node(name, node) => {
                let before = match records.nodes.upsert(name.clone(), node.clone(), hash) {
                    Change::None => return,
                    Change::New => None,
                    Change::Replaced(before) => Some(before),
                };
                self.topology.node_changed(cluster, &name, before.as_ref(), Some(&node));
                self.own_node_changed |= cluster == self.own;
            }
            Fact::Ip(ip, value) => {
                if records.ips.upsert(ip, value, hash) {
                    self.address_changed(cluster, ip, Some(value));
                }
            }
            Fact::LocalIp(ip, value) => {
                if records.local_ips.upsert(ip, value, hash) {
                    let value = records.address(&ip);
                    self.address_changed(cluster, ip, value);
                }
            }
            Fact::Service(name, service) => {
                if records.services.upsert(name.clone(), service, hash).is_change() {
                    let own = self.clusters.get(&self.own);
                    self.services.remote_changed(own.and_then(|own| own.local_services.get(&name)));
                }
            }
            Fact::LocalService(service) => {
                let name = service.name.clone();
                let before = match records.local_services.upsert(name, (*service).clone(), hash) {
                    Change::None => return,
                    Change::New => None,
                    Change::Replaced(before) => Some(before),
                };
                self.services.local_changed(before.as_ref(), Some(&service));
            }
        }
    }

    /// A record of `cluster` is gone.
    pub fn delete(&mut self, cluster: ClusterId, key: &FactKey) {
        let cluster = cluster.get();
        let Some(records) = self.clusters.get_mut(&cluster) else { return };
        match key {
            FactKey::Identity(id) => {
                if records.identities.delete(id).is_some() {
                    self.labels_changed(cluster, *id);
                }
            }
            FactKey::LocalIdentity(id) => {
                if records.local_identities.delete(id).is_some() {
                    self.labels_changed(cluster, *id);
                }
            }
            FactKey::LocalPolicy(name) => {
                if records.local_policies.delete(name).is_some() {
                    self.policy_changed(name);
                }
            }
            FactKey::Node(name) => {
                if let Some(before) = records.nodes.delete(name) {
                    self.topology.node_changed(cluster, name, Some(&before), None);
                    self.own_node_changed |= cluster == self.own;
                }
            }
            FactKey::Ip(ip) => {
                if records.ips.delete(ip) {
                    let left = records.address(ip);
                    self.address_changed(cluster, *ip, left);
                }
            }
            FactKey::LocalIp(ip) => {
                if records.local_ips.delete(ip) {
                    let left = records.address(ip);
                    self.address_changed(cluster, *ip, left);
                }
            }
            FactKey::Service(name) => {
                if records.services.delete(name).is_some() {
                    let own = self.clusters.get(&self.own);
                    self.services.remote_changed(own.and_then(|own| own.local_services.get(name)));
                }
            }
            FactKey::LocalService(name) => {
                if let Some(before) = records.local_services.delete(name) {
                    self.services.local_changed(Some(&before), None);
                }
            }
        }
    }

    /// A record of `cluster` stays although its cluster writes something else by now, which was refused.
    pub fn disown(&mut self, cluster: ClusterId, key: &FactKey) {
        let Some(records) = self.clusters.get_mut(&cluster.get()) else { return };
        match key {
            FactKey::Identity(id) => records.identities.disown(id),
            FactKey::Node(name) => records.nodes.disown(name),
            FactKey::Ip(ip) => records.ips.disown(ip),
            FactKey::Service(name) => records.services.disown(name),
            FactKey::LocalService(name) => records.local_services.disown(name),
            FactKey::LocalIp(ip) => records.local_ips.disown(ip),
            FactKey::LocalIdentity(id) => records.local_identities.disown(id),
            FactKey::LocalPolicy(name) => records.local_policies.disown(name),
        }
    }

    /// A new list of a kind begins: what it will not contain goes at its end.
    pub fn begin_list(&mut self, cluster: ClusterId, kind: Kind) {
        let records = self.clusters.entry(cluster.get()).or_default();
        match kind {
            Kind::Nodes => records.nodes.begin_list(),
            Kind::Ip => records.ips.begin_list(),
            Kind::Identities => records.identities.begin_list(),
            Kind::Services => records.services.begin_list(),
            Kind::LocalServices => records.local_services.begin_list(),
            Kind::LocalIdentities => records.local_identities.begin_list(),
            Kind::LocalIp => records.local_ips.begin_list(),
            Kind::LocalPolicies => records.local_policies.begin_list(),
            Kind::ServiceExports => {}
        }
    }

    /// The list of a kind is complete.
    pub fn finish_list(&mut self, cluster: ClusterId, kind: Kind) {
        let cluster = cluster.get();
        let records = self.clusters.entry(cluster).or_default();
        match kind {
            Kind::Identities | Kind::LocalIdentities => {
                let list = match kind {
                    Kind::Identities => &mut records.identities,
                    _ => &mut records.local_identities,
                };
                for (id, _) in list.finish_list() {
                    self.labels_changed(cluster, id);
                }
                self.identities_told(cluster);
            }
            Kind::LocalPolicies => {
                for (name, _) in records.local_policies.finish_list() {
                    self.policy_changed(&name);
                }
                self.identities_told(cluster);
            }
            Kind::Nodes => {
                for (name, before) in records.nodes.finish_list() {
                    self.topology.node_changed(cluster, &name, Some(&before), None);
                    self.own_node_changed |= cluster == self.own;
                }
                self.topology.forget_restored(cluster);
            }
            Kind::Ip | Kind::LocalIp => {
                let stale = records.finish_addresses(kind);
                let left = |ip| (ip, records.address(&ip));
                for (ip, left) in stale.into_iter().map(left).collect::<Vec<_>>() {
                    self.address_changed(cluster, ip, left);
                }
                if cluster == self.own {
                    self.endpoints.synced();
                }
            }
            Kind::Services => {
                let stale = records.services.finish_list();
                self.services.remote_synced(cluster);
                let own = self.clusters.get(&self.own);
                for (name, _) in stale {
                    self.services.remote_changed(own.and_then(|own| own.local_services.get(&name)));
                }
            }
            Kind::LocalServices => {
                for (_, service) in records.local_services.finish_list() {
                    self.services.local_changed(Some(&service), None);
                }
                self.services.own_synced();
            }
            Kind::ServiceExports => {}
        }
    }

    /// The cluster is no part of the mesh any more: everything of it goes.
    pub fn drain(&mut self, cluster: ClusterId) {
        self.drain_id(cluster.get());
    }

    /// Drains what was restored of clusters that are none of `configured`.
    pub fn keep_only(&mut self, configured: &BTreeSet<u16>) {
        let gone: Vec<u16> = self
            .clusters
            .keys()
            .copied()
            .filter(|cluster| *cluster != self.own && !configured.contains(cluster))
            .collect();
        gone.into_iter().for_each(|cluster| self.drain_id(cluster));
    }

    /// What `cluster` is called.
    pub fn set_name(&mut self, cluster: ClusterId, name: &ClusterName) {
        let cluster = cluster.get();
        if cluster != self.own && self.names.insert(cluster, name.clone()).as_ref() != Some(name) {
            self.plan_again(|service| service.balancing.names_clusters());
        }
    }

    /// Where pods and nodes of `cluster` may be, by the operator's word.
    pub fn set_placement(&mut self, cluster: ClusterId, rules: PlacementRules) {
        let cluster = cluster.get();
        if cluster != self.own && self.placement.set_rules(cluster, rules) {
            self.place_all(cluster);
            self.services.all_changed();
        }
    }

    /// Services are reached from outside too. Before anything is known.
    pub fn let_in(&mut self, how: LetIn) {
        self.services.let_in(how);
    }

    /// Takes the cluster out of load-balancing, or back in. Everything else of it stays as it is.
    pub fn set_dead(&mut self, cluster: ClusterId, dead: bool) {
        let state = dead.then_some(ClusterState { state: cluster_state::DEAD });
        self.set_state(cluster.get(), state);
    }

    /// What the network edge found out about this node's pods.
    pub fn set_links(&mut self, links: Links) {
        self.endpoints.set_links(links);
    }

    /// Recomputes what the facts since the last call touched.
    pub fn compute(&mut self) -> Changes {
        let mut changes = std::mem::take(&mut self.foreign);
        self.compute_topology(&mut changes);
        changes.routes = self.compute_routes(&changes);
        changes.translate.extend(self.translations.compute());
        changes.ends = self.compute_ends();
        self.place_again(&changes);
        changes.ipcache.extend(self.ipcache.drain());
        self.ipcache.shrink_to(64);
        self.compute_policies(&mut changes);
        if let Some(own) = self.clusters.get(&self.own) {
            let flags = |identity| self.policies.flags(identity);
            changes.endpoint.extend(self.endpoints.compute(own, flags));
        }
        let standing = |cluster, ip| self.placement.standing(&self.topology, cluster, ip);
        let here = Here { node: &self.node_name, zone: self.zone.as_deref() };
        changes.service.extend(self.services.compute(&self.clusters, &self.names, here, standing));
        let states = std::mem::take(&mut self.changed_states).into_iter();
        changes.cluster.extend(states.map(|cluster| (cluster.into(), self.states.get(&cluster).copied())));
        self.compute_underlay(&mut changes);
        changes
    }

    fn own_node(&self) -> Option<&NodeFact> {
        self.clusters.get(&self.own)?.nodes.get(&self.node_name)
    }

    /// Plans those of the own cluster's services once more.
    fn plan_again(&mut self, which: impl Fn(&LocalService) -> bool) {
        let Some(own) = self.clusters.get(&self.own) else { return };
        for (_, service) in own.local_services.iter().filter(|(_, service)| which(service)) {
            self.services.again(service);
        }
    }

    fn address_changed(&mut self, cluster: u16, ip: IpAddr, value: Option<IpValue>) {
        let value = match value {
            Some(value) if cluster != self.own => self.placement.place(&self.topology, cluster, ip, value),
            Some(value) => Some(self.place_own(value)),
            None => {
                self.placement.forget(cluster, ip);
                None
            }
        };
        self.ipcache.insert(wire_key::ip_key(cluster, ip), value);
        if cluster == self.own {
            self.endpoints.address_changed(ip);
        }
    }

    /// What is to be installed for an address of the own cluster: its records are taken at their word.
    fn place_own(&self, value: IpValue) -> IpValue {
        IpValue { node_ip: self.topology.tunnel_name(value.node_ip).unwrap_or_default(), ..value }
    }

    fn compute_topology(&mut self, changes: &mut Changes) {
        self.topology.resolve(self.own, changes);
        if self.own_node_changed {
            if let Some(own) = self.clusters.get(&self.own)
                && let Some(node) = own.nodes.get(&self.node_name)
            {
                let ips = node.internal_ips.iter().copied();
                if let Some(node_ip) = self.topology.node_ip_of(node) {
                    let names = ips.clone().filter_map(|ip| self.topology.underlay.find(ip)).collect();
                    self.endpoints.set_here(node_ip, names, own);
                }
                self.services.set_node_ips(ips, own);
            }
            let zone = self.own_node().and_then(|node| node.zone.clone());
            if zone != self.zone {
                self.zone = zone;
                self.plan_again(|service| service.balancing.nearness != Nearness::Any);
            }
        }
    }

    /// Numbers of nodes: those that what is installed names from now on, without those that nothing names any more.
    fn compute_underlay(&mut self, changes: &mut Changes) {
        let underlay = &mut self.topology.underlay;
        if underlay.protocol() == UnderlayProtocol::Ipv6 {
            let addresses = changes.ipcache.iter().filter_map(|(_, value)| Some((*value)?.node_ip));
            let prefixes = changes.prefix.iter().filter_map(|(_, value)| Some((*value)?.node_ip));
            let nodes = changes.node.iter().filter_map(|(_, value)| Some((*value)?.number.to_ne_bytes()));
            addresses.chain(prefixes).chain(nodes).for_each(|node_ip| underlay.install(node_ip));
        }
        if underlay.wants_sweep() {
            let records = self.clusters.values();
            let of_pods = records.flat_map(|records| records.ips.nodes().chain(records.local_ips.nodes()));
            let named = of_pods.chain(self.topology.named()).chain(self.endpoints.node_ip());
            let named: HashSet<[u8; 4]> = named.collect();
            self.topology.underlay.sweep(&named);
        }
        changes.underlay.extend(self.topology.underlay.take_changes());
    }

    fn set_state(&mut self, cluster: u16, state: Option<ClusterState>) {
        let before = match state {
            Some(state) => self.states.insert(cluster, state),
            None => self.states.remove(&cluster),
        };
        if before != state {
            self.changed_states.insert(cluster);
        }
    }

    fn drain_id(&mut self, cluster: u16) {
        self.set_state(cluster, None);
        self.names.remove(&cluster);
        self.translations.set(cluster, &VirtualCidrs::default());
        let Some(records) = self.clusters.remove(&cluster) else { return };
        self.topology.underlay.forget_some();
        for (ip, _) in records.addresses() {
            self.address_changed(cluster, ip, None);
        }
        self.forget_identities(cluster, &records);
        for (name, before) in records.nodes.iter() {
            self.topology.node_changed(cluster, name, Some(before), None);
        }
        self.topology.forget_restored(cluster);
        self.placement.drain(cluster);
        self.own_node_changed |= cluster == self.own;
        let own = self.clusters.get(&self.own);
        for (name, _) in records.services.iter() {
            self.services.remote_changed(own.and_then(|own| own.local_services.get(name)));
        }
        self.services.forget_restored(cluster);
    }
}
