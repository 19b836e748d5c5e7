//! What the engine knows of one service, address or identity: each cluster's part in it, what became of
//! that, and why. What stands in the clusters' etcds is added by whoever asks.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::DatapathError;
use ebpf_global_svc::abi::cluster_state;

use super::members::Member;
use super::{Engine, Row};
use crate::mesh::FactKey;

/// Rows of the tables, and addresses of an identity, that an answer has at most.
const MOST: usize = 256;

/// What is to be explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A service, as `namespace/name`.
    Service(NamespacedName),
    /// An address of a pod or node.
    Ip(IpAddr),
    /// A security identity.
    Identity(Identity),
}

/// Why a cluster's part is used, or is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Its ID, if it is let in.
    pub id: Option<ClusterId>,
    /// Whether its list of the kind is complete.
    pub synced: bool,
    /// A record of the subject is held.
    pub held: bool,
    /// The cluster tells its own agents alone, and this is one.
    pub private: bool,
    /// Something of it is in use.
    pub chosen: bool,
    /// Sentences: what is used, what is not, and why.
    pub why: Vec<String>,
}

/// The engine's part of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Explanation {
    /// By cluster, as far as it is configured.
    pub parts: BTreeMap<ClusterName, Part>,
    /// About the subject as a whole.
    pub verdict: Vec<String>,
    /// What is installed, by table.
    pub installed: Vec<(&'static str, Vec<Row>)>,
}

impl Subject {
    /// The kind of record that is about it; `private` if a cluster tells it its own agents alone.
    pub fn kind(&self, private: bool) -> Kind {
        match (self, private) {
            (Self::Service(_), true) => Kind::LocalServices,
            (Self::Service(_), false) => Kind::Services,
            (Self::Ip(_), true) => Kind::LocalIp,
            (Self::Ip(_), false) => Kind::Ip,
            (Self::Identity(_), true) => Kind::LocalIdentities,
            (Self::Identity(_), false) => Kind::Identities,
        }
    }

    /// The key of that record without its prefix.
    pub fn suffix(&self) -> String {
        match self {
            Self::Service(name) => name.to_string(),
            Self::Ip(ip) => ip.to_string(),
            Self::Identity(identity) => identity.to_string(),
        }
    }
}

impl Engine {
    pub(super) fn explain(&self, subject: &Subject) -> Result<Explanation, DatapathError> {
        let own = self.core.own();
        let states: BTreeMap<u32, u32> =
            self.tables.cluster.dump()?.into_iter().map(|(id, value)| (id, value.state)).collect();
        let mut explanation = Explanation::default();
        for (name, member) in self.core.members().iter() {
            let mut part = self.part(name, member, subject);
            match part.id.and_then(|id| states.get(&u32::from(id.get()))) {
                Some(&cluster_state::DEAD) => {
                    part.why.push("the cluster is dead: it gets no new connections".into())
                }
                Some(&cluster_state::DRAINING) => {
                    part.why.push("the cluster is draining: it gets no new connections".into());
                }
                _ => {}
            }
            explanation.parts.insert(name.clone(), part);
        }
        match subject {
            Subject::Service(name) => {
                if self.core.mesh().local_service(name).is_none() {
                    explanation.verdict.push(format!(
                        "{} has no service {name}: there is no frontend, whatever others export",
                        own.name
                    ));
                }
                explanation.installed = self.installed_service(name)?;
            }
            Subject::Ip(ip) => {
                explanation.verdict.push(self.place_of(*ip));
                explanation.installed =
                    vec![("ipcache", self.rows_with("ipcache", "address", &ip.to_string()))];
            }
            Subject::Identity(identity) if identity.is_reserved() => {
                let name = identity.reserved_name().unwrap_or("without a name");
                explanation
                    .verdict
                    .push(format!("it is reserved ({name}) and means the same in all clusters"));
            }
            Subject::Identity(identity) => {
                let id = identity.cluster(own.max);
                let holder = self.name_of(id);
                explanation.verdict.push(format!("it is in the range of cluster ID {id} ({holder})"));
            }
        }
        Ok(explanation)
    }

    fn part(&self, name: &ClusterName, member: &Member, subject: &Subject) -> Part {
        let mesh = self.core.mesh();
        let own = self.core.own();
        let is_own = *name == own.name;
        let Some(id) = member.id else {
            let why = vec!["its cluster configuration was not accepted yet".to_owned()];
            return Part { why, ..Part::default() };
        };
        let private = match subject {
            Subject::Service(_) => is_own,
            Subject::Ip(ip) => mesh.holds(id, &FactKey::LocalIp(*ip)),
            Subject::Identity(identity) => mesh.holds(id, &FactKey::LocalIdentity(identity.0)),
        };
        let kind = subject.kind(private);
        let synced = mesh.is_synced(id, kind);
        let mut part = Part { id: Some(id), synced, private, ..Part::default() };
        if !part.synced {
            part.why.push(format!("its {kind} are not synced yet: what was known before counts"));
        }
        match subject {
            Subject::Service(service) => self.service_part(id, is_own, service, &mut part),
            Subject::Ip(ip) => self.address_part(id, *ip, &mut part),
            Subject::Identity(identity) => {
                part.held = private || mesh.holds(id, &FactKey::Identity(identity.0));
                let (count, some) = mesh.addresses_of(id, identity.0, MOST);
                part.chosen = count > 0;
                if count > 0 {
                    let some: Vec<_> = some.iter().map(IpAddr::to_string).collect();
                    part.why.push(format!("{count} addresses have it: {}", some.join(", ")));
                } else if part.held {
                    part.why.push("no address has it".into());
                }
            }
        }
        part
    }

