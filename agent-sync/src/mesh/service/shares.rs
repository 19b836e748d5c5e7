//! What share of the calls each cluster gets, and which of the own cluster's backends.

use std::collections::BTreeSet;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::record::{Affinity, BackendState, Balancing, LocalBackend, Nearness};

use super::plan::{Candidates, Inputs, Remote};
use crate::desired::GroupPlan;

impl Inputs<'_> {
    /// Active backends by cluster, the own one first. Only if nothing is active anywhere, those that
    /// are about to go stand in.
    pub(super) fn groups(&self, candidates: Vec<Candidates>) -> Vec<GroupPlan> {
        let any_active = candidates.iter().flat_map(|of| &of.backends).any(|backend| !backend.terminating);
        let mut chosen = candidates;
        for of in &mut chosen {
            of.backends.retain(|backend| backend.terminating != any_active);
        }
        chosen.retain(|of| !of.backends.is_empty());
        let size = |of: &Candidates| of.backends.len() + if any_active { of.farther } else { 0 };
        let largest = chosen.iter().map(size).max().unwrap_or(0);
        let elsewhere = chosen.iter().filter(|of| of.cluster != self.own_cluster);
        let elsewhere: usize = elsewhere.map(size).sum();
        let missing = if any_active { self.missing().filter(|_| elsewhere > 0) } else { None };
        let group = |of: Candidates| {
            let (cluster, size) = (of.cluster, size(&of));
            let place = if self.names_clusters() { self.place(cluster) } else { Place::default() };
            let weight = match (missing, place.weight) {
                _ if !any_active => 0,
                (_, Some(weight)) => weight,
                (Some(missing), None) if cluster == self.own_cluster => u16::MAX - missing,
                (Some(missing), None) => part(missing, size, elsewhere),
                (None, None) if self.prefers(cluster) => scale(size, largest),
                (None, None) => 0,
            };
            GroupPlan { cluster, weight, tier: place.tier, backends: of.backends }
        };
        chosen.into_iter().map(group).collect()
    }

    /// Whether the service says which clusters are used how.
    fn names_clusters(&self) -> bool {
        self.own.global && self.own.balancing.names_clusters()
    }

    /// Where the service puts a cluster. One whose name nobody has told yet stays where it was.
    fn place(&self, cluster: u16) -> Place {
        let Balancing { order, weights, .. } = &self.own.balancing;
        let weighted =
            |weight: Option<u16>| if weights.is_empty() { None } else { Some(weight.unwrap_or(0)) };
        let name = match self.names.get(&cluster) {
            Some(name) => name.as_str(),
            None if cluster == self.own_cluster => &self.own.cluster,
            None => {
                let restored = match self.remotes.get(&cluster) {
                    Some(Remote::Restored(group)) => Some(group),
                    _ => None,
                };
                let tier = restored.map_or(last_tier(order), |group| group.tier);
                return Place { tier, weight: weighted(restored.map(|group| group.weight)) };
            }
        };
        let tier = order.iter().position(|tier| tier.iter().any(|named| named.as_str() == name));
        let weight = weights.iter().find(|(named, _)| named.as_str() == name).map(|(_, weight)| *weight);
        Place {
            tier: tier.and_then(|tier| u8::try_from(tier).ok()).unwrap_or(last_tier(order)),
            weight: weighted(weight),
        }
    }

    /// The share of calls, in parts of [`u16::MAX`], that the own backends cannot answer any more; none if
    /// they can, or if they are not preferred.
    fn missing(&self) -> Option<u16> {
        let failover = self.own.failover.filter(|_| self.affinity() == Affinity::Local)?;
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
        match self.affinity() {
            Affinity::None => true,
            Affinity::Local => cluster == self.own_cluster,
            Affinity::Remote => cluster != self.own_cluster,
        }
    }

    /// What names clusters leaves nothing to it.
    fn affinity(&self) -> Affinity {
        if self.own.global && !self.names_clusters() { self.own.affinity } else { Affinity::None }
    }

    /// How far away a backend of the own cluster is from this node.
    pub(super) fn distance(&self, backend: &LocalBackend) -> Distance {
        if backend.node.as_deref() == Some(self.here.node) {
            return Distance::Node;
        }
        match &backend.zone {
            Some(zone) if self.here.zone == Some(zone) => Distance::Zone,
            _ => Distance::Cluster,
        }
    }

    /// Backends of the own cluster that are farther away are not called, by the service's word. `counts` tells which
    /// backends there are.
    pub(super) fn nearest(&self, nearness: Nearness, counts: impl Fn(&LocalBackend) -> bool) -> Distance {
        let preferred = match nearness {
            Nearness::Any => return Distance::Cluster,
            // In no zone nothing is near, not even what is on the same node.
            Nearness::PreferZone if self.here.zone.is_none() => return Distance::Cluster,
            Nearness::OnlyNode => return Distance::Node,
            Nearness::PreferNode => Distance::Node,
            Nearness::PreferZone => Distance::Zone,
        };
        let active = self.own.backends.iter().filter(|backend| backend.state == BackendState::Active);
        let distances = active.filter(|backend| counts(backend)).map(|backend| self.distance(backend));
        distances.min().unwrap_or(Distance::Cluster).max(preferred)
    }
}

