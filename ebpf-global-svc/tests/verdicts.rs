//! Verdicts of the interface programs on single packets, without a network.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_global_svc::{
    Arrival, Datapath, Tables, Trial,
    abi::{ENDPOINT_VIA_STACK, EndpointValue, reason},
};
use support::{Netns, Root, endpoint, ip_key, ip_value, metric, prefix_key, prefix_value};

const OWN: u16 = 1;
const PEER: u16 = 2;
const THIS_NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
const PEER_NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 2);

const TO_STACK: i32 = 0;
const DROPPED: i32 = 2;
const REDIRECTED: i32 = 7;

const FRAME_SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
const FRAME_DESTINATION: [u8; 6] = [2, 0, 0, 0, 0, 0xbb];

/// A node with two pods of each family on one interface, and a peer cluster.
struct Node {
    datapath: Datapath,
    tables: Tables,
    pod_ifindex: u32,
    _root: Root,
    netns: Netns,
}

impl Node {
    fn new() -> Self {
        let netns = Netns::new("verdicts");
        netns.ip("link add pod0 type veth peer name eth0");
        netns.ip("link add cm_vxlan type vxlan external dstport 8472");
        let pod_ifindex = netns.ifindex("pod0");
        let overlay = netns.ifindex("cm_vxlan");
        let root = Root::new();
        let mut options = root.options(OWN);
        options.node_ip = Some(THIS_NODE);
        let mut datapath = Datapath::open(&options).unwrap();
        netns.run(|| datapath.attach_overlay(overlay).unwrap());
        let mut tables = datapath.tables().unwrap();
        for (n, family) in [1, 2].into_iter().flat_map(|n| [(n, 4), (n, 6)]) {
            let entry = (ip_key(OWN, pod(OWN, n, family)), endpoint(pod_ifindex, 0x1_0000 + u32::from(n)));
            tables.endpoint.upsert(&[entry]).unwrap();
        }
        for (cluster, node) in [(OWN, THIS_NODE), (PEER, PEER_NODE)] {
            for (family, length) in [(4, 24), (6, 64)] {
                let entry = (prefix_key(pod(cluster, 0, family), length), prefix_value(cluster, node));
                tables.prefix.upsert(&[entry]).unwrap();
            }
        }
        Self { datapath, tables, pod_ifindex, _root: root, netns }
    }

    fn run(&self, program: &str, frame: &[u8]) -> Trial {
        let Self { datapath, pod_ifindex: ifindex, .. } = self;
        self.netns.run(|| datapath.trial(program, frame, at(*ifindex), 1).unwrap())
    }

    /// Runs a packet that leaves a pod, and expects a verdict and one more of one counter.
    #[track_caller]
    fn pod_sends(&self, frame: &[u8], verdict: i32, reason: u8) -> Vec<u8> {
        self.expect("cm_from_pod", frame, verdict, reason)
    }

    #[track_caller]
    fn expect(&self, program: &str, frame: &[u8], verdict: i32, reason: u8) -> Vec<u8> {
        let before = metric(&self.datapath, reason);
        let trial = self.run(program, frame);
        assert_eq!(trial.verdict, verdict);
        assert_eq!(metric(&self.datapath, reason), before + 1, "counter {reason}");
        trial.packet
    }
}

fn at(ifindex: u32) -> Arrival {
    Arrival { ifindex, ..Arrival::default() }
}

fn pod(cluster: u16, n: u8, family: u8) -> IpAddr {
    match family {
        4 => Ipv4Addr::new(10, cluster.to_be_bytes()[1], 0, n).into(),
        _ => Ipv6Addr::new(0xfd00, 10, cluster, 0, 0, 0, 0, n.into()).into(),
    }
}

/// An Ethernet frame with an IP header and 32 bytes behind it.
fn frame(source: IpAddr, destination: IpAddr) -> Vec<u8> {
    let mut frame = [FRAME_DESTINATION, FRAME_SOURCE].concat();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend([0x08, 0x00, 0x45, 0, 0, 52, 0, 0, 0, 0, 64, 17, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 17, 64]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        _ => panic!("one family, please"),
    }
    frame.extend([0; 32]);
    frame
}

#[test]
fn a_pod_reaches_a_pod_of_its_node() {
    let node = Node::new();
    for family in [4, 6] {
        let packet = frame(pod(OWN, 1, family), pod(OWN, 2, family));
        let after = node.pod_sends(&packet, REDIRECTED, reason::FORWARDED);
        let EndpointValue { pod_mac, host_mac, .. } = endpoint(0, 0);
        assert_eq!(after[..6], pod_mac);
        assert_eq!(after[6..12], host_mac);
        assert_eq!(after[12..], packet[12..], "nothing else changes");
    }
}

#[test]
fn a_pod_without_a_known_mac_gets_its_packets_from_the_stack() {
    let mut node = Node::new();
    let value = EndpointValue { flags: ENDPOINT_VIA_STACK, ..endpoint(node.pod_ifindex, 7) };
    node.tables.endpoint.upsert(&[(ip_key(OWN, pod(OWN, 2, 4)), value)]).unwrap();
    let packet = frame(pod(OWN, 1, 4), pod(OWN, 2, 4));
    assert_eq!(node.pod_sends(&packet, TO_STACK, reason::TO_STACK), packet);
}

