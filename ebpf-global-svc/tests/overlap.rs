//! Two clusters whose pods have the same addresses, each known to the other by virtual ones.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    io::ErrorKind,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use ebpf_global_svc::{
    Arrival, Datapath,
    abi::{
        ENDPOINT_ENFORCE_INGRESS, EndpointValue, POLICY_PORT_BITS, PREFIX_VIRTUAL, PolicyKey, PolicyValue,
        PrefixValue, direction, identity, reason, translate,
    },
};
use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice, icmpv4,
    icmpv6,
};
use support::{
    Netns, Root, TCP, UDP, endpoint, ip_key, metric,
    pair::{ECHO, Node, PATIENCE, VIRTUAL, address, call, pod, pod_identity, router, send, stream, underlay},
    prefix_key, prefix_value, translation, wait_until,
};

/// The pod of a cluster, as the other one knows it.
fn seen(cluster: u16, family: u8) -> IpAddr {
    pod(VIRTUAL + cluster, family)
}

#[test]
fn pods_with_equal_addresses_talk_and_carry_their_identity() {
    let nodes = Node::overlapping_pair();
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].pod, seen(2, family)).unwrap(), (seen(2, family), ECHO).into());
        assert_eq!(call(&nodes[1].pod, seen(1, family)).unwrap(), (seen(1, family), ECHO).into());
        // One's own address is one's own.
        assert_eq!(call(&nodes[0].pod, pod(1, family)).unwrap(), (pod(1, family), ECHO).into());
    }
    assert_eq!(nodes[1].received(pod_identity(1), underlay(1)), 4);
    assert_eq!(nodes[0].received(pod_identity(2), underlay(2)), 4);
}

#[test]
fn a_stream_arrives_whole() {
    let nodes = Node::overlapping_pair();
    for family in [4, 6] {
        stream(&nodes[0].pod, seen(2, family));
    }
}

#[test]
fn a_node_reaches_pods_by_their_virtual_addresses_and_is_reached() {
    let nodes = Node::overlapping_pair();
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].netns, seen(2, family)).unwrap(), (seen(2, family), ECHO).into());
    }
    assert_eq!(nodes[1].received(identity::REMOTE_NODE, underlay(1)), 2);
    let router = router(VIRTUAL + 1, 4);
    assert_eq!(call(&nodes[1].pod, router).unwrap(), (router, ECHO).into());
}

#[test]
fn fragments_and_datagrams_without_checksum_arrive() {
    let nodes = Node::overlapping_pair();
    let big: Vec<u8> = (0..4000_u32).map(|n| n.to_le_bytes()[0]).collect();
    for (family, checksum) in [(4, true), (4, false), (6, true)] {
        let received = nodes[0].pod.run(|| {
            let socket = UdpSocket::bind(if family == 4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            if !checksum {
                let on: libc::c_int = 1;
                // SAFETY: a valid descriptor, and a value of the size that is passed.
                let set = unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        libc::SOL_SOCKET,
                        libc::SO_NO_CHECK,
                        (&raw const on).cast(),
                        libc::socklen_t::try_from(size_of_val(&on)).unwrap(),
                    )
                };
                assert_eq!(set, 0);
            }
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut buffer = vec![0; 8192];
            // The echo's buffer ends at 2048 bytes: what comes back is the beginning of what arrived whole.
            socket.send_to(&big, (seen(2, family), ECHO)).unwrap();
            let (length, _) = socket.recv_from(&mut buffer).unwrap();
            buffer.truncate(length);
            buffer
        });
        assert!(received == big[..2048], "{} bytes", received.len());
    }
}

/// The error names the packet as its sender knows it, else no socket would get it.
#[test]
fn errors_reach_who_caused_them() {
    let nodes = Node::overlapping_pair();
    for (family, netns) in
        [(4, &nodes[0].pod), (6, &nodes[0].pod), (4, &nodes[0].netns), (6, &nodes[0].netns)]
    {
        let error = netns.run(|| {
            let socket = UdpSocket::bind(if family == 4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect((seen(2, family), ECHO + 1)).unwrap();
            socket.send(b"nobody listens there").unwrap();
            socket.recv(&mut [0; 64]).unwrap_err()
        });
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "IPv{family}: {error}");
    }
}

