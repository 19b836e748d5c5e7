//! Service addresses at real sockets: every test has a network namespace whose only interface is
//! its loopback, so a frontend that is not translated is unreachable.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use ebpf_global_svc::{
    Datapath,
    abi::{FAMILY_V4, SlotKey, backend_state, cluster_state, reason},
};
use support::{
    Service, TCP, UDP, metric,
    sockets::{LOCAL, MAPPED_VIP4, Node, PATIENCE, PORT, REMOTE, VIP4, VIP6, connect, server4, server6},
};

#[test]
fn tcp_reaches_the_backend_and_sees_the_frontend() {
    let mut node = Node::new();
    let port4 = node.serve_tcp(server4(2), "four");
    let port6 = node.serve_tcp(server6(1), "six");
    node.install(&Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(REMOTE, 1, &[(10, server4(2), port4)])],
    });
    node.install(&Service {
        id: 2,
        frontend: (VIP6, PORT),
        proto: TCP,
        groups: &[(REMOTE, 1, &[(11, server6(1), port6)])],
    });

    assert_eq!(node.connect(VIP4).unwrap(), ("four".to_owned(), (VIP4, PORT).into()));
    assert_eq!(node.connect(VIP6).unwrap(), ("six".to_owned(), (VIP6, PORT).into()));
    // An IPv4 address on an IPv6 socket is IPv4 all the way.
    assert_eq!(node.connect(MAPPED_VIP4).unwrap(), ("four".to_owned(), (MAPPED_VIP4, PORT).into()));
    assert_eq!(metric(node.datapath(), reason::LB_SELECTED), 3);

    let sockets = node.datapath().sock_rev().unwrap();
    assert_eq!(sockets.len(), 3);
    assert_eq!(
        sockets.iter().filter(|(key, value)| key.family == FAMILY_V4 && value.service == 1).count(),
        2
    );
}

#[test]
fn what_is_not_a_service_is_left_alone() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(2), "direct");
    node.install(&Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: UDP,
        groups: &[(REMOTE, 1, &[(10, server4(2), port)])],
    });
    let name = node.netns.run(|| {
        let mut name = String::new();
        TcpStream::connect((server4(2), port)).unwrap().read_to_string(&mut name).unwrap();
        name
    });
    assert_eq!(name, "direct");
    // The same address and port, but TCP.
    assert_eq!(node.connect(VIP4).unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
    assert_eq!(metric(node.datapath(), reason::LB_SELECTED), 0);
}

#[test]
fn a_datagram_socket_sticks_to_its_backend_and_sees_the_frontend() {
    let mut node = Node::new();
    let names = ["a", "b", "c", "d"];
    let four: Vec<_> =
        (1..).zip(names).map(|(n, name)| (n.into(), server4(n), node.serve_udp(server4(n), name))).collect();
    let six: Vec<_> = (1..)
        .zip(names)
        .map(|(n, name)| (u32::from(n) + 4, server6(n), node.serve_udp(server6(n), name)))
        .collect();
    node.install_both(&four, &six);

    let bind4 = SocketAddr::from(([0, 0, 0, 0], 0));
    let bind6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    for (bind, frontend) in [(bind4, VIP4), (bind6, VIP6), (bind6, MAPPED_VIP4)] {
        let mut seen = BTreeMap::<String, u32>::new();
        node.netns.run(|| {
            for round in 0..40 {
                let socket = UdpSocket::bind(bind).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                let connected = round % 2 == 0;
                if connected {
                    socket.connect((frontend, PORT)).unwrap();
                    assert_eq!(socket.peer_addr().unwrap(), (frontend, PORT).into());
                }
                let mut sticky = None;
                for _ in 0..5 {
                    match connected {
                        true => socket.send(b"?").unwrap(),
                        false => socket.send_to(b"?", (frontend, PORT)).unwrap(),
                    };
                    let mut buffer = [0; 8];
                    let (length, from) = socket.recv_from(&mut buffer).unwrap();
                    assert_eq!(from, (frontend, PORT).into());
                    let name = String::from_utf8(buffer[..length].to_vec()).unwrap();
                    assert_eq!(*sticky.get_or_insert(name.clone()), name);
                }
                *seen.entry(sticky.unwrap()).or_default() += 1;
            }
        });
        assert_eq!(seen.len(), 4, "40 sockets find all of 4 backends: {seen:?}");
    }
}

