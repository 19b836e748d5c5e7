//! Frontends of the own cluster and the backends behind them.

#[cfg(test)]
mod outside_tests;
mod places;
mod plan;
mod shares;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterName, NamespacedName};
use clustermesh_kvstore::record::{Algorithm, LocalService, Nearness, Protocol};
use ebpf_global_svc::abi::{ServiceKey, scope};
use ipnet::IpNet;

use super::records::Records;
use crate::desired::ServicePlan;
use crate::wire_key;
use places::Places;
use plan::{Inputs, Planned, Remote, nearness, plan};

pub use plan::LeftOut;
pub(super) use plan::{Contested, Here, Standing};

/// How calls from outside of the mesh are let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LetIn {
    /// Addresses of this node whose ports can be services', besides those that its record has.
    pub addresses: Vec<IpAddr>,
    /// How backends are chosen, if the service does not say.
    pub algorithm: Algorithm,
    /// Places in a table of [`Algorithm::Maglev`], for each cluster; one of [`LetIn::TABLE_SIZES`].
    pub table_size: u32,
}

impl LetIn {
    /// What [`LetIn::table_size`] can be.
    pub const TABLE_SIZES: [u32; 10] = crate::desired::TABLE_SIZES;
}

/// Plans of all frontends; recomputes those whose inputs changed.
#[derive(Debug)]
pub(super) struct Services {
    own: u16,
    /// None: nobody is let in from outside.
    outside: Option<LetIn>,
    /// Addresses of this node.
    node_ips: BTreeSet<IpAddr>,
    /// Services that have a frontend; the first by name holds it.
    owners: HashMap<ServiceKey, BTreeSet<NamespacedName>>,
    /// Last computed, or restored.
    plans: HashMap<ServiceKey, ServicePlan>,
    /// Parts of restored plans that nobody has confirmed or replaced yet.
    restored: HashMap<ServiceKey, ServicePlan>,
    left_out: HashMap<ServiceKey, LeftOut>,
    places: Places,
    /// Of those that were left out, some whose address is another cluster's.
    contested: BTreeMap<ServiceKey, Vec<Contested>>,
    /// Those may be others than when this was asked last.
    decided: bool,
    dirty: HashSet<ServiceKey>,
}

impl Services {
    pub(super) fn new(own: u16, restored: Vec<(ServiceKey, ServicePlan)>) -> Self {
        let plans: HashMap<_, _> = restored.into_iter().collect();
        let (mine, foreign): (HashMap<_, _>, HashMap<_, _>) =
            plans.into_iter().partition(|(key, _)| key.cluster == own);
        let mut services = Self {
            own,
            outside: None,
            node_ips: BTreeSet::new(),
            owners: HashMap::new(),
            plans: mine.clone(),
            restored: mine,
            left_out: HashMap::new(),
            places: Places::default(),
            contested: BTreeMap::new(),
            decided: false,
            dirty: HashSet::new(),
        };
        for (key, plan) in &services.plans {
            services.places.plan_changed(own, key, None, Some(plan));
        }
        // Left by an agent of another cluster ID: no frontend of ours.
        services.dirty.extend(foreign.keys().copied());
        services.plans.extend(foreign);
        services
    }

    /// See [`super::Mesh::let_in`].
    pub(super) fn let_in(&mut self, how: LetIn) {
        self.node_ips.extend(&how.addresses);
        self.outside = Some(how);
    }

    /// This node has these addresses, at which services of the `own` cluster have node ports.
    pub(super) fn set_node_ips(&mut self, ips: impl Iterator<Item = IpAddr>, own: &Records) {
        let given = self.outside.iter().flat_map(|outside| &outside.addresses).copied();
        let ips: BTreeSet<IpAddr> = ips.chain(given).collect();
        if ips != self.node_ips {
            let services = || own.local_services.iter().map(|(_, service)| service);
            let with_ports = || services().filter(|service| !service.external.node_ports.is_empty());
            with_ports().for_each(|service| self.local_changed(Some(service), None));
            self.node_ips = ips;
            with_ports().for_each(|service| self.local_changed(None, Some(service)));
        }
    }

    /// The own cluster's service changed.
    pub(super) fn local_changed(&mut self, before: Option<&LocalService>, after: Option<&LocalService>) {
        for (service, added) in [(before, false), (after, true)] {
            let Some(service) = service else { continue };
            for key in self.frontends_of(service) {
                self.dirty.insert(key);
                if added {
                    self.owners.entry(key).or_default().insert(service.name.clone());
                } else if let Some(owners) = self.owners.get_mut(&key) {
                    owners.remove(&service.name);
                    if owners.is_empty() {
                        self.owners.remove(&key);
                    }
                }
            }
        }
    }

