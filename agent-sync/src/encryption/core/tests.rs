use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::tunnels::EndNode;

const PORT: u16 = 51_871;

fn key(byte: u8) -> WireguardKey {
    WireguardKey::new([byte; 32]).unwrap()
}

fn ip(cluster: u8, node: u8) -> IpAddr {
    [172, 31, cluster, node].into()
}

fn end(cluster: u8, node: u8, key: Option<WireguardKey>) -> (IpAddr, Option<TunnelEnd>) {
    let name = format!("node{node}");
    let ip = ip(cluster, node);
    let node = EndNode { name, tunnel_ip: Some(ip), key, ipsec: None };
    (ip, Some(TunnelEnd { cluster: cluster.into(), node: Some(node) }))
}

fn unconfirmed(cluster: u8, node: u8) -> (IpAddr, Option<TunnelEnd>) {
    (ip(cluster, node), Some(TunnelEnd { cluster: cluster.into(), node: None }))
}

fn core(scope: Scope, strict: bool, installed: Installed) -> Core {
    let own = Own { cluster: 1, node: "node1".into(), key: key(11), previous: None };
    let mut core = Core::new(own, scope, strict, PORT, installed);
    core.apply(vec![end(1, 1, Some(key(11)))]);
    core
}

/// The peer in the lane of its key and this node's.
fn peer(key: WireguardKey) -> PeerId {
    (lane(key), key)
}

fn lane(key: WireguardKey) -> Lane {
    Lane::of(&self::key(11), &key)
}

/// The kernel is read again.
fn wait(core: &mut Core, span: Duration) {
    core.observe(core.installed().clone(), core.now + span);
}

/// Where a device of another node listens for us.
fn at(ip: IpAddr, key: WireguardKey) -> SocketAddr {
    SocketAddr::new(ip, PORT + u16::from(lane(key).reversed().number()))
}

/// What a kernel would make of it.
fn carry_out(core: &mut Core) -> Vec<Step> {
    let steps = core.plan();
    steps.iter().for_each(|step| core.done(step));
    steps
}

/// The other ends answer.
fn answer(core: &mut Core, keys: &[WireguardKey]) {
    let mut installed = core.installed().clone();
    for (_, state) in installed.peers.iter_mut().filter(|((_, key), _)| keys.contains(key)) {
        state.handshake = 1;
    }
    core.observe(installed, core.now);
}

#[test]
fn packets_are_steered_once_the_other_end_has_answered_and_never_back() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21))), end(1, 2, Some(key(12)))]);
    let set =
        PeerChange::Set { key: key(21), endpoint: Some(at(ip(2, 1), key(21))), allowed: [ip(2, 1)].into() };
    let lane = lane(key(21));
    let greet = Step::Peers(lane, vec![PeerChange::Greet(key(21))]);
    let steps = [Step::Open(lane), Step::Peers(lane, vec![set]), greet];
    assert_eq!(carry_out(&mut core), steps, "not the own cluster's");
    assert_eq!(carry_out(&mut core), []);
    answer(&mut core, &[key(21)]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Steering::Encrypted(lane)))]);
    assert_eq!(core.encrypted(), [ip(2, 1)].into());

    // It comes back with a key in the same lane, of which the kernel has no session yet.
    core.apply(vec![end(2, 1, Some(key(23)))]);
    let steps = carry_out(&mut core);
    assert!(steps.iter().all(|step| matches!(step, Step::Peers(..))), "{steps:?}");
    assert_eq!(steps[1], Step::Peers(lane, vec![PeerChange::Remove(key(21))]));
    assert_eq!(core.encrypted(), [ip(2, 1)].into(), "no way back into clear text");

    // It does not encrypt any more.
    core.apply(vec![end(2, 1, None)]);
    let gone = Step::Peers(lane, vec![PeerChange::Remove(key(23))]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), None), gone, Step::Close(lane)]);
}

