//! Agents that come after others, under traffic of which every packet is counted: the same version again, other sizes
//! of maps, and maps with another layout.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use ebpf_global_svc::{
    Datapath, DatapathError, MapSizes,
    abi::{ENDPOINT_ENFORCE_EGRESS, IpValue, NodeValue, Plain, direction, reason},
    table::Table,
};
use support::{
    Backend, Root, Service, TCP, UDP, ip_key, ip_value, metric,
    old_maps::{bytes, pin_hash_map},
    packets::{assert_none_lost, count_packets},
    pair::{ECHO, Node, PATIENCE, echo, pod, pod_identity, underlay},
    sockets::{self, LOCAL, PORT, REMOTE, VIP4, VIP6, server4, server6},
};

/// The first retransmission of a SYN comes after a second, that of data after 200 ms.
const RETRANSMITTED: Duration = Duration::from_millis(180);
/// Datagrams to each target before a change, and as many after it.
const LEAST: u64 = 400;

/// Two nodes, and pods whose answers pass only because `cm_ct` knows their flows.
fn guarded_pair() -> [Node; 2] {
    let mut nodes = Node::pair();
    for node in &mut nodes {
        node.flag(ENDPOINT_ENFORCE_EGRESS | ebpf_global_svc::abi::ENDPOINT_ENFORCE_INGRESS);
    }
    nodes[0].allow(pod_identity(2), direction::EGRESS);
    nodes[1].allow(pod_identity(1), direction::INGRESS);
    nodes
}

fn targets() -> [SocketAddr; 2] {
    [4, 6].map(|family| (pod(2, family), ECHO).into())
}

/// The agents of both nodes end and start again, with these sizes.
fn start_again(nodes: &mut [Node; 2], sizes: MapSizes) {
    for node in nodes {
        drop(node.datapath.take());
        node.options.sizes = sizes;
        let mut datapath = Datapath::open(&node.options).unwrap();
        // Before Linux 6.6 programs are on interfaces until others are put there.
        let (veth, overlay) = (node.netns.ifindex("lxc0"), node.netns.ifindex("cm_vxlan"));
        node.netns.run(|| {
            datapath.attach_overlay(overlay).unwrap();
            datapath.attach_pod(veth).unwrap();
        });
        node.tables = datapath.tables().unwrap();
        node.datapath = Some(datapath);
    }
}

/// Twice as many entries in each.
fn twice(sizes: MapSizes) -> MapSizes {
    MapSizes {
        ipcache: 2 * sizes.ipcache,
        prefix: 2 * sizes.prefix,
        endpoint: 2 * sizes.endpoint,
        node: 2 * sizes.node,
        service: 2 * sizes.service,
        slot: 2 * sizes.slot,
        backend: 2 * sizes.backend,
        affinity: 2 * sizes.affinity,
        sock_rev: 2 * sizes.sock_rev,
        overlay_rx: 2 * sizes.overlay_rx,
        policy: 2 * sizes.policy,
        cidr: 2 * sizes.cidr,
        translate: 2 * sizes.translate,
        ct: 2 * sizes.ct,
        verdict: 2 * sizes.verdict,
        fragment: 2 * sizes.fragment,
        calls: 2 * sizes.calls,
        nat: 2 * sizes.nat,
        events: 2 * sizes.events,
    }
}

fn sorted<K: Ord, V>(table: &dyn Table<K, V>) -> Vec<(K, V)> {
    let mut entries = table.dump().unwrap();
    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
    entries
}

/// All that an agent has written of a node.
fn written(node: &Node) -> String {
    let tables = &node.tables;
    format!(
        "{:?}\n{:?}\n{:?}\n{:?}\n{:?}",
        sorted(&*tables.ipcache),
        sorted(&*tables.prefix),
        sorted(&*tables.endpoint),
        sorted(&*tables.node),
        sorted(&*tables.policy)
    )
}

#[test]
fn starting_again_loses_no_packet() {
    let mut nodes = guarded_pair();
    let pods = nodes[0].pod.again();
    let ((), counted) = count_packets(&pods, &targets(), LEAST, || {
        for _ in 0..5 {
            let sizes = nodes[0].options.sizes;
            start_again(&mut nodes, sizes);
            assert_eq!(nodes[0].datapath().migrated(), []);
        }
    });
    assert_none_lost(&counted);
}

