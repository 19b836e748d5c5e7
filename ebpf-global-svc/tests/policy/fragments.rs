//! Packets in pieces.

use ebpf_global_svc::abi::reason;

use crate::{
    BOTH, EGRESS, Node, ONE, any, at, far,
    frames::{GRE, SYN, TCP, UDP, echo_types, fragment, icmp, icmp_proto, packet_with, tcp, udp},
    of, one, pair, two,
};

#[test]
fn later_fragments_go_with_the_first() {
    let node = Node::with_dns();
    for family in [4, 6] {
        for (id, port, expected) in [(1, 53, Ok(())), (2, 54, Err(reason::POLICY))] {
            let first = fragment(pair(family), UDP, id, (0, true), &udp(1, port));
            // Whatever is where ports would be.
            let middle = fragment(pair(family), UDP, id, (8, true), &udp(53, 53));
            let last = fragment(pair(family), UDP, id, (16, false), &udp(54, 54));
            for packet in [&first, &middle, &last, &middle] {
                assert_eq!(node.sends(packet), expected, "{family} {id}");
            }
        }
    }
}

#[test]
fn later_fragments_that_come_first_are_dropped() {
    let node = Node::with_dns();
    for family in [4, 6] {
        let later = fragment(pair(family), UDP, 7, (8, false), &udp(53, 53));
        assert_eq!(node.sends(&later), Err(reason::FRAGMENT_NOT_FOUND));
        let first = |id| fragment(pair(family), UDP, id, (0, true), &udp(1, 53));
        assert_eq!(node.sends(&first(8)), Ok(()));
        assert_eq!(node.sends(&later), Err(reason::FRAGMENT_NOT_FOUND), "another packet's");
        assert_eq!(node.sends(&first(7)), Ok(()));
        assert_eq!(node.sends(&later), Ok(()), "sent again, it passes");
        let other = fragment((two(family), far(family)), UDP, 7, (8, false), &[0; 8]);
        assert_eq!(node.sends(&other), Ok(()), "no policy selects its sender");
    }
    let other_proto = fragment(pair(4), TCP, 7, (8, false), &[0; 16]);
    assert_eq!(node.sends(&other_proto), Err(reason::FRAGMENT_NOT_FOUND));
}

#[test]
fn fragments_are_followed_behind_extension_headers() {
    let node = Node::with_dns();
    let (source, destination) = pair(6);
    let chained = |offset: u16, more: u16, tail: &[u8]| {
        let fragment = [&[60, 0][..], &(offset | more).to_be_bytes(), &[1, 2, 3, 4]].concat();
        packet_with(source, destination, 44, &[&fragment, tail].concat(), &[])
    };
    let options = [&[UDP, 0, 1, 4][..], &[0; 4]].concat();
    assert_eq!(node.sends(&chained(16, 0, &[0; 8])), Err(reason::FRAGMENT_NOT_FOUND));
    assert_eq!(node.sends(&chained(0, 1, &[&options[..], &udp(1, 53)].concat())), Ok(()));
    assert_eq!(node.sends(&chained(16, 0, &[0; 8])), Ok(()));
}

#[test]
fn a_first_fragment_without_ports_is_dropped() {
    let node = Node::with_dns();
    for family in [4, 6] {
        for (proto, bytes) in [(UDP, 0), (TCP, 8)] {
            let tiny = fragment(pair(family), proto, 3, (0, true), &tcp(1, 53, SYN)[..bytes]);
            assert_eq!(node.sends(&tiny), Err(reason::INVALID_PACKET));
        }
    }
}

#[test]
fn fragments_of_an_answer_are_one() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, any(ONE, 0, EGRESS));
    for family in [4, 6] {
        let (one, two) = (one(family), two(family));
        let (request, answer) = echo_types(one);
        let proto = icmp_proto(one);
        for (id, question, reply) in [
            (1, (UDP, udp(9, 53)), (UDP, udp(53, 9))),
            (2, (proto, icmp(request, 0, 5)), (proto, icmp(answer, 0, 5))),
        ] {
            let first = fragment((two, one), reply.0, id, (0, true), &reply.1);
            let later = fragment((two, one), reply.0, id, (8, false), &[0; 8]);
            assert_eq!(node.sends(&first), Err(reason::POLICY));
            assert_eq!(node.sends(&fragment((one, two), question.0, id, (0, true), &question.1)), Ok(()));
            assert_eq!(node.sends(&fragment((one, two), question.0, id, (8, false), &[0; 8])), Ok(()));
            assert_eq!(node.sends(&first), Ok(()));
            assert_eq!(node.sends(&later), Ok(()));
        }
    }
}

#[test]
fn fragments_of_what_has_no_ports() {
    let mut node = Node::with_dns();
    node.allow(2, of(GRE, any(ONE, 0, EGRESS)));
    node.allow(3, at(1, 8, any(ONE, 0, EGRESS)));
    for (proto, head) in [(GRE, vec![0; 8]), (1, icmp(8, 0, 5))] {
        let later = fragment(pair(4), proto, 3, (8, false), &[0; 8]);
        assert_eq!(node.sends(&later), Err(reason::FRAGMENT_NOT_FOUND));
        assert_eq!(node.sends(&fragment(pair(4), proto, 3, (0, true), &head)), Ok(()));
        assert_eq!(node.sends(&later), Ok(()));
    }
}
