//! Where the ports are, and what has none.

use ebpf_global_svc::Arrival;
use ebpf_global_svc::abi::{POLICY_PROTO_BITS, PolicyKey, reason, verdict};

use crate::{
    DROPPED, EGRESS, FAR, Node, ONE, TO_STACK, any, at,
    frames::{GRE, SCTP, SYN, TCP, UDP, frame, packet, packet_with, sctp, tcp, udp},
    of, pair,
    support::metric,
};

#[test]
fn ports_come_behind_ipv4_options() {
    let node = Node::with_dns();
    let (source, destination) = pair(4);
    for words in 1..=10_u8 {
        // No-operation, as often as it fits; a port of its own where the header would end without options.
        let options = [0, 1, 0, 2].repeat(words.into());
        let good = packet_with(source, destination, UDP, &options, &udp(1, 53));
        assert_eq!(node.sends(&good), Ok(()), "{words}");
        let bad = packet_with(source, destination, UDP, &[1, 0, 0, 53].repeat(words.into()), &udp(1, 2));
        assert_eq!(node.sends(&bad), Err(reason::POLICY), "{words}");
    }
}

#[test]
fn ports_come_behind_ipv6_extension_headers() {
    let node = Node::with_dns();
    let (source, destination) = pair(6);
    // Hop by hop (8 bytes), routing (24), destination options (16), an atomic fragment.
    let hop = |next| [&[next, 0, 1, 4][..], &[0; 4]].concat();
    let routing = |next| [&[next, 2, 4, 0][..], &[0; 20]].concat();
    let options = |next| [&[next, 1, 1, 12][..], &[0; 12]].concat();
    let atomic = |next| vec![next, 0, 0, 0, 1, 2, 3, 4];
    let chains: [(u8, Vec<u8>); 6] = [
        (0, hop(UDP)),
        (43, routing(UDP)),
        (60, options(UDP)),
        (44, atomic(UDP)),
        (0, [hop(60), options(43), routing(60), options(UDP)].concat()),
        (0, [hop(43), routing(44), atomic(60), options(UDP)].concat()),
    ];
    for (first, chain) in chains {
        for (port, expected) in [(53, Ok(())), (54, Err(reason::POLICY))] {
            let packet = packet_with(source, destination, first, &chain, &udp(1, port));
            assert_eq!(node.sends(&packet), expected, "{first} {chain:?}");
        }
    }
    let deepest = [hop(60), [options(60), options(60), options(60), options(60)].concat(), options(UDP)];
    let packet = packet_with(source, destination, 0, &deepest.concat(), &udp(1, 53));
    assert_eq!(node.sends(&packet), Ok(()), "six of them");
    let too_deep = [deepest[0].clone(), options(60), deepest[1].clone(), options(UDP)].concat();
    let packet = packet_with(source, destination, 0, &too_deep, &udp(1, 53));
    assert_eq!(node.sends(&packet), Err(reason::POLICY), "nobody looks behind seven");
    // No next header, and those that encrypt, are protocols of their own.
    for proto in [59, 50, 51] {
        let packet = packet_with(source, destination, 0, &hop(proto), &udp(1, 53));
        assert_eq!(node.sends(&packet), Err(reason::POLICY), "{proto}");
    }
}

#[test]
fn what_has_no_ports_needs_a_rule_without_ports() {
    let mut node = Node::with_dns();
    let (source, destination) = pair(4);
    let gre = packet(source, destination, GRE, &udp(53, 53));
    let unknown = packet(source, destination, 253, &udp(53, 53));
    node.allow(2, at(GRE, 53, any(ONE, FAR, EGRESS)));
    node.allow(2, at(GRE, 0, any(ONE, FAR, EGRESS)));
    assert_eq!(node.sends(&gre), Err(reason::POLICY), "what is where ports would be is none");
    node.allow(3, of(GRE, any(ONE, FAR, EGRESS)));
    assert_eq!(node.sends(&gre), Ok(()));
    assert_eq!(node.sends(&unknown), Err(reason::POLICY));
    node.allow(4, any(ONE, FAR, EGRESS));
    assert_eq!(node.sends(&unknown), Ok(()));
    // A range of ports does not hold all of them.
    let lower_half = PolicyKey { prefixlen: POLICY_PROTO_BITS + 1, ..of(253, any(ONE, FAR, EGRESS)) };
    node.deny(5, lower_half);
    assert_eq!(node.sends(&unknown), Ok(()));
    node.deny(6, of(253, any(ONE, FAR, EGRESS)));
    assert_eq!(node.sends(&unknown), Err(reason::POLICY_DENY));
}

#[test]
fn what_is_cut_off_is_dropped_where_a_policy_selects() {
    let mut node = Node::with_dns();
    node.allow(2, any(ONE, 0, EGRESS));
    let whole = [(UDP, udp(1, 53), 4), (TCP, tcp(1, 53, SYN), 14), (SCTP, sctp(1, 53), 4)];
    for family in [4, 6] {
        let (source, destination) = pair(family);
        let icmp = (if family == 4 { 1 } else { 58 }, vec![8, 0, 0, 0, 0, 1, 0, 1], 8);
        for (proto, payload, needed) in whole.iter().cloned().chain([icmp]) {
            for length in 0..=needed {
                let packet = packet(source, destination, proto, &payload[..length]);
                let expected = if length < needed { Err(reason::INVALID_PACKET) } else { Ok(()) };
                assert_eq!(node.sends(&packet), expected, "{length} bytes of {proto}");
            }
        }
    }
    let (source, destination) = pair(6);
    for (first, header) in [(0, &[UDP][..]), (44, &[UDP, 0, 0, 0, 0, 0, 0])] {
        let packet = packet_with(source, destination, first, header, &[]);
        assert_eq!(node.sends(&packet), Err(reason::INVALID_PACKET), "a header of {first}");
    }
    let (source, destination) = pair(4);
    let mut options = packet_with(source, destination, UDP, &[1; 8], &[]);
    options[0] = 0x4f;
    assert_eq!(node.sends(&options), Err(reason::INVALID_PACKET), "options beyond the end");
    assert!(node.count(ONE, EGRESS, 0, verdict::DENIED) > 0);
    node.flag(ONE, 0);
    assert_eq!(node.sends(&options), Ok(()), "others decide for themselves");
}

#[test]
fn a_frame_with_a_vlan_tag_is_the_stacks() {
    let node = Node::with_dns();
    let (source, destination) = pair(4);
    let mut tagged = frame(&packet(source, destination, UDP, &udp(1, 2)));
    tagged.splice(12..12, [0x81, 0x00, 0, 7]);
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    let before = metric(&node.datapath, reason::TO_STACK);
    let trial = node.try_frame("cm_from_pod", &tagged, arrival, 1);
    assert_eq!(
        trial.verdict, TO_STACK,
        "which has no such VLAN: it is not sent to the overlay, nor to a pod"
    );
    assert_eq!(metric(&node.datapath, reason::TO_STACK), before + 1);
    // Without its tag it is what it is.
    tagged.drain(12..16);
    let trial = node.try_frame("cm_from_pod", &tagged, arrival, 1);
    assert_eq!(trial.verdict, DROPPED);
}
