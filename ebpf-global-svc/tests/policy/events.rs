//! What is told of packets, and how much of it.

use ebpf_global_svc::{
    Arrival, EventRing, KINDS,
    abi::{
        ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, EVENT_ANSWER, EVENT_EGRESS, EVENT_POLICY, Event, EventRule,
        EventState, event_hook, event_kind, identity, reason,
    },
};

use crate::{
    BOTH, EGRESS, FAR, INGRESS, Node, ONE, OWN, PEER, TWO, address, any, at, far,
    frames::{ACK, FIN, RST, SYN, TCP, UDP, echo_types, frame, icmp, icmp_proto, packet, tcp, udp},
    one, outside,
    support::{
        address as bytes,
        events::{all_of, listen, stay_on_one_cpu, told},
    },
    two,
};

/// Of one packet, but for its time.
fn only(ring: &mut EventRing) -> Event {
    let events = told(ring);
    assert_eq!(events.len(), 1, "{events:?}");
    events[0]
}

fn state(node: &Node, kind: u8) -> EventState {
    node.datapath.event_states().unwrap()[usize::from(kind)]
}

#[test]
fn nothing_is_told_that_nobody_wants_to_know() {
    let mut node = Node::new();
    let mut ring = node.datapath.event_ring().unwrap();
    node.flag(ONE, BOTH);
    node.sends(&packet(one(4), two(4), UDP, &udp(1, 2))).unwrap_err();
    node.sends(&packet(two(4), far(4), UDP, &udp(1, 2))).unwrap();
    assert_eq!(told(&mut ring), []);
    assert_eq!(node.datapath.event_states().unwrap(), [EventState::default(); KINDS]);
}

#[test]
fn a_drop_says_where_who_and_why() {
    let mut node = Node::new();
    let mut ring = listen(&mut node.datapath, &[event_kind::DROP]);
    for family in [4, 6] {
        let stranger = address(OWN, 77, family);
        let sent = packet(stranger, far(family), TCP, &tcp(4000, 80, SYN));
        node.sends(&sent).unwrap_err();
        let event = only(&mut ring);
        let now = ebpf_global_svc::program_time();
        assert!(now.as_nanos() - u128::from(event.time) < 60_000_000_000, "{event:?}");
        let expected = Event {
            time: event.time,
            source: bytes(stranger).1,
            destination: bytes(far(family)).1,
            length: frame(&sent).len().try_into().unwrap(),
            ifindex: node.pod_ifindex,
            source_port: 4000_u16.to_be(),
            destination_port: 80_u16.to_be(),
            kind: event_kind::DROP,
            reason: reason::INVALID_SOURCE_IP,
            hook: event_hook::FROM_POD,
            flags: EVENT_EGRESS,
            family,
            proto: TCP,
            tcp_flags: SYN,
            ..none()
        };
        assert_eq!(event, expected);

        let lost = packet(one(family), address(3, 1, family), UDP, &udp(5, 6));
        node.tables.prefix.upsert(&[foreign_prefix(family)]).unwrap();
        assert_eq!(node.sends(&lost), Err(reason::NO_TUNNEL_ENDPOINT));
        let event = only(&mut ring);
        assert_eq!((event.reason, event.source_identity), (reason::NO_TUNNEL_ENDPOINT, ONE), "{event:?}");
    }
    // A header that is shorter than headers are.
    let mut short = packet(one(4), far(4), UDP, &udp(1, 2));
    short[0] = 0x44;
    assert_eq!(node.sends(&short), Err(reason::INVALID_PACKET));
    let event = only(&mut ring);
    assert_eq!((event.family, event.source, event.source_port), (4, bytes(one(4)).1, 0));
    // On the overlay without a tunnel.
    node.try_out("cm_from_overlay", &packet(far(4), one(4), UDP, &udp(1, 2)), Arrival::default());
    let event = only(&mut ring);
    assert_eq!((event.hook, event.flags), (event_hook::FROM_OVERLAY, 0));
    assert_eq!(event.reason, reason::NO_TUNNEL_KEY);
    // What the node itself sends into it. Kernels try each link's neighbours: of that nobody wants to hear.
    let report = packet(one(6), "ff02::16".parse().unwrap(), 58, &icmp(143, 0, 0));
    let strayed = packet(one(4), outside(4), UDP, &udp(1, 2));
    for lost in [report, strayed] {
        let outcome = node.outcome("cm_to_overlay", &lost, Arrival::default());
        assert_eq!(outcome, Err(reason::NO_TUNNEL_ENDPOINT));
    }
    let event = only(&mut ring);
    assert_eq!((event.hook, event.family), (event_hook::TO_OVERLAY, 4));
}

