//! `cm_xdp` sends on what `cm_from_netdev` would, byte for byte, and leaves everything else to it.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

#[path = "../support/mod.rs"]
mod support;
mod world;

use std::time::Duration;

use ebpf_global_svc::{
    Acceleration, Datapath,
    abi::{
        BackendValue, ClusterState, NAT_CLOSED, PREFIX_VIRTUAL, PrefixValue, backend_state, cluster_state,
        nat_kind, reason,
    },
};
use support::{
    TCP, UDP, ip_key, metric,
    pair::{address, call, pod, stream, underlay},
    prefix_key, prefix_value, wait_until,
};
use world::{Frame, PASS, TX, World, assert_sums_up, frontend, mend, other_node};

const NOW: Duration = Duration::ZERO;
/// A flow that is in use.
const PORT: u16 = 40_000;
/// Outer headers.
const OUTER: usize = 50;
/// Verdict of tc.
const REDIRECTED: i32 = 7;

fn plain(family: u8, proto: u8) -> Frame {
    Frame { family, proto, port: PORT, payload: 100, class: 0 }
}

fn kinds() -> impl Iterator<Item = (u8, u8)> {
    [4, 6].into_iter().flat_map(|family| [(family, TCP), (family, UDP)])
}

/// Without what the kernel is free to choose: the outer ID, with the checksum over it, and the outer source port.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let port = u16::from_be_bytes([packet[34], packet[35]]);
    assert!((32_768..61_000).contains(&port), "source port {port}");
    assert_eq!(world::sum(&packet[14..34]), 0xffff, "outer header");
    packet[18..20].fill(0);
    packet[24..26].fill(0);
    packet[34..36].fill(0);
    packet
}

#[test]
fn packets_leave_as_tc_sends_them() {
    let mut world = World::new();
    let mut frames: Vec<(Frame, Vec<u8>)> = Vec::new();
    for (family, proto) in kinds() {
        for (n, (payload, class)) in
            [(0, 0), (1, 1), (5, 2), (100, 3), (999, 0xb8), (1300, 0xbb)].into_iter().enumerate()
        {
            let port = PORT + u16::try_from(n).unwrap();
            let frame = Frame { payload, class, port, ..plain(family, proto) };
            frames.push((frame, frame.bytes()));
        }
        // Shorter than Ethernet's shortest: padded, and the padding goes along.
        let frame = Frame { payload: 1, port: PORT + 20, ..plain(family, proto) };
        let mut padded = frame.bytes();
        padded.resize(padded.len() + 9, 0);
        frames.push((frame, padded));
        if proto == UDP {
            let frame = Frame { port: PORT + 21, ..plain(family, proto) };
            let mut without = frame.bytes();
            without[frame.checksum()..frame.checksum() + 2].fill(0);
            frames.push((frame, without));
        }
    }
    let note = |world: &World, frame: &Frame| world.note(frame, NOW, |_, _| {});
    let by_tc: Vec<_> = frames
        .iter()
        .map(|(frame, bytes)| {
            note(&world, frame);
            world.tunnelled(bytes)
        })
        .collect();
    let ifindex = world.ifindex;
    for by in [Acceleration::Driver, Acceleration::Generic] {
        world.on_first(|datapath| datapath.accelerate(ifindex, by).unwrap());
        for ((frame, bytes), by_tc) in frames.iter().zip(&by_tc) {
            // A second is a long time, but not for every machine.
            let accelerated = || metric(world.nodes[0].datapath(), reason::ACCELERATED);
            let before = accelerated();
            let mut sent = Vec::new();
            wait_until("the packet goes past the kernel", || {
                note(&world, frame);
                sent = world.tunnelled(bytes);
                accelerated() > before
            });
            assert_eq!(comparable(&sent), comparable(by_tc), "{by:?} {frame:?}");
            if bytes[frame.checksum()..frame.checksum() + 2] != [0, 0] {
                assert_sums_up(frame, &sent[OUTER..]);
            }
            if by == Acceleration::Driver {
                note(&world, frame);
                let [tc, xdp] = ["cm_from_netdev", "cm_xdp"].map(|program| world.trial_of(program, bytes));
                assert_eq!((tc.verdict, xdp.verdict), (REDIRECTED, TX), "{frame:?}");
                assert_eq!(xdp.packet[OUTER..], tc.packet, "{frame:?}");
            }
        }
    }
}

