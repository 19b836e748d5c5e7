//! What the operator allows one cluster, beyond what is plausible at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::pattern::NameFilter;
use super::refusal::{Reason, Refusal, refuse};
use crate::cluster::NamespacedName;
use crate::key::Kind;
use crate::record::{IdentityRecord, IpRecord, MAX_VALUE, Node, NodeAddressKind, Service};
use crate::virtual_cidrs::VirtualCidrs;

/// The label in which an identity has its pods' namespace.
const NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

/// Rules for one cluster. The default lets in whatever is plausible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Whether they are enforced.
    pub mode: Mode,
    /// Where its pods may be.
    pub pod_cidrs: PodCidrs,
    /// By which prefixes those of its pods are known to this reader, who has it from the cluster's configuration file
    /// and not from the policy's. Rules name real addresses.
    pub virtual_cidrs: VirtualCidrs,
    /// Where its nodes may be; none: anywhere.
    pub node_cidrs: Option<Vec<IpNet>>,
    /// Reserved identities (below 256) that its addresses may not have.
    pub refused_identities: BTreeSet<u32>,
    /// Namespaces it may speak of.
    pub namespaces: NameFilter,
    /// Services it may contribute to, as `namespace/name`.
    pub services: NameFilter,
    /// Records it may have.
    pub quotas: Quotas,
    /// Longest value, in bytes.
    pub max_record_bytes: usize,
    /// Most backends of one service.
    pub max_backends: usize,
}

/// What happens to a record that breaks a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It is refused.
    #[default]
    Enforce,
    /// It is counted and let in.
    Audit,
}

/// Where a cluster's pods may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PodCidrs {
    /// Anywhere.
    #[default]
    Any,
    /// In the pod CIDRs that its own nodes announce.
    Nodes,
    /// In one of these, and so must the pod CIDRs of its nodes be.
    Listed(Vec<IpNet>),
}

/// Records of each kind that one cluster may have. They bound the reader's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quotas(BTreeMap<Kind, usize>);

impl Quotas {
    /// Of one kind.
    pub fn of(&self, kind: Kind) -> usize {
        self.0.get(&kind).copied().unwrap_or(match kind {
            Kind::Nodes => 10_000,
            Kind::Identities | Kind::LocalIdentities => 65_535,
            Kind::Ip | Kind::LocalIp => 250_000,
            Kind::Services | Kind::LocalServices | Kind::ServiceExports | Kind::LocalPolicies => 20_000,
        })
    }

    /// Sets that of one kind.
    pub fn set(&mut self, kind: Kind, records: usize) {
        self.0.insert(kind, records);
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            mode: Mode::Enforce,
            pod_cidrs: PodCidrs::Any,
            virtual_cidrs: VirtualCidrs::default(),
            node_cidrs: None,
            refused_identities: BTreeSet::new(),
            namespaces: NameFilter::default(),
            services: NameFilter::default(),
            quotas: Quotas::default(),
            max_record_bytes: MAX_VALUE,
            max_backends: Self::MAX_BACKENDS,
        }
    }
}

impl Rules {
    /// Most backends of one service, unless the operator says otherwise.
    pub const MAX_BACKENDS: usize = 16_384;

    /// Applies a rule: what breaks it is refused, or with [`Mode::Audit`] noted in `audited`.
    pub(super) fn judge(
        &self,
        rule: impl FnOnce() -> Result<(), Refusal>,
        audited: &mut Option<Refusal>,
    ) -> Result<(), Refusal> {
        match (rule(), self.mode) {
            (Err(refusal), Mode::Audit) => {
                audited.get_or_insert(refusal);
                Ok(())
            }
            (verdict, _) => verdict,
        }
    }

    pub(super) fn check_size(&self, bytes: usize) -> Result<(), Refusal> {
        let max = self.max_record_bytes;
        if bytes > max {
            return refuse(Reason::RecordSize, format!("it has {bytes} bytes; at most {max} are allowed"));
        }
        Ok(())
    }

    /// Whoever reads the record could not tell its addresses from virtual ones.
    pub(super) fn check_places(
        &self,
        mut ips: impl Iterator<Item = IpAddr>,
        cidrs: impl IntoIterator<Item = IpNet>,
    ) -> Result<(), Refusal> {
        if self.virtual_cidrs.is_empty() {
            return Ok(());
        }
        if let Some(ip) = ips.find(|ip| self.virtual_cidrs.known_by(*ip).is_none()) {
            return refuse(
                Reason::VirtualCidr,
                format!("{ip} is a virtual address ({})", self.virtual_cidrs),
            );
        }
        match cidrs.into_iter().find(|cidr| self.virtual_cidrs.prefix_known_by(*cidr).is_none()) {
            Some(cidr) => refuse(
                Reason::VirtualCidr,
                format!("pod CIDR {cidr} lies across virtual prefixes ({})", self.virtual_cidrs),
            ),
            None => Ok(()),
        }
    }

