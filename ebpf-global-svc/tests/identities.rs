//! What identities look like between nodes: 511 clusters, and what never leaves a node.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use ebpf_global_svc::{
    Datapath,
    abi::{identity, reason},
};
use support::{
    Netns, ip_key, ip_value, metric, node,
    pair::{Node, address, call, pod, pod_identity, send, underlay},
    prefix_key, prefix_value, wait_until,
};

/// With nine bits for the cluster.
const SHIFT: u16 = 15;

/// Node 1 takes node 2 for one of cluster `cluster`, in a mesh of up to 511.
fn regard_as(nodes: &mut [Node; 2], cluster: u16) {
    let [one, _] = nodes;
    drop(one.datapath.take());
    one.options.identity_shift = SHIFT;
    let mut datapath = Datapath::open(&one.options).unwrap();
    // Before Linux 6.6 programs are on interfaces until others are put there.
    let (veth, overlay) = (one.netns.ifindex("lxc0"), one.netns.ifindex("cm_vxlan"));
    one.netns.run(|| {
        datapath.attach_overlay(overlay).unwrap();
        datapath.attach_pod(veth).unwrap();
    });
    one.datapath = Some(datapath);
    one.tables.node.upsert(&[node(underlay(2), cluster)]).unwrap();
    for (family, length) in [(4, 24), (6, 64)] {
        let prefix = (prefix_key(address(2, 0, family), length), prefix_value(cluster, underlay(2)));
        one.tables.prefix.upsert(&[prefix]).unwrap();
        let own = u32::from(cluster) << SHIFT | 7;
        one.tables.ipcache.upsert(&[(ip_key(cluster, pod(2, family)), ip_value(own, underlay(2)))]).unwrap();
    }
}

#[test]
fn a_cluster_above_255_speaks_for_itself_only() {
    let mut nodes = Node::pair();
    for cluster in [256, 300, 511] {
        regard_as(&mut nodes, cluster);
        let own = u32::from(cluster) << SHIFT | 7;
        nodes[1].claim(own);
        let before = nodes[0].received(own, underlay(2));
        for family in [4, 6] {
            call(&nodes[1].pod, pod(1, family)).unwrap();
        }
        assert_eq!(nodes[0].received(own, underlay(2)), before + 2, "cluster {cluster}");
        // The highest identity of another one, one that has the same low bits, and what the own ID means with 16 bits.
        let others = [
            u32::from(cluster - 1) << SHIFT | 0x7fff,
            u32::from(cluster & 0xff) << SHIFT | 7,
            u32::from(cluster & 0xff) << 16,
        ];
        for other in others.into_iter().filter(|other| other >> SHIFT != u32::from(cluster)) {
            nodes[1].claim(other);
            for family in [4, 6] {
                let datapath = nodes[0].datapath();
                let refused = || {
                    metric(datapath, reason::INVALID_CLUSTER_ID) + metric(datapath, reason::INVALID_IDENTITY)
                };
                let before = refused();
                send(&nodes[1].pod, pod(1, family));
                wait_until("it is dropped", || refused() == before + 1);
            }
        }
    }
}

/// Identities of address ranges begin with a byte that says so: the VNI has no room for it, and what would be left of
/// them may be somebody else's.
#[test]
fn identities_of_address_ranges_stay_on_their_node() {
    const RANGE: u32 = 1 << 24 | 0x2_0007;
    let mut nodes = Node::pair();
    let outside = Netns::new("outside");
    nodes[0].netns.ip(&format!("link add out type veth peer name eth0 netns {}", outside.name()));
    nodes[0].netns.ip("link set out up");
    outside.ip("link set eth0 up");
    for (family, there, here, length) in
        [(4, "198.51.100.2", "198.51.100.1", 24), (6, "2001:db8:51::2", "2001:db8:51::1", 64)]
    {
        nodes[0].netns.ip(&format!("addr add {here}/{length} dev out"));
        outside.ip(&format!("addr add {there}/{length} dev eth0"));
        outside.ip(&format!("-{family} route add default via {here} dev eth0"));
        let range = (prefix_key(there.parse().unwrap(), length), RANGE);
        for node in &mut nodes {
            node.tables.cidr.upsert(&[range]).unwrap();
        }
    }
    for family in [4, 6] {
        let before = nodes[1].received(identity::WORLD, underlay(1));
        wait_until("what node 1 forwards arrives as the world's", || {
            send(&outside, pod(2, family));
            nodes[1].received(identity::WORLD, underlay(1)) > before
        });
    }
    call(&nodes[0].pod, pod(2, 4)).unwrap();
    let known = [identity::WORLD, pod_identity(1), pod_identity(2), identity::REMOTE_NODE];
    for node in &nodes {
        for (key, _) in node.datapath().overlay_rx().unwrap() {
            assert!(known.contains(&key.identity), "{key:?}");
        }
    }
    // And if the agent were wrong: nothing goes, rather than something under another one's name.
    nodes[0].claim(RANGE);
    for family in [4, 6] {
        let before = metric(nodes[0].datapath(), reason::INVALID_IDENTITY);
        send(&nodes[0].pod, pod(2, family));
        wait_until("it is dropped", || metric(nodes[0].datapath(), reason::INVALID_IDENTITY) == before + 1);
    }
    assert_eq!(nodes[1].received(RANGE & 0xff_ffff, underlay(1)), 0);
}
