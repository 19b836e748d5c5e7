//! Single rules, and then a mesh of nodes in virtual time: agents start again, keys change, announcements come late and
//! hellos are lost, and no packet is lost or in clear.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use proptest::prelude::*;

use super::super::old::{MAX, QUIET};
use super::*;
use crate::tunnels::TunnelEnd;

/// Agrees without computing anything; as one-sided as the real one.
struct Fake(u8);

impl Agree for Fake {
    fn public(&self) -> IpsecKey {
        key(self.0)
    }

    fn pair(&self, peer: &IpsecKey, here: IpAddr, there: IpAddr) -> Option<Pair> {
        let derive = |(sender, source): (IpsecKey, IpAddr), (receiver, destination): (IpsecKey, IpAddr)| {
            let mut hasher = DefaultHasher::new();
            (sender, receiver, source, destination).hash(&mut hasher);
            let hash = hasher.finish();
            let mut bytes = [0; 36];
            bytes[..8].copy_from_slice(&hash.to_be_bytes());
            let spi = u32::try_from(hash >> 32).unwrap() | 0x100;
            Association { id: StateId { source, destination, spi }, key: bytes }
        };
        (*peer != key(BAD)).then(|| Pair {
            out: derive((self.public(), here), (*peer, there)),
            back: derive((*peer, there), (self.public(), here)),
        })
    }
}

/// Of small order, as it were.
const BAD: u8 = 255;

fn key(byte: u8) -> IpsecKey {
    IpsecKey::new([byte; 32]).unwrap()
}

fn ip(cluster: u8, node: u8) -> IpAddr {
    [0xfd00, 0, 0, 0, 0, 0, cluster.into(), node.into()].into()
}

fn end(cluster: u8, node: u8, ipsec: Option<u8>) -> (IpAddr, Option<TunnelEnd>) {
    let tunnel_ip = Some(ip(cluster, node));
    let known = EndNode { name: format!("node{node}"), tunnel_ip, key: None, ipsec: ipsec.map(key) };
    (ip(cluster, node), Some(TunnelEnd { cluster: cluster.into(), node: Some(known) }))
}

fn unconfirmed(cluster: u8, node: u8) -> (IpAddr, Option<TunnelEnd>) {
    (ip(cluster, node), Some(TunnelEnd { cluster: cluster.into(), node: None }))
}

/// Of node 1 of cluster 1, with key 11.
fn core(scope: Scope, strict: bool, installed: Installed) -> Core {
    core_of((1, 1), 11, (scope, strict, false), installed)
}

fn core_of(
    (cluster, node): (u8, u8),
    byte: u8,
    (scope, strict, wireguard): (Scope, bool, bool),
    installed: Installed,
) -> Core {
    let own = Own { cluster: cluster.into(), node: format!("node{node}"), ip: ip(cluster, node) };
    Core::new(own, Box::new(Fake(byte)), scope, strict, wireguard, installed)
}

fn carry_out(core: &mut Core) -> Vec<Step> {
    let steps = core.plan();
    steps.iter().for_each(|step| core.done(step));
    assert_eq!(core.plan(), [], "nothing is left to do");
    steps
}

/// What node 1 and another one agree on.
fn pair(core: &Core, peer: u8, there: IpAddr) -> (StateId, StateId) {
    let pair = core.agree.pair(&key(peer), core.own.ip, there).unwrap();
    (pair.out.id, pair.back.id)
}

/// So many packets have come by an association by now.
fn heard(core: &mut Core, id: StateId, packets: u64) {
    let mut installed = core.installed().clone();
    installed.states.get_mut(&id).unwrap().packets = packets;
    core.observe(installed);
}

fn wait(core: &mut Core, span: Duration) {
    core.pass(core.now + span);
    core.observe(core.installed().clone());
}