/// Both lanes take packets in until nothing comes by the old one; packets go by one that has answered.
#[test]
fn a_peers_new_key_takes_over_when_it_has_answered_and_the_old_one_goes_when_it_is_quiet() {
    let mut core = core(Scope::Clusters, true, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21)))]);
    carry_out(&mut core);
    answer(&mut core, &[key(21)]);
    carry_out(&mut core);
    core.apply(vec![end(2, 1, Some(key(22)))]);
    let steps = carry_out(&mut core);
    assert!(steps.contains(&Step::Open(lane(key(22)))), "{steps:?}");
    wait(&mut core, PATIENCE / 2);
    carry_out(&mut core);
    let way = |core: &Core| core.installed().steering[&ip(2, 1)];
    assert_eq!(way(&core), Steering::Encrypted(lane(key(21))), "the new one has not answered");
    assert!(
        [21, 22].iter().all(|byte| core.installed().peers[&peer(key(*byte))].allowed == [ip(2, 1)].into())
    );

    answer(&mut core, &[key(22)]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Steering::Encrypted(lane(key(22)))))]);
    // The other end still speaks by the old one.
    for received in 1..5 {
        let mut installed = core.installed().clone();
        installed.peers.get_mut(&peer(key(21))).unwrap().received = received;
        core.observe(installed, core.now + QUIET - Duration::from_secs(1));
        assert_eq!(carry_out(&mut core), []);
    }
    assert!(core.has_old());
    wait(&mut core, QUIET);
    let gone = Step::Peers(lane(key(21)), vec![PeerChange::Remove(key(21))]);
    assert_eq!(carry_out(&mut core), [gone, Step::Close(lane(key(21)))]);
    assert!(!core.has_old());
}

#[test]
fn the_own_new_key_takes_over_node_by_node_and_waits_for_none_for_ever() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21))), end(3, 1, Some(key(31)))]);
    carry_out(&mut core);
    answer(&mut core, &[key(21), key(31)]);
    carry_out(&mut core);
    core.rotate(key(14));
    carry_out(&mut core);
    let new = |byte| (Lane::of(&key(14), &key(byte)), key(byte));
    assert_eq!((core.waiting().count(), core.behind().len()), (2, 2));
    assert_eq!(core.previous(), Some((key(11), false)));
    // One answers to the new key, the other one never hears of it.
    let mut installed = core.installed().clone();
    installed.peers.get_mut(&new(21)).unwrap().handshake = 1;
    core.observe(installed, core.now);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Steering::Encrypted(new(21).0)))]);
    wait(&mut core, QUIET);
    carry_out(&mut core);
    assert!(!core.installed().peers.contains_key(&peer(key(21))));
    assert_eq!((core.behind(), core.previous()), ([ip(3, 1)].into(), Some((key(11), false))));
    wait(&mut core, PATIENCE);
    let steps = carry_out(&mut core);
    assert!(steps.contains(&Step::Steer(ip(3, 1), Some(Steering::Encrypted(new(31).0)))), "{steps:?}");
    assert_eq!(core.previous(), Some((key(11), true)));
    core.retire();
    assert_eq!(carry_out(&mut core), []);
    assert!(core.installed().open.iter().all(|lane| lane.own() == Slot::of(&key(14))));
}

#[test]
fn strict_nodes_speak_in_clear_to_nobody_in_scope() {
    let mut core = core(Scope::Nodes, true, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21))), end(1, 2, None), unconfirmed(3, 1)]);
    carry_out(&mut core);
    let blocked = |core: &Core, ip| core.installed().steering.get(&ip) == Some(&Steering::Blocked);
    assert!([ip(2, 1), ip(1, 2), ip(3, 1)].into_iter().all(|ip| blocked(&core, ip)));
    assert!(!core.installed().steering.contains_key(&ip(1, 1)), "not this node itself");
    answer(&mut core, &[key(21)]);
    carry_out(&mut core);
    assert_eq!(core.encrypted(), [ip(2, 1)].into());
    core.apply(vec![end(2, 1, None)]);
    // In one step from the one to the other.
    assert_eq!(carry_out(&mut core)[0], Step::Steer(ip(2, 1), Some(Steering::Blocked)));
}

#[test]
fn what_an_earlier_life_installed_stays_until_it_is_confirmed_or_denied() {
    let state = WireguardState {
        endpoint: Some(at(ip(2, 1), key(21))),
        allowed: [ip(2, 1)].into(),
        handshake: 7,
        ..WireguardState::default()
    };
    let lane = lane(key(21));
    let installed = Installed {
        open: [lane].into(),
        peers: [((lane, key(21)), state)].into(),
        steering: [(ip(2, 1), Steering::Encrypted(lane))].into(),
    };
    let mut core = core(Scope::Clusters, false, installed);
    core.apply(vec![unconfirmed(2, 1)]);
    assert_eq!(carry_out(&mut core), []);
    core.apply(vec![end(2, 1, Some(key(21)))]);
    assert_eq!(carry_out(&mut core), [], "the session goes on");
    core.apply(vec![(ip(2, 1), None)]);
    let gone = Step::Peers(lane, vec![PeerChange::Remove(key(21))]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), None), gone, Step::Close(lane)]);
}

