//! The naive answer: all tables computed at once from what every cluster says, with no memory.
//!
//! Where several claims are equally good, the answer depends on who came first; there the model asks
//! the tables who holds it, and checks that the holder has a claim.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use agent_sync::desired::BackendKey;
use agent_sync::mesh::{NodeFact, RemoteService};
use agent_sync::wire_key;
use clustermesh_kvstore::cluster::{ClusterName, NamespacedName};
use clustermesh_kvstore::record::{
    Affinity, BackendState, Balancing, Failover, LocalBackend, LocalService, Nearness,
};
use ebpf_global_svc::Tables;
use ebpf_global_svc::abi::{BACKEND_EXCLUSIVE, IpKey, IpValue, MAX_GROUPS, ServiceKey, SlotKey};
use ipnet::IpNet;

/// What one cluster's etcd holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Truth {
    pub nodes: BTreeMap<String, NodeFact>,
    pub ips: BTreeMap<IpAddr, IpValue>,
    pub services: BTreeMap<NamespacedName, RemoteService>,
    pub local_services: BTreeMap<NamespacedName, LocalService>,
}

/// What a program sees of a service.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Seen {
    pub affinity_timeout: u16,
    pub groups: Groups,
}

type Groups = BTreeMap<u16, Group>;

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Group {
    pub weight: u16,
    pub tier: u8,
    pub backends: BTreeSet<BackendKey>,
}

/// Name of a cluster that is not the own one.
pub(crate) fn cluster_name(cluster: u16) -> ClusterName {
    format!("c{cluster}").parse().unwrap()
}

/// Compares all tables with the naive answer. `views` is what was last heard of each cluster.
pub(crate) fn check(own: u16, node_ip: [u8; 4], views: &BTreeMap<u16, Truth>, tables: &Tables) {
    check_addresses(own, node_ip, views, tables);
    check_topology(own, views, tables);
    check_services(own, views, tables);
}

fn check_addresses(own: u16, node_ip: [u8; 4], views: &BTreeMap<u16, Truth>, tables: &Tables) {
    let installed: BTreeMap<IpKey, IpValue> = tables.ipcache.dump().unwrap().into_iter().collect();
    let hosts: BTreeMap<_, u16> =
        tables.node.dump().unwrap().into_iter().map(|(key, node)| (key, node.cluster)).collect();
    let mut wanted = BTreeMap::new();
    let mut here = BTreeMap::new();
    for (cluster, view) in views {
        for (ip, value) in &view.ips {
            let mut placed = *value;
            let host = wire_key::node_key(std::net::Ipv4Addr::from(value.node_ip).into());
            let is_at_home = hosts.get(&host) == Some(cluster);
            if *cluster != own && !is_at_home {
                // The pod's prefix says where it is.
                placed.node_ip = [0; 4];
            }
            wanted.insert(wire_key::ip_key(*cluster, *ip), placed);
            if *cluster == own && value.node_ip == node_ip {
                here.insert(wire_key::ip_key(own, *ip), value.identity);
            }
        }
    }
    assert_eq!(installed, wanted, "ipcache");
    let endpoints: BTreeMap<IpKey, u32> =
        tables.endpoint.dump().unwrap().into_iter().map(|(key, value)| (key, value.identity)).collect();
    assert_eq!(endpoints, here, "endpoints");
}

