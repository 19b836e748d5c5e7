//! From a key and its bytes to a fact, or to a refusal that is counted and shown.

use std::collections::BTreeMap;
use std::net::IpAddr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{
    IdentityRecord, IpRecord, LocalService, Node, NodeAddressKind, Record, Service,
};
use ebpf_global_svc::abi::IpValue;
use tracing::{debug, warn};

use crate::import_policy::{Peer, Refusal, quota};
use crate::mesh::{Fact, FactKey, Mesh, NodeFact, RemoteService};

/// Longest part of a foreign key that is kept to be shown.
const SHOWN: usize = 128;

/// Takes in one kind of one cluster.
#[derive(Debug, Default)]
pub(super) struct Intake {
    refusals: RefusalCounts,
}

/// Records that were refused so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusalCounts {
    /// By reason; reasons are a fixed set of words.
    pub by_reason: BTreeMap<&'static str, u64>,
    /// The newest: key and why.
    pub last: Option<String>,
}

impl RefusalCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.by_reason.values().sum()
    }
}

impl Intake {
    /// The fact that a record states. A refused one changes nothing: what was held under its key stays.
    pub(super) fn admit(
        &mut self,
        peer: &Peer<'_>,
        kind: Kind,
        suffix: &str,
        value: &[u8],
        mesh: &Mesh,
    ) -> Option<Fact> {
        match admit(peer, kind, suffix, value, mesh) {
            Ok(fact) => Some(fact),
            Err(refusal) => {
                self.note(peer, kind, suffix, &refusal);
                None
            }
        }
    }

    pub(super) fn refusals(&self) -> &RefusalCounts {
        &self.refusals
    }

    fn note(&mut self, peer: &Peer<'_>, kind: Kind, suffix: &str, refusal: &Refusal) {
        let key: String = suffix.chars().take(SHOWN).collect();
        let count = self.refusals.by_reason.entry(refusal.reason).or_default();
        *count += 1;
        // A peer must not fill our log: each reason is told once, all are counted.
        if *count == 1 {
            warn!(cluster = %peer.name, %kind, key, %refusal, "refused a record; more of this reason are only counted");
        } else {
            debug!(cluster = %peer.name, %kind, key, %refusal, "refused a record");
        }
        self.refusals.last = Some(format!("{key}: {refusal}"));
    }
}

/// The key of a record that may be held; none if no record can have it.
pub(super) fn key(kind: Kind, suffix: &str) -> Option<FactKey> {
    match kind {
        Kind::Nodes => Some(FactKey::Node(suffix.to_owned())),
        Kind::Ip => suffix.parse::<IpAddr>().ok().map(FactKey::Ip),
        Kind::Identities => suffix.parse().ok().map(FactKey::Identity),
        Kind::Services => name(suffix).map(FactKey::Service),
        Kind::LocalServices => name(suffix).map(FactKey::LocalService),
        Kind::ServiceExports => None,
    }
}

fn name(suffix: &str) -> Option<NamespacedName> {
    let (namespace, name) = suffix.split_once('/')?;
    Some(NamespacedName { namespace: namespace.to_owned(), name: name.to_owned() })
}

fn admit(peer: &Peer<'_>, kind: Kind, suffix: &str, value: &[u8], mesh: &Mesh) -> Result<Fact, Refusal> {
    let fact = match kind {
        Kind::Nodes => node(peer, &decode(suffix, value)?)?,
        Kind::Ip => ip(peer, &decode(suffix, value)?)?,
        Kind::Identities => {
            let record: IdentityRecord = decode(suffix, value)?;
            peer.check_identity(&record)?;
            Fact::Identity(record.id.0)
        }
        Kind::Services => {
            let record: Service = decode(suffix, value)?;
            peer.check_service(&record)?;
            let service = RemoteService { shared: record.shared, backends: record.backends };
            Fact::Service(record.name, service)
        }
        Kind::LocalServices => {
            let record: LocalService = decode(suffix, value)?;
            peer.check_local_service(&record)?;
            Fact::LocalService(Box::new(record))
        }
        Kind::ServiceExports => {
            return Err(Refusal { reason: "unused_kind", detail: "agents do not read it".into() });
        }
    };
    let limit = quota(kind, peer.max);
    if mesh.count(peer.id, kind) >= limit && !mesh.holds(peer.id, &fact.key()) {
        let detail = format!("{} has more than {limit} records of this kind", peer.name);
        return Err(Refusal { reason: "quota_exceeded", detail });
    }
    Ok(fact)
}

fn decode<R: Record>(suffix: &str, value: &[u8]) -> Result<R, Refusal> {
    R::decode(suffix, value).map_err(|error| Refusal { reason: error.reason(), detail: error.to_string() })
}

fn node(peer: &Peer<'_>, node: &Node) -> Result<Fact, Refusal> {
    peer.check_node(node)?;
    let of_kind = |kind: NodeAddressKind| {
        node.addresses.iter().filter(move |address| address.kind == kind).map(|address| address.ip).collect()
    };
    let fact = NodeFact {
        internal_ips: of_kind(NodeAddressKind::InternalIp),
        mesh_ips: of_kind(NodeAddressKind::CiliumInternalIp),
        pod_cidrs: node.pod_cidrs().collect(),
    };
    Ok(Fact::Node(node.name.clone(), fact))
}

fn ip(peer: &Peer<'_>, record: &IpRecord) -> Result<Fact, Refusal> {
    let identity = peer.check_ip(record)?;
    let node_ip = match record.host_ip {
        Some(IpAddr::V4(host)) => host.octets(),
        // The underlay is IPv4; the pod's prefix says which node to go to.
        Some(IpAddr::V6(_)) | None => [0; 4],
    };
    let value = IpValue { identity: identity.0, node_ip, key: record.key, flags: 0, pad: 0 };
    Ok(Fact::Ip(record.prefix.addr(), value))
}
