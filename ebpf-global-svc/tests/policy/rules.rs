//! Which rule decides.

use ebpf_global_svc::abi::{
    ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, PolicyKey, reason, verdict,
};

use crate::{
    BOTH, EGRESS, FAR, INGRESS, Node, ONE, TWO, any, at, far,
    frames::{SCTP, TCP, UDP, packet, sctp, tcp, udp},
    of, one, outside,
    support::metric,
    two,
};

const FAMILIES: [u8; 2] = [4, 6];

#[test]
fn a_pod_without_flags_may_do_anything() {
    let mut node = Node::new();
    node.deny(1, any(ONE, 0, EGRESS));
    for family in FAMILIES {
        for to in [two(family), far(family), outside(family)] {
            assert_eq!(node.sends(&packet(one(family), to, UDP, &udp(1, 53))), Ok(()));
        }
    }
    assert_eq!(node.datapath.flows().unwrap(), [], "and nobody keeps a record of it");
    assert_eq!(node.datapath.verdicts().unwrap(), []);
}

#[test]
fn what_no_rule_allows_is_denied() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    for family in FAMILIES {
        for to in [two(family), far(family), outside(family)] {
            assert_eq!(node.sends(&packet(one(family), to, UDP, &udp(1, 53))), Err(reason::POLICY));
        }
        let other_way = packet(two(family), one(family), UDP, &udp(1, 53));
        assert_eq!(node.sends(&other_way), Ok(()), "nobody has spoken of what it receives");
    }
    assert_eq!(node.count(ONE, EGRESS, 0, verdict::DENIED), 6);

    node.flag(ONE, ENDPOINT_ENFORCE_INGRESS);
    for family in FAMILIES {
        assert_eq!(node.sends(&packet(one(family), far(family), UDP, &udp(1, 53))), Ok(()));
        let from_two = packet(two(family), one(family), UDP, &udp(1, 54));
        assert_eq!(node.sends(&from_two), Err(reason::POLICY));
    }
    assert_eq!(node.count(ONE, INGRESS, 0, verdict::DENIED), 2);
}

#[test]
fn peers_are_known_by_identity() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    node.allow(7, any(ONE, FAR, EGRESS));
    // Nobody else's rule, and not the other direction's.
    node.allow(8, any(TWO, TWO, EGRESS));
    node.allow(9, any(ONE, TWO, INGRESS));
    for family in FAMILIES {
        let to = |peer| packet(one(family), peer, UDP, &udp(1, 53));
        assert_eq!(node.sends(&to(far(family))), Ok(()));
        assert_eq!(node.sends(&to(two(family))), Err(reason::POLICY));
    }
    assert_eq!(node.count(ONE, EGRESS, 7, verdict::ALLOWED), 2);
    node.allow(10, any(ONE, 0, EGRESS));
    assert_eq!(node.sends(&packet(one(4), two(4), UDP, &udp(1, 53))), Ok(()), "any peer");
    assert_eq!(node.sends(&packet(one(4), outside(4), UDP, &udp(1, 53))), Ok(()));
    assert_eq!(node.count(ONE, EGRESS, 10, verdict::ALLOWED), 2);
}

#[test]
fn both_ends_on_a_node_are_asked() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.flag(TWO, BOTH);
    let request = packet(one(4), two(4), UDP, &udp(1, 53));
    assert_eq!(node.sends(&request), Err(reason::POLICY));
    node.allow(1, any(ONE, TWO, EGRESS));
    assert_eq!(node.sends(&request), Err(reason::POLICY), "the receiver");
    assert_eq!(node.count(TWO, INGRESS, 0, verdict::DENIED), 1);
    node.allow(2, any(TWO, ONE, INGRESS));
    assert_eq!(node.sends(&request), Ok(()));
    assert_eq!(node.sends(&packet(two(4), one(4), UDP, &udp(53, 1))), Ok(()), "the answer");
    assert_eq!(node.sends(&packet(two(4), one(4), UDP, &udp(54, 1))), Err(reason::POLICY));
}