#[test]
fn a_remote_pod_is_reached_through_its_node_even_before_its_address_is_known() {
    let mut node = Node::new();
    for family in [4, 6] {
        let packet = frame(pod(OWN, 1, family), pod(PEER, 9, family));
        assert_eq!(
            node.pod_sends(&packet, REDIRECTED, reason::ENCAPSULATED),
            packet,
            "by its node's pod CIDR"
        );
        let entry = (ip_key(PEER, pod(PEER, 9, family)), ip_value(0x2_0009, PEER_NODE));
        node.tables.ipcache.upsert(&[entry]).unwrap();
        assert_eq!(node.pod_sends(&packet, REDIRECTED, reason::ENCAPSULATED), packet, "by its address");
        let entry = (ip_key(PEER, pod(PEER, 9, family)), ip_value(0x2_0009, Ipv4Addr::UNSPECIFIED));
        node.tables.ipcache.upsert(&[entry]).unwrap();
        node.pod_sends(&packet, DROPPED, reason::NO_TUNNEL_ENDPOINT);
    }
}

#[test]
fn the_longest_prefix_names_the_cluster() {
    let mut node = Node::new();
    let entry = (prefix_key(pod(PEER, 128, 4), 25), prefix_value(3, Ipv4Addr::UNSPECIFIED));
    node.tables.prefix.upsert(&[entry]).unwrap();
    node.pod_sends(&frame(pod(OWN, 1, 4), pod(PEER, 127, 4)), REDIRECTED, reason::ENCAPSULATED);
    node.pod_sends(&frame(pod(OWN, 1, 4), pod(PEER, 128, 4)), DROPPED, reason::NO_TUNNEL_ENDPOINT);
    // The address is known in cluster 3, which is where the prefix says it is.
    let entry = (ip_key(3, pod(PEER, 128, 4)), ip_value(0x3_0001, PEER_NODE));
    node.tables.ipcache.upsert(&[entry]).unwrap();
    node.pod_sends(&frame(pod(OWN, 1, 4), pod(PEER, 128, 4)), REDIRECTED, reason::ENCAPSULATED);
}

#[test]
fn a_pod_cannot_send_from_an_address_that_is_not_its_own() {
    let mut node = Node::new();
    for family in [4, 6] {
        let destination = pod(PEER, 9, family);
        // Nobody's, a remote pod's, and that of a pod behind another interface.
        node.pod_sends(&frame(pod(OWN, 77, family), destination), DROPPED, reason::INVALID_SOURCE_IP);
        node.pod_sends(&frame(pod(PEER, 1, family), destination), DROPPED, reason::INVALID_SOURCE_IP);
        let other = (ip_key(OWN, pod(OWN, 3, family)), endpoint(node.pod_ifindex + 1, 3));
        node.tables.endpoint.upsert(&[other]).unwrap();
        node.pod_sends(&frame(pod(OWN, 3, family), destination), DROPPED, reason::INVALID_SOURCE_IP);
    }
    // Nor to places outside of the mesh.
    let outside = Ipv4Addr::new(1, 1, 1, 1).into();
    node.pod_sends(&frame(pod(OWN, 77, 4), outside), DROPPED, reason::INVALID_SOURCE_IP);
}

#[test]
fn what_is_not_for_the_mesh_goes_to_the_stack() {
    let mut node = Node::new();
    let outside4 = frame(pod(OWN, 1, 4), Ipv4Addr::new(1, 1, 1, 1).into());
    let outside6 = frame(pod(OWN, 1, 6), "2001:db8::1".parse().unwrap());
    let own_node = frame(pod(OWN, 1, 4), THIS_NODE.into());
    let mut arp = [FRAME_DESTINATION, FRAME_SOURCE].concat();
    arp.extend([0x08, 0x06]);
    arp.extend([0; 28]);
    // What keeps the link alive may come from addresses that are no endpoint's.
    let dhcp = frame(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into());
    let link_local = "fe80::2".parse().unwrap();
    let router_solicitation = frame(link_local, "ff02::2".parse().unwrap());
    let neighbour_solicitation = frame(link_local, "fe80::1".parse().unwrap());
    for packet in [outside4, outside6, own_node, arp, dhcp, router_solicitation, neighbour_solicitation] {
        assert_eq!(node.pod_sends(&packet, TO_STACK, reason::TO_STACK), packet);
    }
    // An address of this node in its own pod CIDR, known or not.
    let router = pod(OWN, 254, 4);
    node.pod_sends(&frame(pod(OWN, 1, 4), router), TO_STACK, reason::TO_STACK);
    node.tables.ipcache.upsert(&[(ip_key(OWN, router), ip_value(6, THIS_NODE))]).unwrap();
    node.pod_sends(&frame(pod(OWN, 1, 4), router), TO_STACK, reason::TO_STACK);
}

