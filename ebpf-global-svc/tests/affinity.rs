//! Session affinity at real sockets.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, UdpSocket},
    thread,
};

use ebpf_global_svc::abi::{
    AFFINITY_REFRESH_NS, AffinityKey, AffinityValue, BACKEND_EXCLUSIVE, BackendValue, Group, MAX_GROUPS,
    ServiceValue, SlotKey, cluster_state, reason,
};
use ebpf_global_svc::program_time;
use support::{
    Backend, Service, TCP, UDP, metric,
    sockets::{LOCAL, Node, PATIENCE, PORT, REMOTE, VIP4, VIP6, server4, server6},
};

/// In units of two seconds.
const MINUTE: u16 = 30;
const SECOND_NS: u64 = 1_000_000_000;

/// Four listeners, the ID of each its last byte.
fn listeners(node: &Node) -> [Backend; 4] {
    [(1, "1"), (2, "2"), (3, "3"), (4, "4")]
        .map(|(n, name)| (n.into(), server4(n), node.serve_tcp(server4(n), name)))
}

fn service<'a>(groups: &'a [(u16, u16, &'a [Backend])]) -> Service<'a> {
    Service { id: 7, frontend: (VIP4, PORT), proto: TCP, groups }
}

fn bindings(node: &Node) -> Vec<(AffinityKey, AffinityValue)> {
    node.tables.affinity.dump().unwrap()
}

/// The one binding that there is.
fn binding(node: &Node) -> (AffinityKey, AffinityValue) {
    let all = bindings(node);
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

/// The only backend that answers `n` connections.
fn sole_answer(node: &Node, n: u32) -> u32 {
    let answers = node.answers(n);
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers.into_keys().next().unwrap().parse().unwrap()
}

#[test]
fn all_calls_of_a_client_go_to_one_backend() {
    let mut node = Node::new();
    let all = listeners(&node);
    let groups: &[(u16, u16, &[Backend])] = &[(LOCAL, 1, &all[..2]), (REMOTE, 1, &all[2..])];
    node.install(&service(groups));
    assert_eq!(node.answers(64).len(), 4, "without session affinity");
    assert_eq!(bindings(&node), []);

    node.sticky(&service(groups), MINUTE);
    let answer = sole_answer(&node, 64);
    let (key, value) = binding(&node);
    assert_eq!((key.service, value.service, value.backend), (7, 7, answer));
    assert_eq!(metric(node.datapath(), reason::LB_AFFINITY), 63);

    node.install(&service(groups));
    assert_eq!(node.answers(64).len(), 4, "without it once more");
}

#[test]
fn datagrams_of_a_client_go_to_one_backend_whatever_the_socket() {
    let mut node = Node::new();
    let all = [1, 2, 3, 4].map(|n| {
        (n.into(), server4(n), node.serve_udp(server4(n), ["1", "2", "3", "4"][usize::from(n) - 1]))
    });
    let groups: &[(u16, u16, &[Backend])] = &[(LOCAL, 1, &all[..2]), (REMOTE, 1, &all[2..])];
    node.sticky(&Service { proto: UDP, ..service(groups) }, MINUTE);
    let mut seen = BTreeMap::<String, u32>::new();
    node.netns.run(|| {
        for round in 0..40 {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            if round % 2 == 0 {
                socket.connect((VIP4, PORT)).unwrap();
                socket.send(b"?").unwrap();
            } else {
                socket.send_to(b"?", (VIP4, PORT)).unwrap();
            }
            let mut buffer = [0; 8];
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(from, SocketAddr::from((VIP4, PORT)));
            *seen.entry(String::from_utf8(buffer[..length].to_vec()).unwrap()).or_default() += 1;
        }
    });
    assert_eq!(seen.len(), 1, "{seen:?}");
}

#[test]
fn clients_spread_over_the_backends() {
    let mut node = Node::new();
    let all = listeners(&node);
    node.sticky(&service(&[(LOCAL, 1, &all[..2]), (REMOTE, 1, &all[2..])]), MINUTE);
    for _ in 0..40 {
        // A namespace of its own; nothing listens in it, but the call is on its way to a backend by then.
        let client = || {
            // SAFETY: this thread alone changes, and ends soon.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            std::net::TcpStream::connect((VIP4, PORT)).unwrap_err();
            std::net::TcpStream::connect((VIP4, PORT)).unwrap_err();
        };
        thread::scope(|scope| scope.spawn(client).join()).unwrap();
    }
    let bindings = bindings(&node);
    assert_eq!(bindings.len(), 40);
    let backends: BTreeSet<u32> = bindings.iter().map(|(_, value)| value.backend).collect();
    assert_eq!(backends.len(), 4, "40 clients find all of 4 backends");
    assert_eq!(metric(node.datapath(), reason::LB_AFFINITY), 40);
}

#[test]
fn a_backend_that_goes_is_replaced_without_a_failed_call() {
    let mut node = Node::new();
    let all = listeners(&node);
    let mut left = all.to_vec();
    let mut value =
        ServiceValue { id: 7, n_groups: 1, affinity_timeout: MINUTE, groups: [Group::default(); MAX_GROUPS] };
    node.sticky(&service(&[(LOCAL, 1, &all)]), MINUTE);
    while left.len() > 1 {
        let gone = sole_answer(&node, 16);
        // The last slot into the hole, the count, and later the backend: as the agent does it.
        let hole = left.iter().position(|(id, ..)| *id == gone).unwrap();
        left.swap_remove(hole);
        if let Some((id, ..)) = left.get(hole) {
            let slot = SlotKey { service: 7, slot: u32::try_from(hole).unwrap(), cluster: LOCAL, pad: 0 };
            node.tables.slot.upsert(&[(slot, *id)]).unwrap();
        }
        value.groups[0] = Group::new(LOCAL, 1, 0, u32::try_from(left.len()).unwrap());
        node.tables.service.upsert(&[(service(&[]).key(LOCAL), value)]).unwrap();
        node.tables.backend.remove(&[gone]).unwrap();
        let next = sole_answer(&node, 16);
        assert!(left.iter().any(|(id, ..)| *id == next), "{next} of {left:?}");
        assert_eq!(binding(&node).1.backend, next);
    }
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND), 0);
}

#[test]
fn clients_leave_a_cluster_that_dies_and_stay_where_they_went() {
    let mut node = Node::new();
    let [local, remote, ..] = listeners(&node);
    // Affinity to the own cluster, and session affinity.
    node.sticky(&service(&[(LOCAL, 1, &[local]), (REMOTE, 0, &[remote])]), MINUTE);
    assert_eq!(sole_answer(&node, 16), 1);
    node.set_cluster(LOCAL, cluster_state::DEAD);
    assert_eq!(sole_answer(&node, 16), 2);
    node.set_cluster(LOCAL, cluster_state::HEALTHY);
    assert_eq!(sole_answer(&node, 16), 2, "the session is there now");
    // A cluster that drains keeps its clients only if there is no other.
    node.set_cluster(REMOTE, cluster_state::DRAINING);
    assert_eq!(sole_answer(&node, 16), 1);
    node.set_cluster(LOCAL, cluster_state::DRAINING);
    node.set_cluster(REMOTE, cluster_state::DRAINING);
    assert_eq!(sole_answer(&node, 16), 1);
    node.set_cluster(LOCAL, cluster_state::DEAD);
    assert_eq!(sole_answer(&node, 16), 2);
    node.set_cluster(LOCAL, cluster_state::DRAINING);
    assert_eq!(sole_answer(&node, 16), 2, "both drain: there is no reason to move");
    node.set_cluster(REMOTE, cluster_state::DEAD);
    node.set_cluster(LOCAL, cluster_state::DEAD);
    assert!(node.connect(VIP4).is_err());
}

#[test]
fn a_session_moves_once_when_its_cluster_dies() {
    let mut node = Node::new();
    let servers = [(VIP4, server4(1), server4(2)), (VIP6, server6(1), server6(2))];
    for (id, (frontend, local, remote)) in (1..).zip(servers) {
        let backends = [(10 * id, local, "local"), (10 * id + 1, remote, "remote")]
            .map(|(id, ip, name)| (id, ip, node.serve_tcp(ip, name)));
        let groups: &[(u16, u16, &[Backend])] = &[(LOCAL, 1, &backends[..1]), (REMOTE, 0, &backends[1..])];
        node.sticky(&Service { id, frontend: (frontend, PORT), proto: TCP, groups }, MINUTE);
    }
    for (state, answers) in [
        (cluster_state::HEALTHY, "local"),
        (cluster_state::DEAD, "remote"),
        (cluster_state::HEALTHY, "remote"),
    ] {
        node.set_cluster(LOCAL, state);
        for (frontend, ..) in servers {
            for _ in 0..16 {
                assert_eq!(node.connect(frontend).unwrap().0, answers, "{frontend}, cluster {state}");
            }
        }
    }
}

#[test]
fn a_binding_ends_when_its_time_has_passed() {
    // A machine that has just started has no time yet that lies so far back.
    while monotonic() < 11 * SECOND_NS {
        std::thread::park_timeout(std::time::Duration::from_millis(100));
    }
    let mut node = Node::new();
    let all = listeners(&node);
    node.sticky(&service(&[(LOCAL, 1, &all)]), 5);
    let mut stays = sole_answer(&node, 4);
    let (key, _) = binding(&node);
    let idle = |node: &mut Node, seconds: u64| {
        let used = monotonic() - seconds * SECOND_NS;
        let value = AffinityValue { used, ..binding(node).1 };
        node.tables.affinity.upsert(&[(key, value)]).unwrap();
    };
    for _ in 0..32 {
        idle(&mut node, 8);
        assert_eq!(sole_answer(&node, 1), stays, "8 s of 10 have passed");
        assert!(monotonic() - binding(&node).1.used < 5 * SECOND_NS, "the time begins anew");
    }
    let moved = (0..64).find(|_| {
        idle(&mut node, 10);
        let before = std::mem::replace(&mut stays, sole_answer(&node, 1));
        assert_eq!(sole_answer(&node, 4), stays);
        before != stays
    });
    assert!(moved.is_some(), "64 draws from 4 backends, always the same");
}

#[test]
fn a_call_soon_after_another_is_not_noted() {
    let mut node = Node::new();
    let all = listeners(&node);
    node.sticky(&service(&[(LOCAL, 1, &all)]), MINUTE);
    sole_answer(&node, 1);
    let mut used = binding(&node).1.used;
    let mut noted = 0;
    for _ in 0..64 {
        sole_answer(&node, 1);
        let now = binding(&node).1.used;
        if now != used {
            assert!(now - used > AFFINITY_REFRESH_NS);
            noted += 1;
        }
        used = now;
    }
    assert!(noted < 64, "each call was noted");
}

#[test]
fn only_what_proves_its_service_is_believed() {
    let mut node = Node::new();
    let all = listeners(&node);
    node.sticky(&service(&[(LOCAL, 1, &all)]), MINUTE);
    let bound = sole_answer(&node, 4);
    let (key, value) = binding(&node);
    let other = if bound == 1 { all[1] } else { all[0] };
    let foreign = Service { id: 8, ..service(&[]) };

    // The element was another client's a moment ago.
    node.tables.affinity.upsert(&[(key, AffinityValue { service: 8, backend: other.0, ..value })]).unwrap();
    sole_answer(&node, 4);
    assert_eq!(binding(&node).1.service, 7, "bound anew");
    // Of a backend whose ID others have, too, nobody can say whether it still is one of this service.
    let shared = foreign.backend(99, LOCAL, other.1, other.2);
    assert_eq!(shared.flags & BACKEND_EXCLUSIVE, 0);
    node.tables.backend.upsert(&[(99, shared)]).unwrap();
    node.tables.affinity.upsert(&[(key, AffinityValue { backend: 99, ..value })]).unwrap();
    sole_answer(&node, 4);
    assert_ne!(binding(&node).1.backend, 99);
    // Nor are clients bound to such a one.
    let slots = (0..).zip(all).map(|(slot, _)| (SlotKey { service: 7, slot, cluster: LOCAL, pad: 0 }, 99));
    node.tables.slot.upsert(&slots.collect::<Vec<_>>()).unwrap();
    node.tables.affinity.remove(&[key]).unwrap();
    sole_answer(&node, 4);
    assert_eq!(bindings(&node), []);
    // And an element that holds another backend by now counts as gone.
    let recycled = BackendValue { generation: 98, flags: BACKEND_EXCLUSIVE, ..shared };
    node.tables.backend.upsert(&[(97, recycled)]).unwrap();
    node.tables.affinity.upsert(&[(key, AffinityValue { used: monotonic(), backend: 97, ..value })]).unwrap();
    let affine = metric(node.datapath(), reason::LB_AFFINITY);
    sole_answer(&node, 1);
    assert_eq!(metric(node.datapath(), reason::LB_AFFINITY), affine);
}

/// In nanoseconds.
fn monotonic() -> u64 {
    u64::try_from(program_time().as_nanos()).unwrap()
}
