//! Strict encryption: what is in clear is dropped on both ways. WireGuard itself is not needed: `cm_from_wireguard`
//! marks what arrives at any device that it is hooked up to.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use ebpf_global_svc::abi::{NODE_CLEAR, NODE_ENCRYPTED, NodeValue, reason};
use support::{
    metric, node,
    pair::{ECHO, Node, call, pod, send, underlay},
    wait_until,
};

/// What node `n` knows of the other one's encryption.
fn flag(node: &mut Node, other: u16, flags: u16) {
    let (key, value) = self::node(underlay(other), other);
    node.tables.node.upsert(&[(key, NodeValue { flags, ..value })]).unwrap();
}

fn set_strict(node: &mut Node, strict: bool) {
    node.datapath.as_mut().unwrap().set_strict(strict).unwrap();
}

/// A datagram from pod a to pod b is dropped by one of the nodes for want of encryption.
#[track_caller]
fn lost(nodes: &[Node; 2], by: usize) {
    for family in [4, 6] {
        let node = nodes[by].datapath();
        let before = metric(node, reason::UNENCRYPTED);
        send(&nodes[0].pod, pod(2, family));
        wait_until("the drop is counted", || metric(node, reason::UNENCRYPTED) == before + 1);
    }
}

#[test]
fn a_strict_node_sends_nothing_in_clear() {
    let mut nodes = Node::pair();
    set_strict(&mut nodes[0], true);
    flag(&mut nodes[0], 2, NODE_CLEAR);
    call(&nodes[0].pod, pod(2, 4)).unwrap();
    flag(&mut nodes[0], 2, NODE_ENCRYPTED);
    send(&nodes[0].pod, pod(2, 4));
    // The answer comes in clear.
    wait_until("the answer is dropped", || metric(nodes[0].datapath(), reason::UNENCRYPTED) == 1);
    let sent = metric(nodes[0].datapath(), reason::ENCAPSULATED);
    assert_eq!(sent, 2);
    flag(&mut nodes[0], 2, 0);
    lost(&nodes, 0);
    // Nobody may be spoken to of whom nothing is known.
    nodes[0].tables.node.remove(&[node(underlay(2), 2).0]).unwrap();
    lost(&nodes, 0);
    assert_eq!(metric(nodes[0].datapath(), reason::ENCAPSULATED), sent);
    // And so it is for the node itself.
    let before = metric(nodes[0].datapath(), reason::UNENCRYPTED);
    send(&nodes[0].netns, pod(2, 4));
    assert_eq!(metric(nodes[0].datapath(), reason::UNENCRYPTED), before + 1);
}

#[test]
fn a_strict_node_takes_in_nothing_in_clear() {
    let mut nodes = Node::pair();
    set_strict(&mut nodes[1], true);
    flag(&mut nodes[1], 1, 0);
    lost(&nodes, 1);
    // That packets go there encrypted says nothing of those that come.
    flag(&mut nodes[1], 1, NODE_ENCRYPTED);
    lost(&nodes, 1);
    flag(&mut nodes[1], 1, NODE_CLEAR);
    assert_eq!(call(&nodes[0].pod, pod(2, 4)).unwrap(), (pod(2, 4), ECHO).into());

    // The mark outlives the tunnel, on this kernel too.
    flag(&mut nodes[1], 1, NODE_ENCRYPTED);
    let Node { netns, datapath, .. } = &mut nodes[1];
    let device = netns.ifindex("eth0");
    netns.run(|| datapath.as_mut().unwrap().attach_wireguard(device).unwrap());
    for family in [4, 6] {
        assert_eq!(call(&nodes[0].pod, pod(2, family)).unwrap(), (pod(2, family), ECHO).into());
    }
    set_strict(&mut nodes[1], false);
    assert_eq!(call(&nodes[0].pod, pod(2, 4)).unwrap(), (pod(2, 4), ECHO).into());
}