#[test]
fn other_sizes_lose_no_packet_and_no_entry() {
    let mut nodes = guarded_pair();
    let pods = nodes[0].pod.again();
    let before = written(&nodes[0]);
    let small = nodes[0].options.sizes;
    let ((), counted) = count_packets(&pods, &targets(), LEAST, || {
        for sizes in [twice(small), small, twice(small)] {
            start_again(&mut nodes, sizes);
            let datapath = nodes[0].datapath();
            let migrated: Vec<_> = datapath.migrated().iter().map(|one| one.map).collect();
            // All but arrays, whose sizes nobody sets.
            assert_eq!(migrated.len(), 20, "{migrated:?}");
            assert_eq!(written(&nodes[0]), before);
        }
    });
    assert_none_lost(&counted);
    let node = nodes[0].datapath();
    assert_eq!(metric(node, reason::POLICY), 0, "all answers were known as such");
    assert!(nodes[0].received(pod_identity(2), underlay(2)) > 4 * LEAST, "counters go on, too");
    let names: Vec<_> = std::fs::read_dir(nodes[0].options.bpf_root.join("maps"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.iter().all(|name| !name.ends_with("-next")), "{names:?}");
}

/// Programs that know the old and the new map of flows come in between. Before Linux 6.6 there are none on interfaces: a
/// flow that begins in that moment may lose its first answer, and TCP sends it again.
#[test]
fn connections_that_begin_during_a_change_of_sizes_are_established() {
    let mut nodes = guarded_pair();
    let pods = nodes[0].pod.again();
    let small = nodes[0].options.sizes;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let caller = scope.spawn(|| {
            pods.run(|| {
                let (mut connections, mut slow) = (0_u32, 0_u32);
                while !stop.load(Ordering::Acquire) || connections < 100 {
                    for to in targets() {
                        let begin = Instant::now();
                        let mut stream = TcpStream::connect(to).expect("the connection is established");
                        stream.set_read_timeout(Some(PATIENCE)).unwrap();
                        stream.write_all(b"hello").unwrap();
                        stream.read_exact(&mut [0; 5]).expect("and answered");
                        slow += u32::from(begin.elapsed() > RETRANSMITTED);
                        connections += 1;
                    }
                }
                (connections, slow)
            })
        });
        let end = support::SetAtEnd(&stop);
        for sizes in [twice(small), small, twice(small), small] {
            start_again(&mut nodes, sizes);
        }
        drop(end);
        let (connections, slow) = caller.join().unwrap();
        println!("{connections} connections, {slow} of them after a retransmission");
        // One caller: no more than one connection is at its beginning when a node's programs are replaced.
        let bound = if support::has_links() { 0 } else { 8 };
        assert!(slow <= bound, "{slow} of {connections} connections needed a retransmission");
    });
}

/// Puts a map with values of `length` bytes, and the entries that are there now, in place of the pinned one.
fn age<K: Plain + Ord, V: Plain>(root: &Path, map: &str, table: &dyn Table<K, V>, length: usize) {
    let entries: Vec<_> =
        sorted(table).iter().map(|(k, v)| (bytes(k, size_of::<K>(), 0), bytes(v, length, 0xa5))).collect();
    pin_hash_map(&root.join("maps").join(map), 16_384, &entries);
}

#[test]
fn older_and_newer_layouts_are_taken_over_without_losing_a_packet() {
    let mut nodes = guarded_pair();
    let pods = nodes[0].pod.again();
    let before = written(&nodes[0]);
    let sizes = nodes[0].options.sizes;
    let ((), counted) = count_packets(&pods, &targets(), LEAST, || {
        // The programs go on with the maps that they have.
        let root = nodes[0].options.bpf_root.clone();
        // Of a version without keys and flags of addresses.
        age(&root, "cm_ipcache", &*nodes[0].tables.ipcache, std::mem::offset_of!(IpValue, key));
        // Of one without numbers, and of one with more than we know.
        age(&root, "cm_node", &*nodes[0].tables.node, std::mem::offset_of!(NodeValue, number));
        age(&root, "cm_endpoint", &*nodes[0].tables.endpoint, 40);
        start_again(&mut nodes, sizes);
        let mut migrated: Vec<_> =
            nodes[0].datapath().migrated().iter().map(|one| (one.map, one.value_size, one.entries)).collect();
        migrated.sort_unstable();
        assert_eq!(
            migrated,
            [("cm_endpoint", [40, 24], 2), ("cm_ipcache", [8, 12], 4), ("cm_node", [4, 8], 2)]
        );
        assert_eq!(written(&nodes[0]), before, "what is cut off was zero, and what is new is");
    });
    assert_none_lost(&counted);
}

