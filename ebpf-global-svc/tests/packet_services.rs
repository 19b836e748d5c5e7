//! Services for packets that no socket hook has seen: of clients outside of the mesh, and of pods whose sockets are none of
//! this kernel's. Here that is any pod: there are no socket hooks.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
};

use ebpf_global_svc::{
    Tables,
    abi::{
        ClusterState, ENDPOINT_ENFORCE_INGRESS, EndpointValue, POLICY_PORT_BITS, PolicyKey, PolicyValue,
        cluster_state, direction, identity, reason,
    },
};
use support::{
    Netns, Service, TCP, UDP, endpoint, ip_key, metric,
    pair::{ECHO, Node, PATIENCE, VIRTUAL, call, pod, pod_identity, stream, underlay},
    prefix_key, wait_until,
};

/// Tells its clients who they are, in a pod.
const WHO: u16 = 9;

/// Two nodes, and a client outside of the mesh that knows the first.
struct World {
    nodes: [Node; 2],
    client: Netns,
}

fn client(family: u8) -> IpAddr {
    if family == 4 { "198.51.100.2".parse().unwrap() } else { "2001:db8::2".parse().unwrap() }
}

/// The first node's address on the client's side.
fn gate(family: u8) -> IpAddr {
    if family == 4 { "198.51.100.1".parse().unwrap() } else { "2001:db8::1".parse().unwrap() }
}

/// An address that nobody has.
fn frontend(family: u8) -> IpAddr {
    if family == 4 { "203.0.113.10".parse().unwrap() } else { "2001:db8:f::10".parse().unwrap() }
}

impl World {
    fn new(mut nodes: [Node; 2]) -> Self {
        let client = Netns::new("client");
        let node = &mut nodes[0];
        node.netns.ip(&format!("link add out0 type veth peer name eth0 netns {}", client.name()));
        node.netns.ip("link set out0 up");
        client.ip("link set eth0 up");
        for (family, length) in [(4, 24), (6, 64)] {
            let (mine, theirs) = (self::client(family), gate(family));
            let nodad = if family == 6 { " nodad" } else { "" };
            client.ip(&format!("addr add {mine}/{length} dev eth0{nodad}"));
            node.netns.ip(&format!("addr add {theirs}/{length} dev out0{nodad}"));
            client.ip(&format!("-{family} route add default via {theirs}"));
        }
        let out = node.netns.ifindex("out0");
        let datapath = node.datapath.as_mut().unwrap();
        node.netns.run(|| datapath.attach_netdev(out).unwrap());
        assert_eq!(datapath.attached_netdevs().unwrap(), [out]);
        Self { nodes, client }
    }

    /// A frontend with one backend, the pod of a cluster.
    fn publish(&mut self, ip: IpAddr, port: u16, cluster: u16, backend: IpAddr) {
        for (id, proto) in [(1, TCP), (2, UDP)] {
            let id = id + u32::from(port) * 16 + if ip.is_ipv6() { 4 } else { 0 };
            let service =
                Service { id, frontend: (ip, port), proto, groups: &[(cluster, 1, &[(id, backend, port)])] };
            service.publish(1, &mut self.nodes[0].tables);
        }
    }

    fn tables(&mut self) -> &mut Tables {
        &mut self.nodes[0].tables
    }
}

/// What a server in a pod sees as the client's address.
fn seen_by(pod: &Netns, pod_ip: IpAddr, caller: &Netns, to: SocketAddr) -> SocketAddr {
    // A program that another test has just started may hold the descriptor of the socket before for a moment.
    let mut socket = None;
    wait_until("the port is free", || {
        socket = pod.run(|| UdpSocket::bind((pod_ip, WHO))).ok();
        socket.is_some()
    });
    let socket = socket.unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = thread::spawn(move || {
        let (_, client) = socket.recv_from(&mut [0; 8]).unwrap();
        socket.send_to(client.to_string().as_bytes(), client).unwrap();
    });
    let told = caller.run(|| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(to).unwrap();
        socket.send(b"who?").unwrap();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    });
    server.join().unwrap();
    told.parse().unwrap()
}

