//! What a mesh at rest must look like, computed from what really is in its clusters.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use agent_sync::tunnels::UnderlayProtocol;
use agent_sync::wire_key;
use clustermesh_kvstore::key::{Kind, Layout, canary_key, cluster_config_key, data_prefix};
use clustermesh_kvstore::record::{Affinity, IpRecord, Nearness, Record as _};
use ebpf_global_svc::abi::{
    ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, FAMILY_V6, IpKey, NODE_VIRTUAL, POLICY_DENY,
    PREFIX_VIRTUAL, UnderlayKey, backend_state, cluster_state, direction,
};

use crate::agent::Agent;
use crate::exporter::ExporterProcess;
use crate::kernel::Kernel;
use crate::objects::PORTS;
use crate::world::World;

/// I1: each etcd holds what its exporter wants, and each kernel what all clusters say.
pub(crate) fn check(world: &World) -> Result<(), String> {
    for (place, exporter) in world.exporters.iter().enumerate() {
        if let Some(exporter) = exporter {
            check_etcd(world, place, exporter)?;
        }
    }
    world.agents.iter().try_for_each(|agent| {
        check_addresses(world, agent)?;
        check_topology(world, agent)?;
        check_services(world, agent)
    })
}

/// Who has not come to rest.
pub(crate) fn unrest(world: &World) -> String {
    let mut text = String::new();
    for (place, exporter) in world.exporters.iter().enumerate() {
        match exporter {
            Some(exporter) if exporter.is_at_rest(&world.places[place]) => {}
            Some(exporter) => {
                let _ = write!(text, "exporter {place}: {:?}; ", exporter.publisher.status());
            }
            None => {
                let _ = write!(text, "exporter {place} does not run; ");
            }
        }
    }
    for (number, agent) in world.agents.iter().enumerate() {
        if let Some(life) = agent.life.as_ref().filter(|life| !life.is_at_rest(&world.places)) {
            let (pending, error) = (life.engine.pending(), life.engine.last_error());
            let _ = write!(text, "agent {number}: {pending} pending ({error:?})");
            for (place, peer) in &life.peers {
                let live: Vec<_> = peer.link.reflectors.iter().map(|r| (r.tag, r.live)).collect();
                let _ = write!(text, ", {place}: accepted {}, {live:?}", peer.accepted);
            }
        }
    }
    text
}

fn check_etcd(world: &World, place: usize, exporter: &ExporterProcess) -> Result<(), String> {
    let stands = &world.places[place];
    let wanted: BTreeMap<String, &[u8]> = exporter.exporter.published().collect();
    let mut found = BTreeMap::new();
    for kind in clustermesh_apiserver::export::Exporter::KINDS {
        let prefix = data_prefix(kind, &stands.name, Layout::State);
        found.extend(stands.etcd.below(&prefix).map(|(key, value)| (key.to_owned(), value.to_vec())));
        let canary = canary_key(kind, &stands.name, Layout::State);
        if !stands.etcd.contains(&canary) {
            let history = stands.history_of(&canary);
            return Err(format!("I1: {canary} is missing: {history}"));
        }
    }
    for (key, value) in &wanted {
        if found.get(key).is_none_or(|found| found != value) {
            return Err(format!("I1: {key} is not in etcd as it should be"));
        }
    }
    if let Some(key) = found.keys().find(|key| !wanted.contains_key(*key)) {
        return Err(format!("I1: {key} is in etcd and should not"));
    }
    if !stands.etcd.contains(&cluster_config_key(&stands.name)) {
        return Err("I1: the cluster's config is missing".into());
    }
    let truth = &world.truths[place];
    let exported: BTreeSet<IpAddr> = ip_records(exporter).into_keys().collect();
    let wanted = truth.addresses();
    if exported != wanted {
        return Err(format!("I1: exported addresses {exported:?}, not {wanted:?}"));
    }
    Ok(())
}

fn ip_records(exporter: &ExporterProcess) -> BTreeMap<IpAddr, IpRecord> {
    let records = exporter.exporter.published().filter_map(|(key, value)| {
        let suffix = key.strip_prefix("cilium/state/ip/v1/default/")?;
        let record = IpRecord::decode(suffix, value).ok()?;
        Some((record.prefix.addr(), record))
    });
    records.collect()
}

