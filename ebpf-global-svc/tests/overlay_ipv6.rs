//! Two nodes of two clusters whose tunnels run over IPv6: what `overlay` shows, and what is other.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::FromRawFd as _,
    thread,
};

use ebpf_global_svc::{
    Datapath,
    abi::{UnderlayKey, UnderlayValue, direction, identity, reason},
};
use support::{
    metric, node_at,
    pair::{
        ECHO, Node, PATIENCE, address, call, number, pod, pod_identity, refused, router, send, stream,
        underlay, underlay6,
    },
    prefix_key, prefix_value, wait_until,
};

const UDP: i32 = libc::IPPROTO_UDP;

#[test]
fn pods_of_two_clusters_talk_and_carry_their_identity() {
    let nodes = Node::pair_over_ipv6();
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].pod, pod(2, family)).unwrap(), (pod(2, family), ECHO).into());
        assert_eq!(call(&nodes[1].pod, pod(1, family)).unwrap(), (pod(1, family), ECHO).into());
        stream(&nodes[0].pod, pod(2, family));
    }
    // A node is counted by its number. Streams have come, too.
    assert!(nodes[1].received(pod_identity(1), number(1)) > 4);
    assert!(nodes[0].received(pod_identity(2), number(2)) > 4);
    assert_eq!(metric(nodes[0].datapath(), reason::NO_TUNNEL_KEY), 0);
}

#[test]
fn a_node_reaches_remote_pods_as_a_node() {
    let nodes = Node::pair_over_ipv6();
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].netns, pod(2, family)).unwrap(), (pod(2, family), ECHO).into());
    }
    assert_eq!(nodes[1].received(identity::REMOTE_NODE, number(1)), 2);
    assert_eq!(call(&nodes[1].pod, router(1, 4)).unwrap(), (router(1, 4), ECHO).into());
}

#[test]
fn a_node_cannot_speak_for_another_cluster() {
    let mut nodes = Node::pair_over_ipv6();
    for claimed in [3 << 16 | 0x1000, pod_identity(1)] {
        nodes[1].claim(claimed);
        refused(&nodes, reason::INVALID_CLUSTER_ID);
    }
    for reserved in [identity::UNKNOWN, identity::HOST, 255] {
        nodes[1].claim(reserved);
        refused(&nodes, reason::INVALID_IDENTITY);
    }
    nodes[1].claim(pod_identity(2));
    for (family, length) in [(4, 32), (6, 128)] {
        let entry = (prefix_key(pod(2, family), length), prefix_value(3, number(3)));
        nodes[0].tables.prefix.upsert(&[entry]).unwrap();
    }
    refused(&nodes, reason::INVALID_SOURCE_IP);
}

#[test]
fn a_stranger_is_not_heard() {
    let mut nodes = Node::pair_over_ipv6();
    let (key, _) = node_at(underlay6(2).into(), 2);
    nodes[0].tables.node.remove(&[key]).unwrap();
    refused(&nodes, reason::UNKNOWN_SENDER);
}

/// Tunnels of the other family are nobody's, even from a node that is known.
#[test]
fn what_comes_over_ipv4_is_not_heard() {
    let mut nodes = Node::pair_over_ipv6();
    for node in &mut nodes {
        node.netns.ip(&format!("addr add {}/24 dev eth0", underlay(node.cluster)));
        for other in [1, 2] {
            node.tables.node.upsert(&[node_at(underlay(other).into(), other)]).unwrap();
        }
    }
    let [one, two] = &mut nodes;
    drop(two.datapath.take());
    two.options.underlay_ipv6 = false;
    two.options.node_ip = Some(underlay(2));
    two.datapath = Some(Datapath::open(&two.options).unwrap());
    for (family, length) in [(4, 24), (6, 64)] {
        let entry = (prefix_key(address(1, 0, family), length), prefix_value(1, underlay(1)));
        two.tables.prefix.upsert(&[entry]).unwrap();
        let key = support::ip_key(1, pod(1, family));
        two.tables.ipcache.upsert(&[(key, support::ip_value(pod_identity(1), underlay(1)))]).unwrap();
    }
    assert_eq!(two.datapath().config().node_ip6, [0; 16]);
    assert_eq!(metric(one.datapath(), reason::UNKNOWN_SENDER), 0);
    refused(&nodes, reason::NO_TUNNEL_KEY);
}

#[test]
fn a_number_that_stands_for_nobody_leads_nowhere() {
    let mut nodes = Node::pair_over_ipv6();
    let key = UnderlayKey { number: number(1).octets() };
    nodes[1].tables.underlay.remove(&[key]).unwrap();
    let before = metric(nodes[1].datapath(), reason::NO_TUNNEL_KEY);
    for family in [4, 6] {
        send(&nodes[1].pod, pod(1, family));
        send(&nodes[1].netns, pod(1, family));
    }
    wait_until("the drops are counted", || metric(nodes[1].datapath(), reason::NO_TUNNEL_KEY) == before + 4);
    nodes[1].tables.underlay.upsert(&[(key, UnderlayValue { ip: underlay6(1).octets() })]).unwrap();
    call(&nodes[1].pod, pod(1, 4)).unwrap();
}

