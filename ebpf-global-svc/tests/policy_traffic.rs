//! Policies between two nodes, with real traffic: what arrives through the overlay, and what the stack delivers.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpStream, UdpSocket},
};

use aya::programs::{SchedClassifier, TcAttachType, tc};
use ebpf_global_svc::{
    Datapath,
    abi::{
        ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, ENDPOINT_VIA_STACK, POLICY_PORT_BITS, PolicyKey,
        PolicyValue, direction, identity, reason,
    },
};
use support::{
    Netns, UDP, assert_attached, has_links, metric,
    pair::{ECHO, Node, PATIENCE, call, pod, pod_identity, send, underlay},
    prefix_key, wait_until,
};

const BOTH: u32 = ENDPOINT_ENFORCE_INGRESS | ENDPOINT_ENFORCE_EGRESS;

/// Sends to the pod of node 1, which drops it for `reason`, in both families.
#[track_caller]
fn refused(nodes: &[Node; 2], from: &Netns, reason: u8) {
    let datapath = nodes[0].datapath();
    for family in [4, 6] {
        let before = metric(datapath, reason);
        send(from, pod(1, family));
        wait_until("the drop is counted", || metric(datapath, reason) == before + 1);
    }
}

#[track_caller]
fn answered(from: &Netns, to: IpAddr) {
    assert_eq!(call(from, to).unwrap(), (to, ECHO).into());
}

