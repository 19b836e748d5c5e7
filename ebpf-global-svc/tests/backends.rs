//! Backends that come, go and end under traffic, and one socket's view of them: at real sockets, in both families.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Instant,
};

use ebpf_global_svc::{
    Tables,
    abi::{Group, MAX_GROUPS, ServiceValue, SlotKey, reason},
};
use support::{
    Netns, Service, TCP, UDP, metric,
    pair::{ECHO, echo},
    sockets::{LOCAL, Node, PATIENCE, PORT, REMOTE, VIP4, VIP6, connect, server4, server6},
};

/// The frontend of a family, and its servers.
fn world(family: u8) -> (IpAddr, fn(u8) -> IpAddr) {
    if family == 4 { (VIP4, server4) } else { (VIP6, |n| server6(n.into())) }
}

fn any(family: u8) -> SocketAddr {
    if family == 4 { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() }
}

/// A service whose backends change all the time.
struct Churned {
    id: u32,
    frontend: IpAddr,
    /// Where its backends may be.
    servers: Vec<(IpAddr, u16)>,
    /// Backends in its slots.
    slots: Vec<u32>,
}

impl Churned {
    fn service(&self) -> Service<'static> {
        Service { id: self.id, frontend: (self.frontend, PORT), proto: TCP, groups: &[] }
    }

    fn write_count(&self, tables: &mut Tables) {
        let mut groups = [Group::default(); MAX_GROUPS];
        groups[0] = Group::new(LOCAL, 1, 0, u32::try_from(self.slots.len()).unwrap());
        let value = ServiceValue { id: self.id, n_groups: 1, affinity_timeout: 0, groups };
        tables.service.upsert(&[(self.service().key(LOCAL), value)]).unwrap();
    }

    fn slot(&self, slot: usize) -> SlotKey {
        SlotKey { service: self.id, slot: u32::try_from(slot).unwrap(), cluster: LOCAL, pad: 0 }
    }

    fn write_slot(&self, tables: &mut Tables, slot: usize) {
        tables.slot.upsert(&[(self.slot(slot), self.slots[slot])]).unwrap();
    }

    /// One backend comes, goes, or makes place for another one. In the agent's order, but without its waiting: what
    /// goes, goes while programs may still hold it.
    fn change(&mut self, tables: &mut Tables, random: u32, new: u32) {
        let place = usize::try_from(random >> 8).unwrap() % self.slots.len();
        let (ip, port) = self.servers[usize::try_from(random >> 16).unwrap() % self.servers.len()];
        let backend = |id| (id, self.service().backend(id, LOCAL, ip, port));
        match random % 3 {
            0 if self.slots.len() < 8 => {
                tables.backend.upsert(&[backend(new)]).unwrap();
                self.slots.push(new);
                self.write_slot(tables, self.slots.len() - 1);
                self.write_count(tables);
            }
            1 if self.slots.len() > 1 => {
                let gone = self.slots.swap_remove(place);
                if place < self.slots.len() {
                    self.write_slot(tables, place);
                }
                self.write_count(tables);
                tables.slot.remove(&[self.slot(self.slots.len())]).unwrap();
                tables.backend.remove(&[gone]).unwrap();
            }
            _ => {
                tables.backend.upsert(&[backend(new)]).unwrap();
                let gone = std::mem::replace(&mut self.slots[place], new);
                self.write_slot(tables, place);
                tables.backend.remove(&[gone]).unwrap();
            }
        }
    }
}