#[test]
fn malformed_packets_are_dropped() {
    let node = Node::new();
    for family in [4, 6] {
        let mut packet = frame(pod(OWN, 1, family), pod(PEER, 9, family));
        packet[14] ^= 0xf0;
        for program in ["cm_from_pod", "cm_to_overlay"] {
            node.expect(program, &packet, DROPPED, reason::INVALID_PACKET);
        }
    }
    let mut short_header = frame(pod(OWN, 1, 4), pod(PEER, 9, 4));
    short_header[14] = 0x44;
    node.pod_sends(&short_header, DROPPED, reason::INVALID_PACKET);
}

#[test]
fn what_the_node_sends_into_the_overlay_needs_a_destination_in_the_mesh() {
    let node = Node::new();
    for family in [4, 6] {
        let packet = frame(pod(OWN, 254, family), pod(PEER, 9, family));
        assert_eq!(node.expect("cm_to_overlay", &packet, TO_STACK, reason::ENCAPSULATED), packet);
    }
    let outside = frame(pod(OWN, 254, 4), Ipv4Addr::new(1, 1, 1, 1).into());
    node.expect("cm_to_overlay", &outside, DROPPED, reason::NO_TUNNEL_ENDPOINT);
}

#[test]
fn a_packet_that_no_tunnel_brought_is_dropped_at_the_overlay() {
    let node = Node::new();
    let packet = frame(pod(PEER, 9, 4), pod(OWN, 1, 4));
    node.expect("cm_from_overlay", &packet, DROPPED, reason::NO_TUNNEL_KEY);
}

#[test]
fn a_pod_cannot_pass_for_its_node_on_the_underlay() {
    let node = Node::new();
    let mut packet = frame(pod(OWN, 1, 4), PEER_NODE.into());
    node.pod_sends(&packet, TO_STACK, reason::TO_STACK);
    packet[14 + 20 + 2..][..2].copy_from_slice(&8472_u16.to_be_bytes());
    node.pod_sends(&packet, DROPPED, reason::ENCAPSULATION_PROHIBITED);
    // With options the port is elsewhere.
    packet[14] = 0x46;
    node.pod_sends(&packet, TO_STACK, reason::TO_STACK);
    packet[14 + 24 + 2..][..2].copy_from_slice(&8472_u16.to_be_bytes());
    node.pod_sends(&packet, DROPPED, reason::ENCAPSULATION_PROHIBITED);
    // A later fragment has no ports; TCP has another purpose for them.
    packet[14 + 7] = 1;
    node.pod_sends(&packet, TO_STACK, reason::TO_STACK);
    packet[14 + 7] = 0;
    packet[14 + 9] = 6;
    node.pod_sends(&packet, TO_STACK, reason::TO_STACK);
}

#[test]
fn a_node_without_an_overlay_drops_what_would_need_it() {
    let netns = Netns::new("bare");
    netns.ip("link add pod0 type veth peer name eth0");
    let ifindex = netns.ifindex("pod0");
    let root = Root::new();
    let datapath = Datapath::open(&root.options(OWN)).unwrap();
    let mut tables = datapath.tables().unwrap();
    tables.endpoint.upsert(&[(ip_key(OWN, pod(OWN, 1, 4)), endpoint(ifindex, 1))]).unwrap();
    tables.prefix.upsert(&[(prefix_key(pod(PEER, 0, 4), 24), prefix_value(PEER, PEER_NODE))]).unwrap();
    let packet = frame(pod(OWN, 1, 4), pod(PEER, 9, 4));
    let trial = netns.run(|| datapath.trial("cm_from_pod", &packet, at(ifindex), 1).unwrap());
    assert_eq!(trial.verdict, DROPPED);
    assert_eq!(metric(&datapath, reason::NO_TUNNEL_ENDPOINT), 1);
}

#[test]
fn time_per_packet() {
    let mut node = Node::new();
    let entry = (ip_key(PEER, pod(PEER, 9, 4)), ip_value(0x2_0009, PEER_NODE));
    node.tables.ipcache.upsert(&[entry]).unwrap();
    for (what, packet) in [
        ("pod to pod of this node", frame(pod(OWN, 1, 4), pod(OWN, 2, 4))),
        ("pod to remote pod", frame(pod(OWN, 1, 4), pod(PEER, 9, 4))),
        ("pod to the outside", frame(pod(OWN, 1, 4), Ipv4Addr::new(1, 1, 1, 1).into())),
        ("spoofed source", frame(pod(OWN, 77, 4), pod(PEER, 9, 4))),
    ] {
        let Node { datapath, pod_ifindex: ifindex, .. } = &node;
        let trial = node.netns.run(|| datapath.trial("cm_from_pod", &packet, at(*ifindex), 100_000).unwrap());
        println!("{what:24} {:4} ns", trial.duration.as_nanos());
        // No promise, but a program that takes this long has a loop that it should not have.
        assert!(trial.duration.as_micros() < 20, "{what}: {trial:?}");
    }
}