/// A stream there and back, and no drop of any policy.
#[track_caller]
fn streams(nodes: &[Node; 2], from: &Netns, to: IpAddr) {
    let echoed = from.run(|| {
        let mut stream = TcpStream::connect((to, ECHO)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[7; 100_000]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut echoed = Vec::new();
        stream.read_to_end(&mut echoed).unwrap();
        echoed.len()
    });
    assert_eq!(echoed, 100_000);
    for node in nodes {
        for drop in [reason::POLICY, reason::POLICY_DENY, reason::UNKNOWN_IDENTITY] {
            assert_eq!(metric(node.datapath(), drop), 0);
        }
    }
}

#[test]
fn a_remote_pod_is_let_in_by_its_identity() {
    let mut nodes = Node::pair();
    nodes[0].flag(ENDPOINT_ENFORCE_INGRESS);
    refused(&nodes, &nodes[1].pod, reason::POLICY);
    refused(&nodes, &nodes[1].netns, reason::POLICY);
    let key = nodes[0].allow(pod_identity(2), direction::INGRESS);
    for family in [4, 6] {
        answered(&nodes[1].pod, pod(1, family));
    }
    refused(&nodes, &nodes[1].netns, reason::POLICY);
    nodes[0].allow(identity::REMOTE_NODE, direction::INGRESS);
    answered(&nodes[1].netns, pod(1, 4));
    // Its answers came by a record, and so do those to what it sends itself.
    nodes[0].tables.policy.remove(&[key]).unwrap();
    answered(&nodes[0].pod, pod(2, 4));
    refused(&nodes, &nodes[1].pod, reason::POLICY);
}

#[test]
fn streams_pass_when_both_ends_have_policies() {
    let mut nodes = Node::pair();
    for node in &mut nodes {
        node.flag(BOTH);
    }
    nodes[0].allow(pod_identity(2), direction::EGRESS);
    nodes[1].allow(pod_identity(1), direction::INGRESS);
    for family in [4, 6] {
        streams(&nodes, &nodes[0].pod, pod(2, family));
    }
    refused(&nodes, &nodes[0].netns, reason::POLICY);
}

#[test]
fn a_large_datagram_passes_in_fragments() {
    let mut nodes = Node::pair();
    for node in &mut nodes {
        node.flag(BOTH);
    }
    let port = |subject, peer, direction| {
        let port = ECHO.to_be();
        let key = PolicyKey { prefixlen: POLICY_PORT_BITS, subject, peer, direction, proto: UDP, port };
        (key, PolicyValue { flags: 0, rule: 1 })
    };
    let (a, b) = (pod_identity(1), pod_identity(2));
    nodes[0].tables.policy.upsert(&[port(a, b, direction::EGRESS)]).unwrap();
    nodes[1].tables.policy.upsert(&[port(b, a, direction::INGRESS)]).unwrap();
    for family in [4, 6] {
        let echoed = nodes[0].pod.run(|| {
            let socket = UdpSocket::bind(if family == 4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            // The echo's buffer takes no more; a veth takes less.
            socket.send_to(&[7; 2048], (pod(2, family), ECHO)).unwrap();
            socket.recv_from(&mut [0; 4096]).unwrap().0
        });
        assert_eq!(echoed, 2048);
    }
}

#[test]
fn the_host_is_let_in_by_a_rule_of_its_own() {
    let mut nodes = Node::pair();
    nodes[0].flag(ENDPOINT_ENFORCE_INGRESS);
    // No rule for others helps.
    nodes[0].allow(identity::WORLD, direction::INGRESS);
    nodes[0].allow(identity::REMOTE_NODE, direction::INGRESS);
    refused(&nodes, &nodes[0].netns, reason::POLICY);
    nodes[0].allow(identity::HOST, direction::INGRESS);
    for family in [4, 6] {
        answered(&nodes[0].netns, pod(1, family));
        streams_to_pod(&nodes[0], family);
    }
    nodes[0].flag(0);
    nodes[0].tables.policy.remove(&policies(&nodes[0])).unwrap();
    answered(&nodes[0].netns, pod(1, 4));
}

fn streams_to_pod(node: &Node, family: u8) {
    let to = pod(node.cluster, family);
    let echoed = node.netns.run(|| {
        let mut stream = TcpStream::connect((to, ECHO)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"hello").unwrap();
        let mut echoed = [0; 5];
        stream.read_exact(&mut echoed).unwrap();
        echoed
    });
    assert_eq!(&echoed, b"hello");
}

fn policies(node: &Node) -> Vec<PolicyKey> {
    node.tables.policy.dump().unwrap().into_iter().map(|(key, _)| key).collect()
}

#[test]
fn what_the_stack_routes_to_a_pod_is_known_by_address() {
    let mut nodes = Node::pair();
    nodes[0].flag(ENDPOINT_ENFORCE_INGRESS);
    // Node 2 reaches pod a past the overlay, as a stranger on the underlay would.
    nodes[1].netns.ip(&format!("route replace {} via {}", pod(1, 4), underlay(1)));
    let node = &mut nodes[0];
    node.allow(identity::WORLD, direction::INGRESS);
    let call_from_two = |nodes: &[Node; 2]| {
        let from = &nodes[1].netns;
        from.run(|| {
            let socket = UdpSocket::bind((underlay(2), 0)).unwrap();
            socket.send_to(b"hello", (pod(1, 4), ECHO)).unwrap();
        });
    };
    let before = metric(nodes[0].datapath(), reason::POLICY);
    call_from_two(&nodes);
    wait_until("the drop is counted", || metric(nodes[0].datapath(), reason::POLICY) == before + 1);
    nodes[0].allow(identity::REMOTE_NODE, direction::INGRESS);
    nodes[1].netns.run(|| {
        let socket = UdpSocket::bind((underlay(2), 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(b"hello", (pod(1, 4), ECHO)).unwrap();
        assert_eq!(socket.recv_from(&mut [0; 64]).unwrap().1, (pod(1, 4), ECHO).into());
    });
    // No node any more, but a range of the world that a policy names.
    let (key, _) = support::node(underlay(2), 2);
    nodes[0].tables.node.remove(&[key]).unwrap();
    let range = (prefix_key(underlay(2).into(), 32), identity::FIRST_CIDR);
    nodes[0].tables.cidr.upsert(&[range]).unwrap();
    let before = metric(nodes[0].datapath(), reason::POLICY);
    call_from_two(&nodes);
    wait_until("the drop is counted", || metric(nodes[0].datapath(), reason::POLICY) == before + 1);
}

#[test]
fn an_identity_reaches_a_pod_behind_the_stack() {
    let mut nodes = Node::pair();
    nodes[0].flag(ENDPOINT_VIA_STACK | ENDPOINT_ENFORCE_INGRESS);
    refused(&nodes, &nodes[1].pod, reason::POLICY);
    nodes[0].allow(pod_identity(2), direction::INGRESS);
    for family in [4, 6] {
        answered(&nodes[1].pod, pod(1, family));
    }
    assert!(metric(nodes[0].datapath(), reason::TO_STACK) > 0);
    refused(&nodes, &nodes[0].netns, reason::POLICY);
}

#[test]
fn a_pod_of_an_older_version_gets_what_it_lacks() {
    let mut nodes = Node::pair();
    let veth = nodes[0].netns.ifindex("lxc0");
    nodes[0].flag(ENDPOINT_ENFORCE_INGRESS);
    drop(nodes[0].datapath.take());
    without_to_pod(&nodes[0], veth);
    answered(&nodes[0].netns, pod(1, 4));

    let mut datapath = Datapath::open(&nodes[0].options).unwrap();
    assert_eq!(datapath.attached_pods().unwrap(), Vec::<u32>::new(), "half of it does not count");
    nodes[0].netns.run(|| datapath.attach_pod(veth).unwrap());
    assert_attached(&datapath, &[veth]);
    nodes[0].datapath = Some(datapath);
    refused(&nodes, &nodes[0].netns, reason::POLICY);

    // What has both keeps both while nobody runs, and lets go of both.
    drop(nodes[0].datapath.take());
    send(&nodes[0].netns, pod(1, 4));
    let mut datapath = Datapath::open(&nodes[0].options).unwrap();
    assert_attached(&datapath, &[veth]);
    wait_until("the drop is counted", || metric(&datapath, reason::POLICY) == 3);
    nodes[0].netns.run(|| datapath.detach_pod(veth).unwrap());
    assert_eq!(datapath.attached_pods().unwrap(), Vec::<u32>::new());
    nodes[0].datapath = Some(datapath);
    answered(&nodes[0].netns, pod(1, 4));
}

/// Takes `cm_to_pod` off a pod's interface, as before there was one.
fn without_to_pod(node: &Node, veth: u32) {
    if has_links() {
        let link = node.options.bpf_root.join(format!("links/cm_to_pod-{veth}"));
        std::fs::remove_file(link).unwrap();
        wait_until("the link is gone", || {
            let query = || SchedClassifier::query_tcx("lxc0", TcAttachType::Egress).unwrap().1.is_empty();
            node.netns.run(query)
        });
    } else {
        assert_eq!(node.netns.filters("lxc0", "egress"), ["cm_to_pod"]);
        node.netns.run(|| tc::qdisc_detach_program("lxc0", TcAttachType::Egress, "cm_to_pod").unwrap());
        assert_eq!(node.netns.filters("lxc0", "egress"), Vec::<String>::new());
    }
}
