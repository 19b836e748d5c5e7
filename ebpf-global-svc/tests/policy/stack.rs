//! What the node's stack delivers to a pod, and what our programs leave to it.

use std::net::IpAddr;

use ebpf_global_svc::{
    Arrival,
    abi::{ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, ENDPOINT_VIA_STACK, identity, reason},
};

use crate::{
    BOTH, EGRESS, FAR, INGRESS, LEFT, Node, ONE, PEER_NODE, THIS_NODE, TO_STACK, TWO, address, any, at, far,
    frames::{UDP, icmp, packet, udp},
    one, outside,
    support::prefix_key,
    two,
};

/// Some interface that is not the pod's.
const ELSEWHERE: u32 = 1;

/// As [`ONE`] would be in a mark, under kube-proxy's bits.
const MARK_OF_TWO: u32 = 0x0002_0f01;

/// Pod one has a policy for what it receives.
fn node() -> Node {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_INGRESS);
    node
}

impl Node {
    fn gets(&self, packet: &[u8], ingress_ifindex: u32, mark: u32) -> Result<(), u8> {
        let arrival = Arrival { ifindex: self.pod_ifindex, ingress_ifindex, mark };
        let outcome = self.outcome("cm_to_pod", packet, arrival);
        if outcome.is_ok() {
            assert_eq!(self.try_out("cm_to_pod", packet, arrival).verdict, LEFT, "others have a say");
        }
        outcome
    }
}

fn from(ip: impl Into<IpAddr>) -> Vec<u8> {
    let ip = ip.into();
    packet(ip, one(if ip.is_ipv4() { 4 } else { 6 }), UDP, &udp(1000, 53))
}

#[test]
fn what_this_node_sends_is_the_hosts() {
    let mut node = node();
    // Also from addresses that would be somebody else's if they came in.
    let own = [THIS_NODE.into(), address(1, 254, 4), outside(4), address(1, 254, 6), outside(6)];
    for ip in own {
        assert_eq!(node.gets(&from(ip), 0, 0), Err(reason::POLICY), "{ip}");
    }
    node.allow(1, any(ONE, identity::HOST, INGRESS));
    for ip in own {
        assert_eq!(node.gets(&from(ip), 0, 0), Ok(()), "{ip}");
    }
    assert_eq!(node.gets(&from(THIS_NODE), ELSEWHERE, 0), Ok(()), "masqueraded");
    assert_eq!(node.gets(&from(outside(4)), ELSEWHERE, 0), Err(reason::POLICY));
    assert_eq!(node.gets(&from(PEER_NODE), ELSEWHERE, 0), Err(reason::POLICY));
}

#[test]
fn what_this_node_routes_is_known_by_address() {
    let mut node = node();
    node.tables.cidr.upsert(&[(prefix_key("1.1.0.0".parse().unwrap(), 16), identity::FIRST_CIDR)]).unwrap();
    let rows = [
        (IpAddr::from(PEER_NODE), identity::REMOTE_NODE),
        (outside(4), identity::FIRST_CIDR),
        (outside(6), identity::WORLD),
    ];
    for (ip, peer) in rows {
        assert_eq!(node.gets(&from(ip), ELSEWHERE, 0), Err(reason::POLICY));
        node.allow(1, any(ONE, peer, INGRESS));
        assert_eq!(node.gets(&from(ip), ELSEWHERE, 0), Ok(()));
        node.tables.policy.remove(&[any(ONE, peer, INGRESS)]).unwrap();
    }
}

#[test]
fn an_address_of_the_mesh_counts_for_nothing_without_a_mark() {
    let mut node = node();
    for peer in [0, FAR, TWO, identity::WORLD, identity::HOST] {
        node.allow(1, any(ONE, peer, INGRESS));
    }
    for ip in [far(4), far(6), two(4), address(1, 77, 4)] {
        assert_eq!(node.gets(&from(ip), ELSEWHERE, 0), Err(reason::UNKNOWN_IDENTITY), "{ip}");
        assert_eq!(node.gets(&from(ip), ELSEWHERE, 0x4000), Err(reason::UNKNOWN_IDENTITY), "others' mark");
    }
}

#[test]
fn a_mark_of_ours_names_the_sender() {
    let mut node = node();
    node.allow(1, any(ONE, TWO, INGRESS));
    for kube_proxys in [0, 0x4000, 0xc000] {
        assert_eq!(node.gets(&from(two(4)), ELSEWHERE, MARK_OF_TWO | kube_proxys), Ok(()));
    }
    assert_eq!(node.gets(&from(two(4)), ELSEWHERE, 0x0003_0f01), Err(reason::POLICY), "somebody else");
    assert_eq!(node.gets(&from(two(4)), ELSEWHERE, 0x0009_0f02), Err(reason::POLICY), "pod far");
    node.allow(2, any(ONE, FAR, INGRESS));
    assert_eq!(node.gets(&from(two(4)), ELSEWHERE, 0x0009_0f02), Ok(()));
    // What came through the overlay for the world may be in a range of it.
    let world_mark = 0x0002_0f00;
    node.allow(3, any(ONE, identity::WORLD, INGRESS));
    assert_eq!(node.gets(&from(outside(4)), ELSEWHERE, world_mark), Ok(()));
    node.tables.cidr.upsert(&[(prefix_key("1.1.0.0".parse().unwrap(), 16), identity::FIRST_CIDR)]).unwrap();
    assert_eq!(node.gets(&from(outside(4)), ELSEWHERE, world_mark), Err(reason::POLICY));
}