#[test]
fn packets_move_once_the_other_end_was_heard_and_never_back() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(1, 1, Some(11)), end(2, 1, Some(21)), end(1, 2, Some(12))]);
    let (out, back) = pair(&core, 21, ip(2, 1));
    let kinds = |steps: &[Step]| -> Vec<_> {
        let kind = |step: &Step| match step {
            Step::Add { association, inbound } => format!("{} {inbound}", association.id.spi),
            other => format!("{other:?}"),
        };
        steps.iter().map(kind).collect()
    };
    let steps = carry_out(&mut core);
    let greet = format!("{:?}", Step::Greet(ip(2, 1), Some(out.spi)));
    assert_eq!(kinds(&steps), [format!("{} true", back.spi), format!("{} false", out.spi), greet]);
    assert_eq!(core.hellos(), [Hello { to: ip(2, 1), asks: true }]);
    heard(&mut core, back, 1);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Way::Encrypted(out.spi)))]);
    assert_eq!((core.hellos(), core.waits()), (vec![], (false, false)));
    // It asks because it has not heard us; once is enough.
    core.asked(ip(2, 1));
    core.asked(ip(9, 9));
    assert_eq!((core.hellos(), core.hellos()), (vec![Hello { to: ip(2, 1), asks: false }], vec![]));

    // It has started again. What it sent by before is taken in until nothing comes by it.
    core.apply(vec![end(2, 1, Some(22))]);
    let (new, new_back) = pair(&core, 22, ip(2, 1));
    assert_eq!(carry_out(&mut core).len(), 3);
    assert_eq!(core.behind(), [ip(2, 1)].into());
    wait(&mut core, QUIET * 10);
    assert_eq!(carry_out(&mut core), [], "it was not heard, so it may not know of us");
    heard(&mut core, new_back, 1);
    assert_eq!(carry_out(&mut core)[0], Step::Steer(ip(2, 1), Some(Way::Encrypted(new.spi))));
    wait(&mut core, QUIET - Duration::from_secs(1));
    heard(&mut core, back, 2);
    wait(&mut core, QUIET - Duration::from_secs(1));
    assert!(core.installed().states.contains_key(&back));
    wait(&mut core, Duration::from_secs(1));
    carry_out(&mut core);
    assert_eq!(core.installed().states.keys().copied().collect::<BTreeSet<_>>(), [new, new_back].into());

    // It does not encrypt any more.
    core.apply(vec![end(2, 1, None)]);
    assert_eq!(carry_out(&mut core), [Step::Greet(ip(2, 1), None), Step::Steer(ip(2, 1), None)]);
    wait(&mut core, QUIET);
    assert_eq!(carry_out(&mut core).len(), 2);
    assert_eq!(*core.installed(), Installed::default());
}

#[test]
fn strict_nodes_speak_in_clear_to_nobody_in_scope() {
    let mut core = core(Scope::Nodes, true, Installed::default());
    core.apply(vec![
        end(1, 1, Some(11)),
        end(2, 1, Some(21)),
        end(1, 2, None),
        unconfirmed(3, 1),
        end(3, 2, Some(BAD)),
    ]);
    carry_out(&mut core);
    let blocked: BTreeMap<_, _> =
        [ip(2, 1), ip(1, 2), ip(3, 1), ip(3, 2)].map(|ip| (ip, Way::Blocked)).into();
    assert_eq!(core.installed().ways, blocked);
    assert!(core.is_bad(ip(3, 2)) && !core.is_bad(ip(2, 1)));
    let (out, back) = pair(&core, 21, ip(2, 1));
    heard(&mut core, back, 1);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Way::Encrypted(out.spi)))]);
    core.apply(vec![end(2, 1, None)]);
    // In one step from the one to the other.
    assert!(carry_out(&mut core).contains(&Step::Steer(ip(2, 1), Some(Way::Blocked))));
}

/// AES-GCM must not see a key and a counter twice.
#[test]
fn an_association_is_installed_once_and_then_a_new_key_is_needed() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(21))]);
    carry_out(&mut core);
    let (out, back) = pair(&core, 21, ip(2, 1));
    heard(&mut core, back, 1);
    carry_out(&mut core);
    assert!(!core.needs_key());
    // Somebody has flushed all states.
    let without = Installed { states: BTreeMap::new(), ..core.installed().clone() };
    core.observe(without);
    assert_eq!(core.plan(), [Step::Greet(ip(2, 1), None)]);
    assert!(core.needs_key());
    assert_eq!(core.installed().ways[&ip(2, 1)], Way::Encrypted(out.spi), "dropped, and not in clear");
    core.rotate(Box::new(Fake(12)));
    carry_out(&mut core);
    assert!(!core.needs_key() && core.installed().states.len() == 2);

    // A node comes back with the key that it had.
    core.apply(vec![(ip(2, 1), None)]);
    wait(&mut core, QUIET);
    carry_out(&mut core);
    assert!(core.installed().states.is_empty());
    core.apply(vec![end(2, 1, Some(21))]);
    assert!(core.plan().is_empty() && core.needs_key());
    core.rotate(Box::new(Fake(13)));
    assert!(!carry_out(&mut core).is_empty() && !core.needs_key());
    // And another program has an SPI.
    core.rotate(Box::new(Fake(14)));
    core.taken(pair(&core, 21, ip(2, 1)).0);
    assert!(core.needs_key());
}

