//! Random policies and packets against the rules in plain Rust.

use std::{cell::RefCell, collections::BTreeMap};

use ebpf_global_svc::{
    Arrival, Datapath, Tables,
    abi::{
        ENDPOINT_AUDIT, ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, EndpointValue, POLICY_DENY,
        POLICY_PEER_BITS, POLICY_PORT_BITS, POLICY_PROTO_BITS, PolicyKey, PolicyValue, VerdictKey, identity,
        reason, verdict,
    },
};
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};

use crate::{
    DROPPED, EGRESS, FAR, INGRESS, Node, ONE, OWN, TWO, far,
    frames::{GRE, SCTP, TCP, UDP, frame, icmp, packet, sctp, tcp, udp},
    one, outside,
    support::{endpoint, ip_key, metric},
    two,
};

const PORTS: [u16; 8] = [0, 1, 2, 3, 8, 80, 81, 0x8050];

#[derive(Clone, Copy, Debug)]
struct Probe {
    family: u8,
    direction: u8,
    /// 0: the other pod, 1: the one elsewhere, 2: the world.
    to: u8,
    proto: u8,
    port: u16,
}

impl Probe {
    fn subject(self) -> u32 {
        if self.direction == EGRESS { ONE } else { TWO }
    }

    fn peer(self) -> u32 {
        match (self.direction, self.to) {
            (INGRESS, _) => ONE,
            (_, 0) => TWO,
            (_, 1) => FAR,
            _ => identity::WORLD,
        }
    }

    fn proto(self) -> u8 {
        if self.proto == 1 && self.family == 6 { 58 } else { self.proto }
    }

    /// What policies call its port, if it has one.
    fn service(self) -> Option<u16> {
        match self.proto {
            GRE => None,
            // Types; an echo reply and errors would be other stories.
            1 => Some(200 + self.port % 8),
            _ => Some(self.port),
        }
    }

    fn packet(self) -> Vec<u8> {
        let to = match self.to {
            1 if self.direction == EGRESS => far(self.family),
            2 if self.direction == EGRESS => outside(self.family),
            _ => two(self.family),
        };
        let payload = match self.proto {
            TCP => tcp(9, self.port, 16),
            UDP => udp(9, self.port),
            SCTP => sctp(9, self.port),
            GRE => vec![0; 8],
            _ => icmp(self.service().unwrap().to_be_bytes()[1], 0, 1),
        };
        frame(&packet(one(self.family), to, self.proto(), &payload))
    }
}

/// What the rules say.
fn expected(entries: &[(PolicyKey, PolicyValue)], probe: Probe) -> (u8, u32) {
    let longest = |peer| {
        let matching = entries.iter().filter(|(key, _)| {
            let port_bits = key.prefixlen.saturating_sub(POLICY_PROTO_BITS);
            let mask = u16::try_from(0xffff_u32 << (16 - port_bits) & 0xffff).unwrap();
            (key.subject, key.peer, key.direction) == (probe.subject(), peer, probe.direction)
                && (key.prefixlen == POLICY_PEER_BITS || key.proto == probe.proto())
                && match probe.service() {
                    Some(port) => u16::from_be(key.port) & mask == port & mask,
                    None => port_bits == 0,
                }
        });
        matching.max_by_key(|(key, _)| key.prefixlen).map(|(_, value)| *value)
    };
    let found = [longest(probe.peer()), longest(0)];
    let denial = found.iter().flatten().find(|value| value.flags & POLICY_DENY != 0);
    match (denial, found.iter().flatten().next()) {
        (Some(denial), _) => (reason::POLICY_DENY, denial.rule),
        (None, Some(value)) => (0, value.rule),
        (None, None) => (reason::POLICY, 0),
    }
}

fn protos() -> impl Strategy<Value = u8> {
    select(vec![TCP, UDP, SCTP, GRE, 1])
}

