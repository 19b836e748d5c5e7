//! Where an address of a cluster leads, and why nowhere.

use std::net::IpAddr;

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity};
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::DatapathError;
use ebpf_global_svc::abi::IpValue;

use super::super::query::endpoint_row;
use super::super::{Engine, Row};
use super::{NOT_GLOBAL, Part, Subject};
use crate::mesh::FactKey;
use crate::wire_key;

/// One address of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressPart {
    /// What became of it.
    pub part: Part,
    /// The node that its record names, by name; none if the cluster has no such node.
    pub node: Option<String>,
    /// What is installed of it, by table.
    pub installed: Vec<(&'static str, Vec<Row>)>,
}

impl Engine {
    pub(in crate::engine) fn explain_addresses(
        &self,
        name: &ClusterName,
        ips: &[IpAddr],
    ) -> Result<Vec<AddressPart>, DatapathError> {
        let Some(member) = self.core.members().iter().find_map(|(n, member)| (n == name).then_some(member))
        else {
            return Ok(vec![AddressPart::default(); ips.len()]);
        };
        let explain = |ip: &IpAddr| {
            let mut part = self.part(name, member, &Subject::Ip(*ip));
            let Some(id) = part.id else { return Ok(AddressPart { part, ..AddressPart::default() }) };
            part.why.push(self.place_of(*ip));
            let node = self.core.mesh().address(id, *ip).and_then(|value| self.node_of(id, value));
            Ok(AddressPart { part, node, installed: self.installed_address(*ip, [id].into_iter())? })
        };
        ips.iter().map(explain).collect()
    }

    pub(super) fn address_part(&self, id: ClusterId, ip: IpAddr, part: &mut Part) {
        let mesh = self.core.mesh();
        let Some(value) = mesh.address(id, ip) else { return };
        part.held = true;
        let end = mesh.tunnel_end(value.node_ip);
        let at = self.node_text(value.node_ip);
        let node = match self.node_of(id, value) {
            Some(name) => format!("{at} ({name})"),
            None if value.node_ip == [0; 4] => "none named".into(),
            None => at.clone(),
        };
        part.why.push(format!("identity {}, node {node}", value.identity));
        if part.private {
            part.why.push(NOT_GLOBAL.into());
        }
        if !Identity(value.identity).is_reserved() && !self.knows_identity(id, value.identity) {
            part.why.push(format!("the cluster has told nothing of identity {} yet", value.identity));
        }
        if end == Some(ip) {
            part.why
                .push("it is its node's own address: that of the node, and of pods in its network".into());
        }
        for (other, member) in self.core.members().iter() {
            if let Some(other_id) = member.id.filter(|other_id| *other_id != id)
                && mesh.address(other_id, ip).is_some()
            {
                part.why.push(format!("{other} says that the same address is its own"));
            }
        }
        if mesh.is_misplaced(id, ip) {
            part.why.push(match mesh.wanted_address(&wire_key::ip_key(id.get(), ip)) {
                Some(_) => {
                    format!("not sent to {at}: the cluster has no such node; the pod's prefix decides")
                }
                None => {
                    "not installed: the import policy wants it in a pod prefix of the cluster's own nodes"
                        .into()
                }
            });
        }
        match mesh.holder_of(ip) {
            Some(holder) if holder == id.get() => part.chosen = true,
            Some(holder) => {
                part.why.push(format!("not reached there: the address is {}'s", self.name_of(holder)));
            }
            None => part.why.push("not reached: no cluster has a pod prefix around it".into()),
        }
        if id == self.core.own().id && mesh.local_pods().contains(&ip) {
            part.why.push(match mesh.wanted_endpoint(&wire_key::ip_key(id.get(), ip)) {
                Some(endpoint) if endpoint.ifindex > 0 => {
                    format!("it is a pod of this node, behind interface {}", endpoint.ifindex)
                }
                Some(_) => "it is a pod of this node".into(),
                None => "it is a pod of this node, but no interface leads to it".into(),
            });
        }
    }

    pub(super) fn place_of(&self, ip: IpAddr) -> String {
        let mesh = self.core.mesh();
        match (mesh.prefix_of(ip), mesh.holder_of(ip)) {
            (Some((net, cluster)), _) => format!("it is in pod prefix {net} of {}", self.name_of(cluster)),
            (None, Some(cluster)) => format!("it is a node of {}", self.name_of(cluster)),
            (None, None) => "it is in no cluster's pod prefix, and no node's".into(),
        }
    }

    /// Rows about an address in the view of some clusters.
    pub(super) fn installed_address(
        &self,
        ip: IpAddr,
        clusters: impl Iterator<Item = ClusterId>,
    ) -> Result<Vec<(&'static str, Vec<Row>)>, DatapathError> {
        let keys: Vec<_> = clusters.map(|id| wire_key::ip_key(id.get(), ip)).collect();
        let values = self.tables.ipcache.get(&keys)?;
        let row = |(key, value): (&_, Option<_>)| Some(self.ipcache_row(*key, value?));
        let ipcache = keys.iter().zip(values).filter_map(row);
        let values = self.tables.endpoint.get(&keys)?;
        let endpoint = keys.iter().zip(values).filter_map(|(key, value)| Some(endpoint_row(*key, value?)));
        Ok(vec![("ipcache", ipcache.collect()), ("endpoint", endpoint.collect())])
    }

    fn node_of(&self, id: ClusterId, value: IpValue) -> Option<String> {
        let mesh = self.core.mesh();
        mesh.node_at(id, mesh.tunnel_end(value.node_ip)?).map(str::to_owned)
    }

    /// Whether there is a record of the identity, or its list may still have one.
    fn knows_identity(&self, id: ClusterId, identity: u32) -> bool {
        let mesh = self.core.mesh();
        mesh.holds(id, &FactKey::Identity(identity))
            || mesh.holds(id, &FactKey::LocalIdentity(identity))
            || !mesh.is_synced(id, Kind::Identities)
    }
}