#[test]
fn an_spi_is_one_nodes() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    core.apply(vec![end(2, 1, Some(21)), end(3, 1, Some(31))]);
    let (_, back) = pair(&core, 31, ip(3, 1));
    // Somebody at 172.31.9.9 has it already.
    let other = StateId { source: ip(9, 9), ..back };
    core.observe(Installed { states: [(other, StateUse::default())].into(), ..Installed::default() });
    let added = |steps: &[Step]| steps.iter().filter(|step| matches!(step, Step::Add { .. })).count();
    assert_eq!(added(&core.plan()), 3);
    assert!(core.needs_key());
    core.rotate(Box::new(Fake(12)));
    assert_eq!(added(&core.plan()), 4);
}

#[test]
fn what_an_earlier_life_installed_stays_until_the_new_is_there() {
    let mut before = core(Scope::Clusters, true, Installed::default());
    before.apply(vec![end(2, 1, Some(21))]);
    carry_out(&mut before);
    let (old, old_back) = pair(&before, 21, ip(2, 1));
    heard(&mut before, old_back, 5);
    carry_out(&mut before);

    let mut core = core_of((1, 1), 12, (Scope::Clusters, true, false), before.installed().clone());
    core.apply(vec![unconfirmed(2, 1)]);
    wait(&mut core, QUIET * 3);
    assert_eq!(carry_out(&mut core), [Step::Greet(ip(2, 1), None)]);
    core.apply(vec![end(2, 1, Some(21))]);
    carry_out(&mut core);
    assert_eq!(core.encrypted(), [ip(2, 1)].into());
    assert_eq!(core.installed().ways[&ip(2, 1)], Way::Encrypted(old.spi));
    let (new, new_back) = pair(&core, 21, ip(2, 1));
    heard(&mut core, new_back, 1);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Way::Encrypted(new.spi)))]);
}

#[test]
fn an_agent_that_starts_again_and_again_fills_nothing() {
    let mut installed = Installed::default();
    for byte in 30..50 {
        let mut core = core_of((1, 1), byte, (Scope::Clusters, false, false), installed);
        core.apply(vec![end(2, 1, Some(21))]);
        carry_out(&mut core);
        installed = core.installed().clone();
        assert!(installed.states.len() <= 2 * (MAX + 1), "{}", installed.states.len());
    }
}

#[test]
fn wireguard_takes_over_before_ipsec_ends() {
    let mut core = core_of((1, 1), 11, (Scope::Clusters, true, true), Installed::default());
    let with_wireguard = |ipsec| {
        let (ip, end) = end(2, 1, ipsec);
        let mut end = end.unwrap();
        end.node.as_mut().unwrap().key = clustermesh_kvstore::record::WireguardKey::new([7; 32]);
        vec![(ip, Some(end))]
    };
    core.apply(with_wireguard(None));
    carry_out(&mut core);
    assert_eq!(core.installed().ways[&ip(2, 1)], Way::Blocked);
    core.set_wireguard(&[ip(2, 1)].into());
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), None)], "by WireGuard");
    core.apply(with_wireguard(Some(21)));
    carry_out(&mut core);
    let (out, back) = pair(&core, 21, ip(2, 1));
    heard(&mut core, back, 1);
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), Some(Way::Encrypted(out.spi)))]);
    assert_eq!(core.kept(), [ip(2, 1)].into());
    core.set_wireguard(&BTreeSet::new());
    assert_eq!(carry_out(&mut core), []);

    core.apply(with_wireguard(None));
    assert_eq!(core.kept(), BTreeSet::new(), "WireGuard's turn");
    carry_out(&mut core);
    assert_eq!(core.encrypted(), [ip(2, 1)].into(), "not before WireGuard has it");
    let mut left = core_of((1, 1), 12, (Scope::Clusters, true, true), core.installed().clone());
    core.set_wireguard(&[ip(2, 1)].into());
    assert_eq!(carry_out(&mut core), [Step::Steer(ip(2, 1), None)]);
    // Unless that never answers.
    left.apply(with_wireguard(None));
    wait(&mut left, HANDOVER);
    assert!(carry_out(&mut left).contains(&Step::Steer(ip(2, 1), Some(Way::Blocked))));
}