/// The figures are those of tc.
#[test]
fn what_goes_past_the_kernel_is_counted_as_ever() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    let counters = |world: &World| {
        let metrics = world.nodes[0].datapath().metrics().unwrap();
        [reason::SERVED, reason::ENCAPSULATED, reason::ACCELERATED].map(|reason| {
            metrics.iter().find(|(code, _)| *code == reason).map_or((0, 0), |(_, c)| (c.packets, c.bytes))
        })
    };
    let frame = plain(4, UDP);
    let bytes = frame.bytes();
    let before = counters(&world);
    world.note(&frame, NOW, |_, _| {});
    assert_eq!(world.trial(&bytes).verdict, TX);
    let length = u64::try_from(bytes.len()).unwrap();
    for (after, before) in counters(&world).into_iter().zip(before) {
        assert_eq!(after, (before.0 + 1, before.1 + length));
    }
    let before = counters(&world);
    world.note(&frame, Duration::from_secs(2), |_, _| {});
    assert_eq!(world.trial(&bytes).verdict, PASS);
    assert_eq!(counters(&world), before, "what passes, others count");
}

/// Fails unless a frame passes as it was, although its flow is in use: the plain packet goes, before and after.
#[track_caller]
fn assert_left(world: &World, what: &str, frame: &Frame, bytes: &[u8]) {
    for bytes in [None, Some(bytes), None] {
        world.note(frame, NOW, |_, _| {});
        let plain = frame.bytes();
        let trial = world.trial(bytes.unwrap_or(&plain));
        match bytes {
            Some(bytes) => {
                assert_eq!(trial.verdict, PASS, "{what}: {frame:?}");
                assert_eq!(trial.packet, bytes, "{what}: {frame:?}");
            }
            None => assert_eq!(trial.verdict, TX, "beside {what}: {frame:?}"),
        }
    }
}

#[test]
fn packets_that_are_not_plain_are_left_to_tc() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    for (family, proto) in kinds() {
        let frame = plain(family, proto);
        let bytes = frame.bytes();
        let left = |what: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let mut changed = bytes.clone();
            change(&mut changed);
            assert_left(&world, what, &frame, &changed);
        };
        let least = frame.transport() + if proto == TCP { 20 } else { 8 };
        for length in 14..least {
            left("a truncated header", &|bytes| bytes.truncate(length));
        }
        left("a truncated packet", &|bytes| bytes.truncate(least + 10));
        left("a VLAN's", &|bytes| drop(bytes.splice(12..12, [0x81, 0, 0, 5])));
        left("no IP", &|bytes| bytes[12..14].copy_from_slice(&[8, 6]));
        left("another version", &|bytes| bytes[14] = 0x55);
        let checksum = frame.checksum();
        left("a checksum left to the device", &|bytes| {
            let addresses = if family == 4 { 26..34 } else { 22..54 };
            let mut pseudo = bytes[addresses].to_vec();
            pseudo.extend([0, proto]);
            pseudo.extend(u16::try_from(bytes.len() - frame.transport()).unwrap().to_be_bytes());
            bytes[checksum..checksum + 2].copy_from_slice(&world::sum(&pseudo).to_be_bytes());
        });
        left("of another client", &|bytes| bytes[if family == 4 { 29 } else { 37 }] ^= 1);
        left("to another frontend", &|bytes| bytes[if family == 4 { 33 } else { 53 }] ^= 1);
        left("from another port", &|bytes| bytes[frame.transport() + 1] ^= 1);
        left("to another port", &|bytes| bytes[frame.transport() + 3] ^= 1);
        let next = if family == 4 { 23 } else { 20 };
        for other in [1, 58, 132, 136, 17 + 6 - proto] {
            left("of another protocol", &|bytes| bytes[next] = other);
        }
        if family == 4 {
            for (what, high, low) in
                [("a first fragment", 0x20, 0), ("a later one", 0, 9), ("another", 0x20, 1)]
            {
                left(what, &|bytes| {
                    bytes[20..22].copy_from_slice(&[high, low]);
                    mend(bytes);
                });
            }
            left("with options", &|bytes| {
                bytes[14] = 0x46;
                bytes.splice(34..34, [1; 4]);
                bytes[17] += 4;
                mend(bytes);
            });
            left("shorter than its headers", &|bytes| {
                bytes[16..18].copy_from_slice(&[0, 27]);
                mend(bytes);
            });
        } else {
            for extension in [0, 43, 44, 60] {
                left("with an extension", &|bytes| {
                    bytes[20] = extension;
                    bytes.splice(54..54, [proto, 0, 0, 0, 0, 0, 0, 0]);
                    bytes[19] += 8;
                });
            }
        }
        if proto == TCP {
            for flags in [1, 2, 4, 0x12, 0x11, 0x14] {
                left("that begins or ends a connection", &|bytes| bytes[frame.transport() + 13] = flags);
            }
        }
        let large = Frame { payload: 1401 - frame.transport() + 64, ..frame };
        let fits = Frame { payload: 1464 - least, ..frame };
        world.note(&fits, NOW, |_, _| {});
        assert_eq!(world.trial(&fits.bytes()).verdict, TX, "just fits");
        assert!(large.bytes().len() > 1464);
        left("too big for the overlay", &|bytes| *bytes = large.bytes());
    }
}

