//! Two nodes of two clusters, each with a pod, over a real VXLAN device.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    net::{Ipv4Addr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
};

use ebpf_global_svc::{
    Datapath,
    abi::{EndpointValue, identity, reason},
};
use support::{
    Netns, assert_attached, endpoint, has_links, ip_key, ip_value, metric, node,
    pair::{ECHO, Node, PATIENCE, address, call, pod, pod_identity, refused, router, send, stream, underlay},
    prefix_key, prefix_value, wait_until,
};

#[test]
fn pods_of_two_clusters_talk_and_carry_their_identity() {
    let nodes = Node::pair();
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].pod, pod(2, family)).unwrap(), (pod(2, family), ECHO).into());
        assert_eq!(call(&nodes[1].pod, pod(1, family)).unwrap(), (pod(1, family), ECHO).into());
    }
    // Two requests and two answers in each direction.
    assert_eq!(nodes[1].received(pod_identity(1), underlay(1)), 4);
    assert_eq!(nodes[0].received(pod_identity(2), underlay(2)), 4);
    assert_eq!(metric(nodes[0].datapath(), reason::ENCAPSULATED), 4);
    assert_eq!(metric(nodes[0].datapath(), reason::DECAPSULATED), 4);
}

#[test]
fn a_stream_larger_than_any_packet_arrives_whole() {
    let nodes = Node::pair();
    for family in [4, 6] {
        stream(&nodes[0].pod, pod(2, family));
    }
}

#[test]
fn a_node_reaches_remote_pods_as_a_node() {
    let nodes = Node::pair();
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].netns, pod(2, family)).unwrap(), (pod(2, family), ECHO).into());
    }
    assert_eq!(nodes[1].received(identity::REMOTE_NODE, underlay(1)), 2);
    // And is reached by them.
    assert_eq!(call(&nodes[1].pod, router(1, 4)).unwrap(), (router(1, 4), ECHO).into());
}

#[test]
fn a_node_cannot_speak_for_another_cluster() {
    let mut nodes = Node::pair();
    nodes[1].claim(3 << 16 | 0x1000);
    refused(&nodes, reason::INVALID_CLUSTER_ID);
    nodes[1].claim(pod_identity(1));
    refused(&nodes, reason::INVALID_CLUSTER_ID);
    for reserved in [identity::UNKNOWN, identity::HOST, 255] {
        nodes[1].claim(reserved);
        refused(&nodes, reason::INVALID_IDENTITY);
    }
    let before = nodes[0].received(pod_identity(2), underlay(2));
    nodes[1].claim(pod_identity(2));
    call(&nodes[1].pod, pod(1, 4)).unwrap();
    assert_eq!(nodes[0].received(pod_identity(2), underlay(2)), before + 1);
}

#[test]
fn a_node_cannot_send_from_addresses_of_another_cluster() {
    let mut nodes = Node::pair();
    for (family, length) in [(4, 32), (6, 128)] {
        let entry = (prefix_key(pod(2, family), length), prefix_value(3, Ipv4Addr::new(192, 168, 77, 3)));
        nodes[0].tables.prefix.upsert(&[entry]).unwrap();
    }
    refused(&nodes, reason::INVALID_SOURCE_IP);
}

#[test]
fn a_stranger_is_not_heard() {
    let mut nodes = Node::pair();
    let (key, _) = node(underlay(2), 2);
    nodes[0].tables.node.remove(&[key]).unwrap();
    refused(&nodes, reason::UNKNOWN_SENDER);
}

#[test]
fn a_node_is_no_router_for_others() {
    let mut nodes = Node::pair();
    for (family, length) in [(4, 24), (6, 64)] {
        let key = ip_key(1, pod(1, family));
        nodes[0].tables.endpoint.remove(&[key]).unwrap();
        let elsewhere = Ipv4Addr::new(192, 168, 77, 9);
        nodes[0].tables.ipcache.upsert(&[(key, ip_value(pod_identity(1), elsewhere))]).unwrap();
        let entry = (prefix_key(address(1, 0, family), length), prefix_value(1, elsewhere));
        nodes[0].tables.prefix.upsert(&[entry]).unwrap();
    }
    refused(&nodes, reason::UNKNOWN_TARGET);
}

#[test]
fn a_pod_that_the_agent_has_not_seen_yet_is_reached_through_the_stack() {
    let mut nodes = Node::pair();
    for family in [4, 6] {
        nodes[0].tables.endpoint.remove(&[ip_key(1, pod(1, family))]).unwrap();
        let before = metric(nodes[0].datapath(), reason::TO_STACK);
        send(&nodes[1].pod, pod(1, family));
        wait_until("the packet is the stack's", || {
            metric(nodes[0].datapath(), reason::TO_STACK) > before
                && metric(nodes[0].datapath(), reason::INVALID_SOURCE_IP) > 0
        });
        // The pod's answer is dropped: its address is nobody's as long as the agent does not know it.
    }
}