#[test]
fn a_policys_denial_is_told_once_and_with_both_identities() {
    let mut node = Node::new();
    node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
    node.deny(7, at(UDP, 9, any(ONE, FAR, EGRESS)));
    let mut ring = listen(&mut node.datapath, &[event_kind::DROP]);
    for family in [4, 6] {
        for (port, reason, rule) in [(8, reason::POLICY, 0), (9, reason::POLICY_DENY, 7)] {
            for _ in 0..2 {
                node.sends(&packet(one(family), far(family), UDP, &udp(1, port))).unwrap_err();
            }
            let events = told(&mut ring);
            assert_eq!(events.len(), 2, "each packet: {events:?}");
            let event = events[1];
            assert_eq!((event.reason, event.number), (reason, rule));
            assert_eq!((event.source_identity, event.destination_identity), (ONE, FAR));
            assert_eq!((event.source_cluster, event.destination_cluster), (OWN, PEER));
            assert_eq!(event.flags, EVENT_EGRESS | EVENT_POLICY);
        }
    }
    // At the receiving end, and from the node's stack.
    node.flag(ONE, BOTH);
    node.sends(&packet(two(4), one(4), UDP, &udp(1, 2))).unwrap_err();
    let event = only(&mut ring);
    assert_eq!((event.source_identity, event.destination_identity, event.flags), (TWO, ONE, EVENT_POLICY));
    node.outcome("cm_to_pod", &packet(outside(4), one(4), UDP, &udp(1, 2)), Arrival::default()).unwrap_err();
    let event = only(&mut ring);
    assert_eq!((event.hook, event.source_identity), (event_hook::TO_POD, identity::HOST));
}

#[test]
fn only_the_first_packet_of_a_flow_is_told_as_allowed_or_audited() {
    let mut node = Node::new();
    node.flag(ONE, BOTH);
    node.flag(TWO, BOTH);
    node.allow(3, at(TCP, 80, any(ONE, TWO, EGRESS)));
    node.allow(4, at(TCP, 80, any(TWO, ONE, INGRESS)));
    let mut ring = listen(&mut node.datapath, &[event_kind::ALLOW, event_kind::AUDIT]);
    for family in [4, 6] {
        let there = |flags| packet(one(family), two(family), TCP, &tcp(1, 80, flags));
        let back = |flags| packet(two(family), one(family), TCP, &tcp(80, 1, flags));
        for sent in [there(SYN), back(SYN | ACK), there(ACK), back(ACK), there(FIN | ACK)] {
            node.sends(&sent).unwrap();
        }
        let events = told(&mut ring);
        let seen: Vec<_> = events.iter().map(|event| (event.kind, event.flags, event.number)).collect();
        let allow = |flags, rule| (event_kind::ALLOW, flags, rule);
        assert_eq!(seen, [allow(EVENT_POLICY | EVENT_EGRESS, 3), allow(EVENT_POLICY, 4)]);
        for event in events {
            assert_eq!((event.source_identity, event.destination_identity, event.reason), (ONE, TWO, 0));
        }
    }
    node.flag(ONE, BOTH | ENDPOINT_AUDIT);
    for _ in 0..3 {
        node.sends(&packet(one(4), far(4), UDP, &udp(1, 2))).unwrap();
    }
    let event = only(&mut ring);
    assert_eq!((event.kind, event.reason, event.number), (event_kind::AUDIT, reason::POLICY, 0));
}

