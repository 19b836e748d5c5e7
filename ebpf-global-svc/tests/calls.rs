//! What is counted and told of calls to services.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::io;

use ebpf_global_svc::abi::{
    CallKey, EVENT_BOUND, EVENT_DRAINING, EVENT_EGRESS, EVENT_STANDBY, Event, call, cluster_state,
    event_hook, event_kind, reason,
};
use support::{
    Service, TCP, address,
    events::{listen, told},
    sockets::{LOCAL, Node, PORT, REMOTE, VIP4, VIP6, server4, server6},
};

/// How often a service was called, by cluster and outcome.
fn calls(node: &Node, service: u32) -> Vec<(u16, u16, u64)> {
    let calls = node.datapath().calls().unwrap();
    let calls = calls.into_iter().filter(|(key, _)| key.service == service);
    calls.map(|(key, counter)| (key.cluster, key.outcome, counter.packets)).collect()
}

#[test]
fn calls_are_counted_by_service_and_cluster() {
    let mut node = Node::new();
    let here = node.serve_tcp(server4(1), "here");
    let there = node.serve_tcp(server4(2), "there");
    node.install(&Service {
        id: 7,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[(1, server4(1), here)]), (REMOTE, 1, &[(2, server4(2), there)])],
    });
    let answers = node.answers(60);
    let seen =
        [(LOCAL, call::CHOSEN, answers["here"].into()), (REMOTE, call::CHOSEN, answers["there"].into())];
    assert_eq!(calls(&node, 7), seen);

    node.set_cluster(LOCAL, cluster_state::DEAD);
    node.set_cluster(REMOTE, cluster_state::DEAD);
    for _ in 0..3 {
        assert_eq!(node.connect(VIP4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!(calls(&node, 7)[0], (0, call::REFUSED, 3));
    assert_eq!(calls(&node, 7)[1..], seen);

    let gone: Vec<CallKey> = node.datapath().calls().unwrap().into_iter().map(|(key, _)| key).collect();
    node.datapath().forget_calls(&gone).unwrap();
    node.datapath().forget_calls(&gone).unwrap();
    assert_eq!(node.datapath().calls().unwrap(), []);
}

#[test]
fn a_call_is_told_with_its_process_and_its_backend() {
    let mut node = Node::new();
    let mut ring = listen(node.datapath.as_mut().unwrap(), &[event_kind::DROP, event_kind::CALL]);
    for (id, frontend, server) in [(7, VIP4, server4(1)), (8, VIP6, server6(1))] {
        let port = node.serve_tcp(server, "it");
        let (family, vip) = address(frontend);
        let service = Service {
            id,
            frontend: (frontend, PORT),
            proto: TCP,
            groups: &[(REMOTE, 1, &[(id, server, port)])],
        };
        node.install(&service);
        node.connect(frontend).unwrap();
        let events = told(&mut ring);
        let [event] = events[..] else { panic!("one call: {events:?}") };
        assert!(event.time > 0 && event.socket != 0 && event.command[0] != 0, "{event:?}");
        let expected = Event {
            time: event.time,
            socket: event.socket,
            source: [0; 16],
            destination: address(server).1,
            frontend: vip,
            command: event.command,
            source_identity: 0,
            destination_identity: 0,
            number: id,
            process: std::process::id(),
            length: 0,
            ifindex: 0,
            unsent: 0,
            source_cluster: LOCAL,
            destination_cluster: REMOTE,
            source_port: 0,
            destination_port: port.to_be(),
            frontend_port: PORT.to_be(),
            kind: event_kind::CALL,
            reason: reason::LB_SELECTED,
            hook: event_hook::SOCKET,
            flags: EVENT_EGRESS,
            family,
            proto: TCP,
            tcp_flags: 0,
            icmp_type: 0,
            icmp_code: 0,
            pad: 0,
        };
        assert_eq!(event, expected);

        node.set_cluster(REMOTE, cluster_state::DEAD);
        node.connect(frontend).unwrap_err();
        let events = told(&mut ring);
        let [refused] = events[..] else { panic!("one refusal: {events:?}") };
        assert_eq!((refused.kind, refused.reason), (event_kind::DROP, reason::LB_NO_BACKEND));
        assert_eq!((refused.frontend, refused.frontend_port), (vip, PORT.to_be()));
        assert_eq!((refused.destination, refused.destination_cluster), ([0; 16], 0));
        node.set_cluster(REMOTE, cluster_state::HEALTHY);
    }
}

#[test]
fn a_call_tells_what_is_not_as_usual() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(1), "it");
    let backends = [(1, server4(1), port)];
    let mut ring = listen(node.datapath.as_mut().unwrap(), &[event_kind::CALL]);
    let mut how = |node: &Node| {
        node.connect(VIP4).unwrap();
        told(&mut ring).iter().map(|event| event.flags & !EVENT_EGRESS).collect::<Vec<_>>()
    };
    let service = |weight| (REMOTE, weight, &backends[..]);
    let groups = [service(0)];
    let standby = Service { id: 7, frontend: (VIP4, PORT), proto: TCP, groups: &groups };
    node.install(&standby);
    assert_eq!(how(&node), [EVENT_STANDBY]);
    let groups = [service(1)];
    let usual = Service { groups: &groups, ..standby };
    node.install(&usual);
    assert_eq!(how(&node), [0]);
    node.set_cluster(REMOTE, cluster_state::DRAINING);
    assert_eq!(how(&node), [EVENT_DRAINING]);
    node.set_cluster(REMOTE, cluster_state::HEALTHY);
    node.sticky(&usual, 600);
    assert_eq!(how(&node), [0], "bound by this call");
    assert_eq!(how(&node), [EVENT_BOUND]);
}