    fn service_part(&self, id: ClusterId, is_own: bool, name: &NamespacedName, part: &mut Part) {
        let mesh = self.core.mesh();
        let local = mesh.local_service(name);
        let used: usize = mesh.backends_of(name, id);
        part.chosen = used > 0;
        if is_own {
            part.held = local.is_some();
            let Some(local) = local else { return };
            part.why.push(format!(
                "global {}, shared {}, affinity {:?}, {} backends, {used} in use",
                local.global,
                local.shared,
                local.affinity,
                local.backends.len()
            ));
            if !local.global {
                part.why.push("it is not global: no cluster but this one contributes".into());
            }
            return;
        }
        let Some(remote) = mesh.remote_service(id, name) else { return };
        let (shared, backends) = (remote.shared, &remote.backends);
        part.held = true;
        part.why.push(format!("shared {shared}, {} backends, {used} in use", backends.len()));
        match local {
            None => part.why.push("not used: no local service of that name".into()),
            Some(local) if !local.global => part.why.push("not used: the local service is not global".into()),
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
                for (ip, _) in backends.iter().take(MOST) {
                    if let Some(holder) = mesh.holder_of(*ip).filter(|holder| *holder != id.get()) {
                        part.why.push(format!("not used: {ip} is {}'s", self.name_of(holder)));
                    }
                }
            }
        }
    }

    fn address_part(&self, id: ClusterId, ip: IpAddr, part: &mut Part) {
        let mesh = self.core.mesh();
        let Some(value) = mesh.address(id, ip) else { return };
        part.held = true;
        let node = std::net::Ipv4Addr::from(value.node_ip);
        part.why.push(format!("identity {}, node {node}", value.identity));
        if mesh.is_misplaced(id, ip) {
            part.why
                .push(format!("not sent to {node}: the cluster has no such node; the pod's prefix decides"));
        }
        match mesh.holder_of(ip) {
            Some(holder) if holder == id.get() => part.chosen = true,
            Some(holder) => {
                part.why.push(format!("not reached there: the address is {}'s", self.name_of(holder)));
            }
            None => part.why.push("not reached: no cluster has a pod prefix around it".into()),
        }
    }

    fn place_of(&self, ip: IpAddr) -> String {
        let mesh = self.core.mesh();
        match (mesh.prefix_of(ip), mesh.holder_of(ip)) {
            (Some((net, cluster)), _) => format!("it is in pod prefix {net} of {}", self.name_of(cluster)),
            (None, Some(cluster)) => format!("it is a node of {}", self.name_of(cluster)),
            (None, None) => "it is in no cluster's pod prefix, and no node's".into(),
        }
    }

    /// The frontends' rows, and those of their backends.
    fn installed_service(
        &self,
        name: &NamespacedName,
    ) -> Result<Vec<(&'static str, Vec<Row>)>, DatapathError> {
        let keys = self.core.mesh().frontends_of(name);
        let mut services: Vec<_> = self.tables.service.dump()?;
        services.retain(|(key, _)| keys.contains(key));
        let ids: Vec<u32> = services.iter().map(|(_, value)| value.id).collect();
        let rows = services.into_iter().flat_map(|(key, value)| super::query::service_rows(key, value));
        let rows: Vec<Row> = rows.take(MOST).collect();
        let mut slots = self.tables.slot.dump()?;
        slots.retain(|(key, _)| ids.contains(&key.service));
        slots.sort_unstable();
        slots.truncate(MOST);
        let wanted: Vec<u32> = slots.iter().map(|(_, backend)| *backend).collect();
        let mut backends = self.tables.backend.dump()?;
        backends.retain(|(id, _)| wanted.contains(id));
        backends.sort_unstable_by_key(|(id, _)| *id);
        let slots = slots.into_iter().map(|(key, backend)| super::query::slot_row(key, backend)).collect();
        let backends = backends.into_iter().map(|(id, value)| super::query::backend_row(id, value)).collect();
        Ok(vec![("service", rows), ("slot", slots), ("backend", backends)])
    }

    fn rows_with(&self, table: &str, column: &str, value: &str) -> Vec<Row> {
        let rows = self.dump(table).unwrap_or_default().into_iter();
        rows.filter(|row| row.iter().any(|(name, text)| *name == column && text == value))
            .take(MOST)
            .collect()
    }

    fn name_of(&self, id: u16) -> String {
        let named = self.core.members().iter().find(|(_, member)| member.id.map(ClusterId::get) == Some(id));
        named.map_or_else(|| format!("cluster ID {id}"), |(name, _)| name.to_string())
    }
}
