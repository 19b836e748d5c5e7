//! Routes that processes on this node need to reach pods of other nodes: one for each pod prefix that another
//! node carries.

use super::Mesh;
use crate::desired::{Changes, RouteChanges, Routes};
use crate::wire_key;

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
