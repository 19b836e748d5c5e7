//! What the engine knows of one service, address or identity: each cluster's part in it, what became of
//! that, and why. What stands in the clusters' etcds is added by whoever asks.
//!
//! The engine answers between two batches, so it looks single entries up and walks no table.

mod address;
mod service;

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::DatapathError;
use ebpf_global_svc::abi::cluster_state;

use super::members::Member;
use super::{Engine, Row};
use crate::mesh::FactKey;

pub use address::AddressPart;

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
        let mut explanation = Explanation::default();
        for (name, member) in self.core.members().iter() {
            let mut part = self.part(name, member, subject);
            part.why.extend(part.id.map(|id| self.standing(id)).transpose()?.flatten());
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
                let ids = self.core.members().iter().filter_map(|(_, member)| member.id);
                explanation.installed = self.installed_address(*ip, ids)?;
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
                if private {
                    part.why.push(NOT_GLOBAL.into());
                }
            }
        }
        part
    }

    /// What keeps all of a cluster from new connections, if anything does.
    fn standing(&self, id: ClusterId) -> Result<Option<String>, DatapathError> {
        let state = self.tables.cluster.get(&[id.get().into()])?.pop().flatten();
        Ok(match state.map(|value| value.state) {
            Some(cluster_state::DEAD) => Some("the cluster is dead: it gets no new connections".into()),
            Some(cluster_state::DRAINING) => {
                Some("the cluster is draining: it gets no new connections".into())
            }
            _ => None,
        })
    }

    fn name_of(&self, id: u16) -> String {
        let named = self.core.members().iter().find(|(_, member)| member.id.map(ClusterId::get) == Some(id));
        named.map_or_else(|| format!("cluster ID {id}"), |(name, _)| name.to_string())
    }
}

/// Of what the own cluster tells its own agents alone.
const NOT_GLOBAL: &str = "its namespace is not global: other clusters do not know of it";