/// Where a service puts a cluster.
#[derive(Default)]
struct Place {
    tier: u8,
    /// None: in proportion to its backends.
    weight: Option<u16>,
}

/// From this node to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Distance {
    Node,
    Zone,
    Cluster,
}

/// The tier of clusters that are not named; records with more tiers are refused.
fn last_tier(order: &[BTreeSet<ClusterName>]) -> u8 {
    u8::try_from(order.len()).unwrap_or(u8::MAX)
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
    use std::net::IpAddr;

    use clustermesh_kvstore::cluster::NamespacedName;
    use clustermesh_kvstore::record::{External, Failover, LocalService, PortMap};

    use super::super::plan::Here;
    use super::*;
    use crate::desired::BackendKey;

    fn service(active: u8) -> LocalService {
        let backend = |n: u8| LocalBackend {
            ip: [10, 1, 0, n].into(),
            ports: PortMap::new(),
            state: BackendState::Active,
            node: None,
            zone: None,
            hostname: None,
        };
        LocalService {
            cluster: "alpha".into(),
            name: NamespacedName { namespace: "shop".into(), name: "orders".into() },
            cluster_id: 1,
            global: true,
            shared: true,
            private: false,
            affinity: Affinity::None,
            failover: None,
            balancing: Balancing::default(),
            external: External::default(),
            headless: false,
            frontends: BTreeMap::new(),
            backends: (0..active).map(backend).collect(),
        }
    }

    fn candidates(cluster: u8, count: u8) -> Candidates {
        let backend = |n| BackendKey {
            cluster: cluster.into(),
            ip: [10, cluster, 0, n].into(),
            port: 80,
            proto: 6,
            terminating: false,
        };
        Candidates { cluster: cluster.into(), farther: 0, backends: (0..count).map(backend).collect() }
    }

    /// Shares of clusters 1 (own), 2 and 3 in per mille, if the own one has `active` backends, and the
    /// others one and three.
    fn shares(active: u8, failover: Failover) -> [u32; 3] {
        let own = LocalService { affinity: Affinity::Local, failover: Some(failover), ..service(active) };
        let (names, remotes) = (BTreeMap::new(), BTreeMap::new());
        let here = Here { node: "n1", zone: None };
        let inputs =
            Inputs { own_cluster: 1, own: &own, remotes, before: None, names: &names, here, lets_in: None };
        let groups = inputs.groups(vec![candidates(1, active), candidates(2, 1), candidates(3, 3)]);
        let all: u32 = groups.iter().map(|group| u32::from(group.weight)).sum();
        let share = |cluster| {
            let group = groups.iter().find(|group| group.cluster == cluster);
            group.map_or(0, |group| (u32::from(group.weight) * 1000 + all / 2) / all)
        };
        [share(1), share(2), share(3)]
    }

    /// Tier and weight of clusters 1 (alpha, the own one), 2 (beta), 3 (gamma) and 4, whose name nobody has told, with
    /// two, one, three and one backends.
    fn placed(balancing: Balancing) -> Vec<(u8, u16)> {
        let own = LocalService { affinity: Affinity::Local, balancing, ..service(2) };
        let names = [(2, "beta"), (3, "gamma")].map(|(id, name)| (id, name.parse().unwrap())).into();
        let here = Here { node: "n1", zone: None };
        let before = GroupPlan { cluster: 4, weight: 9, tier: 7, backends: candidates(4, 1).backends };
        let remotes = BTreeMap::from([(4, Remote::Restored(&before))]);
        let inputs =
            Inputs { own_cluster: 1, own: &own, remotes, before: None, names: &names, here, lets_in: None };
        let all = vec![candidates(1, 2), candidates(2, 1), candidates(3, 3), candidates(4, 1)];
        inputs.groups(all).iter().map(|group| (group.tier, group.weight)).collect()
    }

    #[test]
    fn clusters_have_the_places_that_the_service_names() {
        let order = |tiers: &[&[&str]]| -> Vec<BTreeSet<ClusterName>> {
            tiers.iter().map(|tier| tier.iter().map(|name| name.parse().unwrap()).collect()).collect()
        };
        let weights = |shares: &[(&str, u16)]| -> BTreeMap<ClusterName, u16> {
            shares.iter().map(|(name, share)| (name.parse().unwrap(), *share)).collect()
        };
        let plain = Balancing::default;
        // The affinity decides where nothing else is said.
        assert_eq!(placed(plain()), [(0, 2), (0, 0), (0, 0), (0, 0)]);
        let ordered = Balancing { order: order(&[&["gamma"], &["beta", "nobody"]]), ..plain() };
        assert_eq!(placed(ordered.clone()), [(2, 2), (1, 1), (0, 3), (7, 1)]);
        let weighted = Balancing { weights: weights(&[("alpha", 80), ("beta", 20)]), ..plain() };
        assert_eq!(placed(weighted.clone()), [(0, 80), (0, 20), (0, 0), (7, 9)]);
        let both = Balancing { order: ordered.order, weights: weighted.weights, ..plain() };
        assert_eq!(placed(both), [(2, 80), (1, 20), (0, 0), (7, 9)]);
    }

    #[test]
    fn backends_are_as_near_as_the_service_wants_them() {
        let backend = |n: u8, node: &str, zone: Option<&str>, state| LocalBackend {
            ip: [10, 1, 0, n].into(),
            ports: PortMap::new(),
            state,
            node: Some(node.into()),
            zone: zone.map(str::to_owned),
            hostname: None,
        };
        use BackendState::{Active, Terminating};
        let all = vec![
            backend(1, "n1", Some("west"), Active),
            backend(2, "n2", Some("west"), Active),
            backend(3, "n3", Some("east"), Active),
            backend(4, "n4", None, Active),
            backend(5, "n5", Some("south"), Terminating),
        ];
        let called = |nearness: Nearness, node: &str, zone: Option<&str>| -> Vec<u8> {
            let balancing = Balancing { nearness, ..Balancing::default() };
            let own = LocalService { balancing, backends: all.clone(), ..service(0) };
            let (names, remotes) = (BTreeMap::new(), BTreeMap::new());
            let here = Here { node, zone };
            let inputs = Inputs {
                own_cluster: 1,
                own: &own,
                remotes,
                before: None,
                names: &names,
                here,
                lets_in: None,
            };
            let nearest = inputs.nearest(nearness, |_| true);
            let called = own.backends.iter().filter(|backend| inputs.distance(backend) <= nearest);
            let last_byte = |ip: IpAddr| ip.to_string().rsplit('.').next().unwrap().parse().unwrap();
            called.map(|backend| last_byte(backend.ip)).collect()
        };
        const ALL: [u8; 5] = [1, 2, 3, 4, 5];
        assert_eq!(called(Nearness::Any, "n1", Some("west")), ALL);
        assert_eq!(called(Nearness::PreferZone, "n1", Some("west")), [1, 2]);
        assert_eq!(called(Nearness::PreferZone, "n9", Some("east")), [3]);
        assert_eq!(
            called(Nearness::PreferZone, "n9", Some("south")),
            ALL,
            "the only one there is about to go"
        );
        assert_eq!(called(Nearness::PreferZone, "n9", Some("north")), ALL);
        assert_eq!(called(Nearness::PreferZone, "n1", None), ALL, "in no zone nothing is near");
        assert_eq!(called(Nearness::PreferNode, "n1", Some("west")), [1]);
        assert_eq!(called(Nearness::PreferNode, "n9", Some("west")), [1, 2]);
        assert_eq!(called(Nearness::PreferNode, "n4", None), [4]);
        assert_eq!(called(Nearness::PreferNode, "n9", None), ALL);
        assert_eq!(called(Nearness::OnlyNode, "n2", Some("west")), [2]);
        assert_eq!(called(Nearness::OnlyNode, "n9", Some("west")), [0_u8; 0]);
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