    /// Another cluster's service of that name changed.
    pub(super) fn remote_changed(&mut self, own: Option<&LocalService>) {
        if let Some(own) = own.filter(|own| own.global) {
            let keys = self.frontends_of(own);
            self.dirty.extend(keys);
        }
    }

    /// The own cluster's service is to be looked at again: what it depends on besides may have changed.
    pub(super) fn again(&mut self, own: &LocalService) {
        let keys = self.frontends_of(own);
        self.dirty.extend(keys);
    }

    /// Everything that another cluster contributes may have changed.
    pub(super) fn all_changed(&mut self) {
        self.dirty.extend(self.plans.keys().copied());
    }

    /// Addresses inside `net` may have another holder than before: backends may have to go, and those that
    /// were left out may come. Gives the number of frontends that are computed again.
    pub(super) fn holders_changed(&mut self, net: IpNet) -> usize {
        let touched = self.places.inside(net);
        let count = touched.len();
        self.dirty.extend(touched);
        count
    }

    /// A cluster has told all its services: what it was restored with counts no more for frontends
    /// whose service is known.
    pub(super) fn remote_synced(&mut self, cluster: u16) {
        let awaiting =
            self.restored.iter().filter(|(_, plan)| plan.groups.iter().any(|group| group.cluster == cluster));
        self.dirty.extend(awaiting.map(|(key, _)| *key));
    }

    /// The cluster is gone, and with it whatever was restored of it.
    pub(super) fn forget_restored(&mut self, cluster: u16) {
        for (key, plan) in &mut self.restored {
            let groups = plan.groups.len();
            plan.groups.retain(|group| group.cluster != cluster);
            if plan.groups.len() != groups {
                self.dirty.insert(*key);
            }
        }
    }

    /// The own cluster's services are complete: frontends that it does not have are none.
    pub(super) fn own_synced(&mut self) {
        self.dirty.extend(self.restored.keys().copied().filter(|key| !self.owners.contains_key(key)));
    }

    /// Clusters with restored backends that nobody has confirmed.
    pub(super) fn restored_clusters(&self) -> BTreeSet<u16> {
        self.restored.values().flat_map(|plan| &plan.groups).map(|group| group.cluster).collect()
    }

    /// Computes what is dirty; gives back what differs from before.
    pub(super) fn compute(
        &mut self,
        clusters: &BTreeMap<u16, Records>,
        names: &BTreeMap<u16, ClusterName>,
        here: Here<'_>,
        standing: impl Fn(u16, IpAddr) -> Standing,
    ) -> Vec<(ServiceKey, Option<ServicePlan>)> {
        let mut changes = Vec::new();
        for key in std::mem::take(&mut self.dirty) {
            if self.waits_for_zone(&key, clusters, here) {
                self.dirty.insert(key);
                continue;
            }
            let Planned { plan: after, left_out, contested, elsewhere } =
                self.compute_one(&key, clusters, names, here, &standing);
            self.places.left_out(&key, elsewhere.into_iter().collect());
            self.note_contested(key, contested);
            if left_out == LeftOut::default() {
                self.left_out.remove(&key);
            } else {
                self.left_out.insert(key, left_out);
            }
            if self.plans.get(&key) == after.as_ref() {
                continue;
            }
            let before = match &after {
                Some(plan) => self.plans.insert(key, plan.clone()),
                None => self.plans.remove(&key),
            };
            self.places.plan_changed(self.own, &key, before.as_ref(), after.as_ref());
            changes.push((key, after));
        }
        self.drop_settled(clusters);
        changes
    }

    /// The keys of a service's frontends.
    pub(super) fn frontends_of(&self, service: &LocalService) -> Vec<ServiceKey> {
        let key = |ip, port, protocol: Protocol| wire_key::service_key(self.own, ip, port, protocol.number());
        let inner = service
            .frontends
            .iter()
            .flat_map(|(ip, ports)| ports.values().map(move |port| key(*ip, port.port, port.protocol)));
        let mut keys: Vec<ServiceKey> = inner.collect();
        // All of a service's addresses have the same ports.
        let (Some(_), Some(ports)) = (&self.outside, service.frontends.values().next()) else {
            return keys;
        };
        let has_family =
            |node_ip: &&IpAddr| service.frontends.keys().any(|ip| ip.is_ipv4() == node_ip.is_ipv4());
        let at_ips = service
            .external
            .ips
            .iter()
            .flat_map(|ip| ports.values().map(move |port| key(*ip, port.port, port.protocol)));
        let at_nodes = service.external.node_ports.iter().filter_map(|(name, number)| {
            let protocol = ports.get(name)?.protocol;
            Some(self.node_ips.iter().filter(has_family).map(move |ip| key(*ip, *number, protocol)))
        });
        let outer: Vec<ServiceKey> = at_ips.chain(at_nodes.flatten()).collect();
        keys.extend(&outer);
        keys.extend(outer.into_iter().map(|key| ServiceKey { scope: scope::OUTSIDE, ..key }));
        keys
    }

