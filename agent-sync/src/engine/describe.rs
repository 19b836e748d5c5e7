//! Events of the programs with what the engine knows of their ends.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::labels::Labels;
use ebpf_global_svc::abi::{EVENT_POLICY, Event, ServiceKey, event_hook, identity, scope};
use jiff::Timestamp;

use super::Engine;
use super::core::Core;
use crate::observe::{End, Flow};
use crate::wire_key;

impl Engine {
    /// One flow for each event, in their order; their times are the reader's.
    pub(super) fn describe(&self, events: Vec<Event>) -> Vec<Flow> {
        Describer::new(&self.core, &events).describe(events)
    }
}

/// What a batch of events has in common.
struct Describer<'a> {
    core: &'a Core,
    clusters: BTreeMap<u16, &'a ClusterName>,
    /// Frontends of the services that events name by number.
    frontends: BTreeMap<u32, ServiceKey>,
    /// Labels that were read already.
    labels: HashMap<u32, Option<Arc<Labels>>>,
}

impl<'a> Describer<'a> {
    fn new(core: &'a Core, events: &[Event]) -> Self {
        let ids = core.members().iter().filter_map(|(name, member)| Some((member.id?.get(), name)));
        let own = core.own();
        let services: BTreeSet<u32> =
            events.iter().filter(|event| names_service(event)).map(|event| event.number).collect();
        Self {
            core,
            clusters: ids.chain([(own.id.get(), &own.name)]).collect(),
            frontends: if services.is_empty() { BTreeMap::new() } else { core.frontends_of(&services) },
            labels: HashMap::new(),
        }
    }

    fn describe(mut self, events: Vec<Event>) -> Vec<Flow> {
        events.into_iter().map(|event| self.flow(event)).collect()
    }

    fn flow(&mut self, event: Event) -> Flow {
        // What a call does not know is zero; in a packet that is an address as any other.
        let is_known = |ip: &IpAddr| event.hook != event_hook::SOCKET || !ip.is_unspecified();
        let end = |ip, port, identity, cluster| {
            let ip = wire_key::address(event.family, ip).filter(is_known);
            (ip, u16::from_be(port), identity, cluster)
        };
        let source = end(event.source, event.source_port, event.source_identity, event.source_cluster);
        let destination = end(
            event.destination,
            event.destination_port,
            event.destination_identity,
            event.destination_cluster,
        );
        Flow {
            time: Timestamp::UNIX_EPOCH,
            event,
            source: self.end(source),
            destination: self.end(destination),
            service: self.service(&event),
            rule: self.rule(&event),
        }
    }

    fn end(&mut self, (ip, port, told, cluster): (Option<IpAddr>, u16, u32, u16)) -> End {
        let mesh = self.core.mesh();
        let held_by = if cluster != 0 { Some(cluster) } else { ip.and_then(|ip| mesh.holder_of(ip)) };
        let id = held_by.and_then(|id| ClusterId::new(id.into(), self.core.own().max).ok());
        let held = id.zip(ip).and_then(|(id, ip)| mesh.address(id, ip));
        let node = id.zip(ip).and_then(|(id, ip)| mesh.node_of_address(id, ip)).map(Into::into);
        let identity = match (told, held) {
            (identity::UNKNOWN, Some(held)) => held.identity,
            (identity::UNKNOWN, None) if node.is_some() => identity::REMOTE_NODE,
            (identity::UNKNOWN, None) if held_by.is_none() && ip.is_some_and(is_routed) => identity::WORLD,
            (told, _) => told,
        };
        End {
            ip,
            port,
            identity,
            cluster: held_by.and_then(|id| self.clusters.get(&id)).map(|name| (*name).clone()),
            labels: self.labels(identity),
            node,
            is_known: held.is_some_and(|held| held.identity == identity),
        }
    }

    /// What an identity means, as far as it is known.
    fn labels(&mut self, id: u32) -> Option<Arc<Labels>> {
        let mesh = self.core.mesh();
        let known = self.labels.entry(id).or_insert_with(|| {
            let mut labels = Labels::default();
            match id {
                identity::FIRST_CIDR.. => {
                    labels.insert("cidr", &mesh.policies().range_of(id)?.to_string(), "")
                }
                identity::FIRST_USER.. => labels = Labels::parse(mesh.labels_of(id)?).ok()?,
                _ => labels.insert("reserved", Identity(id).reserved_name()?, ""),
            }
            Some(Arc::new(labels))
        });
        known.clone()
    }

    fn service(&self, event: &Event) -> Option<NamespacedName> {
        let key = if event.hook == event_hook::SOCKET {
            ServiceKey {
                cluster: self.core.own().id.get(),
                port: event.frontend_port,
                proto: event.proto,
                family: event.family,
                scope: scope::MESH,
                pad: 0,
                ip: event.frontend,
            }
        } else if names_service(event) {
            *self.frontends.get(&event.number)?
        } else {
            return None;
        };
        self.core.mesh().service_at(&key).cloned()
    }

    fn rule(&self, event: &Event) -> Option<Box<str>> {
        if event.flags & EVENT_POLICY == 0 || event.number == 0 {
            return None;
        }
        let known = self.core.mesh().policies().rule_text(event.number).map(Into::into);
        Some(known.unwrap_or_else(|| event.number.to_string().into()))
    }
}

/// Whether an address can be somebody's beyond its link.
fn is_routed(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(is_link_local || ip.is_multicast() || ip.is_unspecified())
}

/// Whether its number is a service's.
fn names_service(event: &Event) -> bool {
    event.flags & EVENT_POLICY == 0 && event.number != 0
}

#[cfg(test)]
#[path = "describe_tests.rs"]
mod tests;