/// Places of the clusters that an agent is configured to follow, its own one first.
fn followed<'a>(world: &'a World, agent: &'a Agent) -> impl Iterator<Item = (usize, &'a ExporterProcess)> {
    let places = [agent.home].into_iter().chain(world.remotes[agent.home].iter().copied());
    places.filter_map(|place| Some((place, world.exporters[place].as_ref()?)))
}

fn check_addresses(world: &World, agent: &Agent) -> Result<(), String> {
    let mut wanted: BTreeMap<IpKey, u32> = BTreeMap::new();
    let mut ends: BTreeMap<IpKey, IpAddr> = BTreeMap::new();
    for (place, exporter) in followed(world, agent) {
        let (truth, virtual_cidrs) = (&world.truths[place], agent.virtual_cidrs(place));
        for (ip, record) in ip_records(exporter) {
            let ip = virtual_cidrs.known_by(ip).unwrap_or(ip);
            // A host is "the host" only at home.
            let is_foreign_host = record.identity.0 == 1 && place != agent.home;
            let identity = if is_foreign_host { 6 } else { record.identity.0 };
            let key = wire_key::ip_key(exporter.id().get(), ip);
            wanted.insert(key, identity);
            let is_host =
                |node: &&u8| record.host_ip.is_some_and(|ip| truth.internal_ips(**node).contains(&ip));
            ends.extend(truth.nodes.keys().find(is_host).map(|node| (key, truth.node_ip(*node))));
        }
    }
    let kernel = agent.kernel();
    for (key, identity) in &wanted {
        match kernel.ipcache.get(key) {
            Some(value) if value.identity == *identity => {}
            found => return Err(format!("I1: address {key:?} is {found:?}, not identity {identity}")),
        }
    }
    if let Some(key) = kernel.ipcache.keys().find(|key| !wanted.contains_key(key)) {
        return Err(format!("I1: address {key:?} is nobody's"));
    }
    let leads_to = |key: &IpKey| tunnel_end(&kernel, kernel.ipcache.get(key)?.node_ip);
    match ends.iter().find(|(key, end)| leads_to(key) != Some(**end)) {
        Some((key, end)) => Err(format!("I1: {key:?} leads to {:?}, not to {end}", leads_to(key))),
        None => Ok(()),
    }
}

/// The address of a node, as tables call it.
fn tunnel_end(kernel: &Kernel, node_ip: [u8; 4]) -> Option<IpAddr> {
    match kernel.underlay.get(&UnderlayKey { number: node_ip }) {
        Some(value) => Some(Ipv6Addr::from(value.ip).into()),
        None => Some(Ipv4Addr::from(node_ip).into()).filter(|_| node_ip[0] != 0),
    }
}

fn check_topology(world: &World, agent: &Agent) -> Result<(), String> {
    let (mut nodes, mut prefixes, mut translations) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (place, exporter) in followed(world, agent) {
        let truth = &world.truths[place];
        let (id, virtual_cidrs) = (exporter.id().get(), agent.virtual_cidrs(place));
        let is_virtual = !virtual_cidrs.is_empty();
        translations.extend(virtual_cidrs.iter().flat_map(|(a, b)| wire_key::translations(id, a, b)));
        for node in truth.nodes.keys() {
            for ip in truth.internal_ips(*node) {
                nodes.insert(wire_key::node_key(ip), (id, is_virtual));
            }
            let IpAddr::V4(ip) = truth.mesh_ip(*node) else { continue };
            let net =
                ipnet::Ipv4Net::new(ip, 24).map(|net| net.trunc()).map_err(|error| error.to_string())?;
            let net = virtual_cidrs.prefix_known_by(net.into()).unwrap_or_else(|| net.into());
            prefixes.insert(wire_key::prefix_key(net), (id, is_virtual));
        }
    }
    let kernel = agent.kernel();
    let found = kernel.nodes.iter().map(|(key, value)| (*key, (value.cluster, value.flags == NODE_VIRTUAL)));
    let found: BTreeMap<_, _> = found.collect();
    if found != nodes {
        return Err(format!("I1: nodes are {found:?}, not {nodes:?}"));
    }
    check_numbers(&kernel, world.truths[agent.home].underlay.tunnels)?;
    let found =
        kernel.prefixes.iter().map(|(key, value)| (*key, (value.cluster, value.flags == PREFIX_VIRTUAL)));
    let found: BTreeMap<_, _> = found.collect();
    if found != prefixes {
        return Err(format!("I1: prefixes are {found:?}, not {prefixes:?}"));
    }
    if kernel.translations != translations {
        return Err(format!("I1: virtual addresses are {:?}, not {translations:?}", kernel.translations));
    }
    Ok(())
}

