use clustermesh_agent_api::v1::Peer;
use proptest::prelude::*;

use super::*;

fn status(name: &str, id: u32) -> StatusResponse {
    StatusResponse {
        version: "0.1.0".into(),
        cluster_name: name.into(),
        cluster_id: id,
        max_connected_clusters: 255,
        ready: true,
        ..Default::default()
    }
}

/// A side whose agents have read the other side's etcd, in which pod CIDRs are `10.<peer_id>.n.0/24`.
fn side(name: &str, id: u32, peer_id: u32) -> Side {
    Side {
        cluster: name.parse().unwrap(),
        id,
        config_dir: format!("/{name}/clustermesh").into(),
        agents: ["node1", "node2"]
            .map(|node| AgentFacts { node: node.into(), status: Ok(status(name, id)) })
            .into(),
        probe: Some(Probe {
            node: "node1".into(),
            result: Ok(ProbePeerResponse {
                cluster_id: peer_id,
                max_connected_clusters: 255,
                pod_cidrs: vec![format!("10.{peer_id}.0.0/24"), format!("fd00:{peer_id}::/64")],
                round_trip_us: 1234,
                etcd_version: "3.4.30".into(),
                ..Default::default()
            }),
        }),
        entry: EntryState::Absent,
        virtual_cidrs: VirtualCidrs::default(),
        known_cidrs: Vec::new(),
    }
}

fn good() -> Facts {
    Facts { source: side("alpha", 1, 2), destination: side("beta", 2, 1) }
}

fn statuses(side: &mut Side) -> impl Iterator<Item = &mut StatusResponse> {
    side.agents.iter_mut().filter_map(|agent| agent.status.as_mut().ok())
}

fn reached(side: &mut Side) -> &mut ProbePeerResponse {
    side.probe.as_mut().unwrap().result.as_mut().unwrap()
}

/// The checks of `facts` that ended with `outcome`.
fn ended(facts: &Facts, outcome: Outcome) -> Vec<CheckId> {
    plan(facts).checks.iter().filter(|c| c.outcome == outcome).map(|c| c.check).collect()
}