#[test]
fn clusters_get_their_weights_and_backends_equal_shares() {
    let mut node = Node::new();
    let [one, two, three] = [(1, "one"), (2, "two"), (3, "three")]
        .map(|(n, name)| (n.into(), server4(n), node.serve_tcp(server4(n), name)));
    node.install(&Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 30, &[one, two]), (REMOTE, 10, &[three])],
    });
    let answers = node.answers(1200);
    // Expected 450, 450, 300; the bounds are more than 6 standard deviations away.
    assert!((340..560).contains(&answers["one"]), "{answers:?}");
    assert!((340..560).contains(&answers["two"]), "{answers:?}");
    assert!((200..400).contains(&answers["three"]), "{answers:?}");
}

#[test]
fn standby_and_draining_clusters_wait_for_their_turn() {
    let mut node = Node::new();
    let [local, remote, standby] = [(1, "local"), (2, "remote"), (3, "standby")]
        .map(|(n, name)| (n.into(), server4(n), node.serve_tcp(server4(n), name)));
    node.install(&Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[local]), (REMOTE, 1, &[remote]), (3, 0, &[standby])],
    });
    let names = |answers: BTreeMap<String, u32>| answers.into_keys().collect::<Vec<_>>();

    assert_eq!(names(node.answers(64)), ["local", "remote"]);
    assert_eq!(metric(node.datapath(), reason::LB_STANDBY), 0);
    node.set_cluster(LOCAL, cluster_state::DRAINING);
    assert_eq!(names(node.answers(64)), ["remote"]);
    node.set_cluster(REMOTE, cluster_state::DEAD);
    assert_eq!(names(node.answers(64)), ["standby"], "a healthy standby comes before a draining cluster");
    assert_eq!(metric(node.datapath(), reason::LB_STANDBY), 64);
    node.set_cluster(3, cluster_state::DRAINING);
    assert_eq!(names(node.answers(64)), ["local"], "of draining clusters, the weighted one");
    assert_eq!(metric(node.datapath(), reason::LB_DRAINING), 64);
    node.set_cluster(LOCAL, cluster_state::DEAD);
    assert_eq!(names(node.answers(64)), ["standby"]);
    node.set_cluster(3, cluster_state::DEAD);
    assert_eq!(node.connect(VIP4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND), 1);
    node.set_cluster(REMOTE, cluster_state::HEALTHY);
    assert_eq!(names(node.answers(64)), ["remote"]);
}

#[test]
fn tiers_take_turns_when_a_cluster_dies() {
    const TIERS: [u8; 4] = [0, 1, 1, 255];
    let mut node = Node::new();
    let [first, second, third, last] = [(1, "first"), (2, "second"), (3, "third"), (4, "last")]
        .map(|(n, name)| (n.into(), server4(n), node.serve_tcp(server4(n), name)));
    let service = Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(1, 1, &[first]), (2, 1, &[second]), (3, 0, &[third]), (4, 1, &[last])],
    };
    service.install_as(LOCAL, &mut node.tables, 0, |cluster| TIERS[usize::from(cluster) - 1]);
    let names = |answers: BTreeMap<String, u32>| answers.into_keys().collect::<Vec<_>>();
    for (cluster, state, answers) in [
        (1, cluster_state::HEALTHY, "first"),
        (1, cluster_state::DEAD, "second"),
        // A standby of its own tier comes before the next tier.
        (2, cluster_state::DEAD, "third"),
        (3, cluster_state::DEAD, "last"),
        // Any healthy cluster comes before any that drains.
        (1, cluster_state::DRAINING, "last"),
        (4, cluster_state::DEAD, "first"),
        (2, cluster_state::HEALTHY, "second"),
        (1, cluster_state::HEALTHY, "first"),
    ] {
        node.set_cluster(cluster, state);
        assert_eq!(names(node.answers(16)), [answers], "cluster {cluster} is {state}");
    }
}

#[test]
fn a_service_without_backends_refuses() {
    let mut node = Node::new();
    for (id, frontend, proto) in [(1, VIP4, TCP), (2, VIP4, UDP), (3, VIP6, TCP), (4, VIP6, UDP)] {
        node.install(&Service { id, frontend: (frontend, PORT), proto, groups: &[] });
    }
    for frontend in [VIP4, MAPPED_VIP4, VIP6] {
        assert_eq!(
            node.connect(frontend).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused,
            "{frontend}"
        );
        let error = node.netns.run(|| {
            let any = if frontend.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any).unwrap().send_to(b"?", (frontend, PORT)).unwrap_err()
        });
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{frontend}");
    }
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND), 6);
}