#[test]
fn a_client_outside_reaches_pods_of_any_cluster_and_is_seen_as_itself() {
    let mut world = World::new(Node::pair());
    for family in [4, 6] {
        for cluster in [1, 2] {
            for ip in [frontend(family), gate(family)] {
                world.publish(ip, ECHO, cluster, pod(cluster, family));
                world.publish(ip, WHO, cluster, pod(cluster, family));
                assert_eq!(call(&world.client, ip).unwrap(), (ip, ECHO).into(), "cluster {cluster}");
                let server = &world.nodes[usize::from(cluster) - 1].pod;
                let seen = seen_by(server, pod(cluster, family), &world.client, (ip, WHO).into());
                assert_eq!(seen.ip(), client(family));
                stream(&world.client, ip);
            }
        }
    }
    assert!(world.nodes[1].received(identity::INGRESS, underlay(1)) > 0);
    assert!(metric(world.nodes[0].datapath(), reason::ANSWERED) > 0);
}

#[test]
fn a_pod_without_socket_hooks_reaches_services() {
    let mut world = World::new(Node::pair());
    for family in [4, 6] {
        let ip = frontend(family);
        world.nodes[0].datapath.as_mut().unwrap().set_packet_services(true).unwrap();
        world.publish(ip, ECHO, 2, pod(2, family));
        assert_eq!(call(&world.nodes[0].pod, ip).unwrap(), (ip, ECHO).into());
        stream(&world.nodes[0].pod, ip);
        // What it says directly stays direct.
        assert_eq!(call(&world.nodes[0].pod, pod(2, family)).unwrap(), (pod(2, family), ECHO).into());
    }
    assert_eq!(world.nodes[1].received(identity::INGRESS, underlay(1)), 0);
    assert!(world.nodes[1].received(pod_identity(1), underlay(1)) > 0);
}

#[test]
fn overlapping_clusters_answer_too() {
    let mut world = World::new(Node::overlapping_pair());
    for family in [4, 6] {
        let ip = frontend(family);
        world.publish(ip, ECHO, 2, pod(VIRTUAL + 2, family));
        assert_eq!(call(&world.client, ip).unwrap(), (ip, ECHO).into());
        stream(&world.client, ip);
    }
}

