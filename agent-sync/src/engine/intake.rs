//! From a key and its bytes to a fact, or to a refusal that is counted and shown.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;

use clustermesh_kvstore::cluster::NamespacedName;
use clustermesh_kvstore::import_policy::{self, Imported, Ledger, PeerPolicy, Refusal, Rules};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::{IpRecord, Node, NodeAddressKind, ServiceReader};
use ebpf_global_svc::abi::IpValue;

use crate::mesh::{Fact, FactKey, Mesh, NodeFact, RemoteService};

/// Takes in one kind of one cluster.
#[derive(Debug, Default)]
pub(super) struct Intake {
    ledger: Ledger,
    /// Of another cluster's services, if it is they that are taken in.
    services: ServiceReader,
}

/// What becomes of what is held under a record's key.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is replaced by this.
    Take(Fact),
    /// It stays: nobody can tell what the record says.
    Keep,
    /// It goes: the operator wants no record of what this one says.
    Drop(FactKey),
}

impl Intake {
    /// Judges a record.
    pub(super) fn admit(
        &mut self,
        peer: &PeerPolicy,
        kind: Kind,
        suffix: &str,
        value: &[u8],
        mesh: &mut Mesh,
    ) -> Verdict {
        let (fact, mut audited) = match self.read(peer, kind, suffix, value, mesh) {
            Ok((Some(fact), audited)) => (fact, audited),
            Ok((None, _)) => return Verdict::Keep,
            Err(refusal) => {
                self.note(peer, kind, suffix, &refusal, false);
                let held = key(&peer.rules, kind, suffix).filter(|_| refusal.reason.is_operators());
                return held.map_or(Verdict::Keep, Verdict::Drop);
            }
        };
        if !mesh.holds(peer.id, &fact.key()) {
            match peer.check_quota(kind, mesh.count(peer.id, kind)) {
                Ok(beyond) => audited = audited.or(beyond),
                Err(refusal) => {
                    self.note(peer, kind, suffix, &refusal, false);
                    return Verdict::Keep;
                }
            }
        }
        if let Some(refusal) = audited {
            self.note(peer, kind, suffix, &refusal, true);
        }
        Verdict::Take(fact)
    }