/// Whatever is wrong with one fact fails exactly the check that it belongs to, with a hint, and prevents
/// the connection, whichever of the two sides it is found on.
#[test]
fn each_mistake_fails_its_own_check() {
    type Mistake = (&'static str, CheckId, fn(&mut Facts));
    let mistakes: [Mistake; 14] = [
        ("/alpha/clustermesh", CheckId::ContextsDiffer, |f| {
            f.destination.config_dir = f.source.config_dir.clone();
        }),
        ("the agent of node2 says alfa", CheckId::ConfigurationMatches, |f| {
            statuses(&mut f.source).last().unwrap().cluster_name = "alfa".into();
        }),
        ("the agent of node1 says alpha with ID 3", CheckId::ConfigurationMatches, |f| {
            statuses(&mut f.source).next().unwrap().cluster_id = 3;
        }),
        ("its etcd says beta with ID 7", CheckId::ConfigurationMatches, |f| {
            reached(&mut f.source).cluster_id = 7;
        }),
        ("both clusters are named alpha", CheckId::NamesDiffer, |f| {
            f.destination.cluster = f.source.cluster.clone();
            statuses(&mut f.destination).for_each(|s| s.cluster_name = "alpha".into());
        }),
        ("cluster ID 1", CheckId::IdsDiffer, |f| {
            f.destination.id = 1;
            statuses(&mut f.destination).for_each(|s| s.cluster_id = 1);
            reached(&mut f.source).cluster_id = 1;
        }),
        ("not in 1..=255", CheckId::IdsInRange, |f| {
            f.source.id = 256;
            statuses(&mut f.source).for_each(|s| s.cluster_id = 256);
            reached(&mut f.destination).cluster_id = 256;
        }),
        ("not in 1..=255", CheckId::IdsInRange, |f| {
            f.source.id = 0;
            statuses(&mut f.source).for_each(|s| s.cluster_id = 0);
            reached(&mut f.destination).cluster_id = 0;
        }),
        ("alpha/node2: 511", CheckId::MaxConnectedClusters, |f| {
            statuses(&mut f.source).last().unwrap().max_connected_clusters = 511;
        }),
        ("etcd of beta: 511", CheckId::MaxConnectedClusters, |f| {
            reached(&mut f.source).max_connected_clusters = 511;
        }),
        ("another cluster named beta, with ID 9", CheckId::NoClash, |f| {
            let peer = Peer { name: "beta".into(), cluster_id: 9, ..Default::default() };
            statuses(&mut f.source).last().unwrap().remotes.push(peer);
        }),
        ("connected to gamma, which has the cluster ID 2 too", CheckId::NoClash, |f| {
            let peer = Peer { name: "gamma".into(), cluster_id: 2, ..Default::default() };
            statuses(&mut f.source).last().unwrap().remotes.push(peer);
        }),
        ("pod CIDRs overlap: 10.0.0.0/8 of beta and 10.1.0.0/24 of alpha", CheckId::PodCidrs, |f| {
            reached(&mut f.source).pod_cidrs.push("10.0.0.0/8".into());
        }),
        ("is a symbolic link", CheckId::Entries, |f| {
            f.source.entry = EntryState::Foreign("/alpha/clustermesh/beta is a symbolic link".into());
        }),
    ];
    for (message, check, mistake) in mistakes {
        let mut facts = good();
        mistake(&mut facts);
        for swapped in [false, true] {
            if swapped {
                std::mem::swap(&mut facts.source, &mut facts.destination);
            }
            let plan = plan(&facts);
            assert!(!plan.is_clear(), "{message}");
            let failures: Vec<_> = plan.failures().collect();
            assert_eq!(failures.iter().map(|c| c.check).collect::<Vec<_>>(), [check], "{failures:?}");
            assert!(!failures[0].hint.is_empty(), "{message}");
            if !swapped {
                assert!(failures[0].message.contains(message), "{}", failures[0].message);
            }
        }
    }
}

#[test]
fn two_good_clusters_pass_everything() {
    let plan = plan(&good());
    assert!(plan.is_clear());
    assert!(
        plan.checks.iter().all(|check| check.outcome == Outcome::Pass && check.hint.is_empty()),
        "{plan:?}"
    );
    let reachable = plan.checks.iter().find(|c| c.check == CheckId::EtcdReachable).unwrap();
    assert_eq!(reachable.message, "alpha/node1 -> etcd of beta: reachable (version 3.4.30, 1.2 ms)");
}

#[test]
fn an_etcd_that_cannot_be_reached_leaves_cidrs_unchecked() {
    let mut facts = good();
    facts.source.probe.as_mut().unwrap().result = Err("connection refused".into());
    assert_eq!(ended(&facts, Outcome::Fail), [CheckId::EtcdReachable]);
    assert_eq!(ended(&facts, Outcome::Skipped), [CheckId::PodCidrs]);
    let message = plan(&facts).failures().next().unwrap().message.clone();
    assert_eq!(message, "alpha/node1 -> etcd of beta: connection refused");
}

#[test]
fn one_silent_agent_is_a_warning_and_all_of_them_a_failure() {
    let mut facts = good();
    facts.source.agents[0].status = Err("connection refused".into());
    assert!(plan(&facts).is_clear());
    assert_eq!(ended(&facts, Outcome::Warn), [CheckId::AgentsAnswer]);
    facts.source.agents[1].status = Err("timed out".into());
    facts.source.probe = None;
    assert!(!plan(&facts).is_clear());
    assert_eq!(ended(&facts, Outcome::Fail), [CheckId::AgentsAnswer]);
    assert_eq!(
        ended(&facts, Outcome::Skipped),
        [CheckId::ConfigurationMatches, CheckId::NoClash, CheckId::EtcdReachable, CheckId::PodCidrs]
    );
}

#[test]
fn warnings_do_not_prevent_the_connection() {
    type Change = fn(&mut Facts);
    let warnings: [(CheckId, Change); 3] = [
        (CheckId::Versions, |f| statuses(&mut f.source).last().unwrap().version = "0.2.0".into()),
        (CheckId::PodCidrs, |f| reached(&mut f.source).pod_cidrs.clear()),
        (CheckId::Entries, |f| f.source.entry = EntryState::Different),
    ];
    for (check, change) in warnings {
        let mut facts = good();
        change(&mut facts);
        assert!(plan(&facts).is_clear());
        assert_eq!(ended(&facts, Outcome::Warn), [check]);
    }
    let mut patch = good();
    statuses(&mut patch.source).for_each(|s| s.version = "0.1.7-rc1".into());
    assert_eq!(ended(&patch, Outcome::Warn), [], "another patch version is fine");
}

#[test]
fn a_connection_that_exists_is_no_clash() {
    let mut facts = good();
    for (side, name, id) in [(&mut facts.source, "beta", 2), (&mut facts.destination, "alpha", 1)] {
        side.entry = EntryState::Same;
        // A second agent has not read the peer's configuration yet.
        for (status, cluster_id) in statuses(side).zip([id, 0]) {
            status.remotes.push(Peer { name: name.into(), cluster_id, ..Default::default() });
        }
    }
    assert!(facts.already_connected());
    let plan = plan(&facts);
    assert!(plan.is_clear());
    assert_eq!(plan.checks.last().unwrap().message, "alpha and beta are already connected");
}

#[test]
fn half_a_connection_is_completed() {
    let mut facts = good();
    facts.destination.entry = EntryState::Same;
    assert!(!facts.already_connected());
    let plan = plan(&facts);
    assert!(plan.is_clear());
    assert!(plan.checks.last().unwrap().message.contains("only beta has its half"), "{plan:?}");
}

/// What is in the way is not the other side's addresses, but those by which they are known.
#[test]
fn virtual_addresses_are_out_of_the_way() {
    let mut facts = good();
    reached(&mut facts.source).pod_cidrs = vec!["10.1.0.0/24".into()];
    assert_eq!(ended(&facts, Outcome::Fail), [CheckId::PodCidrs]);
    let cidrs = |real: &str, virtual_: &str| {
        VirtualCidrs::new([(real.parse().unwrap(), virtual_.parse().unwrap())]).unwrap()
    };
    facts.source.virtual_cidrs = cidrs("10.1.0.0/16", "240.2.0.0/16");
    // One side alone is not enough.
    assert_eq!(ended(&facts, Outcome::Fail), [CheckId::PodCidrs]);
    facts.destination.virtual_cidrs = cidrs("10.1.0.0/16", "240.1.0.0/16");
    assert!(plan(&facts).is_clear());
    let told =
        plan(&facts).checks.iter().find(|check| check.check == CheckId::PodCidrs).unwrap().message.clone();
    assert!(told.contains("alpha knows pods of beta by 10.1.0.0/16 as 240.2.0.0/16; beta knows"), "{told}");
    // A new node, of which nobody thought.
    reached(&mut facts.source).pod_cidrs.push("10.0.0.0/12".into());
    let failed = plan(&facts).failures().map(|check| check.message.clone()).collect::<Vec<_>>();
    assert!(failed[0].contains("among which 10.0.0.0/12 is not"), "{failed:?}");
}

/// A third cluster has what the new one has; the two themselves may be known from before.
#[test]
fn prefixes_of_third_clusters_are_in_the_way() {
    let mut facts = good();
    let known = |id: u32, net: &str| (id, net.parse().unwrap());
    facts.source.known_cidrs =
        vec![known(1, "10.1.0.0/24"), known(2, "10.2.0.0/24"), known(3, "10.3.0.0/24")];
    assert!(plan(&facts).is_clear());
    facts.source.known_cidrs.push(known(3, "10.2.0.0/16"));
    let failed = plan(&facts).failures().map(|check| check.message.clone()).collect::<Vec<_>>();
    assert_eq!(failed.len(), 1);
    assert!(
        failed[0].contains("10.2.0.0/24 of beta and 10.2.0.0/16 of the cluster with ID 3, which alpha"),
        "{failed:?}"
    );
    let cidrs =
        VirtualCidrs::new([("10.2.0.0/16".parse().unwrap(), "240.2.0.0/16".parse().unwrap())]).unwrap();
    facts.source.virtual_cidrs = cidrs;
    assert!(plan(&facts).is_clear());
}

fn network() -> impl Strategy<Value = IpNet> {
    // Few addresses, so that overlaps are frequent.
    let v4 = (0u32..64, 24u8..=32).prop_map(|(host, len)| {
        IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + host).into(), len).unwrap().trunc()
    });
    let v6 = (0u128..64, 120u8..=128).prop_map(|(host, len)| {
        IpNet::new(std::net::Ipv6Addr::from((0xfd << 120) + host).into(), len).unwrap().trunc()
    });
    prop_oneof![v4, v6]
}