/// The agent was started again without IPsec, by which it has encrypted to two nodes up to now.
#[test]
fn what_ipsec_still_encrypts_to_is_not_blocked_until_it_lets_go() {
    let mut before = core(Scope::Clusters, true, Installed::default());
    before.apply(vec![end(2, 1, Some(key(21))), end(3, 1, None)]);
    before.set_elsewhere([ip(2, 1), ip(3, 1)].into(), BTreeSet::new());
    carry_out(&mut before);
    answer(&mut before, &[key(21)]);
    assert!(carry_out(&mut before).is_empty(), "IPsec does it");

    let own = Own { cluster: 1, node: "node1".into(), key: key(11), previous: None };
    let mut core = Core::new(own, Scope::Clusters, true, PORT, before.installed().clone());
    let both = BTreeSet::from([ip(2, 1), ip(3, 1)]);
    core.set_elsewhere(BTreeSet::new(), both.clone());
    core.apply(vec![end(1, 1, Some(key(11))), unconfirmed(2, 1), unconfirmed(3, 1)]);
    assert_eq!(carry_out(&mut core), [], "nobody knows who is there");
    assert_eq!(both.iter().map(|ip| core.awaited(*ip)).collect::<Vec<_>>(), [Awaited::Node, Awaited::Node]);

    core.apply(vec![end(2, 1, Some(key(21))), end(3, 1, None)]);
    assert_eq!(core.awaited(ip(2, 1)), Awaited::Answer);
    let encrypted = Step::Steer(ip(2, 1), Some(Steering::Encrypted(lane(key(21)))));
    assert_eq!(carry_out(&mut core), [encrypted], "the kernel has had its answer");
    assert_eq!(both.iter().map(|ip| core.awaited(*ip)).collect::<Vec<_>>(), [Awaited::Nothing; 2]);
    core.set_elsewhere(BTreeSet::new(), BTreeSet::new());
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(3, 1), Some(Steering::Blocked))]);
}

#[test]
fn a_key_is_one_nodes() {
    let mut core = core(Scope::Nodes, false, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21))), end(3, 1, Some(key(11)))]);
    carry_out(&mut core);
    // Cluster 2 says that the key of a node of ours is that of its own; ours wins, whoever came first.
    core.apply(vec![end(2, 2, Some(key(12))), end(1, 2, Some(key(12)))]);
    // A copied key does not take the place of an installed one, though it would come first by its cluster.
    core.apply(vec![end(4, 1, Some(key(21))), end(3, 2, Some(key(21)))]);
    carry_out(&mut core);
    let refused = |cluster: u16, node: &str| core.refused().get(&(cluster, node.to_owned())).copied();
    assert_eq!(refused(3, "node1"), Some(Refused::OwnKey));
    assert_eq!(refused(2, "node2"), Some(Refused::AnothersKey));
    assert_eq!(refused(4, "node1"), Some(Refused::AnothersKey));
    assert_eq!(core.refused().len(), 4);
    assert_eq!(core.installed().peers[&peer(key(21))].allowed, [ip(2, 1)].into());
    assert_eq!(core.installed().peers[&peer(key(12))].allowed, [ip(1, 2)].into());
    assert_eq!(core.installed().peers.len(), 2);
}

#[test]
fn a_peer_may_roam_among_its_own_addresses_only() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21)))]);
    carry_out(&mut core);
    let [home, elsewhere] = [ip(2, 1), ip(9, 9)].map(|ip| at(ip, key(21)));
    let other_port = SocketAddr::new(ip(2, 1), 9);
    for (at, resets) in [(home, false), (elsewhere, true), (other_port, true)] {
        let mut installed = core.installed().clone();
        installed.peers.get_mut(&peer(key(21))).unwrap().endpoint = Some(at);
        core.observe(installed, Duration::ZERO);
        assert_eq!(!core.plan().is_empty(), resets, "{at}");
    }
}