/// A node whose tunnels' address is another's cannot be spoken to.
#[test]
fn all_addresses_of_a_node_are_agreed_on_up_to_a_few() {
    let mut core = core(Scope::Clusters, false, Installed::default());
    let of_node = |last: u8| {
        let (_, end) = end(2, 1, Some(21));
        (ip(2, last), end)
    };
    core.apply((2..12).map(of_node).collect());
    assert_eq!(core.plan(), []);
    core.apply(vec![of_node(1), (ip(1, 9), end(1, 1, Some(11)).1)]);
    carry_out(&mut core);
    // To four of its addresses; from its tunnels' one to both of ours.
    let to_us = core.installed().states.keys().filter(|id| id.source == ip(2, 1)).count();
    assert_eq!((core.installed().states.len(), to_us), (ADDRESSES + 2, 2));
    let (_, back) = pair(&core, 21, ip(2, 1));
    heard(&mut core, back, 1);
    carry_out(&mut core);
    assert_eq!(core.encrypted().len(), ADDRESSES);
}

/// Nodes that are all of different clusters, and what is between them.
struct World {
    nodes: Vec<Member>,
    strict: bool,
    next_key: u8,
    now: Duration,
    /// Pairs that have been encrypted to.
    sealed: BTreeSet<(usize, usize)>,
}

struct Member {
    core: Core,
    kernel: Installed,
    announced: u8,
    /// It has since it was told something.
    looked: bool,
    /// What it knows of each other one.
    known: Vec<Option<u8>>,
}

fn at(index: usize) -> (u8, u8) {
    (u8::try_from(index).unwrap() + 1, 1)
}

fn address(index: usize) -> IpAddr {
    let (cluster, node) = at(index);
    ip(cluster, node)
}

impl World {
    fn new(count: usize, strict: bool) -> Self {
        let nodes = (0..count).map(|index| {
            let byte = u8::try_from(index).unwrap() + 1;
            let core = core_of(at(index), byte, (Scope::Clusters, strict, false), Installed::default());
            Member {
                core,
                kernel: Installed::default(),
                announced: byte,
                looked: false,
                known: vec![None; count],
            }
        });
        let nodes = nodes.collect();
        Self { nodes, strict, next_key: 100, now: Duration::ZERO, sealed: BTreeSet::new() }
    }

    /// Whether a node can have one more key without anybody's forgetting one that is in use.
    fn has_room(&self, node: usize) -> bool {
        let mut counts: BTreeMap<_, usize> = BTreeMap::new();
        let ids = self.nodes.iter().flat_map(|member| member.kernel.states.keys());
        let touched = ids.filter(|id| [id.source, id.destination].contains(&address(node)));
        touched.for_each(|id| *counts.entry((id.source, id.destination)).or_default() += 1);
        // Both ends have them.
        counts.values().all(|count| count / 2 < MAX)
    }

    fn key(&mut self) -> u8 {
        self.next_key += 1;
        // Short of the bad one.
        assert!(self.next_key < BAD);
        self.next_key
    }

    /// Node `of` hears what `from` has announced.
    fn tell(&mut self, of: usize, from: usize) {
        if of != from {
            let announced = self.nodes[from].announced;
            self.nodes[of].known[from] = Some(announced);
            self.nodes[of].looked = false;
            let (cluster, node) = at(from);
            self.nodes[of].core.apply(vec![end(cluster, node, Some(announced))]);
        }
    }

    /// One node looks at its kernel, and does what is to be done; of its hellos those arrive that `arrives` lets.
    fn look(&mut self, index: usize, arrives: bool) {
        let node = &mut self.nodes[index];
        node.core.pass(self.now);
        node.core.observe(node.kernel.clone());
        carry_out(&mut node.core);
        node.kernel.clone_from(node.core.installed());
        node.looked = true;
        for hello in node.core.hellos() {
            let spi = self.nodes[index].kernel.hellos[&hello.to];
            if arrives {
                self.arrive(index, hello, spi);
            }
        }
    }

    fn arrive(&mut self, from: usize, hello: Hello, spi: u32) {
        let Some(to) = (0..self.nodes.len()).find(|index| address(*index) == hello.to) else { return };
        let id = StateId { source: address(from), destination: hello.to, spi };
        if self.receive(to, id) && hello.asks {
            self.nodes[to].core.asked(address(from));
        }
    }

