//! Routes that processes on this node need to reach pods of other nodes: one for each pod prefix that another
//! node carries.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Mesh;
use crate::desired::Changes;
use crate::wire_key;

/// All routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Pod prefixes that other nodes carry.
    pub prefixes: BTreeSet<IpNet>,
    /// This node's addresses inside the mesh, by preference.
    pub sources: Vec<IpAddr>,
}

/// How the routes differ from before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteChanges {
    /// In these prefixes: whether there is a route.
    Some(Vec<(IpNet, bool)>),
    /// This node is another one, or known for the first time: these are all.
    All(Routes),
}

impl Default for RouteChanges {
    fn default() -> Self {
        Self::Some(Vec::new())
    }
}

impl Mesh {
    /// Routes that this node needs for its own processes; none while its own node record, and with it
    /// what is elsewhere, is unknown.
    pub fn routes(&self) -> Option<Routes> {
        let here = self.own_node()?;
        let node_ip = self.topology.node_ip_of(here)?;
        let elsewhere = self.topology.prefixes().filter(|(_, _, carrier)| *carrier != node_ip);
        let prefixes = elsewhere.map(|(net, _, _)| net).collect();
        Some(Routes { prefixes, sources: here.mesh_ips.clone() })
    }

    /// What follows for the routes from what has changed.
    pub(super) fn compute_routes(&mut self, changes: &Changes) -> RouteChanges {
        if std::mem::take(&mut self.own_node_changed) {
            return self.routes().map_or_else(RouteChanges::default, RouteChanges::All);
        }
        let Some(here) = self.own_node().and_then(|node| self.topology.node_ip_of(node)) else {
            return RouteChanges::default();
        };
        let route = |(key, value): &(_, Option<ebpf_global_svc::abi::PrefixValue>)| {
            Some((wire_key::prefix(key)?, value.is_some_and(|value| value.node_ip != here)))
        };
        RouteChanges::Some(changes.prefix.iter().filter_map(route).collect())
    }
}