fn entries() -> impl Strategy<Value = Vec<(PolicyKey, PolicyValue)>> {
    let one = (
        select(vec![(ONE, EGRESS), (TWO, INGRESS), (ONE, INGRESS)]),
        select(vec![0, ONE, TWO, FAR, identity::WORLD]),
        select(vec![TCP, UDP, SCTP, GRE, 1, 58]),
        select(PORTS.to_vec()),
        prop_oneof![Just(POLICY_PEER_BITS), POLICY_PROTO_BITS..=POLICY_PORT_BITS],
        any::<bool>(),
    );
    vec(one, 0..12).prop_map(|rows| {
        let mut entries = BTreeMap::new();
        for (rule, ((subject, direction), peer, proto, port, prefixlen, deny)) in (1..).zip(rows) {
            let icmp = matches!(proto, 1 | 58);
            let port = if icmp { 200 + port % 8 } else { port };
            let bits = prefixlen.saturating_sub(POLICY_PROTO_BITS);
            // The kernel stores a prefix as it gets it; two that differ behind their length are one.
            let port = (u32::from(port) & (0xffff << (16 - bits))) & 0xffff;
            let key = PolicyKey {
                prefixlen,
                subject,
                peer,
                direction,
                proto: if prefixlen == POLICY_PEER_BITS { 0 } else { proto },
                port: u16::try_from(port).unwrap().to_be(),
            };
            entries.insert(key, PolicyValue { flags: u32::from(deny) * POLICY_DENY, rule });
        }
        entries.into_iter().collect()
    })
}

fn probes() -> impl Strategy<Value = Vec<Probe>> {
    let one = (select(vec![4, 6]), 0..3_u8, protos(), select(PORTS.to_vec()));
    (select(vec![INGRESS, EGRESS]), vec(one, 1..16)).prop_map(|(direction, probes)| {
        let probe = |(family, to, proto, port)| Probe { family, direction, to, proto, port };
        probes.into_iter().map(probe).collect()
    })
}

/// Puts `entries` in force, sends the packets, and compares; in the pods' network namespace.
fn compare(
    (datapath, tables, ifindex): (&Datapath, &mut Tables, u32),
    entries: &[(PolicyKey, PolicyValue)],
    probes: &[Probe],
    audit: bool,
) -> Result<(), TestCaseError> {
    let arrival = Arrival { ifindex, ..Arrival::default() };
    let audited = if audit { ENDPOINT_AUDIT } else { 0 };
    for family in [4, 6] {
        let of = |direction, flag| if probes[0].direction == direction { flag | audited } else { 0 };
        let (out, into) = (of(EGRESS, ENDPOINT_ENFORCE_EGRESS), of(INGRESS, ENDPOINT_ENFORCE_INGRESS));
        let endpoints = [(one(family), ONE, out), (two(family), TWO, into)].map(|(ip, identity, flags)| {
            (ip_key(OWN, ip), EndpointValue { flags, ..endpoint(ifindex, identity) })
        });
        tables.endpoint.upsert(&endpoints).unwrap();
    }
    tables.policy.upsert(entries).unwrap();
    let mut counts: BTreeMap<_, _> = datapath.verdicts().unwrap().into_iter().collect();
    for probe in probes {
        let (reason, rule) = expected(entries, *probe);
        let denied = reason != 0;
        let before = metric(datapath, reason);
        let trial = datapath.trial("cm_from_pod", &probe.packet(), arrival, 1).unwrap();
        prop_assert_eq!(trial.verdict == DROPPED, denied && !audit, "{:?}", probe);
        if trial.verdict == DROPPED {
            prop_assert_eq!(metric(datapath, reason), before + 1, "{:?}", probe);
        }
        let verdict = match (denied, audit) {
            (false, _) => verdict::ALLOWED,
            (true, false) => verdict::DENIED,
            (true, true) => verdict::AUDITED,
        };
        let key = VerdictKey { subject: probe.subject(), rule, direction: probe.direction, verdict, pad: 0 };
        counts.entry(key).or_default().packets += 1;
    }
    for (key, counter) in datapath.verdicts().unwrap() {
        prop_assert_eq!(
            counts.remove(&key).map(|counter| counter.packets),
            Some(counter.packets),
            "{:?}",
            key
        );
    }
    prop_assert!(counts.is_empty(), "{:?}", counts);
    tables.policy.remove(&entries.iter().map(|(key, _)| *key).collect::<Vec<_>>()).unwrap();
    Ok(())
}

#[test]
fn the_kernel_decides_as_the_rules_say() {
    let Node { root: _root, datapath, mut tables, pod_ifindex, netns } = Node::new();
    netns.run(|| {
        let tables = RefCell::new(&mut tables);
        let config = ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() };
        let cases = (entries(), probes(), any::<bool>());
        let result = TestRunner::new(config).run(&cases, |(entries, probes, audit)| {
            let mut tables = tables.borrow_mut();
            // A failed case leaves its entries behind, and is followed by simpler ones.
            let left: Vec<_> = tables.policy.dump().unwrap().into_iter().map(|(key, _)| key).collect();
            tables.policy.remove(&left).unwrap();
            compare((&datapath, &mut tables, pod_ifindex), &entries, &probes, audit)
        });
        if let Err(failure) = result {
            panic!("{failure}");
        }
    });
}