#[test]
fn truncated_packets_end_at_the_veth() {
    let nodes = Node::pair();
    let EndpointValue { pod_mac, host_mac, .. } = endpoint(0, 0);
    for (ethertype, first, header) in [(0x0800_u16, 0x45, 20), (0x86dd, 0x60, 40)] {
        let mut frame = [host_mac, pod_mac].concat();
        frame.extend(ethertype.to_be_bytes());
        frame.push(first);
        frame.resize(14 + header - 1, 0);
        let before = metric(nodes[0].datapath(), reason::INVALID_PACKET);
        send_frame(&nodes[0].pod, &frame);
        wait_until("the drop is counted", || {
            metric(nodes[0].datapath(), reason::INVALID_PACKET) == before + 1
        });
    }
}

#[test]
fn a_packet_beyond_the_overlays_mtu_is_counted_and_arrives() {
    let nodes = Node::pair();
    nodes[0].netns.ip("link set cm_vxlan mtu 1300");
    let echoed = nodes[0].pod.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(&[7; 1400], (pod(2, 4), ECHO)).unwrap();
        socket.recv_from(&mut [0; 2048]).unwrap().0
    });
    assert_eq!(echoed, 1400);
    assert_eq!(metric(nodes[0].datapath(), reason::TOO_BIG), 1);
}

#[test]
fn opening_again_loses_no_packet_and_forgets_interfaces_that_are_gone() {
    let mut nodes = Node::pair();
    let veth = nodes[0].netns.ifindex("lxc0");
    for _ in 0..5 {
        for node in &mut nodes {
            drop(node.datapath.take());
        }
        // Nobody is there, and traffic flows.
        assert_eq!(call(&nodes[0].pod, pod(2, 4)).unwrap(), (pod(2, 4), ECHO).into());
        thread::scope(|scope| {
            let [one, two] = &mut nodes;
            let target = pod(2, 6);
            let client = &one.pod;
            let caller = scope.spawn(move || (0..50).try_for_each(|_| call(client, target).map(drop)));
            for (datapath, options) in [(&mut one.datapath, &one.options), (&mut two.datapath, &two.options)]
            {
                *datapath = Some(Datapath::open(options).unwrap());
            }
            caller.join().unwrap().unwrap();
        });
    }
    assert_attached(nodes[0].datapath(), &[veth]);
    assert_eq!(metric(nodes[0].datapath(), reason::NO_TUNNEL_KEY), 0);
    attaching_again_loses_no_packet(&mut nodes, veth);

    nodes[0].netns.ip("link delete lxc0");
    drop(nodes[0].datapath.take());
    let mut datapath = Datapath::open(&nodes[0].options).unwrap();
    assert_eq!(datapath.attached_pods().unwrap(), Vec::<u32>::new());
    datapath.detach_pod(veth).expect("nothing to do is fine");
    nodes[0].netns.run(|| datapath.attach_pod(veth)).expect_err("the interface is gone");
}

/// As an agent does that finds no links, and one that does is none the worse for it. It replaces the programs.
fn attaching_again_loses_no_packet(nodes: &mut [Node; 2], veth: u32) {
    let [one, _] = nodes;
    thread::scope(|scope| {
        let client = &one.pod;
        let caller = scope.spawn(move || (0..50).try_for_each(|_| call(client, pod(2, 4)).map(drop)));
        let datapath = one.datapath.as_mut().unwrap();
        one.netns.run(|| (0..5).for_each(|_| datapath.attach_pod(veth).unwrap()));
        caller.join().unwrap().unwrap();
    });
    assert_attached(one.datapath(), &[veth]);
    if !has_links() {
        assert_eq!(one.netns.filters("lxc0", "ingress"), ["cm_from_pod"]);
        assert_eq!(one.netns.filters("lxc0", "egress"), ["cm_to_pod"]);
    }
}

/// Sends a frame as it is through the pod's veth.
fn send_frame(netns: &Netns, frame: &[u8]) {
    let ifindex = netns.ifindex("eth0");
    netns.run(|| {
        // SAFETY: no pointers.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(socket >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just given us this descriptor.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: integers only, for which zero is valid.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        to.sll_ifindex = ifindex.cast_signed();
        let length = libc::socklen_t::try_from(size_of_val(&to)).unwrap();
        // SAFETY: frame and address have the lengths that are passed.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                length,
            )
        };
        assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{}", std::io::Error::last_os_error());
    });
}