#[test]
fn pods_are_told_what_fits_into_the_tunnel() {
    let nodes = Node::pair_over_ipv6();
    for family in [4, 6] {
        stream(&nodes[0].pod, pod(2, family));
    }
    let told = || metric(nodes[0].datapath(), reason::FRAG_NEEDED);
    assert!(told() > 0);
    // Fragments too, which may be cut: of the first datagram they are lost, and those of the next one fit.
    nodes[0].pod.ip("route flush cache");
    wait_until("a datagram in fragments comes back", || {
        nodes[0].pod.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE / 10)).unwrap();
            socket.send_to(&[7; 2000], (pod(2, 4), ECHO)).unwrap();
            socket.recv_from(&mut [0; 2048]).is_ok_and(|(length, _)| length == 2000)
        })
    });
    assert_eq!(metric(nodes[0].datapath(), reason::TOO_BIG), 0);
    // What just fits is cut nowhere: the other node had nothing to put together.
    let counters = nodes[1].netns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap());
    let put_together = counters.lines().find(|line| line.starts_with("Ip6ReasmReqds"));
    let put_together = put_together.and_then(|line| line.split_whitespace().nth(1));
    assert_eq!(put_together, Some("0"), "{counters}");
}

#[test]
fn pods_do_not_speak_the_overlays_own_protocol() {
    let nodes = Node::pair_over_ipv6();
    let outside: IpAddr = "fd00:99::1".parse().unwrap();
    let prohibited = || metric(nodes[0].datapath(), reason::ENCAPSULATION_PROHIBITED);
    let to = |port| {
        nodes[0].pod.run(|| {
            let socket = UdpSocket::bind("[::]:0").unwrap();
            socket.send_to(b"hello", SocketAddr::new(outside, port)).unwrap();
        });
    };
    to(8473);
    assert_eq!(prohibited(), 0);
    to(8472);
    assert_eq!(prohibited(), 1);
    // Not behind other headers either, however many there are.
    for options in [1, 5, 6, 20] {
        let before = prohibited();
        send_behind(&nodes[0], outside, options, 8472);
        assert_eq!(prohibited(), before + 1, "{options}");
    }
    send_behind(&nodes[0], outside, 5, 8473);
    assert_eq!(prohibited(), 5);
}

/// A datagram behind so many headers of destination options.
fn send_behind(node: &Node, to: IpAddr, options: usize, port: u16) {
    const DESTINATION_OPTIONS: i32 = 60;
    let mut packet = Vec::new();
    for n in 0..options {
        let next = if n + 1 == options { UDP } else { DESTINATION_OPTIONS };
        // Padding of six bytes.
        packet.extend([u8::try_from(next).unwrap(), 0, 1, 4, 0, 0, 0, 0]);
    }
    packet.extend([0x30, 0x39]);
    packet.extend(port.to_be_bytes());
    packet.extend([0, 8, 0, 0]);
    node.pod.run(|| {
        // SAFETY: no pointers.
        let socket = unsafe { libc::socket(libc::AF_INET6, libc::SOCK_RAW, DESTINATION_OPTIONS) };
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just given us this descriptor.
        let socket = unsafe { UdpSocket::from_raw_fd(socket) };
        socket.send_to(&packet, SocketAddr::new(to, 0)).unwrap();
    });
}

/// To policies an own address of the underlay is the node, as with IPv4.
#[test]
fn a_pod_that_may_talk_to_its_node_alone_does() {
    let mut nodes = Node::pair_over_ipv6();
    nodes[0].allow(identity::HOST, direction::EGRESS);
    nodes[0].flag(ebpf_global_svc::abi::ENDPOINT_ENFORCE_EGRESS);
    let denied = || metric(nodes[0].datapath(), reason::POLICY);
    send(&nodes[0].pod, underlay6(1).into());
    assert_eq!(denied(), 0);
    send(&nodes[0].pod, underlay6(2).into());
    assert_eq!(denied(), 1, "another node");
}

#[test]
fn opening_again_loses_no_packet() {
    let mut nodes = Node::pair_over_ipv6();
    for _ in 0..3 {
        for node in &mut nodes {
            drop(node.datapath.take());
        }
        assert_eq!(call(&nodes[0].pod, pod(2, 4)).unwrap(), (pod(2, 4), ECHO).into());
        thread::scope(|scope| {
            let [one, two] = &mut nodes;
            let client = &one.pod;
            let caller = scope.spawn(move || (0..50).try_for_each(|_| call(client, pod(2, 6)).map(drop)));
            for (datapath, options) in [(&mut one.datapath, &one.options), (&mut two.datapath, &two.options)]
            {
                *datapath = Some(Datapath::open(options).unwrap());
            }
            caller.join().unwrap().unwrap();
        });
    }
    assert_eq!(nodes[0].datapath().config().node_ip, number(1).octets());
    assert_eq!(nodes[0].datapath().config().node_ip6, underlay6(1).octets());
    assert_eq!(metric(nodes[0].datapath(), reason::NO_TUNNEL_KEY), 0);
}