/// Over IPv6 each number that is named stands for a node, and each node is the one that its number stands for.
fn check_numbers(kernel: &Kernel, tunnels: UnderlayProtocol) -> Result<(), String> {
    if tunnels == UnderlayProtocol::Ipv4 {
        return match kernel.underlay.is_empty() {
            true => Ok(()),
            false => Err(format!("I1: numbers of nodes without IPv6: {:?}", kernel.underlay)),
        };
    }
    let stands_for = |number: [u8; 4]| kernel.underlay.get(&UnderlayKey { number }).map(|value| value.ip);
    for (key, value) in kernel.nodes.iter().filter(|(key, _)| key.family == FAMILY_V6) {
        if stands_for(value.number.to_ne_bytes()) != Some(key.ip) {
            return Err(format!("I1: node {key:?} has number {}, of {:?}", value.number, kernel.underlay));
        }
    }
    let of_pods = kernel.ipcache.values().map(|value| value.node_ip);
    let named = of_pods.chain(kernel.prefixes.values().map(|value| value.node_ip));
    match named.filter(|number| *number != [0; 4]).find(|number| stands_for(*number).is_none()) {
        Some(number) => Err(format!("I1: nobody has number {number:?}")),
        None => Ok(()),
    }
}

/// Of a cluster in a service: its tier, whether it has a weight, and its backends.
type Part = (u8, bool, BTreeSet<IpAddr>);

fn check_services(world: &World, agent: &Agent) -> Result<(), String> {
    let own = &world.truths[agent.home];
    let kernel = agent.kernel();
    let mut wanted = BTreeMap::new();
    for (number, service) in &own.services {
        let key = wire_key::service_key(agent.own.id.get(), own.service_ip(*number), PORTS.0, wire_key::TCP);
        let mut groups = BTreeMap::new();
        for (place, exporter) in followed(world, agent) {
            let there = &world.truths[place];
            let offers = place == agent.home
                || service.global
                    && service.nearness != Nearness::OnlyNode
                    && there.services.get(number).is_some_and(|other| other.global && other.shared);
            let backends: BTreeSet<IpAddr> = match place == agent.home {
                true => there.near(*number, agent.node),
                false => {
                    let virtual_cidrs = agent.virtual_cidrs(place);
                    let known_by = |ip| virtual_cidrs.known_by(ip);
                    there.backends(*number).filter(|_| offers).filter_map(known_by).collect()
                }
            };
            let preferred = match service.affinity {
                _ if service.only.is_some() => service.only == Some(place),
                _ if service.first.is_some() => true,
                Affinity::None => true,
                Affinity::Local => place == agent.home,
                Affinity::Remote => place != agent.home,
            };
            if !backends.is_empty() {
                let tier = u8::from(service.first.is_some_and(|first| first != place));
                groups.insert(exporter.id().get(), (tier, preferred, backends));
            }
        }
        let timeout = kernel.services.get(&key).map(|value| u32::from(value.affinity_timeout) * 2);
        if timeout.is_some_and(|timeout| timeout != service.session.map_or(0, |seconds| seconds + 1)) {
            return Err(format!(
                "I1: clients of {key:?} are bound for {timeout:?} s, not {:?}",
                service.session
            ));
        }
        wanted.insert(key, groups);
    }
    if let Some(key) = kernel.services.keys().find(|key| !wanted.contains_key(key)) {
        return Err(format!("I1: frontend {key:?} is nobody's"));
    }
    for (key, groups) in wanted {
        let found: Option<BTreeMap<u16, Part>> = kernel.reachable(&key).map(|found| {
            let groups = found.into_iter().map(|(cluster, (group, backends))| {
                let active = backends.iter().filter(|b| b.state == backend_state::ACTIVE);
                let ips = active.filter_map(|b| wire_key::address(b.family, b.ip)).collect();
                (cluster, (group.tier(), group.weight > 0, ips))
            });
            groups.collect()
        });
        if found.as_ref() != Some(&groups) {
            return Err(format!("I1: frontend {key:?} leads to {found:?}, not {groups:?}"));
        }
    }
    let slots: usize = kernel
        .services
        .values()
        .flat_map(|v| &v.groups[..usize::from(v.n_groups)])
        .map(|g| g.count() as usize)
        .sum();
    if kernel.slots.len() != slots {
        return Err(format!("{} slots remain, {slots} are in use", kernel.slots.len()));
    }
    let used: BTreeSet<u32> = kernel.slots.values().copied().collect();
    match kernel.backends.keys().find(|id| !used.contains(id)) {
        Some(id) => Err(format!("backend {id} remains without use")),
        None => check_endpoints(world, agent, &kernel),
    }
}