    /// Whether the kernel of a node takes it in.
    fn receive(&mut self, to: usize, id: StateId) -> bool {
        let state = self.nodes[to].kernel.states.get_mut(&id);
        state.is_some_and(|state| {
            state.packets += 1;
            true
        })
    }

    /// A pod's packet from each node to each other one.
    fn traffic(&mut self) -> Result<(), TestCaseError> {
        for from in 0..self.nodes.len() {
            for to in (0..self.nodes.len()).filter(|to| *to != from) {
                let kernel = &self.nodes[from].kernel;
                let way = kernel.ways.get(&address(to)).copied();
                match way {
                    Some(Way::Encrypted(spi)) => {
                        let id = StateId { source: address(from), destination: address(to), spi };
                        prop_assert!(kernel.states.contains_key(&id), "nothing to send {:?} by", id);
                        prop_assert!(self.receive(to, id), "{:?} is lost", id);
                        self.sealed.insert((from, to));
                    }
                    way => {
                        prop_assert!(
                            !self.sealed.contains(&(from, to)),
                            "{} > {} went back to {:?}",
                            from,
                            to,
                            way
                        );
                        let is_known = self.nodes[from].known[to].is_some();
                        let may_be_clear = !self.strict || !is_known || !self.nodes[from].looked;
                        prop_assert!(may_be_clear || way == Some(Way::Blocked));
                    }
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Event {
    /// A node hears what another one has announced.
    Tell(usize, usize),
    /// A node looks at its kernel; its hellos arrive or are lost.
    Look(usize, bool),
    /// An agent is killed and starts again: it knows addresses at first, and has a new key.
    Restart(usize),
    Rotate(usize),
    /// Seconds pass, in which nobody looks.
    Wait(u64),
}

const NODES: usize = 3;

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => (0..NODES, 0..NODES).prop_map(|(of, from)| Event::Tell(of, from)),
        8 => (0..NODES, any::<bool>()).prop_map(|(node, arrives)| Event::Look(node, arrives)),
        1 => (0..NODES).prop_map(Event::Restart),
        1 => (0..NODES).prop_map(Event::Rotate),
        2 => (1..40_u64).prop_map(Event::Wait),
    ];
    proptest::collection::vec(event, 1..120)
}

proptest! {
    /// Whatever happens in whatever order: no packet is lost or goes back into clear text, and once everybody hears of
    /// everybody all is encrypted, by the newest keys only.
    #[test]
    fn nothing_is_lost_and_nothing_goes_back_into_clear_text(events in events(), strict: bool) {
        let mut world = World::new(NODES, strict);
        for event in events {
            match event {
                Event::Tell(of, from) => world.tell(of, from),
                Event::Look(node, arrives) => world.look(node, arrives),
                Event::Restart(node) | Event::Rotate(node) if !world.has_room(node) => {}
                Event::Restart(node) => {
                    let byte = world.key();
                    let installed = world.nodes[node].kernel.clone();
                    let mut core = core_of(at(node), byte, (Scope::Clusters, strict, false), installed);
                    core.pass(world.now);
                    let known: Vec<_> = (0..NODES).filter(|other| world.nodes[node].known[*other].is_some()).collect();
                    core.apply(known.into_iter().map(|other| unconfirmed(at(other).0, at(other).1)).collect());
                    world.nodes[node].core = core;
                    world.look(node, false);
                    world.nodes[node].announced = byte;
                }
                Event::Rotate(node) => {
                    let byte = world.key();
                    world.nodes[node].core.rotate(Box::new(Fake(byte)));
                    world.look(node, false);
                    world.nodes[node].announced = byte;
                }
                Event::Wait(seconds) => world.now += Duration::from_secs(seconds),
            }
            world.traffic()?;
        }
        // All is well from now on.
        for round in 0..8 {
            for node in 0..NODES {
                if round == 0 {
                    (0..NODES).for_each(|from| world.tell(node, from));
                }
                world.look(node, true);
                world.traffic()?;
            }
            world.now += ASK;
        }
        world.now += QUIET;
        (0..NODES).for_each(|node| world.look(node, true));
        for node in &world.nodes {
            prop_assert_eq!(node.kernel.states.len(), 2 * (NODES - 1));
            prop_assert_eq!(node.core.encrypted().len(), NODES - 1);
            prop_assert!(node.core.behind().is_empty() && !node.core.has_old() && !node.core.needs_key());
        }
    }
}
