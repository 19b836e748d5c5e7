//! What policies let through, on single packets and without a network.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod cost;
mod events;
mod flows;
mod fragments;
mod frames;
mod headers;
mod icmp;
mod model;
mod peers;
mod rules;
mod stack;
#[path = "../support/mod.rs"]
mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_global_svc::{
    Arrival, Datapath, Tables, Trial,
    abi::{
        ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, EndpointValue, POLICY_DENY, POLICY_PEER_BITS,
        POLICY_PORT_BITS, POLICY_PROTO_BITS, PolicyKey, PolicyValue, VerdictKey,
    },
};
use support::{Netns, Root, endpoint, ip_key, ip_value, node, prefix_key, prefix_value};

const OWN: u16 = 1;
const PEER: u16 = 2;
const THIS_NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
const PEER_NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 2);

/// Identities of the two pods of this node, and of one that is elsewhere.
const ONE: u32 = 0x1_0001;
const TWO: u32 = 0x1_0002;
const FAR: u32 = 0x2_0009;

const INGRESS: u8 = ebpf_global_svc::abi::direction::INGRESS;
const EGRESS: u8 = ebpf_global_svc::abi::direction::EGRESS;
const BOTH: u32 = ENDPOINT_ENFORCE_INGRESS | ENDPOINT_ENFORCE_EGRESS;

const TO_STACK: i32 = 0;
const DROPPED: i32 = 2;
const LEFT: i32 = -1;

/// A node with two pods of both families on one interface, and one pod in a peer cluster.
struct Node {
    datapath: Datapath,
    tables: Tables,
    pod_ifindex: u32,
    root: Root,
    netns: Netns,
}

fn address(cluster: u16, n: u8, family: u8) -> IpAddr {
    match family {
        4 => Ipv4Addr::new(10, cluster.to_be_bytes()[1], 0, n).into(),
        _ => Ipv6Addr::new(0xfd00, 10, cluster, 0, 0, 0, 0, n.into()).into(),
    }
}

fn one(family: u8) -> IpAddr {
    address(OWN, 1, family)
}

fn two(family: u8) -> IpAddr {
    address(OWN, 2, family)
}

fn far(family: u8) -> IpAddr {
    address(PEER, 9, family)
}

/// From pod one to the one that is elsewhere.
fn pair(family: u8) -> (IpAddr, IpAddr) {
    (one(family), far(family))
}

fn outside(family: u8) -> IpAddr {
    if family == 4 { Ipv4Addr::new(1, 1, 1, 1).into() } else { "2001:db8::1".parse().unwrap() }
}

impl Node {
    fn new() -> Self {
        let netns = Netns::new("policy");
        netns.ip("link add pod0 type veth peer name eth0");
        netns.ip("link add cm_vxlan type vxlan external dstport 8472");
        let (pod_ifindex, overlay) = (netns.ifindex("pod0"), netns.ifindex("cm_vxlan"));
        let root = Root::new();
        let mut options = root.options(OWN);
        options.node_ip = Some(THIS_NODE);
        let mut datapath = Datapath::open(&options).unwrap();
        netns.run(|| datapath.attach_overlay(overlay).unwrap());
        let mut tables = datapath.tables().unwrap();
        for (cluster, ip) in [(OWN, THIS_NODE), (PEER, PEER_NODE)] {
            tables.node.upsert(&[node(ip, cluster)]).unwrap();
            for (family, length) in [(4, 24), (6, 64)] {
                let entry = (prefix_key(address(cluster, 0, family), length), prefix_value(cluster, ip));
                tables.prefix.upsert(&[entry]).unwrap();
            }
        }
        for family in [4, 6] {
            let entry = (ip_key(PEER, far(family)), ip_value(FAR, PEER_NODE));
            tables.ipcache.upsert(&[entry]).unwrap();
        }
        let mut node = Self { datapath, tables, pod_ifindex, root, netns };
        node.flag(ONE, 0);
        node.flag(TWO, 0);
        node
    }

    /// Pod one may send to port 53 of UDP, wherever.
    fn with_dns() -> Self {
        let mut node = Self::new();
        node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
        node.allow(1, at(frames::UDP, 53, any(ONE, 0, EGRESS)));
        node
    }

    /// Sets the flags of pod one or two.
    fn flag(&mut self, identity: u32, flags: u32) {
        for family in [4, 6] {
            let ip = if identity == ONE { one(family) } else { two(family) };
            let value = EndpointValue { flags, ..endpoint(self.pod_ifindex, identity) };
            self.tables.endpoint.upsert(&[(ip_key(OWN, ip), value)]).unwrap();
        }
    }

    fn allow(&mut self, rule: u32, key: PolicyKey) {
        self.tables.policy.upsert(&[(key, PolicyValue { flags: 0, rule })]).unwrap();
    }

    fn deny(&mut self, rule: u32, key: PolicyKey) {
        self.tables.policy.upsert(&[(key, PolicyValue { flags: POLICY_DENY, rule })]).unwrap();
    }

    fn try_out(&self, program: &str, packet: &[u8], arrival: Arrival) -> Trial {
        self.try_frame(program, &frames::frame(packet), arrival, 1)
    }

    fn try_frame(&self, program: &str, frame: &[u8], arrival: Arrival, repeat: u32) -> Trial {
        let Self { datapath, netns, .. } = self;
        netns.run(|| datapath.trial(program, frame, arrival, repeat).unwrap())
    }

    /// Runs a packet that leaves a pod: passed on, or dropped and why.
    fn sends(&self, packet: &[u8]) -> Result<(), u8> {
        let arrival = Arrival { ifindex: self.pod_ifindex, ..Arrival::default() };
        self.outcome("cm_from_pod", packet, arrival)
    }

    fn outcome(&self, program: &str, packet: &[u8], arrival: Arrival) -> Result<(), u8> {
        let before = self.datapath.metrics().unwrap();
        if self.try_out(program, packet, arrival).verdict != DROPPED {
            return Ok(());
        }
        let after = self.datapath.metrics().unwrap();
        let rose: Vec<_> = after.iter().filter(|counter| !before.contains(counter)).collect();
        match rose[..] {
            [(reason, _)] => Err(*reason),
            _ => panic!("one reason for a drop: {rose:?}"),
        }
    }

    /// Packets of a verdict of a rule.
    fn count(&self, subject: u32, direction: u8, rule: u32, verdict: u8) -> u64 {
        let key = VerdictKey { subject, rule, direction, verdict, pad: 0 };
        let verdicts = self.datapath.verdicts().unwrap();
        verdicts.iter().find(|(other, _)| *other == key).map_or(0, |(_, counter)| counter.packets)
    }
}

/// Everything between a subject and a peer.
fn any(subject: u32, peer: u32, direction: u8) -> PolicyKey {
    PolicyKey { prefixlen: POLICY_PEER_BITS, subject, peer, direction, proto: 0, port: 0 }
}

/// Everything of a protocol.
fn of(proto: u8, key: PolicyKey) -> PolicyKey {
    PolicyKey { prefixlen: POLICY_PROTO_BITS, proto, ..key }
}

/// One port of a protocol, or one ICMP type.
fn at(proto: u8, port: u16, key: PolicyKey) -> PolicyKey {
    PolicyKey { prefixlen: POLICY_PORT_BITS, proto, port: port.to_be(), ..key }
}