/// The pods of this node, and no others.
fn check_endpoints(world: &World, agent: &Agent, kernel: &crate::kernel::Kernel) -> Result<(), String> {
    let truth = &world.truths[agent.home];
    if !truth.nodes.contains_key(&agent.node) {
        return Ok(());
    }
    let id = agent.own.id.get();
    let here = truth.pods.values().filter(|pod| pod.node == agent.node).map(|pod| truth.pod_ip(pod));
    let wanted: BTreeSet<IpKey> = here.map(|ip| wire_key::ip_key(id, ip)).collect();
    let mesh_ip = wire_key::ip_key(id, truth.mesh_ip(agent.node));
    let found: BTreeSet<IpKey> = kernel.endpoints.keys().copied().filter(|key| *key != mesh_ip).collect();
    match found == wanted {
        true => check_policies(world, agent, kernel),
        false => Err(format!("I1: pods of this node are {found:?}, not {wanted:?}")),
    }
}

/// For each pod of this node and each pod of all clusters: what the kernel's tables say of the way from one to the
/// other is what the policies say.
fn check_policies(world: &World, agent: &Agent, kernel: &crate::kernel::Kernel) -> Result<(), String> {
    let home = &world.truths[agent.home];
    let peers: Vec<_> = followed(world, agent)
        .flat_map(|(place, exporter)| {
            let (there, records) = (&world.truths[place], ip_records(exporter));
            let pods = there.pods.values();
            pods.filter_map(move |pod| Some((there, pod.app, records.get(&there.pod_ip(pod))?.identity.0)))
        })
        .collect();
    for pod in home.pods.values().filter(|pod| pod.node == agent.node) {
        let ip = home.pod_ip(pod);
        let Some(endpoint) = kernel.endpoints.get(&wire_key::ip_key(agent.own.id.get(), ip)) else {
            continue;
        };
        let enforced = endpoint.flags & (ENDPOINT_ENFORCE_INGRESS | ENDPOINT_ENFORCE_EGRESS);
        let wanted = if home.is_guarded(pod.app) { ENDPOINT_ENFORCE_INGRESS } else { 0 };
        if enforced != wanted {
            return Err(format!("I1: {ip} is enforced as {enforced}, not {wanted}"));
        }
        if wanted == 0 {
            continue;
        }
        for (there, app, identity) in &peers {
            let entries: Vec<_> = kernel
                .policies
                .iter()
                .filter(|(key, _)| key.subject == endpoint.identity && key.direction == direction::INGRESS)
                .filter(|(key, _)| key.peer == 0 || key.peer == *identity)
                .collect();
            let denied = entries.iter().any(|(_, value)| value.flags & POLICY_DENY != 0);
            let allowed = !denied && !entries.is_empty();
            if allowed != home.lets_in(pod.app, *app, there) {
                return Err(format!(
                    "I1: {identity} (s{app}) may reach {ip} (s{}): {allowed}, not as {:?} say: {entries:?}",
                    pod.app, home.policies
                ));
            }
        }
    }
    Ok(())
}