    /// A record is gone.
    pub(super) fn forget(&mut self, suffix: &str) {
        self.services.forget(suffix);
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What the agent uses of a record, if it reads that kind, and what would speak against it.
    fn read(
        &mut self,
        peer: &PeerPolicy,
        kind: Kind,
        suffix: &str,
        value: &[u8],
        mesh: &mut Mesh,
    ) -> Result<(Option<Fact>, Option<Refusal>), Refusal> {
        if kind == Kind::Services {
            let (service, audited) = import_policy::admit_service(&mut self.services, suffix, value, peer)?;
            let known_by = peer.rules.virtual_cidrs.clone();
            let fact = RemoteService { shared: service.shared, backends: service.backends.clone(), known_by };
            return Ok((Some(Fact::Service(service.name.clone(), fact)), audited));
        }
        let admitted = import_policy::admit(kind, suffix, value, peer)?;
        Ok((fact(peer, kind, admitted.record, mesh), admitted.audited))
    }

    fn note(&mut self, peer: &PeerPolicy, kind: Kind, suffix: &str, refusal: &Refusal, audited: bool) {
        self.ledger.tell(&peer.name, kind, suffix, refusal, audited);
    }
}

/// The key of a record that may be held, of a cluster with these rules; none if no record can have it.
pub(super) fn key(rules: &Rules, kind: Kind, suffix: &str) -> Option<FactKey> {
    match kind {
        Kind::Nodes => Some(FactKey::Node(suffix.to_owned())),
        Kind::Ip => canonical(suffix).and_then(|ip| rules.virtual_cidrs.known_by(ip)).map(FactKey::Ip),
        Kind::Identities => canonical(suffix).map(FactKey::Identity),
        Kind::Services => name(suffix).map(FactKey::Service),
        Kind::LocalServices => name(suffix).map(FactKey::LocalService),
        Kind::LocalIp => canonical(suffix).map(FactKey::LocalIp),
        Kind::LocalIdentities => canonical(suffix).map(FactKey::LocalIdentity),
        Kind::LocalPolicies => canonical(suffix).map(FactKey::LocalPolicy),
        Kind::ServiceExports => None,
    }
}

/// An address or a number has one key; what is spelled otherwise (`+5`, `fd00:0::1`) is about no record.
fn canonical<T: FromStr + Display>(suffix: &str) -> Option<T> {
    suffix.parse().ok().filter(|parsed: &T| parsed.to_string() == suffix)
}

fn name(suffix: &str) -> Option<NamespacedName> {
    let (namespace, name) = suffix.split_once('/')?;
    Some(NamespacedName { namespace: namespace.to_owned(), name: name.to_owned() })
}

/// What the agent uses of a record; none of a kind that it does not read, or not in this way.
fn fact(peer: &PeerPolicy, kind: Kind, record: Imported, mesh: &mut Mesh) -> Option<Fact> {
    Some(match record {
        Imported::Node(node) => node_fact(node, peer),
        Imported::Ip(record) => {
            let (ip, value) = ip_fact(peer, &record, mesh);
            if kind == Kind::LocalIp { Fact::LocalIp(ip, value) } else { Fact::Ip(ip, value) }
        }
        Imported::Identity(record) => {
            let labels = record.labels.to_string().into_boxed_str();
            let id = record.id.0;
            if kind == Kind::LocalIdentities {
                Fact::LocalIdentity(id, labels)
            } else {
                Fact::Identity(id, labels)
            }
        }
        Imported::LocalPolicy(policy) => Fact::LocalPolicy(Box::new(policy)),
        Imported::LocalService(service) => Fact::LocalService(Box::new(service)),
        Imported::Service(_) | Imported::ServiceExport(_) => return None,
    })
}

/// Label of the failure zone, as Kubernetes has it.
const ZONE: &str = "topology.kubernetes.io/zone";

fn node_fact(node: Node, peer: &PeerPolicy) -> Fact {
    let virtual_cidrs = &peer.rules.virtual_cidrs;
    let of_kind = |kind: NodeAddressKind| -> Vec<IpAddr> {
        node.addresses.iter().filter(move |address| address.kind == kind).map(|address| address.ip).collect()
    };
    let fact = NodeFact {
        internal_ips: of_kind(NodeAddressKind::InternalIp),
        mesh_ips: of_kind(NodeAddressKind::CiliumInternalIp)
            .into_iter()
            .filter_map(|ip| virtual_cidrs.known_by(ip))
            .collect(),
        pod_cidrs: node.pod_cidrs().filter_map(|cidr| virtual_cidrs.prefix_known_by(cidr)).collect(),
        virtual_cidrs: virtual_cidrs.clone(),
        wireguard: node.wireguard_key(),
        ipsec: node.ipsec_key(),
        zone: node.labels.as_ref().filter(|_| peer.is_own).and_then(|labels| labels.get(ZONE).cloned()),
    };
    Fact::Node(node.name, fact)
}

fn ip_fact(peer: &PeerPolicy, record: &IpRecord, mesh: &mut Mesh) -> (IpAddr, IpValue) {
    // Of one that is not on the underlay the pod's prefix says which node to go to.
    let node_ip = record.host_ip.map_or([0; 4], |host| mesh.name_node(host));
    let identity = peer.identity_of(record).0;
    let value = IpValue { identity, node_ip, key: record.key, flags: 0, pad: 0 };
    let ip = record.prefix.addr();
    // One without is refused before.
    (peer.rules.virtual_cidrs.known_by(ip).unwrap_or(ip), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A delete of another spelling must not take the record itself away.
    #[test]
    fn a_record_has_one_key() {
        let key = |kind, suffix| key(&Rules::default(), kind, suffix);
        assert_eq!(key(Kind::Identities, "131373"), Some(FactKey::Identity(131_373)));
        assert_eq!(key(Kind::Ip, "fd00::1"), Some(FactKey::Ip("fd00::1".parse().unwrap())));
        for (kind, alias) in [
            (Kind::Identities, "+5"),
            (Kind::Identities, "05"),
            (Kind::Ip, "fd00:0::1"),
            (Kind::Ip, "10.2.0.1/32"),
        ] {
            assert_eq!(key(kind, alias), None, "{kind} {alias}");
        }
    }
}