#[test]
fn policy_sees_virtual_addresses_and_real_identities() {
    let mut nodes = Node::overlapping_pair();
    let veth = nodes[1].netns.ifindex("lxc0");
    for family in [4, 6] {
        let value = EndpointValue { flags: ENDPOINT_ENFORCE_INGRESS, ..endpoint(veth, pod_identity(2)) };
        nodes[1].tables.endpoint.upsert(&[(ip_key(2, pod(1, family)), value)]).unwrap();
    }
    let denied = metric(nodes[1].datapath(), reason::POLICY);
    send(&nodes[0].pod, seen(2, 4));
    wait_until("the drop is counted", || metric(nodes[1].datapath(), reason::POLICY) == denied + 1);
    for proto in [TCP, UDP] {
        let key = PolicyKey {
            prefixlen: POLICY_PORT_BITS,
            subject: pod_identity(2),
            peer: pod_identity(1),
            direction: direction::INGRESS,
            proto,
            port: ECHO.to_be(),
        };
        nodes[1].tables.policy.upsert(&[(key, PolicyValue { flags: 0, rule: 1 })]).unwrap();
    }
    for family in [4, 6] {
        call(&nodes[0].pod, seen(2, family)).unwrap();
        // And the answers to what it says itself.
        call(&nodes[1].pod, seen(1, family)).unwrap();
    }
}

#[test]
fn what_has_no_counterpart_does_not_pass() {
    let mut nodes = Node::overlapping_pair();
    let entries = |way: u8| -> Vec<_> {
        let of =
            |(family, length)| translation(2, address(1, 0, family), address(VIRTUAL + 2, 0, family), length);
        [(4, 24), (6, 64)].into_iter().flat_map(of).map(|(key, _)| key).filter(|key| key.way == way).collect()
    };
    let count = |node: &Node, reason| metric(node.datapath(), reason);
    // Its real addresses are this cluster's: nobody may speak from them.
    nodes[0].tables.translate.remove(&entries(translate::TO_VIRTUAL)).unwrap();
    for family in [4, 6] {
        let before = count(&nodes[0], reason::INVALID_SOURCE_IP);
        send(&nodes[1].pod, seen(1, family));
        wait_until("it is dropped", || count(&nodes[0], reason::INVALID_SOURCE_IP) == before + 1);
    }
    nodes[0].tables.translate.remove(&entries(translate::TO_REAL)).unwrap();
    for (family, from) in [(4, &nodes[0].pod), (6, &nodes[0].pod), (4, &nodes[0].netns), (6, &nodes[0].netns)]
    {
        let before = count(&nodes[0], reason::NO_MAPPING);
        send(from, seen(2, family));
        wait_until("it is dropped", || count(&nodes[0], reason::NO_MAPPING) == before + 1);
    }
}

/// One node without a network: packets go through `cm_from_pod` and are looked at.
struct Sender {
    datapath: Datapath,
    ifindex: u32,
    _root: Root,
    netns: Netns,
}

impl Sender {
    fn new() -> Self {
        let netns = Netns::new("overlap");
        netns.ip("link add pod0 type veth peer name eth0");
        netns.ip("link add cm_vxlan type vxlan external dstport 8472");
        let (ifindex, overlay) = (netns.ifindex("pod0"), netns.ifindex("cm_vxlan"));
        let root = Root::new();
        let mut options = root.options(1);
        options.node_ip = Some(underlay(1));
        let mut datapath = Datapath::open(&options).unwrap();
        netns.run(|| datapath.attach_overlay(overlay).unwrap());
        let mut tables = datapath.tables().unwrap();
        for (family, length) in [(4, 24), (6, 64)] {
            tables
                .endpoint
                .upsert(&[(ip_key(1, pod(1, family)), endpoint(ifindex, pod_identity(1)))])
                .unwrap();
            tables
                .prefix
                .upsert(&[(prefix_key(address(1, 0, family), length), prefix_value(1, underlay(1)))])
                .unwrap();
            let there = address(VIRTUAL + 2, 0, family);
            let value = PrefixValue { flags: PREFIX_VIRTUAL, ..prefix_value(2, underlay(2)) };
            tables.prefix.upsert(&[(prefix_key(there, length), value)]).unwrap();
            tables.translate.upsert(&translation(2, address(1, 0, family), there, length)).unwrap();
        }
        Self { datapath, ifindex, _root: root, netns }
    }

    /// The packet as it goes into the tunnel.
    #[track_caller]
    fn sends(&self, frame: &[u8]) -> Vec<u8> {
        self.netns.run(|| self.sends_here(frame))
    }

