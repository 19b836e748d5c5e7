//! Answers.

use aya::maps::{HashMap, Map, MapData};
use ebpf_global_svc::abi::{
    CT_CLOSING, CtKey, CtValue, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, reason,
};

use crate::{
    BOTH, EGRESS, FAR, INGRESS, Node, ONE, OWN, PEER, TWO, any, at, far,
    frames::{ACK, FIN, GRE, RST, SYN, TCP, UDP, packet, tcp, udp},
    one, outside, two,
};

const SECOND: u64 = 1_000_000_000;

impl Node {
    /// Makes all flows older.
    fn age(&self, seconds: u64) {
        for (key, value) in self.datapath.flows().unwrap() {
            self.write(&key, &CtValue { expires: value.expires.saturating_sub(seconds * SECOND), ..value });
        }
    }

    fn write(&self, key: &CtKey, value: &CtValue) {
        let pin = self.root.path().join("maps/cm_ct");
        let map = Map::LruHashMap(MapData::from_pin(pin).unwrap());
        let mut map: HashMap<_, [u8; 44], [u8; 16]> = HashMap::try_from(map).unwrap();
        // SAFETY: plain data without padding, of the size that is named.
        let key: [u8; 44] = unsafe { std::mem::transmute(*key) };
        // SAFETY: the same.
        let value: [u8; 16] = unsafe { std::mem::transmute(*value) };
        map.insert(key, value, 0).unwrap();
    }

    /// Seconds that the one flow has left.
    fn left(&self) -> u64 {
        let flows = self.datapath.flows().unwrap();
        let [(_, value)] = flows[..] else { panic!("one flow: {flows:?}") };
        value.expires.saturating_sub(now()).div_ceil(SECOND)
    }
}

/// The kernel's monotonic clock.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place to write to.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    assert_eq!(done, 0);
    u64::try_from(time.tv_sec).unwrap() * SECOND + u64::try_from(time.tv_nsec).unwrap()
}

/// Pod one may send to pod two, and nothing else; nothing selects pod two.
fn node() -> Node {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, any(ONE, TWO, EGRESS));
    node
}

fn request(family: u8) -> Vec<u8> {
    packet(one(family), two(family), UDP, &udp(1000, 53))
}

fn answer(family: u8) -> Vec<u8> {
    packet(two(family), one(family), UDP, &udp(53, 1000))
}

#[test]
fn an_answer_passes_and_what_merely_looks_similar_does_not() {
    let node = node();
    for family in [4, 6] {
        assert_eq!(node.sends(&answer(family)), Err(reason::POLICY), "to no question");
        assert_eq!(node.sends(&request(family)), Ok(()));
        assert_eq!(node.sends(&answer(family)), Ok(()));
        for (from, to) in [(53, 1001), (54, 1000)] {
            let other = packet(two(family), one(family), UDP, &udp(from, to));
            assert_eq!(node.sends(&other), Err(reason::POLICY));
        }
        let other = packet(two(family), one(family), TCP, &tcp(53, 1000, ACK));
        assert_eq!(node.sends(&other), Err(reason::POLICY), "another protocol");
    }
    let flows = node.datapath.flows().unwrap();
    assert_eq!(flows.len(), 2);
    for (key, value) in flows {
        assert_eq!((key.direction, key.cluster, value.peer), (EGRESS, OWN, TWO));
        assert_eq!((key.local_port, key.remote_port), (1000_u16.to_be(), 53_u16.to_be()));
    }
}

#[test]
fn flows_know_the_cluster_of_the_other_end() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, any(ONE, 0, EGRESS));
    for (to, cluster) in [(far(4), PEER), (outside(4), 0), (two(4), OWN)] {
        assert_eq!(node.sends(&packet(one(4), to, UDP, &udp(1, 2))), Ok(()));
        let flows = node.datapath.flows().unwrap();
        assert!(flows.iter().any(|(key, _)| key.cluster == cluster), "{flows:?}");
    }
}

#[test]
fn answers_pass_until_the_flow_expires() {
    let node = node();
    assert_eq!(node.sends(&request(4)), Ok(()));
    assert_eq!(node.left(), 60);
    node.age(50);
    assert_eq!(node.sends(&answer(4)), Ok(()));
    assert!(node.left() <= 10, "an answer does not keep it alive");
    node.age(10);
    assert_eq!(node.sends(&answer(4)), Err(reason::POLICY));
    assert_eq!(node.sends(&request(4)), Ok(()), "it begins anew");
    assert_eq!(node.sends(&answer(4)), Ok(()));
}