#[derive(Clone, Debug)]
enum Event {
    Said(u8, u8, Option<u8>),
    Gone(u8, u8),
    /// One of the peers answers.
    Answers(usize),
    /// The agent starts again over what is installed, and knows addresses only.
    Restart,
    /// This node has a new key, if the one before the present is not in use any more.
    Rotate,
    /// So many seconds pass.
    Wait(u16),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let key = proptest::option::weighted(0.8, prop_oneof![Just(11_u8), 20..24_u8]);
    let event = prop_oneof![
        6 => (1..4_u8, 1..4_u8, key).prop_map(|(cluster, node, key)| Event::Said(cluster, node, key)),
        2 => (1..4_u8, 1..4_u8).prop_map(|(cluster, node)| Event::Gone(cluster, node)),
        4 => any::<usize>().prop_map(Event::Answers),
        1 => Just(Event::Restart),
        1 => Just(Event::Rotate),
        2 => (0..4000_u16).prop_map(Event::Wait),
    ];
    proptest::collection::vec(event, 1..40)
}

proptest! {
    /// Whatever the clusters say, in whatever order: after a round nothing is left to do, no address belongs to two
    /// peers, packets are steered only to peers that are there, and a strict node sends nothing in clear.
    #[test]
    fn a_round_leads_to_where_nothing_is_left_to_do(events in events(), strict: bool, nodes: bool) {
        let scope = if nodes { Scope::Nodes } else { Scope::Clusters };
        let mut core = core(scope, strict, Installed::default());
        let mut mesh: BTreeMap<IpAddr, TunnelEnd> = BTreeMap::new();
        let mut rotations = 0;
        for event in events {
            match event {
                // Who this node is does not change.
                Event::Said(1, 1, _) | Event::Gone(1, 1) => {}
                Event::Said(cluster, node, byte) => {
                    let (ip, end) = end(cluster, node, byte.map(key));
                    mesh.insert(ip, end.clone().unwrap());
                    core.apply(vec![(ip, end)]);
                }
                Event::Gone(cluster, node) => {
                    mesh.remove(&ip(cluster, node));
                    core.apply(vec![(ip(cluster, node), None)]);
                }
                Event::Answers(which) => {
                    let ids: Vec<_> = core.installed().peers.keys().copied().collect();
                    let mut installed = core.installed().clone();
                    if !ids.is_empty() {
                        installed.peers.get_mut(&ids[which % ids.len()]).unwrap().handshake = 1;
                    }
                    core.observe(installed, core.now);
                }
                Event::Restart => {
                    let installed = core.installed().clone();
                    let before = (installed.clone(), core.encrypted());
                    let own = core.own.clone();
                    core = Core::new(own, scope, strict, PORT, installed);
                    core.apply(vec![end(1, 1, Some(core.own.key))]);
                    core.apply(mesh.iter().map(|(ip, end)| {
                        (*ip, Some(TunnelEnd { cluster: end.cluster, node: None }))
                    }).collect());
                    carry_out(&mut core);
                    prop_assert_eq!((core.installed().clone(), core.encrypted()), before);
                    core.apply(mesh.iter().map(|(ip, end)| (*ip, Some(end.clone()))).collect());
                }
                Event::Rotate => {
                    if core.previous().is_some_and(|(_, unused)| unused) {
                        core.retire();
                    }
                    if core.previous().is_none() {
                        rotations += 1;
                        // In the other slot than the one before.
                        core.rotate(key(100 + 2 * rotations + (core.own.key.bytes()[0] & 1 ^ 1)));
                    }
                }
                Event::Wait(seconds) => wait(&mut core, Duration::from_secs(seconds.into())),
            }
            carry_out(&mut core);
            prop_assert_eq!(core.plan(), vec![]);
            let installed = core.installed();
            let mut owned = BTreeSet::new();
            for ((lane, key), peer) in &installed.peers {
                prop_assert!(*key != core.own.key && core.own.previous != Some(*key), "a peer of its own");
                prop_assert!(installed.open.contains(lane));
                for ip in &peer.allowed {
                    prop_assert!(owned.insert((*lane, *ip)), "{} has two peers in a lane", ip);
                    prop_assert!(mesh.contains_key(ip));
                }
            }
            for (ip, steering) in &installed.steering {
                if let Steering::Encrypted(lane) = steering {
                    prop_assert!(owned.contains(&(*lane, *ip)), "{} is steered to nobody", ip);
                }
            }
            for (ip, end) in &mesh {
                let in_scope = nodes || end.cluster != 1;
                prop_assert!(!strict || !in_scope || installed.steering.contains_key(ip));
                prop_assert!(in_scope || !installed.steering.contains_key(ip));
            }
        }
    }
}