#[test]
fn a_thousand_random_changes_a_second_leave_no_call_without_a_backend() {
    const CHANGES: u32 = 60_000;
    const CALLS: u32 = 3_000;
    let mut node = Node::new();
    let mut services = [4, 6].map(|family| {
        let (frontend, server) = world(family);
        let servers: Vec<_> = (1..=4).map(|n| (server(n), node.serve_tcp(server(n), "one"))).collect();
        Churned { id: family.into(), frontend, servers, slots: vec![family.into()] }
    });
    for service in &services {
        let (ip, port) = service.servers[0];
        node.tables
            .backend
            .upsert(&[(service.id, service.service().backend(service.id, LOCAL, ip, port))])
            .unwrap();
        service.write_slot(&mut node.tables, 0);
        service.write_count(&mut node.tables);
    }
    let calls = [4, 6].map(|family| (world(family).0, AtomicU32::new(0)));
    let stop = AtomicBool::new(false);
    let begin = Instant::now();
    let mut changes = 0;
    thread::scope(|scope| {
        let Node { netns, tables, .. } = &mut node;
        let (netns, stop): (&Netns, _) = (netns, &stop);
        let callers: Vec<_> = calls
            .iter()
            .map(|(frontend, calls)| {
                scope.spawn(move || {
                    netns.run(|| {
                        while !stop.load(Ordering::Acquire) {
                            connect(*frontend)?;
                            calls.fetch_add(1, Ordering::AcqRel);
                        }
                        std::io::Result::Ok(())
                    })
                })
            })
            .collect();
        let enough = || calls.iter().all(|(_, calls)| calls.load(Ordering::Acquire) >= CALLS);
        let mut random = 1_u32;
        while (changes < CHANGES || !enough()) && !callers.iter().any(|caller| caller.is_finished()) {
            for service in &mut services {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                service.change(tables, random.rotate_left(16), 100 + changes);
                changes += 1;
            }
        }
        stop.store(true, Ordering::Release);
        for caller in callers {
            caller.join().unwrap().expect("every call is answered");
        }
    });
    let rate = f64::from(changes) / begin.elapsed().as_secs_f64();
    assert_eq!(metric(node.datapath(), reason::LB_NO_BACKEND), 0);
    println!(
        "{changes} changes, {rate:.0} a second, under {} calls; looked again: {}",
        metric(node.datapath(), reason::LB_SELECTED),
        metric(node.datapath(), reason::LB_NO_BACKEND_SLOT)
    );
    assert!(rate >= 1000.0, "only {rate:.0} changes a second: this has shown nothing");
}

#[test]
fn a_backend_that_terminates_keeps_its_flows_and_gets_no_new_ones() {
    for family in [4, 6] {
        let mut node = Node::new();
        let (vip, server) = world(family);
        let frontend = SocketAddr::from((vip, PORT));
        echo(&node.netns, server(1));
        let after = [node.serve_tcp(server(2), "after"), node.serve_udp(server(2), "after")];
        for (id, proto) in [(1, TCP), (2, UDP)] {
            let groups: &[(u16, u16, &[_])] = &[(LOCAL, 1, &[(id, server(1), ECHO)])];
            node.install(&Service { id, frontend: (vip, PORT), proto, groups });
        }
        let netns = node.netns.again();
        let mut stream = netns.run(|| TcpStream::connect(frontend).unwrap());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let datagrams = netns.run(|| datagram_socket(frontend));
        // As the agent does it: only what is active has slots while anything is, and what has none goes.
        for (id, proto, port) in [(1, TCP, after[0]), (2, UDP, after[1])] {
            let groups: &[(u16, u16, &[_])] = &[(REMOTE, 1, &[(id + 2, server(2), port)])];
            node.install(&Service { id, frontend: (vip, PORT), proto, groups });
            node.tables.slot.remove(&[SlotKey { service: id, slot: 0, cluster: LOCAL, pad: 0 }]).unwrap();
            node.tables.backend.remove(&[id]).unwrap();
        }
        for _ in 0..100 {
            assert_eq!(netns.run(|| connect(vip).unwrap().0), "after", "IPv{family}");
            assert_eq!(netns.run(|| ask(&datagram_socket(frontend))), *b"after", "IPv{family}");
            stream.write_all(b"still").unwrap();
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"still");
            assert_eq!(ask(&datagrams), *b"still", "the echo, as before");
        }
        assert_eq!(stream.peer_addr().unwrap(), frontend);
        assert_eq!(datagrams.peer_addr().unwrap(), frontend);
    }
}