/// I3: as soon as nothing is pending, a cluster is out of load-balancing exactly if it was judged dead.
pub(crate) fn check_dead(agent: &Agent) -> Result<(), String> {
    if agent.life.as_ref().is_none_or(|life| life.engine.pending() > 0) {
        return Ok(());
    }
    let kernel = agent.kernel();
    for (place, id) in agent.memory.members.iter().filter(|(place, _)| **place != agent.home) {
        let (Some(id), Some(dead)) = (id, agent.memory.dead.get(place)) else { continue };
        let state = kernel.clusters.get(&u32::from(*id)).map_or(cluster_state::HEALTHY, |state| state.state);
        if (state == cluster_state::DEAD) != *dead {
            return Err(format!("I3: cluster {id} is in state {state}, but judged dead: {dead}"));
        }
    }
    Ok(())
}

/// Every removal that an agent has made since the last call had a reason.
pub(crate) fn check_removals(agent: &mut Agent, places: &[crate::place::Place]) -> Result<(), String> {
    use crate::kernel::Removed;
    let (violation, removed) = {
        let mut kernel = agent.kernel();
        (kernel.violation.take(), std::mem::take(&mut kernel.removed))
    };
    if let Some(violation) = violation {
        return Err(violation);
    }
    let own = agent.own.id.get();
    let memory = &agent.memory;
    for removed in removed {
        match removed {
            Removed::Address(key) => {
                let Some(ip) = wire_key::address(key.family, key.ip) else { continue };
                // Without an entry the cluster was drained, or the address was never told.
                let told = |ip: IpAddr| memory.addresses.get(&(key.cluster, ip.to_string()));
                // Its cluster's pods may be known otherwise than they were.
                let known = memory.members.iter().find(|(_, id)| **id == Some(key.cluster));
                let virtual_cidrs = known.map(|(place, _)| agent.virtual_cidrs(*place)).unwrap_or_default();
                let real = virtual_cidrs.real(ip);
                if virtual_cidrs.known_by(real) != Some(ip) {
                    continue;
                }
                let ip = real;
                let Some((place, tick)) = told(ip) else {
                    continue;
                };
                let place = &places[*place];
                // An address goes, too, when the prefix that it lies in is its cluster's no more.
                let misplaced = place.contested || place.could_be_gone(Kind::Nodes, "n1", 0);
                if !misplaced && !place.could_be_gone(Kind::Ip, &ip.to_string(), *tick) {
                    let history = place.history(Kind::Ip, &ip.to_string());
                    return Err(format!(
                        "I4: {ip} of cluster {} removed, which was told at #{tick} and never went away: {history}",
                        key.cluster
                    ));
                }
            }
            Removed::Group(key, cluster) => {
                let heard = |cluster, kind| memory.heard.contains(&(cluster, kind));
                let told = heard(own, Kind::LocalServices)
                    || heard(cluster, Kind::Services)
                    || heard(own, Kind::Nodes)
                    || memory.drained.contains(&cluster);
                if !told {
                    return Err(format!(
                        "I4: {key:?} lost backends of cluster {cluster}, of which nothing was heard"
                    ));
                }
            }
            Removed::Policy(key) => {
                let of_peer = u16::try_from(key.peer >> 16).unwrap_or(0);
                let at_home = [
                    Kind::LocalPolicies,
                    Kind::Identities,
                    Kind::LocalIdentities,
                    Kind::Ip,
                    Kind::LocalIp,
                    Kind::Nodes,
                ];
                let told = at_home.iter().any(|kind| memory.heard.contains(&(own, *kind)))
                    || memory.heard.contains(&(of_peer, Kind::Identities))
                    || memory.drained.contains(&of_peer);
                if !told {
                    return Err(format!("I4: {key:?} went before anything was heard"));
                }
            }
            Removed::Prefix(value) => {
                let nodes_heard = memory.heard.iter().any(|(_, kind)| *kind == Kind::Nodes);
                if !nodes_heard && !memory.drained.contains(&value.cluster) {
                    return Err(format!(
                        "I4: a prefix of cluster {} went before any node was heard of",
                        value.cluster
                    ));
                }
            }
        }
    }
    Ok(())
}