    /// The same, by a thread that is in the node's namespace.
    #[track_caller]
    fn sends_here(&self, frame: &[u8]) -> Vec<u8> {
        const REDIRECTED: i32 = 7;
        let arrival = Arrival { ifindex: self.ifindex, ..Arrival::default() };
        let trial = self.datapath.trial("cm_from_pod", frame, arrival, 1).unwrap();
        assert_eq!(trial.verdict, REDIRECTED);
        trial.packet
    }
}

/// The pod's Ethernet and IP headers, to a pod of the other cluster.
fn ip_headers(family: u8) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
    match (pod(1, family), seen(2, family)) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!(),
    }
}

/// Source and destination of a packet, whose checksums are right.
#[track_caller]
fn checked(frame: &[u8]) -> (IpAddr, IpAddr) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let addresses = match packet.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum(), "of the IP header");
            (header.source.into(), header.destination.into())
        }
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let (found, right) = match packet.transport.as_ref().unwrap() {
        TransportSlice::Tcp(tcp) => {
            let (header, payload) = (tcp.to_header(), tcp.payload());
            let v4 = |a, b| header.calc_checksum_ipv4_raw(a, b, payload).unwrap();
            let v6 = |a, b| header.calc_checksum_ipv6_raw(a, b, payload).unwrap();
            (header.checksum, over(addresses, v4, v6))
        }
        TransportSlice::Udp(udp) => {
            let (header, payload) = (udp.to_header(), udp.payload());
            let v4 = |a, b| header.calc_checksum_ipv4_raw(a, b, payload).unwrap();
            let v6 = |a, b| header.calc_checksum_ipv6_raw(a, b, payload).unwrap();
            (header.checksum, over(addresses, v4, v6))
        }
        TransportSlice::Icmpv4(icmp) => {
            let header = icmp.header();
            (header.checksum, header.icmp_type.calc_checksum(icmp.payload()))
        }
        TransportSlice::Icmpv6(icmp) => {
            let (IpAddr::V6(a), IpAddr::V6(b)) = addresses else { panic!() };
            let header = icmp.header();
            let right = header.icmp_type.calc_checksum(a.octets(), b.octets(), icmp.payload());
            (header.checksum, right.unwrap())
        }
        TransportSlice::Igmp(_) => panic!("IGMP"),
    };
    assert_eq!(found, right, "of what is in it");
    addresses
}

/// A checksum over addresses of either family.
fn over(
    addresses: (IpAddr, IpAddr),
    v4: impl Fn([u8; 4], [u8; 4]) -> u16,
    v6: impl Fn([u8; 16], [u8; 16]) -> u16,
) -> u16 {
    match addresses {
        (IpAddr::V4(a), IpAddr::V4(b)) => v4(a.octets(), b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => v6(a.octets(), b.octets()),
        _ => unreachable!(),
    }
}

/// Payloads of all lengths, and of bytes for which sums overflow in all ways.
fn payloads() -> impl Iterator<Item = Vec<u8>> {
    let byte = |n: usize, at: usize| match n % 3 {
        0 => 0xff,
        1 => 0,
        _ => (n.wrapping_mul(31) ^ at.wrapping_mul(167)).to_le_bytes()[0],
    };
    (0..200).map(move |n| (0..n).map(|at| byte(n, at)).collect())
}

#[test]
fn only_the_destination_and_checksums_change() {
    let sender = Sender::new();
    for family in [4, 6] {
        for payload in payloads() {
            let n = u16::try_from(payload.len()).unwrap();
            let packets: Vec<Vec<u8>> = {
                let written = |step: &dyn Fn(&mut Vec<u8>)| {
                    let mut frame = Vec::new();
                    step(&mut frame);
                    frame
                };
                vec![
                    written(&|out| {
                        ip_headers(family)
                            .tcp(n.wrapping_mul(7919), 80, 1 << 31, 4000)
                            .write(out, &payload)
                            .unwrap();
                    }),
                    written(&|out| {
                        ip_headers(family).udp(n.wrapping_mul(7919), 53).write(out, &payload).unwrap();
                    }),
                    written(&|out| match family {
                        4 => ip_headers(4).icmpv4_echo_request(n, 1).write(out, &payload).unwrap(),
                        _ => ip_headers(6).icmpv6_echo_request(n, 1).write(out, &payload).unwrap(),
                    }),
                ]
            };
            for packet in packets {
                let (from, to) = checked(&packet);
                assert_eq!((from, to), (pod(1, family), seen(2, family)));
                let sent = sender.sends(&packet);
                assert_eq!(checked(&sent), (pod(1, family), pod(1, family)));
                assert_eq!(sent.len(), packet.len());
                let changed = sent.iter().zip(&packet).filter(|(a, b)| a != b).count();
                // IPv4: a byte or two of the address, two checksums; IPv6: parts of two words of the address.
                assert!((1..=6).contains(&changed), "{changed} bytes");
            }
        }
    }
}

/// There is no source port to run out of: one pod has more flows to one address than a translator of sources has ports,
/// each keeps its own, and nothing is remembered of any.
#[test]
fn more_flows_than_ports_are_translated_without_state() {
    let sender = Sender::new();
    sender.netns.run(|| {
        // Every source port to one port, and one more to another.
        let flows = || (0..=u16::MAX).map(|port| (port, 80)).chain([(0, 81)]);
        for (family, (source, to)) in
            [4, 6].into_iter().flat_map(|family| flows().map(move |flow| (family, flow)))
        {
            let mut frame = Vec::new();
            ip_headers(family).udp(source, to).write(&mut frame, b"hello").unwrap();
            let packet = sender.sends_here(&frame);
            assert_eq!(checked(&packet), (pod(1, family), pod(1, family)));
            let sliced = SlicedPacket::from_ethernet(&packet).unwrap();
            let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!() };
            assert_eq!((udp.source_port(), udp.destination_port()), (source, to));
        }
    });
    assert_eq!(metric(&sender.datapath, reason::ENCAPSULATED), 2 * 65_537);
    assert_eq!(sender.datapath.flows().unwrap(), []);
    assert_eq!(sender.datapath.sock_rev().unwrap(), []);
}