#[test]
fn flows_that_tc_has_to_look_at_are_left_to_it() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    for (family, proto) in kinds() {
        let frame = plain(family, proto);
        let bytes = frame.bytes();
        let verdict = |world: &World, change: fn(&mut ebpf_global_svc::abi::NatValue), age| {
            world.note(&frame, age, |_, value| change(value));
            let trial = world.trial(&bytes);
            if trial.verdict == PASS {
                assert_eq!(trial.packet, bytes);
            }
            trial.verdict
        };
        assert_eq!(world.trial(&bytes).verdict, PASS, "nothing is known of it");
        world.note(&frame, NOW, |key, _| key.kind = nat_kind::ANSWERED);
        assert_eq!(world.trial(&bytes).verdict, PASS, "of the other kind");
        assert_eq!(verdict(&world, |_| {}, NOW), TX);
        assert_eq!(verdict(&world, |_| {}, Duration::from_millis(1001)), PASS, "not used lately");
        assert_eq!(verdict(&world, |_| {}, Duration::from_secs(9000)), PASS, "expired");
        assert_eq!(verdict(&world, |value| value.ifindex += 1, NOW), PASS, "of another interface");
        assert_eq!(verdict(&world, |value| value.ifindex = 0, NOW), PASS, "of a pod");
        assert_eq!(verdict(&world, |value| value.node_ip[0] = 1, NOW), PASS, "of another node's frontend");
        assert_eq!(verdict(&world, |value| value.flags = NAT_CLOSED, NOW), TX, "what tc sends too");
        assert_eq!(verdict(&world, |value| value.ip[0] = 9, NOW), PASS, "a backend outside of the mesh");
        world.note(&frame, NOW, |_, value| value.ip = support::address(pod(1, family)).1);
        assert_eq!(world.trial(&bytes).verdict, PASS, "a local backend");
        world.note(&frame, NOW, |_, value| value.ip = support::address(address(1, 99, family)).1);
        assert_eq!(world.trial(&bytes).verdict, PASS, "one of this node's that is not there");
        assert_eq!(verdict(&world, |_| {}, NOW), TX);
    }
    for (family, proto) in kinds() {
        let frame = plain(family, proto);
        let bytes = frame.bytes();
        let verdict = |world: &World| {
            world.note(&frame, NOW, |_, _| {});
            world.trial(&bytes).verdict
        };
        // What begins in UDP is every packet: to a backend that answers no more tc chooses another one.
        let expected = if proto == UDP { PASS } else { TX };
        for state in [cluster_state::DRAINING, cluster_state::DEAD] {
            world.tables().cluster.upsert(&[(2, ClusterState { state })]).unwrap();
            let expected = if state == cluster_state::DEAD { expected } else { TX };
            assert_eq!(verdict(&world), expected, "cluster {state}");
        }
        world.tables().cluster.remove(&[2]).unwrap();
        let mut id = 0;
        world.note(&frame, NOW, |_, value| id = value.backend);
        let backend = world.tables().backend.get(&[id]).unwrap()[0].unwrap();
        let ends = BackendValue { state: backend_state::TERMINATING, ..backend };
        world.tables().backend.upsert(&[(id, ends)]).unwrap();
        assert_eq!(verdict(&world), expected, "a backend that terminates");
        world.tables().backend.remove(&[id]).unwrap();
        assert_eq!(verdict(&world), expected, "a backend that is gone");
        world.tables().backend.upsert(&[(id, backend)]).unwrap();
        assert_eq!(verdict(&world), TX);

        // Where the backend is.
        let prefix = prefix_key(address(2, 0, family), if family == 4 { 24 } else { 64 });
        let value = prefix_value(2, underlay(2));
        let virtual_ = PrefixValue { flags: PREFIX_VIRTUAL, ..value };
        world.tables().prefix.upsert(&[(prefix, virtual_)]).unwrap();
        assert_eq!(verdict(&world), PASS, "a virtual address");
        world.tables().prefix.upsert(&[(prefix, value)]).unwrap();
        for (node_ip, what) in [
            (underlay(1), "this node"),
            ([0, 0, 0, 0].into(), "no node"),
            ([0, 0, 0, 5].into(), "a node without an IPv4 address"),
            ([192, 168, 77, 9].into(), "a node that nobody has heard of"),
            ([8, 8, 8, 8].into(), "a node to which there is no route"),
        ] {
            let entry = (ip_key(2, pod(2, family)), support::ip_value(0x2_1000, node_ip));
            world.tables().ipcache.upsert(&[entry]).unwrap();
            assert_eq!(verdict(&world), PASS, "{what}");
        }
        let entry = (ip_key(2, pod(2, family)), support::ip_value(0x2_1000, underlay(2)));
        world.tables().ipcache.upsert(&[entry]).unwrap();
        assert_eq!(verdict(&world), TX);
    }
}