    pub(super) fn frontends(&self) -> usize {
        self.plans.len()
    }

    /// The plan of a frontend.
    pub(super) fn plan(&self, key: &ServiceKey) -> Option<&ServicePlan> {
        self.plans.get(key)
    }

    /// Name of the service that has a frontend.
    pub(super) fn holder(&self, key: &ServiceKey) -> Option<&NamespacedName> {
        self.owners.get(key)?.first()
    }

    /// Backends that were left out since another cluster holds their address; not all of them, and one
    /// for each frontend that wants it.
    pub(super) fn contested(&self) -> impl Iterator<Item = Contested> {
        self.contested.values().flatten().copied()
    }

    /// Whether [`Self::contested`] may be others than when this was asked last.
    pub(super) fn take_decided(&mut self) -> bool {
        std::mem::take(&mut self.decided)
    }

    pub(super) fn left_out(&self) -> LeftOut {
        self.left_out.values().fold(LeftOut::default(), |sum, one| LeftOut {
            conflicts: sum.conflicts + one.conflicts,
            clusters: sum.clusters + one.clusters,
        })
    }

    fn compute_one(
        &self,
        key: &ServiceKey,
        clusters: &BTreeMap<u16, Records>,
        names: &BTreeMap<u16, ClusterName>,
        here: Here<'_>,
        standing: impl Fn(u16, IpAddr) -> Standing,
    ) -> Planned {
        let own_records = clusters.get(&self.own);
        let Some(own) = self.owner(key, clusters) else {
            // Until the own cluster has told all its services, what was installed stays as it is.
            let synced = own_records.is_some_and(|records| records.local_services.is_synced());
            let plan = self.restored.get(key).filter(|_| !synced).cloned();
            return Planned { plan, ..Planned::default() };
        };
        let mut remotes = BTreeMap::new();
        // With such a policy a call stays on its node.
        if own.global && nearness(own, key) != Nearness::OnlyNode {
            for (cluster, records) in clusters.iter().filter(|(cluster, _)| **cluster != self.own) {
                if let Some(service) = records.services.get(&own.name) {
                    if service.shared {
                        remotes.insert(*cluster, Remote::Record(service));
                    }
                } else if !records.services.is_synced() {
                    let restored = self.restored.get(key);
                    let group = restored.and_then(|plan| plan.groups.iter().find(|g| g.cluster == *cluster));
                    if let Some(group) = group {
                        remotes.insert(*cluster, Remote::Restored(group));
                    }
                }
            }
        }
        let inputs = Inputs {
            own_cluster: self.own,
            own,
            remotes,
            before: self.plans.get(key),
            names,
            here,
            lets_in: self.outside.as_ref(),
        };
        plan(key, &inputs, standing)
    }

    /// The service that a frontend belongs to.
    fn owner<'a>(&self, key: &ServiceKey, clusters: &'a BTreeMap<u16, Records>) -> Option<&'a LocalService> {
        let name = self.owners.get(key).and_then(BTreeSet::first)?;
        clusters.get(&self.own)?.local_services.get(name)
    }

    /// Whether a service depends on the zone of this node, of which nothing is known until the own cluster's nodes
    /// are: after a restart calls would leave the zone for that long.
    fn waits_for_zone(&self, key: &ServiceKey, clusters: &BTreeMap<u16, Records>, here: Here<'_>) -> bool {
        let Some(own) = self.owner(key, clusters) else { return false };
        let depends = matches!(own.balancing.nearness, Nearness::PreferZone | Nearness::PreferNode);
        let told = clusters.get(&self.own).is_some_and(|records| records.nodes.is_synced());
        depends && here.zone.is_none() && !told
    }

    fn note_contested(&mut self, key: ServiceKey, contested: Vec<Contested>) {
        let before = match contested.is_empty() {
            true => self.contested.remove(&key).unwrap_or_default(),
            false => self.contested.insert(key, contested.clone()).unwrap_or_default(),
        };
        self.decided |= before != contested;
    }

    /// Forgets what was restored for frontends that are known by now and need no more of it.
    fn drop_settled(&mut self, clusters: &BTreeMap<u16, Records>) {
        if self.restored.is_empty() {
            return;
        }
        let own_synced = clusters.get(&self.own).is_some_and(|records| records.local_services.is_synced());
        let awaited = |cluster: u16| {
            cluster != self.own && clusters.get(&cluster).is_some_and(|records| !records.services.is_synced())
        };
        self.restored.retain(|key, plan| match self.owners.contains_key(key) {
            true => plan.groups.iter().any(|group| awaited(group.cluster)),
            false => !own_synced,
        });
        if self.restored.is_empty() {
            self.restored = HashMap::new();
        }
    }
}