fn check_topology(own: u16, views: &BTreeMap<u16, Truth>, tables: &Tables) {
    let prefixes: Vec<(IpNet, u16)> = tables
        .prefix
        .dump()
        .unwrap()
        .into_iter()
        .map(|(key, value)| (wire_key::prefix(&key).unwrap(), value.cluster))
        .collect();
    let overlap = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    for (cluster, view) in views {
        for claim in view.nodes.values().flat_map(|node| &node.pod_cidrs) {
            let held = prefixes.contains(&(*claim, *cluster));
            let rival = prefixes.iter().find(|(net, holder)| holder != cluster && overlap(net, claim));
            assert!(held != rival.is_some(), "{claim} of {cluster}: held {held}, rival {rival:?}");
            assert!(*cluster != own || held, "the own cluster lost {claim} to {rival:?}");
        }
    }
    for (net, cluster) in &prefixes {
        let claimed = views[cluster].nodes.values().any(|node| node.pod_cidrs.contains(net));
        assert!(claimed, "{net} is nobody's any more");
    }
    let mut claims: BTreeMap<_, BTreeSet<u16>> = BTreeMap::new();
    for (cluster, view) in views {
        for ip in view.nodes.values().flat_map(|node| &node.internal_ips) {
            claims.entry(wire_key::node_key(*ip)).or_default().insert(*cluster);
        }
    }
    let holders: BTreeMap<_, u16> =
        tables.node.dump().unwrap().into_iter().map(|(key, value)| (key, value.cluster)).collect();
    assert!(holders.keys().eq(claims.keys()), "{holders:?} {claims:?}");
    for (key, holder) in holders {
        assert!(claims[&key].contains(&holder));
        assert!(!claims[&key].contains(&own) || holder == own);
    }
}

fn check_services(own: u16, views: &BTreeMap<u16, Truth>, tables: &Tables) {
    let installed = installed_services(tables);
    let mut wanted: BTreeMap<ServiceKey, &LocalService> = BTreeMap::new();
    for service in views[&own].local_services.values() {
        for (ip, ports) in &service.frontends {
            for port in ports.values() {
                let key = wire_key::service_key(own, *ip, port.port, port.protocol.number());
                // The first by name has it.
                wanted.entry(key).or_insert(service);
            }
        }
    }
    assert!(installed.keys().eq(wanted.keys()), "{:?}\n{:?}", installed.keys(), wanted.keys());
    let holder = holder_of(tables);
    for (key, service) in wanted {
        let groups = merge(own, &key, service, views, &installed[&key].groups, &holder);
        let seconds = service.balancing.session.unwrap_or(0);
        let expected = Seen { affinity_timeout: u16::try_from(seconds.div_ceil(2)).unwrap(), groups };
        assert_eq!(
            installed[&key], expected,
            "{} {:?} {:?}",
            service.name, service.affinity, service.balancing
        );
    }
    // Those with session affinity share backends with nobody.
    let used: BTreeSet<(Option<ServiceKey>, BackendKey)> = installed
        .iter()
        .flat_map(|(key, seen)| {
            let owner = (seen.affinity_timeout > 0).then_some(*key);
            seen.groups.values().flat_map(|group| &group.backends).map(move |backend| (owner, *backend))
        })
        .collect();
    assert_eq!(tables.backend.dump().unwrap().len(), used.len(), "backends left over or doubled");
    let groups = installed.values().flat_map(|seen| seen.groups.values());
    let slots: usize = groups.map(|group| group.backends.len()).sum();
    assert_eq!(tables.slot.dump().unwrap().len(), slots, "slots left over");
}

/// Services as a program sees them.
pub(crate) fn installed_services(tables: &Tables) -> BTreeMap<ServiceKey, Seen> {
    let backends: BTreeMap<u32, _> = tables.backend.dump().unwrap().into_iter().collect();
    let slots: BTreeMap<SlotKey, u32> = tables.slot.dump().unwrap().into_iter().collect();
    let mut services = BTreeMap::new();
    for (key, value) in tables.service.dump().unwrap() {
        let mut groups = Groups::new();
        for group in &value.groups[..usize::from(value.n_groups)] {
            let seen = groups.entry(group.cluster).or_default();
            (seen.weight, seen.tier) = (group.weight, group.tier());
            for slot in 0..group.count() {
                let id = slots[&SlotKey { service: value.id, slot, cluster: group.cluster, pad: 0 }];
                let backend = BackendKey::of(id, &backends[&id]).unwrap();
                assert!(seen.backends.insert(backend), "{backend:?} twice");
                let exclusive = backends[&id].flags & BACKEND_EXCLUSIVE != 0;
                assert_eq!(exclusive, value.affinity_timeout > 0, "{backend:?} of {key:?}");
            }
        }
        services.insert(key, Seen { affinity_timeout: value.affinity_timeout, groups });
    }
    services
}

