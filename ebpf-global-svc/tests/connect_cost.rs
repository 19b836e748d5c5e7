//! What a service costs at `connect()`: the kernel's own count of a program's time.
//!
//! `cargo test -p ebpf-global-svc --test connect_cost -- --nocapture` prints it. UDP sockets, since connecting them
//! costs little but the program.

#![allow(clippy::unwrap_used, reason = "a test says enough when it fails")]

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use support::{
    Service, UDP,
    sockets::{LOCAL, Node, PORT, REMOTE, VIP4, VIP6, server4, server6},
    spent,
};

const STICKY4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 3));
const CONNECTS: u32 = 200_000;

#[test]
fn time_per_connect() {
    let mut node = Node::new();
    let four: Vec<_> = (1..5).map(|n| (u32::from(n), server4(n), 7)).collect();
    let six: Vec<_> = (1..5).map(|n| (u32::from(n) + 4, server6(n), 7)).collect();
    node.install_both(&four, &six);
    node.sticky(
        &Service {
            id: 3,
            frontend: (STICKY4, PORT),
            proto: UDP,
            groups: &[(LOCAL, 1, &four[..2]), (REMOTE, 1, &four[2..])],
        },
        600,
    );
    let _counting = aya::sys::enable_stats(aya::sys::Stats::RunTime).unwrap();
    measure(&node, "cm_connect4", "no service", server4(1));
    measure(&node, "cm_connect4", "service, two clusters", VIP4);
    measure(&node, "cm_connect4", "the same, session affinity", STICKY4);
    measure(&node, "cm_connect6", "no service", server6(1));
    measure(&node, "cm_connect6", "service, two clusters", VIP6);
}

/// Prints the mean of many connects of one socket; the best of five series, as others use the machine too.
fn measure(node: &Node, program: &str, what: &str, to: IpAddr) {
    let any: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let series = (0..5).map(|_| {
        let (runs, time) = spent(program);
        node.netns.run(|| {
            let socket = UdpSocket::bind((any, 0)).unwrap();
            (0..CONNECTS).for_each(|_| socket.connect((to, PORT)).unwrap());
        });
        let (runs_after, time_after) = spent(program);
        assert_eq!(runs_after - runs, u64::from(CONNECTS));
        (time_after - time) / (runs_after - runs)
    });
    println!("{program:12} {what:32} {:5} ns", series.min().unwrap());
}
