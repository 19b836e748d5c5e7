//! What a policy costs a packet.

use ebpf_global_svc::{
    Arrival, KINDS,
    abi::{ENDPOINT_ENFORCE_EGRESS, ENDPOINT_ENFORCE_INGRESS, EventRule, PolicyKey, PolicyValue, event_kind},
};

use crate::{
    BOTH, EGRESS, INGRESS, Node, ONE, TWO, any, at,
    frames::{ACK, TCP, UDP, frame, packet, tcp, udp},
    one, outside,
    support::events::{all_of, listen, told},
    two,
};

/// Prints it: `--test policy time_per_packet -- --nocapture`.
#[test]
fn time_per_packet() {
    let mut node = Node::new();
    let request = packet(one(4), two(4), TCP, &tcp(1000, 80, ACK));
    let answer = packet(two(4), one(4), TCP, &tcp(80, 1000, ACK));
    node.time("cm_from_pod", "no policy", &request);
    node.allow(1, at(TCP, 80, any(ONE, TWO, EGRESS)));
    node.allow(2, at(TCP, 80, any(TWO, ONE, INGRESS)));
    for entries in [1, 100, 10_000_u32] {
        let others: Vec<(PolicyKey, PolicyValue)> = (1..entries)
            .map(|n| {
                let port = n.to_be_bytes()[3].into();
                (at(TCP, port, any(ONE, 0x1_1000 + n / 200, EGRESS)), PolicyValue { flags: 0, rule: n + 1 })
            })
            .collect();
        node.tables.policy.upsert(&others).unwrap();
        node.flag(ONE, ENDPOINT_ENFORCE_EGRESS);
        node.flag(TWO, 0);
        node.time("cm_from_pod", &format!("egress, {entries} entries"), &request);
    }
    node.flag(TWO, ENDPOINT_ENFORCE_INGRESS);
    node.time("cm_from_pod", "both pods' policies", &request);
    node.flag(ONE, BOTH);
    node.flag(TWO, 0);
    node.sends(&request).unwrap();
    node.time("cm_from_pod", "an answer", &answer);
    let denied = packet(one(4), two(4), UDP, &udp(1, 2));
    node.time("cm_from_pod", "denied", &denied);
    let mut ring = listen(&mut node.datapath, &[event_kind::DROP]);
    // As many as fit.
    let arrival = Arrival { ifindex: node.pod_ifindex, ..Arrival::default() };
    let told_in = node.try_frame("cm_from_pod", &frame(&denied), arrival, 400).duration;
    assert_eq!(told(&mut ring).len(), 400);
    println!("cm_from_pod {:26} {:4} ns", "denied, and told", told_in.as_nanos());
    node.time("cm_from_pod", "denied, the ring is full", &denied);
    node.datapath.set_events(&[Some(EventRule::new(1, 1, 0)); KINDS]).unwrap();
    node.time("cm_from_pod", "denied, over the limit", &denied);
    node.datapath.set_events(&all_of(&[])).unwrap();
    node.time("cm_to_pod", "from the host, denied", &packet(outside(4), one(4), UDP, &udp(1, 2)));
    node.flag(ONE, 0);
    node.time("cm_to_pod", "from the host, no policy", &packet(outside(4), one(4), UDP, &udp(1, 2)));
}

impl Node {
    fn time(&self, program: &str, what: &str, packet: &[u8]) {
        let arrival = Arrival { ifindex: self.pod_ifindex, ..Arrival::default() };
        let trial = self.try_frame(program, &frame(packet), arrival, 100_000);
        println!("{program} {what:26} {:4} ns", trial.duration.as_nanos());
        // No promise, but a program that takes this long has a loop that it should not have.
        assert!(trial.duration.as_micros() < 20, "{what}: {trial:?}");
    }
}
