use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::EndNode;
use super::*;

const PORT: u16 = 51_871;

fn key(byte: u8) -> WireguardKey {
    WireguardKey::new([byte; 32]).unwrap()
}

fn ip(cluster: u8, node: u8) -> Ipv4Addr {
    [172, 31, cluster, node].into()
}

fn end(cluster: u8, node: u8, key: Option<WireguardKey>) -> (Ipv4Addr, Option<TunnelEnd>) {
    let name = format!("node{node}");
    let node = EndNode { name, tunnel_ip: Some(ip(cluster, node)), key };
    (
        ip(cluster, node.tunnel_ip.unwrap().octets()[3]),
        Some(TunnelEnd { cluster: cluster.into(), node: Some(node) }),
    )
}

fn unconfirmed(cluster: u8, node: u8) -> (Ipv4Addr, Option<TunnelEnd>) {
    (ip(cluster, node), Some(TunnelEnd { cluster: cluster.into(), node: None }))
}

fn core(scope: Scope, strict: bool, installed: Installed) -> Core {
    let own = Own { cluster: 1, node: "node1".into(), key: key(11) };
    let mut core = Core::new(own, scope, strict, PORT, installed);
    core.apply(vec![end(1, 1, Some(key(11)))]);
    core
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
    for key in keys {
        installed.peers.get_mut(key).unwrap().handshake = 1;
    }
    core.observe(installed);
}

#[test]
fn packets_are_steered_once_the_other_end_has_answered_and_never_back() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21))), end(1, 2, Some(key(12)))]);
    let set = PeerChange::Set {
        key: key(21),
        endpoint: Some(SocketAddrV4::new(ip(2, 1), PORT)),
        allowed: [ip(2, 1)].into(),
    };
    let greet = Step::Peers(vec![PeerChange::Greet(key(21))]);
    assert_eq!(carry_out(&mut core), [Step::Peers(vec![set]), greet], "not the own cluster's");
    assert_eq!(carry_out(&mut core), []);
    answer(&mut core, &[key(21)]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Steering::Encrypted))]);
    assert_eq!(core.encrypted(), [ip(2, 1)].into());

    // It comes back with another key, of which the kernel has no session yet.
    core.apply(vec![end(2, 1, Some(key(22)))]);
    let steps = carry_out(&mut core);
    assert!(steps.iter().all(|step| matches!(step, Step::Peers(_))), "{steps:?}");
    assert_eq!(steps[1], Step::Peers(vec![PeerChange::Remove(key(21))]));
    assert_eq!(core.encrypted(), [ip(2, 1)].into(), "no way back into clear text");

    // It does not encrypt any more.
    core.apply(vec![end(2, 1, None)]);
    let gone = Step::Peers(vec![PeerChange::Remove(key(22))]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), None), gone]);
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
        endpoint: Some("172.31.2.1:51871".parse().unwrap()),
        allowed: [ip(2, 1)].into(),
        handshake: 7,
        ..WireguardState::default()
    };
    let installed =
        Installed { peers: [(key(21), state)].into(), steering: [(ip(2, 1), Steering::Encrypted)].into() };
    let mut core = core(Scope::Clusters, false, installed);
    core.apply(vec![unconfirmed(2, 1)]);
    assert_eq!(carry_out(&mut core), []);
    core.apply(vec![end(2, 1, Some(key(21)))]);
    assert_eq!(carry_out(&mut core), [], "the session goes on");
    core.apply(vec![(ip(2, 1), None)]);
    let gone = Step::Peers(vec![PeerChange::Remove(key(21))]);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), None), gone]);
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
    assert_eq!(core.installed().peers[&key(21)].allowed, [ip(2, 1)].into());
    assert_eq!(core.installed().peers[&key(12)].allowed, [ip(1, 2)].into());
    assert_eq!(core.installed().peers.len(), 2);
}

#[test]
fn a_peer_may_roam_among_its_own_addresses_only() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(key(21)))]);
    carry_out(&mut core);
    for (at, resets) in [("172.31.2.1:51871", false), ("172.31.9.9:51871", true), ("172.31.2.1:9", true)] {
        let mut installed = core.installed().clone();
        installed.peers.get_mut(&key(21)).unwrap().endpoint = Some(at.parse().unwrap());
        core.observe(installed);
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
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let key = proptest::option::weighted(0.8, prop_oneof![Just(11_u8), 20..24_u8]);
    let event = prop_oneof![
        6 => (1..4_u8, 1..4_u8, key).prop_map(|(cluster, node, key)| Event::Said(cluster, node, key)),
        2 => (1..4_u8, 1..4_u8).prop_map(|(cluster, node)| Event::Gone(cluster, node)),
        4 => any::<usize>().prop_map(Event::Answers),
        1 => Just(Event::Restart),
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
        let mut mesh: BTreeMap<Ipv4Addr, TunnelEnd> = BTreeMap::new();
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
                    let keys: Vec<_> = core.installed().peers.keys().copied().collect();
                    if !keys.is_empty() {
                        answer(&mut core, &[keys[which % keys.len()]]);
                    }
                }
                Event::Restart => {
                    let installed = core.installed().clone();
                    let before = (installed.clone(), core.encrypted());
                    core = self::core(scope, strict, installed);
                    core.apply(mesh.iter().map(|(ip, end)| {
                        (*ip, Some(TunnelEnd { cluster: end.cluster, node: None }))
                    }).collect());
                    carry_out(&mut core);
                    prop_assert_eq!((core.installed().clone(), core.encrypted()), before);
                    core.apply(mesh.iter().map(|(ip, end)| (*ip, Some(end.clone()))).collect());
                }
            }
            carry_out(&mut core);
            prop_assert_eq!(core.plan(), vec![]);
            let installed = core.installed();
            let mut owned = BTreeSet::new();
            for (key, peer) in &installed.peers {
                prop_assert!(*key != self::key(11), "a peer of its own");
                for ip in &peer.allowed {
                    prop_assert!(owned.insert(*ip), "{} has two peers", ip);
                    prop_assert!(mesh.contains_key(ip));
                }
            }
            for ip in core.encrypted() {
                prop_assert!(owned.contains(&ip), "{} is steered to nobody", ip);
            }
            for (ip, end) in &mesh {
                let in_scope = nodes || end.cluster != 1;
                prop_assert!(!strict || !in_scope || installed.steering.contains_key(ip));
                prop_assert!(in_scope || !installed.steering.contains_key(ip));
            }
        }
    }
}