/// What may have to be encrypted never goes past the kernel, whoever was here before.
#[test]
fn nothing_goes_past_encryption() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    let frame = plain(4, TCP);
    let verdict = |world: &World| {
        world.note(&frame, NOW, |_, _| {});
        world.trial(&frame.bytes()).verdict
    };
    assert_eq!(verdict(&world), TX);
    world.nodes[0].datapath.as_mut().unwrap().set_strict(true).unwrap();
    assert_eq!(verdict(&world), PASS);
    world.nodes[0].datapath.as_mut().unwrap().set_strict(false).unwrap();
    assert_eq!(verdict(&world), TX);
    for (encrypts, expected) in [(true, PASS), (false, TX)] {
        world.nodes[0].datapath = None;
        world.nodes[0].options.encrypts = encrypts;
        let options = world.nodes[0].options.clone();
        world.nodes[0].datapath = Some(Datapath::open(&options).unwrap());
        assert_eq!(verdict(&world), expected);
    }
}

/// Routes to a node through another device, a route of its own, or one that is too narrow: the kernel sends it there.
#[test]
fn other_ways_than_back_are_the_kernels() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    let frame = Frame { payload: 1300, ..plain(4, TCP) };
    let verdict = |world: &World| {
        world.note(&frame, NOW, |_, _| {});
        world.trial(&frame.bytes()).verdict
    };
    let netns = &world.nodes[0].netns;
    assert_eq!(verdict(&world), TX);
    netns.ip("link add other type veth peer name end");
    netns.ip("link set end up");
    netns.ip("link set other up");
    netns.ip(&format!("route add {} dev other", other_node()));
    netns.ip(&format!("neigh add {} lladdr 02:00:00:00:00:09 dev other nud permanent", other_node()));
    assert_eq!(verdict(&world), PASS);
    netns.ip(&format!("route del {} dev other", other_node()));
    assert_eq!(verdict(&world), TX);
    // As WireGuard's: a table of its own, for what the node itself sends.
    netns.ip(&format!("route add {} dev other table 99", other_node()));
    netns.ip("rule add iif lo ipproto udp dport 8472 table 99");
    assert_eq!(verdict(&world), PASS);
    netns.ip("rule del table 99");
    assert_eq!(verdict(&world), TX);
    netns.ip(&format!("route add {} dev eth0 mtu lock 1389", other_node()));
    assert_eq!(verdict(&world), PASS);
    netns.ip(&format!("route del {} dev eth0", other_node()));
    netns.ip("link set cm_vxlan mtu 1300");
    assert_eq!(verdict(&world), PASS);
    netns.ip("link set cm_vxlan mtu 1450");
    assert_eq!(verdict(&world), TX);
    netns.ip(&format!("neigh del {} dev eth0", other_node()));
    assert_eq!(verdict(&world), PASS, "nobody knows its address");
}

