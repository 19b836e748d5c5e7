//! How the backends of all clusters merge behind one frontend.
//!
//! The frontend is the own cluster's; there are none of others. If the own service is global, other
//! clusters' shared services of the same name contribute under the same port name and protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::record::{Algorithm, BackendState, LocalService, Nearness, Port, PortMap};
use ebpf_global_svc::abi::{AFFINITY_UNIT_SECONDS, FAMILY_V4, MAX_GROUPS, ServiceKey, scope};

use crate::desired::{BackendKey, GroupPlan, ServicePlan};
use crate::mesh::{LetIn, RemoteService};
use crate::wire_key;

/// What a frontend is computed from.
pub(super) struct Inputs<'a> {
    pub(super) own_cluster: u16,
    pub(super) own: &'a LocalService,
    /// Contributions of other clusters, empty unless the own service is global.
    pub(super) remotes: BTreeMap<u16, Remote<'a>>,
    /// The plan until now: who holds an address that several clusters claim.
    pub(super) before: Option<&'a ServicePlan>,
    /// Names of the other clusters, as far as they are known.
    pub(super) names: &'a BTreeMap<u16, ClusterName>,
    pub(super) here: Here<'a>,
    /// Whether, and how, calls come in from outside.
    pub(super) lets_in: Option<&'a LetIn>,
}

/// Where this node is.
#[derive(Clone, Copy, Debug)]
pub(in crate::mesh) struct Here<'a> {
    pub(in crate::mesh) node: &'a str,
    /// None: it has none, or nobody has said so yet.
    pub(in crate::mesh) zone: Option<&'a str>,
}