/// Who holds an address: by a pod prefix, or as a node's. Who came first is in the tables.
fn holder_of(tables: &Tables) -> impl Fn(IpAddr) -> Option<u16> {
    let prefixes: Vec<_> = tables
        .prefix
        .dump()
        .unwrap()
        .into_iter()
        .map(|(key, value)| (wire_key::prefix(&key).unwrap(), value.cluster))
        .collect();
    let nodes: BTreeMap<_, _> = tables.node.dump().unwrap().into_iter().collect();
    move |ip| {
        let by_prefix = prefixes.iter().find(|(net, _)| net.contains(&ip)).map(|(_, cluster)| *cluster);
        by_prefix.or_else(|| nodes.get(&wire_key::node_key(ip)).map(|node| node.cluster))
    }
}

/// What the own backends cannot take any more goes to the others, in proportion to what they have.
fn fail_over(own: u16, service: &LocalService, sizes: &BTreeMap<u16, usize>, groups: &mut Groups) {
    let Some(Failover { threshold, expected }) = service.failover else { return };
    let active = service.backends.iter().filter(|backend| backend.state == BackendState::Active).count();
    // In hundredths of a backend, and in parts of a whole.
    let (needed, whole) = (u64::from(expected) * u64::from(threshold), u64::from(u16::MAX));
    let have = 100 * active as u64;
    if have >= needed {
        return;
    }
    let kept = (have * whole).div_ceil(needed).clamp(1, whole - 1);
    let others: usize = groups.keys().filter(|cluster| **cluster != own).map(|cluster| sizes[cluster]).sum();
    for (cluster, group) in groups {
        let parts = match *cluster == own {
            true => kept,
            false => ((whole - kept) * sizes[cluster] as u64 / others as u64).max(1),
        };
        group.weight = u16::try_from(parts).unwrap();
    }
}

/// Whether a backend of the own cluster is one for this node, which is `n1` in `zone`, if `active` ones are all there
/// are for this frontend.
fn is_near(
    nearness: Nearness,
    zone: Option<&String>,
    backend: &LocalBackend,
    active: &[&LocalBackend],
) -> bool {
    let here = |other: &LocalBackend| other.node.as_deref() == Some("n1");
    let in_zone = |other: &LocalBackend| here(other) || zone.is_some() && other.zone.as_ref() == zone;
    match nearness {
        Nearness::Any => true,
        Nearness::OnlyNode => here(backend),
        Nearness::PreferNode if active.iter().any(|other| here(other)) => here(backend),
        Nearness::PreferZone if zone.is_none() => true,
        Nearness::PreferNode | Nearness::PreferZone => {
            in_zone(backend) || !active.iter().any(|other| in_zone(other))
        }
    }
}

/// By the names of clusters, if the service says any.
fn steer(own: u16, service: &LocalService, groups: &mut Groups) {
    let Balancing { order, weights, .. } = &service.balancing;
    for (cluster, group) in groups {
        let name = if *cluster == own { service.cluster.parse().unwrap() } else { cluster_name(*cluster) };
        let tier = order.iter().position(|tier| tier.contains(&name)).unwrap_or(order.len());
        group.tier = u8::try_from(tier).unwrap();
        if !weights.is_empty() && group.weight > 0 {
            group.weight = weights.get(&name).copied().unwrap_or(0);
        }
    }
}