#[test]
fn selection_gives_up_only_after_looking_again() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(1), "one");
    let service = Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[(10, server4(1), port)])],
    };
    node.install(&service);
    let mut backend = service.backend(10, LOCAL, server4(1), port);

    // The element belongs to another backend by now.
    backend.generation = 11;
    node.tables.backend.upsert(&[(10, backend)]).unwrap();
    assert_eq!(node.connect(VIP4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND_SLOT), 4);
    // No backend of that number.
    node.tables.backend.remove(&[10]).unwrap();
    assert_eq!(node.connect(VIP4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND_SLOT), 8);
    // One that terminates serves, if there is no other.
    backend.generation = 10;
    backend.state = backend_state::TERMINATING;
    node.tables.backend.upsert(&[(10, backend)]).unwrap();
    assert_eq!(node.connect(VIP4).unwrap().0, "one");
}

#[test]
fn a_frontend_never_becomes_an_address_of_another_family() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(1), "one");
    node.install(&Service {
        id: 1,
        frontend: (VIP6, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[(10, server4(1), port)])],
    });
    assert_eq!(node.connect(VIP6).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn opening_again_interrupts_nobody() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(1), "one");
    node.install(&Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[(10, server4(1), port)])],
    });
    let stop = AtomicBool::new(false);
    let connections = AtomicU32::new(0);
    let progress = |target: u32| {
        while connections.load(Ordering::Acquire) < target {
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        let Node { netns, datapath, options, .. } = &mut node;
        let client = scope.spawn(|| {
            netns.run(|| {
                while !stop.load(Ordering::Acquire) {
                    // Without a program there is no route; with one that has lost its maps, no backend.
                    assert_eq!(connect(VIP4)?, ("one".to_owned(), (VIP4, PORT).into()));
                    connections.fetch_add(1, Ordering::AcqRel);
                }
                io::Result::Ok(())
            })
        });
        for round in 0..10 {
            if client.is_finished() {
                break;
            }
            progress(round * 20);
            drop(datapath.take());
            *datapath = Some(Datapath::open(options).unwrap());
        }
        stop.store(true, Ordering::Release);
        client.join().unwrap().expect("every connection is answered");
    });
    assert!(connections.load(Ordering::Acquire) >= 180);
}

#[test]
fn replacing_backends_refuses_nobody() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(1), "one");
    let service = Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[(1, server4(1), port)])],
    };
    node.install(&service);
    let slot = SlotKey { service: 1, slot: 0, cluster: LOCAL, pad: 0 };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let Node { netns, tables, .. } = &mut node;
        let client = scope.spawn(|| {
            // Stops the writer also when a connection fails.
            let result = netns.run(|| (0..2000).try_for_each(|_| connect(VIP4).map(drop)));
            stop.store(true, Ordering::Release);
            result
        });
        // The worst that can happen to a program: the old backend goes at once, not when nobody can
        // see it any more.
        for id in 2.. {
            if stop.load(Ordering::Acquire) {
                break;
            }
            tables.backend.upsert(&[(id, service.backend(id, LOCAL, server4(1), port))]).unwrap();
            tables.slot.upsert(&[(slot, id)]).unwrap();
            tables.backend.remove(&[id - 1]).unwrap();
        }
        client.join().unwrap().expect("every connection is answered");
    });
    assert_eq!(metric(node.datapath(), reason::LB_SELECTED), 2000);
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND), 0);
    println!("looked again: {}", metric(node.datapath(), reason::LB_NO_BACKEND_SLOT));
}

#[test]
fn dropping_leaves_the_datapath_running_and_unloading_ends_it() {
    let mut node = Node::new();
    let port = node.serve_tcp(server4(1), "one");
    node.install(&Service {
        id: 1,
        frontend: (VIP4, PORT),
        proto: TCP,
        groups: &[(LOCAL, 1, &[(10, server4(1), port)])],
    });
    assert_eq!(node.connect(VIP4).unwrap().0, "one");
    // Without a process, the datapath goes on.
    drop(node.datapath.take());
    assert_eq!(node.connect(VIP4).unwrap().0, "one");
    Datapath::unload(&node.options.bpf_root).unwrap();
    assert!(!node.options.bpf_root.exists());
    assert_eq!(node.connect(VIP4).unwrap_err().raw_os_error(), Some(libc::ENETUNREACH));
}
