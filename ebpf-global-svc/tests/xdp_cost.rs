//! What a packet of an established call from outside costs in `cm_xdp` and in `cm_from_netdev`: the kernel's own count of
//! their time.
//!
//! `cargo test -p ebpf-global-svc --test xdp_cost -- --nocapture` prints it.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;
#[path = "xdp/world.rs"]
mod world;

use std::time::Duration;

use ebpf_global_svc::{Acceleration, Arrival};
use support::{TCP, UDP, spent};
use world::{Frame, TX, World};

/// Verdict of tc.
const REDIRECTED: i32 = 7;

/// One run at a time: a second one would get what the first has made of the packet.
#[test]
fn time_per_packet() {
    const RUNS: u64 = 20_000;
    let mut world = World::new();
    let ifindex = world.ifindex;
    world.on_first(|datapath| datapath.accelerate(ifindex, Acceleration::Driver).unwrap());
    let _counting = aya::sys::enable_stats(aya::sys::Stats::RunTime).unwrap();
    let arrival = Arrival { ifindex, ..Arrival::default() };
    for (family, proto) in [(4, TCP), (4, UDP), (6, TCP), (6, UDP)] {
        let frame = Frame { family, proto, port: 40_000, payload: 100, class: 0 };
        let bytes = frame.bytes();
        let (node, datapath) = (&world.nodes[0].netns, world.nodes[0].datapath());
        let series = |program: &str| {
            let (runs, time) = spent(program);
            for _ in 0..RUNS / 1000 {
                world.note(&frame, Duration::ZERO, |_, _| {});
                node.run(|| {
                    for _ in 0..1000 {
                        let verdict = datapath.trial(program, &bytes, arrival, 1).unwrap().verdict;
                        assert!(verdict == TX || verdict == REDIRECTED, "{program}: {verdict}");
                    }
                });
            }
            let (runs_after, time_after) = spent(program);
            // A few more are of packets of the kernels.
            assert!((RUNS..RUNS + 100).contains(&(runs_after - runs)), "{} runs", runs_after - runs);
            (time_after - time) / (runs_after - runs)
        };
        let best = |program| (0..3).map(|_| series(program)).min().unwrap();
        println!(
            "IPv{family}, protocol {proto:2}: cm_from_netdev {} ns, cm_xdp {} ns",
            best("cm_from_netdev"),
            best("cm_xdp")
        );
    }
}