#[test]
fn packets_that_pass_are_traced_where_connections_begin_and_end() {
    let mut node = Node::new();
    let mut ring = listen(&mut node.datapath, &[event_kind::TRACE]);
    for family in [4, 6] {
        let to = |ip, proto, payload: &[u8]| packet(one(family), ip, proto, payload);
        let (request, answer) = echo_types(one(family));
        for (sent, passed) in [
            (to(far(family), TCP, &tcp(1, 80, SYN)), Some((reason::ENCAPSULATED, 0, FAR, PEER))),
            (to(far(family), TCP, &tcp(1, 80, ACK)), None),
            (to(far(family), TCP, &tcp(1, 80, FIN | ACK)), Some((reason::ENCAPSULATED, 0, FAR, PEER))),
            (to(two(family), TCP, &tcp(1, 80, RST)), Some((reason::FORWARDED, 0, TWO, OWN))),
            (to(two(family), TCP, &tcp(80, 1, SYN | ACK)), Some((reason::FORWARDED, EVENT_ANSWER, TWO, OWN))),
            (to(outside(family), UDP, &udp(1, 2)), Some((reason::TO_STACK, 0, 0, 0))),
            (
                to(two(family), icmp_proto(one(family)), &icmp(request, 0, 7)),
                Some((reason::FORWARDED, 0, TWO, OWN)),
            ),
            (
                to(two(family), icmp_proto(one(family)), &icmp(answer, 0, 7)),
                Some((reason::FORWARDED, EVENT_ANSWER, TWO, OWN)),
            ),
        ] {
            node.sends(&sent).unwrap();
            let events = told(&mut ring);
            let seen: Vec<_> = events
                .iter()
                .map(|event| {
                    assert_eq!((event.source_identity, event.source_cluster), (ONE, OWN));
                    let flags = event.flags & !EVENT_EGRESS;
                    (event.reason, flags, event.destination_identity, event.destination_cluster)
                })
                .collect();
            assert_eq!(seen, Vec::from_iter(passed), "{sent:?}");
            if sent[9] == 1 || sent[6] == 58 {
                assert_eq!(u16::from_be(events[0].source_port), 7);
                assert!([request, answer].contains(&events[0].icmp_type));
            }
        }
    }
    assert_eq!(state(&node, event_kind::TRACE), EventState { sent: 14, ..EventState::default() });
}

#[test]
fn a_limit_holds_and_what_it_keeps_back_is_counted() {
    stay_on_one_cpu();
    let mut node = Node::new();
    // Three at once, and then one in seventeen minutes.
    let mut rules = all_of(&[]);
    rules[usize::from(event_kind::DROP)] =
        Some(EventRule { interval: 1 << 40, tolerance: 2 << 40, sample: 0, pad: 0 });
    node.datapath.set_events(&rules).unwrap();
    let mut ring = node.datapath.event_ring().unwrap();
    let spoofed = packet(address(OWN, 77, 4), far(4), UDP, &udp(1, 2));
    for _ in 0..10 {
        assert_eq!(node.sends(&spoofed), Err(reason::INVALID_SOURCE_IP));
    }
    assert_eq!(told(&mut ring).iter().map(|event| event.unsent).collect::<Vec<_>>(), [0, 0, 0]);
    let expected = EventState { sent: 3, limited: 7, unsent: 7, due: 0, ..EventState::default() };
    assert_eq!(state(&node, event_kind::DROP), expected);

    // Told as soon as there may be another one.
    node.datapath
        .set_events(&[Some(EventRule { tolerance: u64::MAX, ..EventRule::default() }); KINDS])
        .unwrap();
    for _ in 0..2 {
        assert_eq!(node.sends(&spoofed), Err(reason::INVALID_SOURCE_IP));
    }
    assert_eq!(told(&mut ring).iter().map(|event| event.unsent).collect::<Vec<_>>(), [7, 0]);
}