#[test]
fn a_pod_behind_the_stack_is_asked_there() {
    let mut node = Node::new();
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    let request = packet(one(4), two(4), UDP, &udp(1000, 53));

    node.flag(TWO, ENDPOINT_VIA_STACK);
    let trial = node.try_out("cm_from_pod", &request, arrival);
    assert_eq!((trial.verdict, trial.mark), (TO_STACK, 0), "no policy, no mark");

    node.flag(TWO, ENDPOINT_VIA_STACK | ENDPOINT_ENFORCE_INGRESS);
    let trial = node.try_out("cm_from_pod", &request, Arrival { mark: 0x4000, ..arrival });
    assert_eq!((trial.verdict, trial.mark), (TO_STACK, 0x0001_4f01));
    assert_eq!(node.datapath.verdicts().unwrap(), [], "nobody has decided");
    let after = Arrival { ingress_ifindex: ELSEWHERE, mark: trial.mark, ..arrival };
    assert_eq!(node.outcome("cm_to_pod", &request, after), Err(reason::POLICY));
    node.allow(1, any(TWO, ONE, INGRESS));
    assert_eq!(node.outcome("cm_to_pod", &request, after), Ok(()));

    // The sender's own policy comes first.
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    assert_eq!(node.sends(&request), Err(reason::POLICY));
}

#[test]
fn a_pod_cannot_bring_a_mark() {
    let node = Node::new();
    let forged = Arrival { ifindex: node.pod_ifindex, mark: 0x0009_4f02, ..Arrival::default() };
    let trial = node.try_out("cm_from_pod", &packet(one(4), outside(4), UDP, &udp(1, 2)), forged);
    assert_eq!((trial.verdict, trial.mark), (TO_STACK, 0x4000), "only what looks like ours goes");
    let others = Arrival { mark: 0x4000, ..forged };
    let trial = node.try_out("cm_from_pod", &packet(one(4), outside(4), UDP, &udp(1, 2)), others);
    assert_eq!(trial.mark, 0x4000);
}

#[test]
fn answers_come_back_through_the_stack() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, any(ONE, identity::HOST, EGRESS));
    node.allow(2, any(ONE, identity::WORLD, EGRESS));
    for ip in [IpAddr::from(THIS_NODE), outside(4), outside(6)] {
        let source = one(if ip.is_ipv4() { 4 } else { 6 });
        let answer = packet(ip, source, UDP, &udp(53, 1000));
        assert_eq!(node.gets(&answer, ELSEWHERE, 0), Err(reason::POLICY));
        assert_eq!(node.sends(&packet(source, ip, UDP, &udp(1000, 53))), Ok(()));
        assert_eq!(node.gets(&answer, ELSEWHERE, 0), Ok(()));
    }
}

#[test]
fn what_is_no_pods_passes() {
    let mut node = node();
    assert_eq!(node.gets(&packet(outside(4), two(4), UDP, &udp(1, 2)), ELSEWHERE, 0), Ok(()), "no policy");
    let stranger = packet(outside(4), address(1, 77, 4), UDP, &udp(1, 2));
    assert_eq!(node.gets(&stranger, ELSEWHERE, 0), Ok(()));
    let multicast = packet("fe80::1".parse().unwrap(), "ff02::1".parse().unwrap(), UDP, &udp(1, 2));
    assert_eq!(node.gets(&multicast, 0, 0), Ok(()));
    let mut malformed = from(outside(4));
    malformed[0] = 0x44;
    assert_eq!(node.gets(&malformed, 0, 0), Err(reason::INVALID_PACKET));
    let mut arp = vec![2, 0, 0, 0, 0, 0xbb, 2, 0, 0, 0, 0, 0xaa, 0x08, 0x06];
    arp.extend([0; 28]);
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    let trial = node.try_frame("cm_to_pod", &arp, arrival, 1);
    assert_eq!(trial.verdict, LEFT);

    // The node asks whether its neighbour is still there.
    let ask = packet("fe80::1".parse().unwrap(), one(6), 58, &icmp(135, 0, 0));
    assert_eq!(node.gets(&ask, 0, 0), Ok(()));
    assert_eq!(node.gets(&ask, ELSEWHERE, 0), Err(reason::POLICY), "nobody else does");
    node.allow(1, at(58, 128, any(ONE, identity::HOST, INGRESS)));
    assert_eq!(node.gets(&packet(outside(6), one(6), 58, &icmp(128, 0, 1)), 0, 0), Ok(()));
}
