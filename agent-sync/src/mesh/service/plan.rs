//! How the backends of all clusters merge behind one frontend.
//!
//! The frontend is the own cluster's; there are none of others. If the own service is global, other
//! clusters' shared services of the same name contribute under the same port name and protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::record::{Affinity, BackendState, Backends, LocalService, PortMap};
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
    Record(&'a Backends),
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

/// Whose a backend's address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::mesh) enum Standing {
    /// The cluster may have a backend there.
    May,
    /// Another cluster holds it.
    HeldBy(u16),
    /// The operator does not want it there.
    Unwanted,
}

/// A backend that was left out, since another cluster holds its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::mesh) struct Contested {
    pub(in crate::mesh) cluster: u16,
    pub(in crate::mesh) ip: IpAddr,
    pub(in crate::mesh) holder: u16,
}

/// Contested backends of one frontend that are named.
const NAMED: usize = 8;

/// What became of a frontend.
#[derive(Default)]
pub(super) struct Planned {
    /// None: it is not to be installed.
    pub(super) plan: Option<ServicePlan>,
    pub(super) left_out: LeftOut,
    /// Some of those that were left out, in order.
    pub(super) contested: Vec<Contested>,
    /// Where all of those are that were left out for their address.
    pub(super) elsewhere: Vec<IpAddr>,
}

/// Computes the frontend's plan. `standing` tells whether a cluster may have a backend of an address.
///
/// A service may have thousands of backends and change often: everything here goes once through sorted
/// lists.
pub(super) fn plan(
    key: &ServiceKey,
    inputs: &Inputs<'_>,
    standing: impl Fn(u16, IpAddr) -> Standing,
) -> Planned {
    let mut left_out = LeftOut::default();
    let (mut elsewhere, mut contested) = (Vec::new(), BTreeSet::new());
    let mut candidates = inputs.collect(key, standing, &mut elsewhere, &mut contested);
    left_out.conflicts = elsewhere.len() as u64;
    inputs.settle_contested(&mut candidates, &mut left_out, &mut contested);
    let groups = inputs.groups(candidates);
    left_out.clusters = groups.len().saturating_sub(MAX_GROUPS) as u64;
    Planned {
        plan: Some(ServicePlan { groups: groups.into_iter().take(MAX_GROUPS).collect() }),
        left_out,
        contested: contested.into_iter().take(NAMED).collect(),
        elsewhere,
    }
}

/// One cluster's backends, ascending, none twice.
struct Candidates {
    cluster: u16,
    backends: Vec<BackendKey>,
}

