//! How the backends of all clusters merge behind one frontend.
//!
//! The frontend is the own cluster's; there are none of others. If the own service is global, other
//! clusters' shared services of the same name contribute under the same port name and protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::record::{Affinity, BackendState, LocalService, PortMap};
use ebpf_global_svc::abi::{FAMILY_V4, MAX_GROUPS, ServiceKey};

use crate::desired::{BackendKey, GroupPlan, ServicePlan};
use crate::wire_key;

/// What a frontend is computed from.
pub(super) struct Inputs<'a> {
    pub(super) own_cluster: u16,
    pub(super) own: &'a LocalService,
    /// Contributions of other clusters, empty unless the own service is global.
    pub(super) remotes: BTreeMap<u16, Remote<'a>>,
    /// The plan until now: who holds an address that several clusters claim.
    pub(super) before: Option<&'a ServicePlan>,
}

/// What another cluster contributes.
pub(super) enum Remote<'a> {
    /// Its service as it says.
    Record(&'a BTreeMap<IpAddr, PortMap>),
    /// What was installed by this agent's predecessor, until the cluster is synced.
    Restored(&'a [BackendKey]),
}

/// Contributions that were left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Backends with an address that another cluster holds, or that is not where the operator wants it.
    pub conflicts: u64,
    /// Clusters beyond the number that a frontend can have.
    pub clusters: u64,
}

/// Computes the frontend's plan. `may_serve` tells whether a cluster may have a backend of an address.
pub(super) fn plan(
    key: &ServiceKey,
    inputs: &Inputs<'_>,
    may_serve: impl Fn(u16, IpAddr) -> bool,
) -> (ServicePlan, LeftOut) {
    let mut left_out = LeftOut::default();
    let mut backends = inputs.collect(key, may_serve, &mut left_out);
    inputs.settle_contested(&mut backends, &mut left_out);
    let groups = inputs.groups(backends);
    left_out.clusters = groups.len().saturating_sub(MAX_GROUPS) as u64;
    (ServicePlan { groups: groups.into_iter().take(MAX_GROUPS).collect() }, left_out)
}