/// What another cluster contributes.
pub(super) enum Remote<'a> {
    /// Its service as it says.
    Record(&'a RemoteService),
    /// What was installed by this agent's predecessor, until the cluster is synced.
    Restored(&'a GroupPlan),
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
    /// It is in nobody's pod CIDRs: a node's, or of a process somewhere else.
    Outside,
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

/// Backends that are left out for their address.
#[derive(Default)]
struct Elsewhere {
    /// Of another cluster, or where the operator does not want them.
    conflicts: Vec<IpAddr>,
    /// Of processes in a node's network: what they answer to a client outside would pass no program of ours.
    hosts: Vec<IpAddr>,
    contested: BTreeSet<Contested>,
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
    let mut elsewhere = Elsewhere::default();
    let mut candidates = inputs.collect(key, standing, &mut elsewhere);
    let Elsewhere { conflicts: mut elsewhere, hosts, mut contested } = elsewhere;
    let mut left_out = LeftOut { conflicts: elsewhere.len() as u64, ..LeftOut::default() };
    let is_of_hosts = !hosts.is_empty() && candidates.iter().all(|of| of.backends.is_empty());
    elsewhere.extend(hosts);
    if is_of_hosts {
        // Whoever else serves it, as kube-proxy, knows the way.
        return Planned { left_out, elsewhere, ..Planned::default() };
    }
    inputs.settle_contested(&mut candidates, &mut left_out, &mut contested);
    let mut groups = inputs.groups(candidates);
    left_out.clusters = groups.len().saturating_sub(MAX_GROUPS) as u64;
    leave_out_last(&mut groups);
    let session = inputs.own.balancing.session.unwrap_or(0).div_ceil(AFFINITY_UNIT_SECONDS);
    Planned {
        // 43,200 at most: records with more are refused.
        plan: Some(ServicePlan {
            affinity_timeout: u16::try_from(session).unwrap_or(u16::MAX),
            table: inputs.table(key),
            groups,
        }),
        left_out,
        contested: contested.into_iter().take(NAMED).collect(),
        elsewhere,
    }
}

/// Which of the own cluster's backends answer those who use a frontend. `internalTrafficPolicy` is not for the outside,
/// which has a policy of its own.
pub(super) fn nearness(own: &LocalService, key: &ServiceKey) -> Nearness {
    match (key.scope, own.balancing.nearness) {
        (scope::OUTSIDE, _) if own.external.only_node => Nearness::OnlyNode,
        (scope::OUTSIDE, Nearness::OnlyNode) => Nearness::Any,
        (_, nearness) => nearness,
    }
}

/// Leaves as many clusters as a frontend can have: those of the last tiers go, of one tier those of the highest IDs.
fn leave_out_last(groups: &mut Vec<GroupPlan>) {
    if groups.len() <= MAX_GROUPS {
        return;
    }
    let mut tiers: Vec<(u8, usize)> = groups.iter().enumerate().map(|(at, group)| (group.tier, at)).collect();
    tiers.sort_unstable();
    let last = tiers[MAX_GROUPS - 1];
    let mut at = 0..;
    groups.retain(|group| at.next().is_some_and(|at| (group.tier, at) <= last));
}

/// One cluster's backends, ascending, none twice.
pub(super) struct Candidates {
    pub(super) cluster: u16,
    pub(super) backends: Vec<BackendKey>,
    /// Active ones that stay away because these are nearer, though the cluster gets calls for them, too.
    pub(super) farther: usize,
}

impl Inputs<'_> {
    /// All candidates, the own cluster first, then in order of clusters.
    fn collect(
        &self,
        key: &ServiceKey,
        standing: impl Fn(u16, IpAddr) -> Standing,
        elsewhere: &mut Elsewhere,
    ) -> Vec<Candidates> {
        let is_let_in = key.scope == scope::OUTSIDE;
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
        let nearest = self.nearest(nearness(self.own, key), |backend| {
            fits(backend.ip) && !targets(&backend.ports).is_empty()
        });
        let mut own = Vec::with_capacity(self.own.backends.len());
        let mut farther = Vec::new();
        for backend in self.own.backends.iter().filter(|backend| fits(backend.ip)) {
            let (cluster, ip) = (self.own_cluster, backend.ip);
            let terminating = backend.state == BackendState::Terminating;
            let list = if self.distance(backend) <= nearest { &mut own } else { &mut farther };
            let of_port = |port| BackendKey { cluster, ip, port, proto, terminating };
            list.extend(targets(&backend.ports).into_iter().map(of_port));
        }
        for list in [&mut own, &mut farther] {
            list.sort();
            list.dedup();
            if is_let_in {
                list.retain(|backend| {
                    let is_host = standing(self.own_cluster, backend.ip) == Standing::Outside;
                    elsewhere.hosts.extend(is_host.then_some(backend.ip));
                    !is_host
                });
            }
        }
        let farther = farther.iter().filter(|backend| !backend.terminating).count();
        let mut all = vec![Candidates { cluster: self.own_cluster, backends: own, farther }];
        for (cluster, remote) in &self.remotes {
            let cluster = *cluster;
            let mut backends = Vec::new();
            match remote {
                Remote::Restored(restored) => {
                    backends.extend_from_slice(&restored.backends);
                    backends.sort();
                }
                Remote::Record(record) => {
                    backends.reserve(record.backends.len());
                    record.backends.each(targets, |ip, targets| {
                        // One without is refused before.
                        if let Some(ip) = record.known_by.known_by(ip).filter(|ip| fits(*ip)) {
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
                    if !record.known_by.is_empty() {
                        backends.sort();
                    }
                }
            }
            backends.retain(|backend| match standing(cluster, backend.ip) {
                Standing::May => true,
                Standing::Outside if is_let_in => {
                    elsewhere.hosts.push(backend.ip);
                    false
                }
                Standing::Outside => true,
                Standing::Unwanted => {
                    elsewhere.conflicts.push(backend.ip);
                    false
                }
                Standing::HeldBy(holder) => {
                    elsewhere.conflicts.push(backend.ip);
                    if elsewhere.contested.len() < NAMED {
                        elsewhere.contested.insert(Contested { cluster, ip: backend.ip, holder });
                    }
                    false
                }
            });
            all.push(Candidates { cluster, backends, farther: 0 });
        }
        all
    }

    /// How many slots a group has that is shared out by Maglev; 0: it is not.
    fn table(&self, key: &ServiceKey) -> u32 {
        let Some(lets_in) = self.lets_in.filter(|_| key.scope == scope::OUTSIDE) else { return 0 };
        match self.own.external.algorithm.unwrap_or(lets_in.algorithm) {
            Algorithm::Maglev => lets_in.table_size,
            Algorithm::Random => 0,
        }
    }

    /// Port names that this frontend stands for; two names may share a port.
    fn port_names(&self, key: &ServiceKey) -> Vec<&str> {
        let Some(address) = wire_key::address(key.family, key.ip) else { return Vec::new() };
        let (own, number) = (self.own, u16::from_be(key.port));
        let named = match own.frontends.get(&address) {
            Some(ports) => ports,
            // All of a service's addresses have the same ports.
            None => match own.frontends.values().next() {
                Some(ports) => ports,
                None => return Vec::new(),
            },
        };
        let by_number = own.frontends.contains_key(&address) || own.external.ips.contains(&address);
        let is_it = |name: &str, port: &Port| match by_number {
            true => port.port == number,
            false => own.external.node_ports.get(name) == Some(&number),
        };
        named
            .iter()
            .filter(|(name, port)| port.protocol.number() == key.proto && is_it(name, port))
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
}

/// Whether no two clusters can have an address in common, because those of one all come before those of
/// the other: so it is if each has pod prefixes of its own.
fn are_apart(candidates: &[Candidates]) -> bool {
    let spans = candidates.iter().filter_map(|of| Some((of.backends.first()?.ip, of.backends.last()?.ip)));
    let mut spans: Vec<_> = spans.collect();
    spans.sort_unstable();
    spans.windows(2).all(|pair| pair[0].1 < pair[1].0)
}