impl Inputs<'_> {
    /// All candidates, the own cluster first, then in order of clusters.
    fn collect(
        &self,
        key: &ServiceKey,
        standing: impl Fn(u16, IpAddr) -> Standing,
        elsewhere: &mut Vec<IpAddr>,
        contested: &mut BTreeSet<Contested>,
    ) -> Vec<Candidates> {
        let names = self.port_names(key);
        let fits = |ip: IpAddr| ip.is_ipv4() == (key.family == FAMILY_V4);
        let targets = |ports: &PortMap| -> Vec<u16> {
            let named = names.iter().filter_map(|name| ports.get(*name));
            let fitting = named.filter(|port| port.protocol.number() == key.proto);
            let mut targets: Vec<u16> = fitting.map(|port| port.port).collect();
            targets.sort_unstable();
            targets.dedup();
            targets
        };
        let proto = key.proto;
        let mut own = Vec::with_capacity(self.own.backends.len());
        for backend in self.own.backends.iter().filter(|backend| fits(backend.ip)) {
            let (cluster, ip) = (self.own_cluster, backend.ip);
            let terminating = backend.state == BackendState::Terminating;
            let of_port = |port| BackendKey { cluster, ip, port, proto, terminating };
            own.extend(targets(&backend.ports).into_iter().map(of_port));
        }
        own.sort();
        own.dedup();
        let mut all = vec![Candidates { cluster: self.own_cluster, backends: own }];
        for (cluster, remote) in &self.remotes {
            let cluster = *cluster;
            let mut backends = Vec::new();
            match remote {
                Remote::Restored(restored) => {
                    backends.extend_from_slice(restored);
                    backends.sort();
                }
                Remote::Record(record) => {
                    backends.reserve(record.len());
                    record.each(targets, |ip, targets| {
                        if fits(ip) {
                            let of_port = |port: &u16| BackendKey {
                                cluster,
                                ip,
                                port: *port,
                                proto,
                                terminating: false,
                            };
                            backends.extend(targets.iter().map(of_port));
                        }
                    });
                }
            }
            backends.retain(|backend| {
                let standing = standing(cluster, backend.ip);
                if let Standing::HeldBy(holder) = standing
                    && contested.len() < NAMED
                {
                    contested.insert(Contested { cluster, ip: backend.ip, holder });
                }
                if standing != Standing::May {
                    elsewhere.push(backend.ip);
                }
                standing == Standing::May
            });
            all.push(Candidates { cluster, backends });
        }
        all
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
    fn settle_contested(
        &self,
        candidates: &mut [Candidates],
        left_out: &mut LeftOut,
        contested: &mut BTreeSet<Contested>,
    ) {
        if are_apart(candidates) {
            return;
        }
        let mut claims: Vec<(IpAddr, u16)> = candidates
            .iter()
            .flat_map(|of| of.backends.iter().map(|backend| (backend.ip, of.cluster)))
            .collect();
        // Made of sorted runs, which this sort merges.
        claims.sort();
        claims.dedup();
        let mut lost: BTreeSet<(u16, IpAddr)> = BTreeSet::new();
        for claims in claims.chunk_by(|(a, _), (b, _)| a == b).filter(|claims| claims.len() > 1) {
            let ip = claims[0].0;
            let claims_it = |cluster: u16| claims.iter().any(|(_, other)| *other == cluster);
            let preferred =
                if claims_it(self.own_cluster) { Some(self.own_cluster) } else { self.holder(ip) };
            let holder = preferred.filter(|cluster| claims_it(*cluster)).unwrap_or(claims[0].1);
            for (ip, cluster) in claims.iter().filter(|(_, cluster)| *cluster != holder) {
                lost.insert((*cluster, *ip));
                if contested.len() < NAMED {
                    contested.insert(Contested { cluster: *cluster, ip: *ip, holder });
                }
            }
        }
        left_out.conflicts += lost.len() as u64;
        if !lost.is_empty() {
            for of in candidates {
                of.backends.retain(|backend| !lost.contains(&(of.cluster, backend.ip)));
            }
        }
    }

    fn holder(&self, ip: IpAddr) -> Option<u16> {
        let holds = |group: &&GroupPlan| group.backends.binary_search_by(|held| held.ip.cmp(&ip)).is_ok();
        self.before?.groups.iter().find(holds).map(|group| group.cluster)
    }

    /// Active backends by cluster, the own one first. Only if nothing is active anywhere, those that
    /// are about to go stand in.
    fn groups(&self, candidates: Vec<Candidates>) -> Vec<GroupPlan> {
        let any_active = candidates.iter().flat_map(|of| &of.backends).any(|backend| !backend.terminating);
        let mut chosen = candidates;
        for of in &mut chosen {
            of.backends.retain(|backend| backend.terminating != any_active);
        }
        chosen.retain(|of| !of.backends.is_empty());
        let largest = chosen.iter().map(|of| of.backends.len()).max().unwrap_or(0);
        let elsewhere = chosen.iter().filter(|of| of.cluster != self.own_cluster);
        let elsewhere: usize = elsewhere.map(|of| of.backends.len()).sum();
        let missing = if any_active { self.missing().filter(|_| elsewhere > 0) } else { None };
        chosen
            .into_iter()
            .map(|Candidates { cluster, backends }| {
                let weight = match missing {
                    Some(missing) if cluster == self.own_cluster => u16::MAX - missing,
                    Some(missing) => part(missing, backends.len(), elsewhere),
                    None if any_active && self.prefers(cluster) => scale(backends.len(), largest),
                    None => 0,
                };
                GroupPlan { cluster, weight, backends }
            })
            .collect()
    }

    /// The share of calls, in parts of [`u16::MAX`], that the own backends cannot answer any more; none if
    /// they can, or if they are not preferred.
    fn missing(&self) -> Option<u16> {
        let failover =
            self.own.failover.filter(|_| self.own.global && self.own.affinity == Affinity::Local)?;
        let active = self.own.backends.iter().filter(|backend| backend.state == BackendState::Active);
        let active = u64::try_from(active.count()).unwrap_or(u64::MAX);
        let needed = u64::from(failover.expected) * u64::from(failover.threshold);
        // What is left of the needed backends, in percent of one backend.
        let left = needed.saturating_sub(active.saturating_mul(100));
        if left == 0 {
            return None;
        }
        // At least one part each: a share of 0 would be a standby's.
        let missing = left.saturating_mul(u16::MAX.into()) / needed;
        u16::try_from(missing.clamp(1, u64::from(u16::MAX) - 1)).ok()
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

/// Whether no two clusters can have an address in common, because those of one all come before those of
/// the other: so it is if each has pod prefixes of its own.
fn are_apart(candidates: &[Candidates]) -> bool {
    let spans = candidates.iter().filter_map(|of| Some((of.backends.first()?.ip, of.backends.last()?.ip)));
    let mut spans: Vec<_> = spans.collect();
    spans.sort_unstable();
    spans.windows(2).all(|pair| pair[0].1 < pair[1].0)
}

/// The part of `share` for `count` of `all`, at least 1.
fn part(share: u16, count: usize, all: usize) -> u16 {
    let part = usize::from(share) * count / all.max(1);
    u16::try_from(part.max(1)).unwrap_or(u16::MAX)
}

/// A weight in proportion to `count`, at least 1, that fits 16 bits even if `largest` does not.
fn scale(count: usize, largest: usize) -> u16 {
    let max = usize::from(u16::MAX);
    let scaled = if largest <= max { count } else { count * max / largest };
    u16::try_from(scaled.max(1)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clustermesh_kvstore::cluster::NamespacedName;
    use clustermesh_kvstore::record::{Failover, LocalBackend};

    use super::*;

    /// Shares of clusters 1 (own), 2 and 3 in per mille, if the own one has `active` backends, and the
    /// others one and three.
    fn shares(active: u8, failover: Failover) -> [u32; 3] {
        let backend = |n: u8| LocalBackend {
            ip: [10, 1, 0, n].into(),
            ports: PortMap::new(),
            state: BackendState::Active,
            node: None,
            zone: None,
            hostname: None,
        };
        let own = LocalService {
            cluster: "alpha".into(),
            name: NamespacedName { namespace: "shop".into(), name: "orders".into() },
            cluster_id: 1,
            global: true,
            shared: true,
            private: false,
            affinity: Affinity::Local,
            failover: Some(failover),
            headless: false,
            frontends: BTreeMap::new(),
            backends: (0..active).map(backend).collect(),
        };
        let of = |cluster: u8, count: u8| Candidates {
            cluster: cluster.into(),
            backends: (0..count)
                .map(|n| BackendKey {
                    cluster: cluster.into(),
                    ip: [10, cluster, 0, n].into(),
                    port: 80,
                    proto: 6,
                    terminating: false,
                })
                .collect(),
        };
        let inputs = Inputs { own_cluster: 1, own: &own, remotes: BTreeMap::new(), before: None };
        let groups = inputs.groups(vec![of(1, active), of(2, 1), of(3, 3)]);
        let all: u32 = groups.iter().map(|group| u32::from(group.weight)).sum();
        let share = |cluster| {
            let group = groups.iter().find(|group| group.cluster == cluster);
            group.map_or(0, |group| (u32::from(group.weight) * 1000 + all / 2) / all)
        };
        [share(1), share(2), share(3)]
    }

    #[test]
    fn calls_leave_the_cluster_as_far_as_its_backends_are_missing() {
        let half = |active| shares(active, Failover { threshold: 50, expected: 8 });
        assert_eq!(half(8), [1000, 0, 0]);
        assert_eq!(half(4), [1000, 0, 0]);
        assert_eq!(half(3), [750, 62, 187]);
        assert_eq!(half(1), [250, 187, 563]);
        assert_eq!(half(0), [0, 250, 750]);
        // From nothing to thirty: the first one does not get all calls.
        assert_eq!(shares(1, Failover { threshold: 100, expected: 30 }), [33, 242, 725]);
        // Nobody is expected: none is missing.
        assert_eq!(shares(2, Failover { threshold: 100, expected: 0 }), [1000, 0, 0]);
        // More than were expected.
        assert_eq!(shares(9, Failover { threshold: 100, expected: 8 }), [1000, 0, 0]);
    }

    #[test]
    fn weights_keep_their_proportion_when_they_are_scaled() {
        assert_eq!((scale(3, 9), scale(9, 9)), (3, 9));
        assert_eq!(scale(131_070, 131_070), u16::MAX);
        assert_eq!(scale(65_535, 131_070), 32_767);
        assert_eq!(scale(1, 131_070), 1);
    }
}