    pub(super) fn check_node(&self, node: &Node) -> Result<(), Refusal> {
        for address in &node.addresses {
            match address.kind {
                NodeAddressKind::InternalIp => self.check_node_address(address.ip)?,
                NodeAddressKind::CiliumInternalIp => self.check_pod_address(address.ip)?,
                // Nothing is ever sent there.
                _ => {}
            }
        }
        if let PodCidrs::Listed(allowed) = &self.pod_cidrs
            && let Some(outside) =
                node.pod_cidrs().find(|cidr| !allowed.iter().any(|allowed| allowed.contains(cidr)))
        {
            return refuse(Reason::PodCidr, format!("its pod CIDR {outside} is not in {}", shown(allowed)));
        }
        Ok(())
    }

    pub(super) fn check_ip(&self, record: &IpRecord) -> Result<(), Refusal> {
        self.check_namespace(&record.namespace)?;
        let identity = record.identity;
        if identity.is_reserved() && self.refused_identities.contains(&identity.0) {
            let name = identity.reserved_name().unwrap_or("reserved");
            return refuse(Reason::ReservedIdentity, format!("identity {identity} ({name}) is not allowed"));
        }
        // A host has its node's address; whatever else is reserved may be either.
        let ip = record.prefix.addr();
        if !(identity.is_reserved() && self.is_listed_node(ip)) {
            self.check_pod_address(ip)?;
        }
        record.host_ip.map_or(Ok(()), |host| self.check_node_address(host))
    }

    pub(super) fn check_identity(&self, record: &IdentityRecord) -> Result<(), Refusal> {
        match record.labels.find(NAMESPACE_LABEL) {
            Some(label) => self.check_namespace(&label.value),
            None => Ok(()),
        }
    }

    pub(super) fn check_service(&self, service: &Service) -> Result<(), Refusal> {
        self.check_name(&service.name)?;
        let (backends, max) = (service.backends.len(), self.max_backends);
        if backends > max {
            return refuse(
                Reason::Backends,
                format!("it has {backends} backends; at most {max} are allowed"),
            );
        }
        // A pod in its host's network has the node's address.
        service
            .backends
            .iter()
            .filter(|(ip, _)| !self.is_listed_node(**ip))
            .try_for_each(|(ip, _)| self.check_pod_address(*ip))
    }

    pub(super) fn check_name(&self, name: &NamespacedName) -> Result<(), Refusal> {
        self.check_namespace(&name.namespace)?;
        if !self.services.is_open() && !self.services.admits(&name.to_string()) {
            return refuse(Reason::Service, format!("service {name} is not allowed"));
        }
        Ok(())
    }

    /// An empty one is that of something which is no pod.
    fn check_namespace(&self, namespace: &str) -> Result<(), Refusal> {
        if !namespace.is_empty() && !self.namespaces.admits(namespace) {
            return refuse(Reason::Namespace, format!("namespace {namespace:?} is not allowed"));
        }
        Ok(())
    }

    fn check_pod_address(&self, ip: IpAddr) -> Result<(), Refusal> {
        match &self.pod_cidrs {
            PodCidrs::Listed(allowed) if !contains(allowed, ip) => {
                refuse(Reason::PodCidr, format!("{ip} is not in {}", shown(allowed)))
            }
            _ => Ok(()),
        }
    }

    fn check_node_address(&self, ip: IpAddr) -> Result<(), Refusal> {
        match &self.node_cidrs {
            Some(allowed) if !contains(allowed, ip) => {
                refuse(Reason::NodeCidr, format!("node address {ip} is not in {}", shown(allowed)))
            }
            _ => Ok(()),
        }
    }

    fn is_listed_node(&self, ip: IpAddr) -> bool {
        self.node_cidrs.as_deref().is_some_and(|allowed| contains(allowed, ip))
    }
}

fn contains(allowed: &[IpNet], ip: IpAddr) -> bool {
    allowed.iter().any(|allowed| allowed.contains(&ip))
}

/// A list for a sentence; a long one is cut.
fn shown(nets: &[IpNet]) -> String {
    const MOST: usize = 4;
    let mut texts: Vec<_> = nets.iter().take(MOST).map(ToString::to_string).collect();
    if nets.len() > MOST {
        texts.push(format!("{} more", nets.len() - MOST));
    }
    if texts.is_empty() { "an empty list".to_owned() } else { texts.join(", ") }
}