fn datagram_socket(to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(any(if to.is_ipv4() { 4 } else { 6 })).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// What comes back for a datagram.
fn ask(socket: &UdpSocket) -> [u8; 5] {
    socket.send(b"still").unwrap();
    let mut answer = [0; 5];
    assert_eq!(socket.recv(&mut answer).unwrap(), 5);
    answer
}

/// One server, called through a frontend and directly, at the same time and one after the other from the same port.
#[test]
fn sockets_to_one_backend_by_frontend_and_directly_are_not_confused() {
    for family in [4, 6] {
        let mut node = Node::new();
        let (frontend, server) = world(family);
        let direct = SocketAddr::from((server(1), ECHO));
        let frontend = SocketAddr::from((frontend, PORT));
        echo(&node.netns, direct.ip());
        for (id, proto) in [(1, TCP), (2, UDP)] {
            let groups: &[(u16, u16, &[_])] = &[(LOCAL, 1, &[(id, direct.ip(), ECHO)])];
            node.install(&Service { id, frontend: (frontend.ip(), PORT), proto, groups });
        }
        node.netns.run(|| {
            let streams = [frontend, direct].map(|to| (to, TcpStream::connect(to).unwrap()));
            for (to, stream) in &streams {
                assert_eq!(stream.peer_addr().unwrap(), *to, "IPv{family}, at the same time");
            }
            let mut port = 0;
            for to in [frontend, direct, frontend, direct] {
                let mut local = any(family);
                local.set_port(port);
                let socket = UdpSocket::bind(local).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                port = socket.local_addr().unwrap().port();
                for connected in [false, true] {
                    if connected {
                        socket.connect(to).unwrap();
                        assert_eq!(socket.peer_addr().unwrap(), to, "IPv{family}, from port {port}");
                    }
                    let sent = if connected { socket.send(b"?") } else { socket.send_to(b"?", to) };
                    assert_eq!(sent.unwrap(), 1);
                    assert_eq!(socket.recv_from(&mut [0; 8]).unwrap().1, to, "IPv{family}, from port {port}");
                }
            }
        });
    }
}

/// A pod that is a backend of a service reaches itself through it, from its own address.
#[test]
fn a_pod_reaches_itself_through_its_service() {
    for family in [4, 6] {
        let mut node = Node::new();
        let (frontend, server) = world(family);
        let own = server(3);
        let (listener, datagrams) =
            node.netns.run(|| (TcpListener::bind((own, 0)).unwrap(), UdpSocket::bind((own, 0)).unwrap()));
        datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
        let ports = [listener.local_addr().unwrap().port(), datagrams.local_addr().unwrap().port()];
        for (id, proto, port) in [(1, TCP, ports[0]), (2, UDP, ports[1])] {
            let groups: &[(u16, u16, &[_])] = &[(LOCAL, 1, &[(id, own, port)])];
            node.install(&Service { id, frontend: (frontend, PORT), proto, groups });
        }
        node.netns.run(|| {
            let client = TcpStream::connect((frontend, PORT)).unwrap();
            let (_, from) = listener.accept().unwrap();
            assert_eq!(client.peer_addr().unwrap(), (frontend, PORT).into());
            assert_eq!(from, client.local_addr().unwrap(), "IPv{family}: nothing is translated on the way");

            let client = UdpSocket::bind((own, 0)).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.send_to(b"?", (frontend, PORT)).unwrap();
            let (_, from) = datagrams.recv_from(&mut [0; 8]).unwrap();
            assert_eq!(from, client.local_addr().unwrap());
            datagrams.send_to(b"!", from).unwrap();
            assert_eq!(client.recv_from(&mut [0; 8]).unwrap().1, (frontend, PORT).into());
        });
    }
}