/// A UDP socket and a TCP connection to each frontend, which go on under the frontend's name.
#[test]
fn sockets_and_sessions_outlive_other_sizes() {
    let mut node = sockets::Node::new();
    for ip in [server4(1), server6(1)] {
        echo(&node.netns, ip);
    }
    for (id, vip, ip) in [(1, VIP4, server4(1)), (2, VIP6, server6(1))] {
        let backends: &[Backend] = &[(id, ip, ECHO)];
        for (id, proto) in [(id, UDP), (id + 2, TCP)] {
            let backends = &[(id, backends[0].1, ECHO)];
            node.install(&Service { id, frontend: (vip, PORT), proto, groups: &[(LOCAL, 1, backends)] });
        }
    }
    let names = ["1", "2", "3", "4"];
    let sticky: Vec<Backend> = (1..)
        .zip(names)
        .map(|(n, name)| (u32::from(n) + 10, server4(n), node.serve_tcp(server4(n), name)))
        .collect();
    let groups: &[(u16, u16, &[Backend])] = &[(LOCAL, 1, &sticky[..2]), (REMOTE, 1, &sticky[2..])];
    let session = (server4(200), PORT);
    node.sticky(&Service { id: 9, frontend: session, proto: TCP, groups }, 300);
    let bound = node.netns.run(|| sockets::connect(session.0).unwrap().0);
    let frontends = [(VIP4, PORT), (VIP6, PORT)];
    let streams = frontends.map(|to| node.netns.run(|| TcpStream::connect(to).unwrap()));

    let netns = node.netns.again();
    let small = node.options.sizes;
    let ((), counted) = count_packets(&netns, &frontends.map(SocketAddr::from), LEAST, || {
        for sizes in [twice(small), small] {
            drop(node.datapath.take());
            node.options.sizes = sizes;
            let datapath = Datapath::open(&node.options).unwrap();
            assert_eq!(datapath.migrated().len(), 20);
            node.datapath = Some(datapath);
            for (stream, to) in streams.iter().zip(frontends) {
                assert_eq!(stream.peer_addr().unwrap(), to.into());
            }
            for _ in 0..16 {
                assert_eq!(node.netns.run(|| sockets::connect(session.0).unwrap().0), bound);
            }
        }
    });
    assert_none_lost(&counted);
}

#[test]
fn what_cannot_be_carried_over_is_refused_and_changes_nothing() {
    let mut nodes = guarded_pair();
    let pods = nodes[0].pod.again();
    let root = nodes[0].options.bpf_root.clone();
    let options = nodes[0].options.clone();
    let ((), counted) = count_packets(&pods, &targets(), LEAST, || {
        drop(nodes[0].datapath.take());
        let mut smaller = options.clone();
        // The second map that is replaced, so that the first has been begun.
        (smaller.sizes.ipcache, smaller.sizes.node) = (2 * smaller.sizes.ipcache, 1);
        let error = Datapath::open(&smaller).unwrap_err();
        assert!(
            matches!(&error, DatapathError::TooSmall { map, capacity: 1 } if map == "cm_node"),
            "{error}"
        );
        assert!(error.to_string().contains("raise --node-max-entries"), "{error}");

        let slot = root.join("maps/cm_slot");
        let (aside, key) = (root.join("maps/cm_slot-aside"), (vec![1; 16], vec![2; 4]));
        std::fs::rename(&slot, &aside).unwrap();
        pin_hash_map(&slot, options.sizes.slot, &[key]);
        let error = Datapath::open(&options).unwrap_err();
        assert!(matches!(&error, DatapathError::PinMismatch { map, .. } if map == "cm_slot"), "{error}");
        std::fs::rename(&aside, &slot).unwrap();
    });
    assert_none_lost(&counted);
    let left = Datapath::remains(&root).unwrap().unwrap();
    assert!(left.maps().iter().all(|name| !name.contains('-')), "{:?}", left.maps());
    drop(left);
    // Of one that died half-way.
    pin_hash_map(&root.join("maps/cm_slot-next"), 7, &[(vec![0; 12], vec![0; 4])]);
    let datapath = Datapath::open(&options).unwrap();
    assert_eq!(datapath.migrated(), []);
    assert!(!root.join("maps/cm_slot-next").exists());
}

/// An agent that died after the new maps had their names, and before the programs were replaced.
#[test]
fn half_a_change_is_completed_by_the_next_start() {
    let root = Root::new();
    let entry = (ip_key(2, pod(2, 4)), ip_value(0x2_0001, underlay(2)));
    let datapath = Datapath::open(&root.options(1)).unwrap();
    datapath.tables().unwrap().ipcache.upsert(&[entry]).unwrap();
    drop(datapath);
    let mut larger = root.options(1);
    larger.sizes = twice(larger.sizes);
    drop(Datapath::open(&larger).unwrap());
    // Some maps have their new size, the others wait for it.
    let mut other = larger.clone();
    (other.sizes.slot, other.sizes.ct) = (root.options(1).sizes.slot, root.options(1).sizes.ct);
    let datapath = Datapath::open(&other).unwrap();
    assert_eq!(datapath.migrated().len(), 2);
    assert_eq!(datapath.tables().unwrap().ipcache.dump().unwrap(), [entry]);
}