#[test]
fn an_error_holds_the_packet_as_it_was_sent() {
    let sender = Sender::new();
    for family in [4, 6] {
        for payload in payloads() {
            // It came from there, with its real source; here it was the virtual one.
            let mut cause = Vec::new();
            match (seen(2, family), pod(1, family)) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64);
                    builder.udp(4000, 53).write(&mut cause, &payload).unwrap();
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    let builder = PacketBuilder::ipv6(from.octets(), to.octets(), 64);
                    builder.udp(4000, 53).write(&mut cause, &payload).unwrap();
                }
                _ => unreachable!(),
            }
            let mut packet = Vec::new();
            match family {
                4 => {
                    let kind = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
                    ip_headers(4).icmpv4(kind).write(&mut packet, &cause).unwrap();
                }
                _ => {
                    let kind = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
                    ip_headers(6).icmpv6(kind).write(&mut packet, &cause).unwrap();
                }
            }
            let sent = sender.sends(&packet);
            assert_eq!(checked(&sent), (pod(1, family), pod(1, family)));
            let embedded = &sent[sent.len() - cause.len()..];
            let ip = SlicedPacket::from_ip(embedded).unwrap();
            match ip.net.unwrap() {
                NetSlice::Ipv4(ip) => {
                    let header = ip.header().to_header();
                    assert_eq!(header.header_checksum, header.calc_header_checksum());
                    assert_eq!(IpAddr::from(header.source), pod(1, 4));
                }
                NetSlice::Ipv6(ip) => assert_eq!(IpAddr::from(ip.header().source_addr()), pod(1, 6)),
                NetSlice::Arp(_) => panic!("ARP"),
            }
        }
    }
}

/// Cut off anywhere, it is sent or dropped, and nothing behind it is read.
#[test]
fn truncated_packets_do_no_harm() {
    let sender = Sender::new();
    let echo = IcmpEchoHeader { id: 1, seq: 1 };
    let mut packets = vec![Vec::new(), Vec::new(), Vec::new()];
    ip_headers(4).tcp(1, 2, 3, 4).write(&mut packets[0], &[7; 8]).unwrap();
    ip_headers(6).udp(1, 2).write(&mut packets[1], &[7; 8]).unwrap();
    ip_headers(4).icmpv4(Icmpv4Type::EchoRequest(echo)).write(&mut packets[2], &[7; 8]).unwrap();
    for packet in packets {
        // The kernel itself makes sure of the IP header.
        let headers = if packet[12] == 8 { 34 } else { 54 };
        for length in headers..packet.len() {
            let arrival = Arrival { ifindex: sender.ifindex, ..Arrival::default() };
            let cut = &packet[..length];
            let trial = sender.netns.run(|| sender.datapath.trial("cm_from_pod", cut, arrival, 1).unwrap());
            assert!(matches!(trial.verdict, 0 | 2 | 7), "{}", trial.verdict);
            if trial.verdict == 7 {
                assert_eq!(trial.packet.len(), length);
            }
        }
    }
}