impl Inputs<'_> {
    /// All candidates by cluster.
    fn collect(
        &self,
        key: &ServiceKey,
        may_serve: impl Fn(u16, IpAddr) -> bool,
        left_out: &mut LeftOut,
    ) -> BTreeMap<u16, BTreeSet<BackendKey>> {
        let names = self.port_names(key);
        let fits = |ip: &IpAddr| ip.is_ipv4() == (key.family == FAMILY_V4);
        let targets = |ports: &PortMap| -> BTreeSet<u16> {
            let named = names.iter().filter_map(|name| ports.get(*name));
            named.filter(|port| port.protocol.number() == key.proto).map(|port| port.port).collect()
        };
        let mut by_cluster: BTreeMap<u16, BTreeSet<BackendKey>> = BTreeMap::new();
        for backend in self.own.backends.iter().filter(|backend| fits(&backend.ip)) {
            let terminating = backend.state == BackendState::Terminating;
            for port in targets(&backend.ports) {
                by_cluster.entry(self.own_cluster).or_default().insert(BackendKey {
                    cluster: self.own_cluster,
                    ip: backend.ip,
                    port,
                    proto: key.proto,
                    terminating,
                });
            }
        }
        for (cluster, remote) in &self.remotes {
            let mut found = BTreeSet::new();
            match remote {
                Remote::Restored(backends) => found.extend(backends.iter().copied()),
                Remote::Record(backends) => {
                    for (ip, ports) in backends.iter().filter(|(ip, _)| fits(ip)) {
                        found.extend(targets(ports).into_iter().map(|port| BackendKey {
                            cluster: *cluster,
                            ip: *ip,
                            port,
                            proto: key.proto,
                            terminating: false,
                        }));
                    }
                }
            }
            let candidates = found.len();
            found.retain(|backend| may_serve(*cluster, backend.ip));
            left_out.conflicts += (candidates - found.len()) as u64;
            by_cluster.insert(*cluster, found);
        }
        by_cluster
    }

    /// Port names that this frontend stands for; two names may share a port.
    fn port_names(&self, key: &ServiceKey) -> Vec<&str> {
        let ports =
            wire_key::address(key.family, key.ip).and_then(|address| self.own.frontends.get(&address));
        let port = u16::from_be(key.port);
        ports
            .into_iter()
            .flatten()
            .filter(|(_, p)| p.port == port && p.protocol.number() == key.proto)
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// Leaves each address to one cluster: the own one, else its holder so far, else the lowest.
    fn settle_contested(&self, backends: &mut BTreeMap<u16, BTreeSet<BackendKey>>, left_out: &mut LeftOut) {
        if backends.len() < 2 {
            return;
        }
        let mut claims: BTreeMap<IpAddr, BTreeSet<u16>> = BTreeMap::new();
        for (cluster, candidates) in backends.iter() {
            for backend in candidates {
                claims.entry(backend.ip).or_default().insert(*cluster);
            }
        }
        claims.retain(|_, clusters| clusters.len() > 1);
        for (ip, clusters) in claims {
            let holder = if clusters.contains(&self.own_cluster) {
                Some(self.own_cluster)
            } else {
                self.holder(ip).filter(|holder| clusters.contains(holder))
            };
            let holder = holder.or_else(|| clusters.first().copied());
            for cluster in clusters.iter().filter(|cluster| Some(**cluster) != holder) {
                left_out.conflicts += 1;
                if let Some(candidates) = backends.get_mut(cluster) {
                    candidates.retain(|backend| backend.ip != ip);
                }
            }
        }
    }

    fn holder(&self, ip: IpAddr) -> Option<u16> {
        let groups = &self.before?.groups;
        groups.iter().find(|group| group.backends.iter().any(|b| b.ip == ip)).map(|group| group.cluster)
    }

    /// Active backends by cluster, the own one first. Only if nothing is active anywhere, those that
    /// are about to go stand in.
    fn groups(&self, backends: BTreeMap<u16, BTreeSet<BackendKey>>) -> Vec<GroupPlan> {
        let any_active = backends.values().flatten().any(|backend| !backend.terminating);
        let chosen = backends.into_iter().map(|(cluster, candidates)| {
            let usable = candidates.into_iter().filter(|backend| backend.terminating != any_active);
            (cluster, usable.collect::<Vec<_>>())
        });
        let mut chosen: Vec<_> = chosen.filter(|(_, backends)| !backends.is_empty()).collect();
        chosen.sort_by_key(|(cluster, _)| (*cluster != self.own_cluster, *cluster));
        let largest = chosen.iter().map(|(_, backends)| backends.len()).max().unwrap_or(0);
        chosen
            .into_iter()
            .map(|(cluster, backends)| {
                let preferred = any_active && self.prefers(cluster);
                let weight = if preferred { scale(backends.len(), largest) } else { 0 };
                GroupPlan { cluster, weight, backends }
            })
            .collect()
    }

    fn prefers(&self, cluster: u16) -> bool {
        let affinity = if self.own.global { self.own.affinity } else { Affinity::None };
        match affinity {
            Affinity::None => true,
            Affinity::Local => cluster == self.own_cluster,
            Affinity::Remote => cluster != self.own_cluster,
        }
    }
}

/// A weight in proportion to `count`, at least 1, that fits 16 bits even if `largest` does not.
fn scale(count: usize, largest: usize) -> u16 {
    let max = usize::from(u16::MAX);
    let scaled = if largest <= max { count } else { count * max / largest };
    u16::try_from(scaled.max(1)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_keep_their_proportion_when_they_are_scaled() {
        assert_eq!((scale(3, 9), scale(9, 9)), (3, 9));
        assert_eq!(scale(131_070, 131_070), u16::MAX);
        assert_eq!(scale(65_535, 131_070), 32_767);
        assert_eq!(scale(1, 131_070), 1);
    }
}