#[test]
fn a_flow_is_written_only_when_half_of_its_time_is_over() {
    let node = node();
    assert_eq!(node.sends(&request(4)), Ok(()));
    node.age(20);
    assert_eq!(node.sends(&request(4)), Ok(()));
    assert_eq!(node.left(), 40);
    node.age(15);
    assert_eq!(node.sends(&request(4)), Ok(()));
    assert_eq!(node.left(), 60);
}

#[test]
fn tcp_lives_as_long_as_its_connection() {
    let node = node();
    let out = |flags| assert_eq!(node.sends(&packet(one(4), two(4), TCP, &tcp(1000, 80, flags))), Ok(()));
    let back = |flags| assert_eq!(node.sends(&packet(two(4), one(4), TCP, &tcp(80, 1000, flags))), Ok(()));
    out(SYN);
    assert_eq!(node.left(), 60);
    back(SYN | ACK);
    assert_eq!(node.left(), 60);
    out(ACK);
    assert_eq!(node.left(), 8000);
    out(FIN | ACK);
    back(ACK);
    assert_eq!(node.left(), 8000, "the other end may have more to say");
    back(FIN | ACK);
    assert_eq!(node.left(), 10);
    node.age(6);
    out(ACK);
    assert_eq!(node.left(), 10);
    assert_eq!(node.datapath.flows().unwrap()[0].1.flags & CT_CLOSING, CT_CLOSING);
    out(SYN);
    assert_eq!(node.left(), 60, "the ports are used again");
    assert_eq!(node.datapath.flows().unwrap()[0].1.flags, 0);
    out(ACK);
    back(RST);
    assert_eq!(node.left(), 10);
}

#[test]
fn a_connection_is_no_way_in_for_another_one() {
    let node = node();
    assert_eq!(node.sends(&packet(one(4), two(4), TCP, &tcp(1000, 80, SYN))), Ok(()));
    let syn = packet(two(4), one(4), TCP, &tcp(80, 1000, SYN));
    assert_eq!(node.sends(&syn), Err(reason::POLICY));
}

#[test]
fn a_reset_begins_nothing() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_INGRESS);
    assert_eq!(node.sends(&packet(one(4), two(4), TCP, &tcp(1000, 80, RST))), Ok(()));
    assert_eq!(node.datapath.flows().unwrap(), []);
}

#[test]
fn one_direction_needs_a_record_of_both() {
    // What the pod sends is free, so answers must come back.
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_INGRESS);
    assert_eq!(node.sends(&request(4)), Ok(()));
    assert_eq!(node.sends(&answer(4)), Ok(()));

    // What it answers must not let the next question in unasked.
    let (question, reply) =
        (packet(two(4), one(4), UDP, &udp(9, 80)), packet(one(4), two(4), UDP, &udp(80, 9)));
    node.allow(1, at(UDP, 80, any(ONE, TWO, INGRESS)));
    assert_eq!(node.sends(&question), Ok(()));
    assert_eq!(node.sends(&reply), Ok(()));
    node.tables.policy.remove(&[at(UDP, 80, any(ONE, TWO, INGRESS))]).unwrap();
    assert_eq!(node.sends(&question), Err(reason::POLICY));

    // The same the other way round.
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    assert_eq!(node.sends(&question), Ok(()));
    assert_eq!(node.sends(&reply), Ok(()));
    assert_eq!(node.sends(&request(4)), Err(reason::POLICY));
    assert_eq!(node.datapath.flows().unwrap().len(), 1);
}

#[test]
fn a_flow_ends_with_its_permission() {
    let mut node = node();
    assert_eq!(node.sends(&request(6)), Ok(()));
    assert_eq!(node.sends(&answer(6)), Ok(()));
    node.tables.policy.remove(&[any(ONE, TWO, EGRESS)]).unwrap();
    assert_eq!(node.sends(&answer(6)), Ok(()), "nobody has noticed");
    assert_eq!(node.sends(&request(6)), Err(reason::POLICY));
    assert_eq!(node.sends(&answer(6)), Err(reason::POLICY));
    assert_eq!(node.datapath.flows().unwrap(), []);
}

#[test]
fn protocols_without_ports_have_flows_too() {
    let mut node = node();
    node.allow(2, any(ONE, FAR, EGRESS));
    assert_eq!(node.sends(&packet(two(4), one(4), GRE, &[0; 8])), Err(reason::POLICY));
    assert_eq!(node.sends(&packet(one(4), two(4), GRE, &[0; 8])), Ok(()));
    assert_eq!(node.sends(&packet(two(4), one(4), GRE, &[0; 8])), Ok(()));
}