#[test]
fn ports_and_protocols() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    let peer = any(ONE, FAR, EGRESS);
    node.allow(1, at(TCP, 443, peer));
    // 8080 to 8095.
    node.allow(2, PolicyKey { prefixlen: 80 + 12, ..at(TCP, 8080, peer) });
    node.allow(3, of(SCTP, peer));
    for family in FAMILIES {
        let tcp_to = |port| node.sends(&packet(one(family), far(family), TCP, &tcp(443, port, 2)));
        assert_eq!(tcp_to(443), Ok(()));
        assert_eq!(tcp_to(444), Err(reason::POLICY));
        for (port, expected) in [(8079, Err(reason::POLICY)), (8080, Ok(())), (8095, Ok(()))] {
            assert_eq!(tcp_to(port), expected, "{port}");
        }
        assert_eq!(tcp_to(8096), Err(reason::POLICY));
        let udp_to_443 = packet(one(family), far(family), UDP, &udp(443, 443));
        assert_eq!(node.sends(&udp_to_443), Err(reason::POLICY), "another protocol");
        assert_eq!(node.sends(&packet(one(family), far(family), SCTP, &sctp(1, 9))), Ok(()));
    }
    node.allow(4, at(SCTP, 9, any(ONE, 0, EGRESS)));
    assert_eq!(node.sends(&packet(one(4), outside(4), SCTP, &sctp(1, 9))), Ok(()), "SCTP has ports");
    assert_eq!(node.sends(&packet(one(4), outside(4), SCTP, &sctp(9, 1))), Err(reason::POLICY));
}

#[test]
fn a_denial_wins_wherever_it_is() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    let (to_far, to_any) = (any(ONE, FAR, EGRESS), any(ONE, 0, EGRESS));
    let request = packet(one(4), far(4), TCP, &tcp(1, 80, 2));

    node.allow(1, at(TCP, 80, to_far));
    node.deny(2, to_any);
    assert_eq!(node.sends(&request), Err(reason::POLICY_DENY), "of any peer, over the very port");
    assert_eq!(node.count(ONE, EGRESS, 2, verdict::DENIED), 1);

    node.tables.policy.remove(&[to_any]).unwrap();
    node.allow(3, at(TCP, 80, to_any));
    node.deny(4, of(TCP, to_far));
    node.tables.policy.remove(&[at(TCP, 80, to_far)]).unwrap();
    assert_eq!(node.sends(&request), Err(reason::POLICY_DENY), "of the peer, over any peer's port");
    assert_eq!(node.count(ONE, EGRESS, 4, verdict::DENIED), 1);
    assert_eq!(node.sends(&packet(one(4), two(4), TCP, &tcp(1, 80, 2))), Ok(()), "others may");
}

#[test]
fn a_longer_entry_of_the_same_peer_decides() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    node.allow(1, any(ONE, FAR, EGRESS));
    node.deny(2, at(TCP, 22, any(ONE, FAR, EGRESS)));
    assert_eq!(node.sends(&packet(one(6), far(6), TCP, &tcp(1, 22, 2))), Err(reason::POLICY_DENY));
    assert_eq!(node.sends(&packet(one(6), far(6), TCP, &tcp(1, 23, 2))), Ok(()));
    assert_eq!(node.sends(&packet(one(6), far(6), UDP, &udp(1, 22))), Ok(()));
}

#[test]
fn an_audit_lets_everything_pass_and_counts_it() {
    let mut node = Node::new();
    node.flag(ONE, BOTH | ENDPOINT_AUDIT);
    node.deny(3, any(ONE, FAR, EGRESS));
    assert_eq!(node.sends(&packet(one(4), far(4), UDP, &udp(1, 53))), Ok(()));
    assert_eq!(node.count(ONE, EGRESS, 3, verdict::AUDITED), 1);
    assert_eq!(node.sends(&packet(one(4), outside(4), UDP, &udp(1, 53))), Ok(()));
    assert_eq!(node.count(ONE, EGRESS, 0, verdict::AUDITED), 1);
    assert_eq!(node.sends(&packet(one(4), far(4), TCP, &[0; 3])), Ok(()), "even what cannot be read");
    assert_eq!(metric(&node.datapath, reason::POLICY_AUDITED), 3);
    assert_eq!(node.sends(&packet(two(4), one(4), UDP, &udp(1, 53))), Ok(()));
    assert_eq!(node.count(ONE, INGRESS, 0, verdict::AUDITED), 1);
    assert_eq!(node.sends(&packet(one(4), two(4), UDP, &udp(53, 1))), Ok(()), "an answer is an answer");
    assert_eq!(metric(&node.datapath, reason::POLICY_AUDITED), 4);
}
