//! What the programs and tables cost by themselves: `cargo xtask bench datapath` runs it.
//!
//! `costs [ROUNDS]` prints a line per case, `UNIT<TAB>CASE<TAB>FIGURE...`, with a figure per round; in each round all
//! cases of a part take their turn. Packets are run by `BPF_PROG_TEST_RUN`, connects by UDP sockets in a cgroup.

#![allow(clippy::unwrap_used, reason = "it says enough when it fails")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::Instant,
};

use ebpf_global_svc::{
    Arrival, Datapath, DatapathOptions, MapSizes, Tables,
    abi::{
        ClusterState, ENDPOINT_ENFORCE_EGRESS, EndpointValue, PolicyKey, PolicyValue, cluster_state,
        direction,
    },
    table::Table,
};
use etherparse::PacketBuilder;
use support::{
    Backend, Netns, Root, Service, UDP, endpoint, ip_key, ip_value,
    pair::{address, pod, pod_identity, underlay},
    prefix_key, prefix_value,
    sockets::{self, LOCAL, PORT, REMOTE, server4},
};

/// Packets per figure.
const PACKETS: u32 = 200_000;
/// Connects per figure.
const CONNECTS: u32 = 50_000;
const NEIGHBOUR: u8 = 11;

/// Figures by unit and case, in the order of the first round.
#[derive(Default)]
struct Figures(Vec<(&'static str, String, Vec<f64>)>);

impl Figures {
    fn add(&mut self, unit: &'static str, case: &str, figure: f64) {
        match self.0.iter_mut().find(|(_, other, _)| other == case) {
            Some((.., figures)) => figures.push(figure),
            None => self.0.push((unit, case.to_owned(), vec![figure])),
        }
    }

    fn print(&self) {
        for (unit, case, figures) in &self.0 {
            let figures: Vec<String> = figures.iter().map(|figure| format!("{figure:.3}")).collect();
            println!("{unit}\t{case}\t{}", figures.join("\t"));
        }
    }
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(5, |rounds| rounds.parse().expect("a number of rounds"));
    let mut figures = Figures::default();
    packets(rounds, &mut figures);
    connects(rounds, &mut figures);
    tables(rounds, &mut figures);
    figures.print();
}

/// A node with two pods, one of which has policies, and a peer cluster.
struct Node {
    datapath: Datapath,
    tables: Tables,
    ifindex: u32,
    _root: Root,
    netns: Netns,
}

impl Node {
    fn new() -> Self {
        let netns = Netns::new("costs");
        netns.ip("link add pod0 type veth peer name eth0");
        netns.ip("link add cm_vxlan type vxlan external dstport 8472");
        let (ifindex, overlay) = (netns.ifindex("pod0"), netns.ifindex("cm_vxlan"));
        let root = Root::new();
        let options =
            DatapathOptions { node_ip: Some(underlay(1)), sizes: MapSizes::default(), ..root.options(1) };
        let mut datapath = Datapath::open(&options).unwrap();
        netns.run(|| datapath.attach_overlay(overlay).unwrap());
        let tables = datapath.tables().unwrap();
        let mut node = Self { datapath, tables, ifindex, _root: root, netns };
        for cluster in [1, 2] {
            let prefix = (prefix_key(address(cluster, 0, 4), 24), prefix_value(cluster, underlay(cluster)));
            node.tables.prefix.upsert(&[prefix]).unwrap();
        }
        for (n, identity) in [(10, pod_identity(1)), (NEIGHBOUR, pod_identity(1) + 1)] {
            let entry = (ip_key(1, address(1, n, 4)), endpoint(ifindex, identity));
            node.tables.endpoint.upsert(&[entry]).unwrap();
        }
        let remote = (ip_key(2, pod(2, 4)), ip_value(pod_identity(2), underlay(2)));
        node.tables.ipcache.upsert(&[remote]).unwrap();
        node
    }

    /// Nanoseconds per packet.
    fn time(&self, program: &str, frame: &[u8]) -> f64 {
        let Self { datapath, ifindex, .. } = self;
        let arrival = Arrival { ifindex: *ifindex, ..Arrival::default() };
        let trial = self.netns.run(|| datapath.trial(program, frame, arrival, PACKETS).unwrap());
        trial.duration.as_secs_f64() * 1e9
    }

    /// Gives the first pod an egress policy of so many entries; none at all with 0.
    fn rules(&mut self, entries: u32) {
        let subject = pod_identity(1);
        let all: Vec<_> = (0..entries)
            .map(|n| {
                let peer = if n == 0 { pod_identity(2) } else { 0x3_0000 + n };
                let key = PolicyKey {
                    prefixlen: ebpf_global_svc::abi::POLICY_PEER_BITS,
                    subject,
                    peer,
                    direction: direction::EGRESS,
                    proto: 0,
                    port: 0,
                };
                (key, PolicyValue { flags: 0, rule: n + 1 })
            })
            .collect();
        self.tables.policy.upsert(&all).unwrap();
        let flags = if entries == 0 { 0 } else { ENDPOINT_ENFORCE_EGRESS };
        let value = EndpointValue { flags, ..endpoint(self.ifindex, subject) };
        self.tables.endpoint.upsert(&[(ip_key(1, pod(1, 4)), value)]).unwrap();
    }
}

fn frame(from: IpAddr, to: IpAddr) -> Vec<u8> {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else { unreachable!("IPv4 only") };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(from.octets(), to.octets(), 64)
        .udp(1000, 80)
        .write(&mut frame, b"hello")
        .unwrap();
    frame
}

/// Each hook that packets pass, without and with policies.
fn packets(rounds: u32, figures: &mut Figures) {
    let mut node = Node::new();
    let outside = Ipv4Addr::new(198, 51, 100, 1).into();
    let cases = [
        ("cm_from_pod", "to a pod of this node", frame(pod(1, 4), address(1, NEIGHBOUR, 4))),
        ("cm_from_pod", "to a remote pod", frame(pod(1, 4), pod(2, 4))),
        ("cm_from_pod", "to the outside", frame(pod(1, 4), outside)),
        ("cm_from_pod", "spoofed source, dropped", frame(address(1, 99, 4), pod(2, 4))),
        ("cm_to_pod", "from the host, no policy", frame(outside, pod(1, 4))),
        ("cm_to_overlay", "a packet with its tunnel key", frame(address(1, 1, 4), pod(2, 4))),
    ];
    for _ in 0..rounds {
        node.rules(0);
        for (program, case, frame) in &cases {
            figures.add("ns", &format!("{program}: {case}"), node.time(program, frame));
        }
        for entries in [1, 100, 10_000] {
            node.rules(entries);
            let time = node.time("cm_from_pod", &cases[1].2);
            figures.add("ns", &format!("cm_from_pod: to a remote pod, {entries} entries of policy"), time);
        }
        // The next round begins with one entry again.
        let keys: Vec<_> = node.tables.policy.dump().unwrap().iter().map(|(key, _)| *key).collect();
        node.tables.policy.remove(&keys).unwrap();
    }
}

/// `connect()` of a UDP socket: the whole system call, to an address of no service and to services, of which there are
/// more and more, and that have more and more backends.
fn connects(rounds: u32, figures: &mut Figures) {
    let mut node = sockets::Node::new();
    drop(node.datapath.take());
    node.options.sizes = MapSizes::default();
    let plain = |node: &sockets::Node| node.netns.run(|| connect((server4(1), PORT)));
    let datapath = Datapath::open(&node.options).unwrap();
    node.tables = datapath.tables().unwrap();
    node.datapath = Some(datapath);
    let of_backends = [1_u32, 100, 5_000];
    for (number, backends) in (0..).zip(of_backends) {
        let all: Vec<Backend> = (0..backends).map(|n| (10_000 * (number + 1) + n, server4(1), 7)).collect();
        let groups: &[(u16, u16, &[Backend])] = &[(REMOTE, 1, &all)];
        let frontend = (called(number), PORT);
        node.install(&Service { id: number + 1, frontend, proto: UDP, groups });
    }
    let few = (node.tables.service.dump().unwrap(), node.tables.slot.dump().unwrap());
    for _ in 0..rounds {
        // In each round they come and go: what a processor does over time is not to look like the price of services.
        let mut services = 3;
        for total in [3, 1_000, 10_000] {
            let one: &[(u16, u16, &[Backend])] = &[(LOCAL, 1, &[(10_000, server4(1), 7)])];
            while services < total {
                let frontend = (Ipv4Addr::from(0x0a70_0000 + services).into(), PORT);
                node.install(&Service { id: services + 1, frontend, proto: UDP, groups: one });
                services += 1;
            }
            let direct = format!("connect: to no service, {total} services");
            figures.add("ns", &direct, plain(&node));
            for (number, backends) in (0..).zip(of_backends) {
                let case = format!("connect: to a service of {backends} backends, {total} services");
                figures.add("ns", &case, node.netns.run(|| connect((called(number), PORT))));
            }
        }
        leave(&mut *node.tables.service, &few.0);
        leave(&mut *node.tables.slot, &few.1);
    }
}

/// Removes all but these.
fn leave<K: Copy + PartialEq, V>(table: &mut dyn Table<K, V>, these: &[(K, V)]) {
    let others: Vec<K> = table.dump().unwrap().into_iter().map(|(key, _)| key).collect();
    let others: Vec<K> =
        others.into_iter().filter(|key| !these.iter().any(|(other, _)| other == key)).collect();
    table.remove(&others).unwrap();
}

fn called(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a60_0100 + number).into()
}

/// Nanoseconds per connect.
fn connect(to: (IpAddr, u16)) -> f64 {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let begin = Instant::now();
    (0..CONNECTS).for_each(|_| socket.connect(to).unwrap());
    begin.elapsed().as_secs_f64() * 1e9 / f64::from(CONNECTS)
}

/// What the agent's writes cost.
fn tables(rounds: u32, figures: &mut Figures) {
    const ENTRIES: u32 = 100_000;
    let root = Root::new();
    let options = DatapathOptions { sizes: MapSizes::default(), ..root.options(1) };
    let datapath = Datapath::open(&options).unwrap();
    let mut tables = datapath.tables().unwrap();
    let addresses: Vec<_> = (0..ENTRIES)
        .map(|n| (ip_key(2, Ipv4Addr::from(0x0a80_0000 + n).into()), ip_value(0x2_1000, underlay(2))))
        .collect();
    let keys: Vec<_> = addresses.iter().map(|(key, _)| *key).collect();
    for _ in 0..rounds {
        let timed = |work: &mut dyn FnMut()| {
            let begin = Instant::now();
            work();
            begin.elapsed().as_secs_f64()
        };
        let load = timed(&mut || tables.ipcache.upsert(&addresses).unwrap());
        figures.add("s", "cm_ipcache: 100,000 entries into an empty map", load);
        figures.add(
            "s",
            "cm_ipcache: the same read back",
            timed(&mut || drop(tables.ipcache.dump().unwrap())),
        );
        tables.ipcache.remove(&keys).unwrap();
        let dead = [(2, ClusterState { state: cluster_state::DEAD })];
        let failover = timed(&mut || tables.cluster.upsert(&dead).unwrap());
        figures.add("us", "cm_cluster: a whole cluster out of load-balancing, one write", failover * 1e6);
        tables.cluster.remove(&[2]).unwrap();
    }
}
