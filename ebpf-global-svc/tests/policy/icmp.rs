//! ICMP: types, echoes, errors.

use std::net::IpAddr;

use ebpf_global_svc::abi::{ENDPOINT_ENFORCE_INGRESS, identity, reason};

use crate::{
    BOTH, EGRESS, INGRESS, Node, ONE, THIS_NODE, TWO, address, any, at, far,
    frames::{
        RST, TCP, UDP, echo_types, fragment, icmp, icmp_error, icmp_proto, packet, packet_with, tcp, udp,
    },
    one, outside,
    support::{ip_key, ip_value},
    two,
};

fn send(node: &Node, source: IpAddr, destination: IpAddr, message: &[u8]) -> Result<(), u8> {
    node.sends(&packet(source, destination, icmp_proto(source), message))
}

/// Host unreachable, time exceeded, and parameter problem of a family.
fn errors(family: u8) -> [(u8, u8); 3] {
    if family == 4 { [(3, 1), (11, 0), (12, 0)] } else { [(1, 0), (3, 0), (4, 0)] }
}

#[test]
fn types_are_ports() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    for family in [4, 6] {
        let (one, two) = (one(family), two(family));
        let (request, answer) = echo_types(one);
        assert_eq!(send(&node, one, two, &icmp(request, 0, 7)), Err(reason::POLICY));
        node.allow(1, at(icmp_proto(one), request.into(), any(ONE, TWO, EGRESS)));
        assert_eq!(send(&node, one, two, &icmp(request, 0, 7)), Ok(()));
        assert_eq!(send(&node, one, two, &icmp(answer, 0, 8)), Err(reason::POLICY), "another type");
        assert_eq!(send(&node, one, two, &icmp(200, 0, 7)), Err(reason::POLICY));
        node.allow(2, at(icmp_proto(one), 200, any(ONE, TWO, EGRESS)));
        assert_eq!(send(&node, one, two, &icmp(200, 0, 7)), Ok(()));
    }
    assert_eq!(node.datapath.flows().unwrap().len(), 2, "only echoes are flows");
    // The ICMP of the other family is a protocol without ports.
    let strange = packet(one(4), two(4), 58, &icmp(128, 0, 1));
    assert_eq!(node.sends(&strange), Err(reason::POLICY));
}

#[test]
fn an_echo_is_answered_by_its_identifier() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    for family in [4, 6] {
        let (one, two) = (one(family), two(family));
        let (request, answer) = echo_types(one);
        node.allow(1, at(icmp_proto(one), request.into(), any(ONE, TWO, EGRESS)));
        assert_eq!(send(&node, two, one, &icmp(answer, 0, 7)), Err(reason::POLICY));
        assert_eq!(send(&node, one, two, &icmp(request, 0, 7)), Ok(()));
        assert_eq!(send(&node, two, one, &icmp(answer, 0, 7)), Ok(()));
        assert_eq!(send(&node, two, one, &icmp(answer, 0, 8)), Err(reason::POLICY));
        assert_eq!(send(&node, two, one, &icmp(request, 0, 7)), Err(reason::POLICY), "no answer");
    }
}

#[test]
fn an_unasked_echo_reply_begins_nothing() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_INGRESS);
    assert_eq!(send(&node, one(4), two(4), &icmp(0, 0, 7)), Ok(()));
    assert_eq!(node.datapath.flows().unwrap(), []);
}

#[test]
fn an_error_passes_if_its_packet_did() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, any(ONE, 0, EGRESS));
    for family in [4, 6] {
        // Pod two plays a router on the way, too.
        for remote in [two(family), far(family)] {
            let sent = packet(one(family), remote, UDP, &udp(1000, 53));
            let ping = packet(one(family), remote, icmp_proto(remote), &icmp(echo_types(remote).0, 0, 5));
            for (kind, code) in errors(family) {
                for packet in [&sent, &ping] {
                    let error = icmp_error(kind, code, packet);
                    let before = send(&node, two(family), one(family), &error);
                    node.sends(packet).unwrap();
                    let after = send(&node, two(family), one(family), &error);
                    assert_eq!(after, Ok(()), "{kind}: {packet:?}");
                    assert!(before == Err(reason::POLICY) || before == Ok(()), "{before:?}");
                }
            }
            let never = packet(one(family), remote, UDP, &udp(1000, 54));
            let (kind, code) = errors(family)[0];
            let error = icmp_error(kind, code, &never);
            assert_eq!(send(&node, two(family), one(family), &error), Err(reason::POLICY), "never sent");
            // About somebody else's packet, as if pod one had let it through.
            let others = packet(remote, one(family), UDP, &udp(1000, 53));
            let error = icmp_error(kind, code, &others);
            assert_eq!(send(&node, two(family), one(family), &error), Err(reason::POLICY));
        }
    }
}

