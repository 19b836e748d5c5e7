//! Why backends of a service are used, or are not.

use std::collections::BTreeSet;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, NamespacedName};
use clustermesh_kvstore::record::{Affinity, Balancing, LocalService, Nearness};
use ebpf_global_svc::DatapathError;
use ebpf_global_svc::abi::{MAX_GROUPS, ServiceValue, SlotKey};

use super::super::query::{backend_row, service_rows, slot_row};
use super::super::{Engine, Row};
use super::{MOST, Part};
use crate::mesh::InUse;

impl Engine {
    pub(super) fn service_part(&self, id: ClusterId, is_own: bool, name: &NamespacedName, part: &mut Part) {
        let mesh = self.core.mesh();
        let local = mesh.local_service(name);
        let used = mesh.backends_of(name, id);
        part.chosen = used.total() > 0;
        if is_own {
            part.held = local.is_some();
            let Some(local) = local else { return };
            part.why.push(format!(
                "global {}, shared {}, affinity {:?}, {}",
                local.global,
                local.shared,
                local.affinity,
                in_use(local.backends.iter().map(|backend| backend.ip), used)
            ));
            part.why.extend(balancing(local));
            if local.private {
                part.why.push(
                    "its namespace is not global: other clusters do not know of it and contribute nothing"
                        .into(),
                );
            } else if !local.global {
                part.why.push("it is not global: no cluster but this one contributes".into());
            }
            return;
        }
        let Some(remote) = mesh.remote_service(id, name) else { return };
        let (shared, backends) = (remote.shared, &remote.backends);
        part.held = true;
        part.why.push(format!("shared {shared}, {}", in_use(backends.iter().map(|(ip, _)| *ip), used)));
        match local {
            None => part.why.push("not used: no local service of that name".into()),
            Some(local) if local.private => {
                part.why.push("not used: the namespace is not global in this cluster".into());
            }
            Some(local) if !local.global => part.why.push("not used: the local service is not global".into()),
            Some(local) if local.balancing.nearness == Nearness::OnlyNode => {
                part.why.push("not used: internalTrafficPolicy is Local: calls stay on their node".into());
            }
            Some(_) if !shared => part.why.push("not used: it is not shared".into()),
            Some(local) => {
                let names: Vec<&str> =
                    local.frontends.values().flat_map(|ports| ports.keys()).map(String::as_str).collect();
                let foreign = backends
                    .iter()
                    .filter(|(_, ports)| !ports.keys().any(|port| names.contains(&port.as_str())));
                match foreign.count() {
                    0 => {}
                    n => part.why.push(format!(
                        "not used: {n} backends have no port named as the local service's ({})",
                        names.join(", ")
                    )),
                }
                for (v4, family) in [(true, "IPv4"), (false, "IPv6")] {
                    let of_family = backends.iter().filter(|(ip, _)| ip.is_ipv4() == v4).count();
                    if of_family > 0 && !local.frontends.keys().any(|ip| ip.is_ipv4() == v4) {
                        part.why.push(format!(
                            "not used: {of_family} backends are {family}, and the local service has no such frontend"
                        ));
                    }
                }
                for (ip, _) in backends.iter().take(MOST) {
                    if let Some(holder) = mesh.holder_of(*ip).filter(|holder| *holder != id.get()) {
                        part.why.push(format!("not used: {ip} is {}'s", self.name_of(holder)));
                    }
                }
            }
        }
    }

    /// The frontends' rows, and those of their backends.
    pub(super) fn installed_service(
        &self,
        name: &NamespacedName,
    ) -> Result<Vec<(&'static str, Vec<Row>)>, DatapathError> {
        let keys = self.core.mesh().frontends_of(name);
        let values = self.tables.service.get(&keys)?;
        let services: Vec<_> =
            keys.into_iter().zip(values).filter_map(|(key, value)| Some((key, value?))).collect();
        let keys: Vec<_> = services.iter().flat_map(|(_, value)| slots_of(value)).take(MOST).collect();
        let ids = self.tables.slot.get(&keys)?;
        let slots: Vec<_> = keys.into_iter().zip(ids).filter_map(|(key, id)| Some((key, id?))).collect();
        let mut ids: Vec<u32> = slots.iter().map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        let values = self.tables.backend.get(&ids)?;
        let backends = ids.into_iter().zip(values).filter_map(|(id, value)| Some(backend_row(id, value?)));
        let rows = services.into_iter().flat_map(|(key, value)| service_rows(key, value));
        Ok(vec![
            ("service", rows.take(MOST).collect()),
            ("slot", slots.into_iter().map(|(key, id)| slot_row(key, id)).collect()),
            ("backend", backends.collect()),
        ])
    }
}

/// What the service says of how its calls are spread.
fn balancing(service: &LocalService) -> Vec<String> {
    let Balancing { session, order, weights, nearness } = &service.balancing;
    let mut why = Vec::new();
    if let Some(seconds) = session {
        why.push(format!(
            "session affinity: a client keeps its backend until it has not called for {seconds} s"
        ));
    }
    let names =
        |tier: &BTreeSet<ClusterName>| tier.iter().map(ClusterName::as_str).collect::<Vec<_>>().join(" and ");
    if !order.is_empty() {
        let tiers: Vec<_> = order.iter().map(names).collect();
        why.push(format!("cluster-order: {}, then all others", tiers.join(", then ")));
    }
    if !weights.is_empty() {
        let shares: Vec<_> = weights.iter().map(|(name, weight)| format!("{name} {weight}")).collect();
        why.push(format!("cluster-weights: {}; all others stand by", shares.join(", ")));
    }
    if service.balancing.names_clusters() && service.affinity != Affinity::None {
        why.push("the affinity is not used: the annotation that names clusters decides".into());
    }
    why.extend(
        match nearness {
            Nearness::Any => None,
            Nearness::PreferZone => {
                Some("of this cluster's backends only those of the node's zone, if it has any")
            }
            Nearness::PreferNode => {
                Some("of this cluster's backends only those of the node, else of its zone, if any")
            }
            Nearness::OnlyNode => Some("internalTrafficPolicy is Local: only backends of the node"),
        }
        .map(str::to_owned),
    );
    why
}

/// `4 backends, 3 in use`; of a service with both families by family, if fewer of one are in use.
fn in_use(backends: impl Iterator<Item = IpAddr>, used: InUse) -> String {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = backends.partition(IpAddr::is_ipv4);
    let text = format!("{} backends, {} in use", v4.len() + v6.len(), used.total());
    if v4.is_empty() || v6.is_empty() || used.v4 == used.v6 {
        return text;
    }
    format!("{text} ({} IPv4, {} IPv6)", used.v4, used.v6)
}

fn slots_of(value: &ServiceValue) -> impl Iterator<Item = SlotKey> + use<> {
    let service = value.id;
    let groups = value.groups;
    let count = usize::from(value.n_groups).min(MAX_GROUPS);
    groups.into_iter().take(count).flat_map(move |group| {
        (0..group.count()).map(move |slot| SlotKey { service, slot, cluster: group.cluster, pad: 0 })
    })
}