/// Who comes to look must not wait until what was told before is paid for.
#[test]
fn another_limit_begins_anew() {
    stay_on_one_cpu();
    let mut node = Node::new();
    let mut ring = node.datapath.event_ring().unwrap();
    let spoofed = packet(address(OWN, 77, 4), far(4), UDP, &udp(1, 2));
    // In seconds, so that no time passes for them.
    let rule = |interval: u64, burst: u64| {
        let interval = interval * 1_000_000_000;
        EventRule { interval, tolerance: interval * (burst - 1), ..EventRule::default() }
    };
    for (rule, told_of) in [(rule(1000, 10), 10), (rule(200, 5), 5), (rule(1000, 10), 9)] {
        node.datapath.set_events(&[Some(rule); KINDS]).unwrap();
        for _ in 0..20 {
            assert_eq!(node.sends(&spoofed), Err(reason::INVALID_SOURCE_IP));
        }
        assert_eq!(told(&mut ring).len(), told_of, "{rule:?}");
    }
}

#[test]
fn a_rate_is_kept_over_time() {
    stay_on_one_cpu();
    let mut node = Node::new();
    let mut rules = all_of(&[]);
    rules[usize::from(event_kind::DROP)] = Some(EventRule::new(1000, 50, 0));
    node.datapath.set_events(&rules).unwrap();
    let spoofed = frame(&packet(address(OWN, 77, 4), far(4), UDP, &udp(1, 2)));
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    let begin = ebpf_global_svc::program_time();
    while state(&node, event_kind::DROP).sent < 200 {
        node.try_frame("cm_from_pod", &spoofed, arrival, 100);
    }
    let took = (ebpf_global_svc::program_time() - begin).as_millis();
    let sent = u128::from(state(&node, event_kind::DROP).sent);
    assert!(sent <= 50 + took + 1, "{sent} in {took} ms");
    assert!(sent >= took.min(200) * 9 / 10, "{sent} in {took} ms");
}

#[test]
fn a_full_ring_loses_nothing_uncounted() {
    stay_on_one_cpu();
    let mut node = Node::new();
    let mut ring = listen(&mut node.datapath, &[event_kind::DROP]);
    let spoofed = frame(&packet(address(OWN, 77, 4), far(4), UDP, &udp(1, 2)));
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    // Far more than 64 KiB of them.
    node.try_frame("cm_from_pod", &spoofed, arrival, 1000);
    let counts = state(&node, event_kind::DROP);
    assert_eq!((counts.sent + counts.full, counts.limited), (1000, 0));
    assert_eq!(counts.sent, 65_536 / 136);
    assert_eq!(told(&mut ring).len() as u64, counts.sent);
    node.try_frame("cm_from_pod", &spoofed, arrival, 2);
    let unsent: Vec<_> = told(&mut ring).iter().map(|event| u64::from(event.unsent)).collect();
    assert_eq!(unsent, [counts.full, 0]);
}

#[test]
fn a_sample_is_about_as_large_as_it_should_be() {
    let mut node = Node::new();
    let mut rules = all_of(&[]);
    rules[usize::from(event_kind::TRACE)] = Some(EventRule::new(0, 0, 10));
    node.datapath.set_events(&rules).unwrap();
    let passes = frame(&packet(one(4), two(4), UDP, &udp(1, 2)));
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    node.try_frame("cm_from_pod", &passes, arrival, 4000);
    let counts = state(&node, event_kind::TRACE);
    assert_eq!((counts.sent + counts.sampled, counts.limited, counts.full), (4000, 0, 0), "{counts:?}");
    assert!((250..600).contains(&counts.sent), "{counts:?}");
    assert_eq!(counts.unsent, 0, "what was left out by chance is not missing");
}

/// A prefix of a cluster whose node nobody knows.
fn foreign_prefix(family: u8) -> (ebpf_global_svc::abi::PrefixKey, ebpf_global_svc::abi::PrefixValue) {
    use crate::support::{prefix_key, prefix_value};
    let length = if family == 4 { 24 } else { 64 };
    (prefix_key(address(3, 0, family), length), prefix_value(3, std::net::Ipv4Addr::UNSPECIFIED))
}

/// An event of nothing.
fn none() -> Event {
    ebpf_global_svc::abi::read_event(&[0; 128]).unwrap()
}