fn hosts(net: &IpNet) -> BTreeSet<u128> {
    let number = |ip| match ip {
        std::net::IpAddr::V4(ip) => u128::from(u32::from(ip)),
        std::net::IpAddr::V6(ip) => u128::from(ip),
    };
    (number(net.network())..=number(net.broadcast())).collect()
}

proptest! {
    /// Against a model that looks at every single address.
    #[test]
    fn overlap_is_a_common_address(
        a in proptest::collection::vec(network(), 1..4),
        b in proptest::collection::vec(network(), 1..4),
    ) {
        let mut facts = good();
        let text = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        reached(&mut facts.destination).pod_cidrs = text(&a);
        reached(&mut facts.source).pod_cidrs = text(&b);
        let common = a.iter().any(|x| b.iter().any(|y| !hosts(x).is_disjoint(&hosts(y))));
        prop_assert_eq!(!plan(&facts).is_clear(), common);
    }

    /// The order in which the clusters are named does not matter.
    #[test]
    fn sides_are_equal(
        ids in proptest::array::uniform2(0u32..4),
        said in proptest::array::uniform2(0u32..4),
        peers in proptest::array::uniform2((proptest::sample::select(vec!["alpha", "beta", "gamma"]), 0u32..4)),
        widths in proptest::array::uniform2(proptest::sample::select(vec![0u32, 255, 511])),
        silent in proptest::array::uniform2(0usize..3),
        unreachable in proptest::array::uniform2(any::<bool>()),
    ) {
        let mut facts = good();
        for (n, side) in [&mut facts.source, &mut facts.destination].into_iter().enumerate() {
            side.id = ids[n];
            reached(side).cluster_id = said[n];
            for status in statuses(side) {
                status.max_connected_clusters = widths[n];
                let (name, cluster_id) = peers[n];
                status.remotes.push(Peer { name: name.into(), cluster_id, ..Default::default() });
            }
            for agent in side.agents.iter_mut().take(silent[n]) {
                agent.status = Err("silent".into());
            }
            if unreachable[n] {
                side.probe.as_mut().unwrap().result = Err("unreachable".into());
            }
        }
        let swapped = Facts { source: facts.destination.clone(), destination: facts.source.clone() };
        let outcomes = |facts: &Facts| {
            let mut all: Vec<_> = plan(facts).checks.iter().map(|c| (c.check, c.outcome as u8)).collect();
            all.sort_unstable();
            all
        };
        prop_assert_eq!(outcomes(&facts), outcomes(&swapped));
        // Whatever was skipped is explained by a check that failed.
        if outcomes(&facts).iter().any(|(_, outcome)| *outcome == Outcome::Skipped as u8) {
            prop_assert!(plan(&facts).failures().count() > 0 || widths == [0, 0]);
            prop_assert!(!plan(&facts).is_clear());
        }
    }
}
