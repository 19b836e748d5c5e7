//! What a cluster may say. A remote cluster is input from outside: whatever is not allowed here never
//! becomes state, neither in an agent nor in a mirror.
//!
//! In: a key, its bytes and a [`PeerPolicy`], which is the peer and the operator's [`Rules`] for it. Out:
//! the decoded record, or a [`Refusal`] with a [`Reason`] out of a fixed set. Two kinds of checks: what
//! could never be right ([`basics`]: another cluster's name, ID or identities, addresses that no pod has,
//! sizes) is always refused; what the operator forbids ([`rules`]) is refused too, or with
//! [`Mode::Audit`] only counted.
//!
//! Checks that need more than the record (who holds an address, whether a node of that address is known)
//! belong to whoever has that state, since they have to be made again whenever it changes.
//!
//! [`file`] reads the operator's file, [`contradiction`] finds what in it cannot be meant, [`reload`] follows
//! it; [`ledger`] counts what was refused.

mod basics;
mod contradiction;
mod file;
mod ledger;
mod pattern;
mod refusal;
mod reload;
mod rules;

use std::borrow::Cow;
use std::sync::Arc;

pub use contradiction::Contradiction;
pub use file::{PolicyFile, PolicyFileError};
pub use ledger::{Ledger, RefusedKey, Tally};
pub use pattern::{NameFilter, Pattern};
pub use refusal::{Reason, Refusal};
pub use reload::{CurrentPolicy, PolicySource, follow};
pub use rules::{Mode, PodCidrs, Quotas, Rules};

use crate::cluster::{ClusterId, ClusterName, Identity, MaxConnectedClusters};
use crate::key::Kind;
use crate::record::{
    IdentityRecord, IpRecord, LocalPolicy, LocalService, Node, Record, RecordError, Service, ServiceExport,
    ServiceReader,
};

/// A cluster, and what it may say.
#[derive(Clone, Debug)]
pub struct PeerPolicy {
    /// The cluster's name, which is that of its configuration file.
    pub name: ClusterName,
    /// Its ID, from its cluster config.
    pub id: ClusterId,
    /// The mesh's width.
    pub max: MaxConnectedClusters,
    /// It is the reader's own cluster.
    pub is_own: bool,
    /// The operator's rules for it.
    pub rules: Arc<Rules>,
}

/// A record that may become state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Imported {
    /// A node.
    Node(Node),
    /// A pod's address.
    Ip(IpRecord),
    /// An identity.
    Identity(IdentityRecord),
    /// A service of another cluster.
    Service(Service),
    /// A service of the own cluster.
    LocalService(LocalService),
    /// A policy of the own cluster.
    LocalPolicy(LocalPolicy),
    /// An export of the Multi-Cluster Services API.
    ServiceExport(ServiceExport),
}

/// A record that was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The record.
    pub record: Imported,
    /// Why it would have been refused, were the rules not only audited.
    pub audited: Option<Refusal>,
}

/// Decodes the record of `kind` whose key ends in `suffix`, and checks whether `peer` may say it. Never
/// panics, whatever the bytes are. The number of records is for [`PeerPolicy::check_quota`].
///
/// # Errors
/// Why it is refused.
pub fn admit(kind: Kind, suffix: &str, value: &[u8], peer: &PeerPolicy) -> Result<Admitted, Refusal> {
    let rules = &peer.rules;
    let mut audited = None;
    rules.judge(|| rules.check_size(value.len()), &mut audited)?;
    let record = match kind {
        Kind::Nodes => {
            let node: Node = decode(suffix, value)?;
            peer.check_node(&node)?;
            rules.judge(|| rules.check_node(&node), &mut audited)?;
            Imported::Node(node)
        }
        Kind::Ip | Kind::LocalIp => {
            let record: IpRecord = decode(suffix, value)?;
            peer.check_ip(&record)?;
            rules.judge(|| rules.check_ip(&record), &mut audited)?;
            Imported::Ip(record)
        }
        Kind::Identities | Kind::LocalIdentities => {
            let record: IdentityRecord = decode(suffix, value)?;
            peer.check_identity(&record)?;
            rules.judge(|| rules.check_identity(&record), &mut audited)?;
            Imported::Identity(record)
        }
        Kind::Services => {
            let service: Service = decode(suffix, value)?;
            peer.judge_service(&service, &mut audited)?;
            Imported::Service(service)
        }
        Kind::LocalServices => {
            let service: LocalService = decode(suffix, value)?;
            peer.check_local_service(&service)?;
            Imported::LocalService(service)
        }
        Kind::LocalPolicies => {
            let policy: LocalPolicy = decode(suffix, value)?;
            peer.check_local_policy(&policy)?;
            Imported::LocalPolicy(policy)
        }
        Kind::ServiceExports => {
            let export: ServiceExport = decode(suffix, value)?;
            peer.check_service_export(&export)?;
            rules.judge(|| rules.check_name(&export.name), &mut audited)?;
            Imported::ServiceExport(export)
        }
    };
    Ok(Admitted { record, audited })
}

/// As [`admit`] for a service of another cluster, which may be large and change a little often. Gives what
/// would speak against it besides.
///
/// # Errors
/// Why it is refused.
pub fn admit_service<'a>(
    reader: &'a mut ServiceReader,
    suffix: &str,
    value: &[u8],
    peer: &PeerPolicy,
) -> Result<(Cow<'a, Service>, Option<Refusal>), Refusal> {
    let rules = &peer.rules;
    let mut audited = None;
    rules.judge(|| rules.check_size(value.len()), &mut audited)?;
    let service = reader.read(suffix, value).map_err(|error| unreadable(&error))?;
    peer.judge_service(&service, &mut audited)?;
    Ok((service, audited))
}

impl PeerPolicy {
    fn judge_service(&self, service: &Service, audited: &mut Option<Refusal>) -> Result<(), Refusal> {
        self.check_service(service)?;
        self.rules.judge(|| self.rules.check_service(service), audited)
    }

    /// Whether one more record of `kind` may be held besides the `held` ones. Gives what would have been
    /// the reason against it, were the rules not only audited: the default quota then still stands, for
    /// memory is bounded always.
    ///
    /// # Errors
    /// The quota is used up.
    pub fn check_quota(&self, kind: Kind, held: usize) -> Result<Option<Refusal>, Refusal> {
        let fixed = match kind {
            Kind::Identities | Kind::LocalIdentities => (1 << self.max.identity_shift()) - 1,
            _ => usize::MAX,
        };
        let limit = self.rules.quotas.of(kind).min(fixed);
        if held < limit {
            return Ok(None);
        }
        let detail = format!("{} has more than {limit} records of this kind", self.name);
        let refusal = Refusal::new(Reason::QuotaExceeded, detail);
        let bound = Quotas::default().of(kind).min(fixed);
        if self.rules.mode == Mode::Audit && held < bound { Ok(Some(refusal)) } else { Err(refusal) }
    }

    /// The identity behind an address as this reader uses it: another cluster's host is a remote node
    /// here.
    pub fn identity_of(&self, record: &IpRecord) -> Identity {
        match record.identity {
            Identity::HOST if !self.is_own => Identity::REMOTE_NODE,
            identity => identity,
        }
    }
}

fn decode<R: Record>(suffix: &str, value: &[u8]) -> Result<R, Refusal> {
    R::decode(suffix, value).map_err(|error| unreadable(&error))
}

fn unreadable(error: &RecordError) -> Refusal {
    Refusal::new(Reason::Record(error.reason()), error.to_string())
}