/// Real sockets: begun through tc, gone on past the kernel; the other end's kernel checks every sum.
#[test]
fn connections_go_past_the_kernel_and_come_back() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    for by in [Acceleration::Generic, Acceleration::Driver] {
        world.on_first(|datapath| datapath.accelerate(ifindex, by).unwrap());
        for family in [4, 6] {
            let ip = frontend(family);
            let counted = |reason| metric(world.nodes[0].datapath(), reason);
            let before = [reason::SERVED, reason::ACCELERATED].map(counted);
            for _ in 0..4 {
                stream(&world.client, ip);
            }
            let after = [reason::SERVED, reason::ACCELERATED].map(counted);
            let [served, accelerated] = [after[0] - before[0], after[1] - before[1]];
            println!("{by:?}, IPv{family}: {accelerated} of {served} packets");
            assert!(accelerated * 2 > served, "{by:?}, IPv{family}: {accelerated} of {served}");
            assert_eq!(call(&world.client, ip).unwrap(), (ip, support::pair::ECHO).into());
        }
    }
    assert_eq!(metric(world.nodes[1].datapath(), reason::INVALID_PACKET), 0);
}

/// It outlives its agent, is replaced under traffic, changes its mode, and goes.
#[test]
fn the_program_is_kept_replaced_and_removed() {
    let mut world = World::new();
    let ifindex = world.ifindex;
    assert_eq!(world.nodes[0].datapath().accelerated().unwrap(), []);
    let targets = [(frontend(4), support::pair::ECHO).into(), (frontend(6), support::pair::ECHO).into()];
    let client = world.client.again();
    let ((), counted) = support::packets::count_packets(&client, &targets, 500, || {
        for by in [Acceleration::Driver, Acceleration::Generic, Acceleration::Driver] {
            world.on_first(|datapath| datapath.accelerate(ifindex, by).unwrap());
            assert_eq!(world.nodes[0].datapath().accelerated().unwrap(), [(ifindex, by)]);
            for _ in 0..2 {
                let before = metric(world.nodes[0].datapath(), reason::ACCELERATED);
                world.nodes[0].datapath = None;
                let options = world.nodes[0].options.clone();
                world.nodes[0].datapath = Some(Datapath::open(&options).unwrap());
                assert_eq!(world.nodes[0].datapath().accelerated().unwrap(), [(ifindex, by)]);
                wait_until("packets go past the kernel", || {
                    metric(world.nodes[0].datapath(), reason::ACCELERATED) > before
                });
                world.on_first(|datapath| datapath.accelerate(ifindex, by).unwrap());
            }
        }
        world.on_first(|datapath| datapath.slow_down(ifindex).unwrap());
        assert_eq!(world.nodes[0].datapath().accelerated().unwrap(), []);
    });
    support::packets::assert_none_lost(&counted);
    let before = metric(world.nodes[0].datapath(), reason::ACCELERATED);
    stream(&world.client, frontend(4));
    assert_eq!(metric(world.nodes[0].datapath(), reason::ACCELERATED), before);
}

/// A device that has another program is named, and stays as it is.
#[test]
fn a_device_that_is_taken_is_an_error() {
    let mut world = World::new();
    let mut other = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    let datapath = other.nodes[0].datapath.as_mut().unwrap();
    let error = world.nodes[0].netns.run(|| datapath.accelerate(ifindex, Acceleration::Driver).unwrap_err());
    assert!(error.to_string().contains("cannot attach cm_xdp to eth0"), "{error}");
    assert_eq!(other.nodes[0].datapath().accelerated().unwrap(), []);
    // The kernel cannot have a driver run it that does not know how.
    world.nodes[0].netns.ip("link add other type bridge");
    let other = world.nodes[0].netns.ifindex("other");
    let refused = world.on_first(|datapath| datapath.accelerate(other, Acceleration::Driver).unwrap_err());
    assert!(refused.to_string().contains("cannot attach cm_xdp to other"), "{refused}");
    world.on_first(|datapath| datapath.accelerate(other, Acceleration::Generic).unwrap());
}