fn merge(
    own: u16,
    key: &ServiceKey,
    service: &LocalService,
    views: &BTreeMap<u16, Truth>,
    installed: &Groups,
    holder: impl Fn(IpAddr) -> Option<u16>,
) -> Groups {
    let vip = wire_key::address(key.family, key.ip).unwrap();
    let zone = views[&own].nodes.get("n1").and_then(|node| node.zone.as_ref());
    let remotes_too = service.global && service.balancing.nearness != Nearness::OnlyNode;
    let mut all: BTreeSet<BackendKey> = BTreeSet::new();
    let (mut far, mut near) = (BTreeSet::new(), BTreeSet::new());
    let names: Vec<&String> = service.frontends[&vip]
        .iter()
        .filter(|(_, port)| (port.port.to_be(), port.protocol.number()) == (key.port, key.proto))
        .map(|(name, _)| name)
        .collect();
    let has_target = |backend: &&LocalBackend| {
        let of_name = |name: &&String| backend.ports.get(*name);
        let fits = backend.ip.is_ipv4() == vip.is_ipv4() && backend.state == BackendState::Active;
        fits && names.iter().filter_map(of_name).any(|port| port.protocol.number() == key.proto)
    };
    let active: Vec<&LocalBackend> = service.backends.iter().filter(has_target).collect();
    for (name, port) in &service.frontends[&vip] {
        if (port.port.to_be(), port.protocol.number()) != (key.port, key.proto) {
            continue;
        }
        let mut add =
            |cluster, ip: IpAddr, target: Option<&clustermesh_kvstore::record::Port>, terminating| {
                if let Some(target) = target.filter(|t| t.protocol.number() == key.proto)
                    && ip.is_ipv4() == vip.is_ipv4()
                {
                    all.insert(BackendKey { cluster, ip, port: target.port, proto: key.proto, terminating });
                }
            };
        for backend in &service.backends {
            if let Some(target) =
                backend.ports.get(name).filter(|target| target.protocol.number() == key.proto)
                && backend.state == BackendState::Active
                && backend.ip.is_ipv4() == vip.is_ipv4()
            {
                let is_near = is_near(service.balancing.nearness, zone, backend, &active);
                if is_near { &mut near } else { &mut far }.insert((backend.ip, target.port));
            }
            if !is_near(service.balancing.nearness, zone, backend, &active) {
                continue;
            }
            add(own, backend.ip, backend.ports.get(name), backend.state == BackendState::Terminating);
        }
        for (cluster, view) in views.iter().filter(|(cluster, _)| **cluster != own && remotes_too) {
            let remote = view.services.get(&service.name).filter(|remote| remote.shared);
            for (ip, ports) in remote.into_iter().flat_map(|remote| &remote.backends) {
                add(*cluster, *ip, ports.get(name), false);
            }
        }
    }
    all.retain(|backend| {
        backend.cluster == own || holder(backend.ip).is_none_or(|holder| holder == backend.cluster)
    });
    let claims = all.clone();
    all.retain(|backend| {
        let claimants: BTreeSet<u16> =
            claims.iter().filter(|other| other.ip == backend.ip).map(|other| other.cluster).collect();
        if claimants.contains(&own) {
            return backend.cluster == own;
        }
        let holder = installed.iter().find(|(_, held)| held.backends.iter().any(|b| b.ip == backend.ip));
        let holder = holder.map(|(cluster, _)| *cluster).filter(|holder| claimants.contains(holder));
        claimants.len() < 2 || Some(backend.cluster) == holder
    });
    let any_active = all.iter().any(|backend| !backend.terminating);
    let mut groups = Groups::new();
    for backend in all.into_iter().filter(|backend| backend.terminating != any_active) {
        groups.entry(backend.cluster).or_default().backends.insert(backend);
    }
    let steered = service.global && service.balancing.names_clusters();
    let affinity = if service.global && !steered { service.affinity } else { Affinity::None };
    let mut sizes: BTreeMap<u16, usize> =
        groups.iter().map(|(cluster, group)| (*cluster, group.backends.len())).collect();
    if let Some(size) = sizes.get_mut(&own).filter(|_| any_active) {
        // A cluster's share is that of all its backends.
        *size = near.len() + far.len();
    }
    for (cluster, group) in &mut groups {
        let preferred = match affinity {
            Affinity::None => true,
            Affinity::Local => *cluster == own,
            Affinity::Remote => *cluster != own,
        };
        group.weight = if preferred && any_active { u16::try_from(sizes[cluster]).unwrap() } else { 0 };
    }
    if any_active && affinity == Affinity::Local && groups.keys().any(|cluster| *cluster != own) {
        fail_over(own, service, &sizes, &mut groups);
    }
    if steered {
        steer(own, service, &mut groups);
    }
    assert!(groups.len() <= MAX_GROUPS, "not covered here");
    groups
}