#[test]
fn fragments_arrive_and_are_answered() {
    let mut world = World::new(Node::pair());
    let big: Vec<u8> = (0..4000_u32).map(|n| n.to_le_bytes()[0]).collect();
    for family in [4, 6] {
        for cluster in [1, 2] {
            let ip = frontend(family);
            world.publish(ip, ECHO, cluster, pod(cluster, family));
            let received = world.client.run(|| {
                let socket = UdpSocket::bind(if family == 4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.send_to(&big, (ip, ECHO)).unwrap();
                let mut buffer = vec![0; 8192];
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(from, (ip, ECHO).into());
                buffer.truncate(length);
                buffer
            });
            assert!(received == big[..2048], "IPv{family}, cluster {cluster}: {} bytes", received.len());
        }
    }
}

/// "Too big" would be about an address that its sender has never heard of.
#[test]
fn packets_to_frontends_that_are_too_big_go_in_fragments() {
    let mut world = World::new(Node::pair());
    world.nodes[0].netns.ip("link set cm_vxlan mtu 1300");
    let datapath = world.nodes[0].datapath.as_mut().unwrap();
    datapath.set_packet_services(true).unwrap();
    datapath.set_pmtu_discovery(true).unwrap();
    for family in [4, 6] {
        let ip = frontend(family);
        world.publish(ip, ECHO, 2, pod(2, family));
        for netns in [&world.client, &world.nodes[0].pod] {
            let before = metric(world.nodes[0].datapath(), reason::TOO_BIG);
            stream(netns, ip);
            assert!(metric(world.nodes[0].datapath(), reason::TOO_BIG) > before);
        }
    }
    assert_eq!(metric(world.nodes[0].datapath(), reason::FRAG_NEEDED), 0);
}

/// The error names the packet as its sender knows it, else no socket would get it.
#[test]
fn errors_reach_who_caused_them() {
    let mut world = World::new(Node::pair());
    world.nodes[0].datapath.as_mut().unwrap().set_packet_services(true).unwrap();
    for family in [4, 6] {
        for cluster in [1, 2] {
            let ip = frontend(family);
            world.publish(ip, ECHO + 1, cluster, pod(cluster, family));
            for netns in [&world.client, &world.nodes[0].pod] {
                if cluster == 1 && netns.name() == world.nodes[0].pod.name() {
                    continue;
                }
                let error = netns.run(|| {
                    let socket = UdpSocket::bind(if family == 4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
                    socket.set_read_timeout(Some(PATIENCE)).unwrap();
                    socket.connect((ip, ECHO + 1)).unwrap();
                    socket.send(b"nobody listens there").unwrap();
                    socket.recv(&mut [0; 64]).unwrap_err()
                });
                assert_eq!(
                    error.kind(),
                    ErrorKind::ConnectionRefused,
                    "IPv{family}, cluster {cluster}: {error}"
                );
            }
        }
    }
}

#[test]
fn policy_sees_the_client() {
    let mut world = World::new(Node::pair());
    let ip = frontend(4);
    for cluster in [1, 2] {
        world.publish(ip, ECHO, cluster, pod(cluster, 4));
        let node = &mut world.nodes[usize::from(cluster) - 1];
        let veth = node.netns.ifindex("lxc0");
        let value =
            EndpointValue { flags: ENDPOINT_ENFORCE_INGRESS, ..endpoint(veth, pod_identity(cluster)) };
        node.tables.endpoint.upsert(&[(ip_key(cluster, pod(cluster, 4)), value)]).unwrap();
        let denied = metric(node.datapath(), reason::POLICY);
        support::pair::send(&world.client, ip);
        support::wait_until("the drop is counted", || {
            metric(world.nodes[usize::from(cluster) - 1].datapath(), reason::POLICY) == denied + 1
        });
        let tables = &mut world.nodes[usize::from(cluster) - 1].tables;
        tables.cidr.upsert(&[(prefix_key(client(4), 24), identity::FIRST_CIDR)]).unwrap();
        for proto in [TCP, UDP] {
            let key = PolicyKey {
                prefixlen: POLICY_PORT_BITS,
                subject: pod_identity(cluster),
                peer: identity::FIRST_CIDR,
                direction: direction::INGRESS,
                proto,
                port: ECHO.to_be(),
            };
            tables.policy.upsert(&[(key, PolicyValue { flags: 0, rule: 1 })]).unwrap();
        }
        assert_eq!(call(&world.client, ip).unwrap(), (ip, ECHO).into());
        stream(&world.client, ip);
    }
}

/// A service of the cluster is none for the outside, and one without backends is refused.
#[test]
fn nobody_else_is_let_in() {
    let mut world = World::new(Node::pair());
    let inner = Service {
        id: 90,
        frontend: (frontend(4), ECHO),
        proto: UDP,
        groups: &[(2, 1, &[(90, pod(2, 4), ECHO)])],
    };
    inner.install(1, world.tables());
    let refused = |world: &World, ip: IpAddr| {
        world.client.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
            socket.connect((ip, ECHO)).unwrap();
            socket.send(b"hello").unwrap();
            socket.recv(&mut [0; 8]).unwrap_err().kind()
        })
    };
    assert!(matches!(refused(&world, frontend(4)), ErrorKind::WouldBlock | ErrorKind::HostUnreachable));
    let own = underlay(1).into();
    world.publish(own, ECHO, 2, pod(2, 4));
    world.publish(frontend(4), ECHO, 2, pod(2, 4));
    assert_eq!(call(&world.client, own).unwrap(), (own, ECHO).into());
    world.tables().cluster.upsert(&[(2, ClusterState { state: cluster_state::DEAD })]).unwrap();
    assert_eq!(refused(&world, own), ErrorKind::ConnectionRefused);
    let dropped = metric(world.nodes[0].datapath(), reason::NO_BACKEND);
    assert_eq!(refused(&world, frontend(4)), ErrorKind::WouldBlock);
    assert_eq!(metric(world.nodes[0].datapath(), reason::NO_BACKEND), dropped + 1);
}