#[test]
fn an_error_is_sent_about_what_came_in() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, at(UDP, 53, any(ONE, TWO, INGRESS)));
    for family in [4, 6] {
        let (kind, code) = if family == 4 { (3, 3) } else { (1, 4) };
        let question = packet(two(family), one(family), UDP, &udp(1000, 53));
        let refusal = icmp_error(kind, code, &question);
        assert_eq!(send(&node, one(family), two(family), &refusal), Err(reason::POLICY));
        assert_eq!(node.sends(&question), Ok(()));
        assert_eq!(send(&node, one(family), two(family), &refusal), Ok(()));
    }
}

#[test]
fn what_an_error_holds_is_read_with_care() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.allow(1, any(ONE, TWO, EGRESS));
    let (one, two) = (one(4), two(4));
    let back = |about: &[u8]| send(&node, two, one, &icmp_error(3, 1, about));
    let options = packet_with(one, two, TCP, &[1; 8], &tcp(1000, 80, 2));
    assert_eq!(node.sends(&options), Ok(()));
    assert_eq!(back(&options), Ok(()), "options");
    assert_eq!(back(&options[..28 + 8]), Ok(()), "eight bytes are enough");
    let reset = packet(one, two, TCP, &tcp(1000, 80, RST));
    assert_eq!(back(&reset), Ok(()), "an error ends nothing");
    for about in [&options[..28], &options[..19], &[]] {
        assert_eq!(back(about), Err(reason::POLICY), "cut off");
    }
    let later = fragment((one, two), TCP, 9, (64, true), &[0; 16]);
    assert_eq!(back(&later), Err(reason::POLICY), "a later fragment");
    let error = packet(one, two, 1, &icmp_error(3, 1, &options));
    assert_eq!(back(&error), Err(reason::POLICY), "nobody answers errors with errors");
    let mut no_header = options.clone();
    no_header[0] = 0x41;
    assert_eq!(back(&no_header), Err(reason::POLICY));
    node.allow(2, at(1, 3, any(ONE, TWO, INGRESS)));
    assert_eq!(send(&node, two, one, &icmp_error(3, 1, &later)), Ok(()), "a rule may allow all");
}

#[test]
fn path_mtu_discovery_works_whatever_policies_say() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.flag(TWO, BOTH);
    node.deny(1, any(ONE, 0, INGRESS));
    node.deny(2, any(TWO, 0, EGRESS));
    for (family, kind, code) in [(4, 3, 4), (6, 2, 0)] {
        let error = icmp_error(kind, code, &packet(one(family), far(family), UDP, &udp(1, 2)));
        assert_eq!(send(&node, two(family), one(family), &error), Ok(()));
        let other = icmp_error(if family == 4 { 3 } else { 1 }, 0, &[]);
        assert_eq!(send(&node, two(family), one(family), &other), Err(reason::POLICY_DENY));
    }
}

#[test]
fn neighbours_are_discovered_on_the_link_only() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    let router = address(1, 254, 6);
    let entry = (ip_key(1, router), ip_value(identity::REMOTE_NODE, THIS_NODE));
    node.tables.ipcache.upsert(&[entry]).unwrap();
    for kind in 133..=137 {
        let message = icmp(kind, 0, 0);
        assert_eq!(send(&node, one(6), router, &message), Ok(()), "{kind}");
        assert_eq!(send(&node, one(6), address(1, 253, 6), &message), Ok(()), "some gateway's: {kind}");
        assert_eq!(send(&node, one(6), two(6), &message), Err(reason::POLICY), "{kind}");
        assert_eq!(send(&node, one(6), far(6), &message), Err(reason::POLICY), "{kind}");
        assert_eq!(send(&node, one(6), outside(6), &message), Err(reason::POLICY), "{kind}");
    }
    assert_eq!(send(&node, one(6), router, &icmp(138, 0, 0)), Err(reason::POLICY));
    let gateway = address(1, 253, 6);
    assert_eq!(send(&node, one(6), gateway, &icmp(138, 0, 0)), Err(reason::UNKNOWN_IDENTITY));
    // Type 135 means nothing to IPv4.
    assert_eq!(send(&node, one(4), THIS_NODE.into(), &icmp(135, 0, 0)), Err(reason::POLICY));
}
