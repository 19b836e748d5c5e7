//! What somebody on the wire sees: packets of the lab's fabric, which are all between nodes.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde::Deserialize;

use super::steps::Stage;
use crate::scenario::{Clear, Sealed, Underlay};
use crate::{pace, process};

const TUNNEL: u16 = 8472;
/// One port for each combination of an old and a new key.
const WIREGUARD: RangeInclusive<u16> = 51_871..=51_874;
const UDP: u8 = 17;
/// IPsec's, which has no ports.
const ESP: u8 = 50;

/// As `mesh-probe capture` prints them.
#[derive(Deserialize)]
struct Flow {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    port: u16,
    packets: u64,
    marked: u64,
}

/// Packets by what they are.
#[derive(Debug, Default)]
struct Seen {
    /// Tunnel packets in clear, between nodes of one cluster.
    within: u64,
    /// And of different ones.
    across: u64,
    wireguard: u64,
    esp: u64,
    /// With the marker, of any kind.
    marked_within: u64,
    marked_across: u64,
}

pub(super) fn look(stage: &mut Stage<'_>, step: &Underlay) -> anyhow::Result<Option<String>> {
    let lab = stage.lab()?;
    let span = step.span.0;
    let fabric = format!("cm-{}-fabric", lab.name());
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &fabric]).arg(stage.options.binaries.path("mesh-probe")).arg("capture");
    command.args(["--seconds", &span.as_secs_f64().to_string(), "--marker", &step.marker, "-o", "json"]);
    let finished =
        process::run(command, span + pace::slowed(Duration::from_secs(10)), &stage.options.interrupt)?;
    let text = finished.success("mesh-probe capture")?;
    let flows: Vec<Flow> = serde_json::from_str(text.trim()).context("what the capture prints")?;
    let seen = sum(&flows);
    let Seen { within, across, wireguard, esp, .. } = seen;
    let wrong = differences(&seen, step.clear, step.with);
    anyhow::ensure!(wrong.is_empty(), "{}; seen: {seen:?}", wrong.join(", "));
    Ok(Some(format!(
        "tunnel packets in clear: {across} between clusters, {within} within; {wireguard} of WireGuard, {esp} of IPsec"
    )))
}

fn sum(flows: &[Flow]) -> Seen {
    // Nodes of cluster c have the addresses 172.31.c.n and fd00:172:31::c0n, the numbers in hexadecimal.
    let cluster = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets()[2],
        IpAddr::V6(ip) => ip.octets()[14],
    };
    let mut seen = Seen::default();
    for flow in flows {
        let same = cluster(flow.source) == cluster(flow.destination);
        let marked = if same { &mut seen.marked_within } else { &mut seen.marked_across };
        *marked += flow.marked;
        match (flow.protocol, flow.port, same) {
            (UDP, TUNNEL, true) => seen.within += flow.packets,
            (UDP, TUNNEL, false) => seen.across += flow.packets,
            (UDP, port, _) if WIREGUARD.contains(&port) => seen.wireguard += flow.packets,
            (ESP, ..) => seen.esp += flow.packets,
            _ => {}
        }
    }
    seen
}

fn differences(seen: &Seen, clear: Clear, with: Sealed) -> Vec<&'static str> {
    let (encrypted, other) = match with {
        Sealed::Wireguard => (seen.wireguard, seen.esp),
        Sealed::Ipsec => (seen.esp, seen.wireguard),
    };
    let across = seen.across > 0 || seen.marked_across > 0;
    let within = seen.within > 0 || seen.marked_within > 0;
    let mut wrong = Vec::new();
    let mut expect = |fine: bool, what| {
        if !fine {
            wrong.push(what);
        }
    };
    if matches!(clear, Clear::None | Clear::Within) {
        // What is going to end may still answer for a while.
        expect(other * 10 <= encrypted, "it is encrypted by the other one of WireGuard and IPsec");
    }
    match clear {
        Clear::None => {
            expect(!across, "clear text between clusters");
            expect(!within, "clear text within a cluster");
            expect(encrypted > 0, "nothing is encrypted");
        }
        Clear::Within => {
            expect(!across, "clear text between clusters");
            expect(seen.within > 0 && seen.marked_within > 0, "no clear text within a cluster");
            expect(encrypted > 0, "nothing is encrypted");
        }
        Clear::Silence => expect(!across, "clear text between clusters"),
        Clear::All => {
            expect(seen.across > 0 && seen.marked_across > 0, "no clear text between clusters");
            // Devices that are about to go answer each other for a while.
            expect((encrypted + other) * 10 < seen.across, "something is encrypted");
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEALED: u16 = *WIREGUARD.end();

    #[test]
    fn a_leak_is_seen() {
        let flow = |c: u8, port, marked| Flow {
            source: [172, 31, 1, 1].into(),
            destination: [172, 31, c, 2].into(),
            protocol: UDP,
            port,
            packets: 1,
            marked,
        };
        let wrong = |flows: &[Flow], clear| differences(&sum(flows), clear, Sealed::Wireguard).len();
        let fine = [flow(2, SEALED, 0), flow(1, SEALED, 0)];
        assert_eq!(wrong(&fine, Clear::None), 0);
        assert_eq!(wrong(&fine, Clear::All), 2);
        assert_eq!(wrong(&[flow(2, SEALED, 0), flow(2, TUNNEL, 0)], Clear::None), 1);
        assert_eq!(wrong(&[flow(2, SEALED, 1)], Clear::None), 1, "the marker counts wherever it is");
        assert_eq!(wrong(&[flow(2, SEALED, 0), flow(1, TUNNEL, 1)], Clear::Within), 0);
        assert_eq!(wrong(&[flow(2, TUNNEL, 1), flow(1, TUNNEL, 1)], Clear::Within), 2);
        assert_eq!(wrong(&[flow(2, TUNNEL, 1)], Clear::All), 0);
        assert_eq!(wrong(&[], Clear::None), 1);

        let over_ipv6 = |flow: Flow, c: u16| Flow {
            source: [0xfd00, 0x172, 0x31, 0, 0, 0, 0, 0x0101].into(),
            destination: [0xfd00, 0x172, 0x31, 0, 0, 0, 0, c << 8 | 2].into(),
            ..flow
        };
        assert_eq!(wrong(&[over_ipv6(flow(0, SEALED, 0), 2)], Clear::None), 0);
        assert_eq!(
            wrong(&[over_ipv6(flow(0, SEALED, 0), 2), over_ipv6(flow(0, TUNNEL, 1), 1)], Clear::Within),
            0
        );
        assert_eq!(
            wrong(&[over_ipv6(flow(0, SEALED, 0), 2), over_ipv6(flow(0, TUNNEL, 0), 2)], Clear::None),
            1
        );

        let esp = |marked| Flow { protocol: ESP, ..flow(2, 0, marked) };
        let by_ipsec = |flows: &[Flow]| differences(&sum(flows), Clear::None, Sealed::Ipsec).len();
        assert_eq!(by_ipsec(&[esp(0)]), 0);
        assert_eq!(by_ipsec(&[esp(0), flow(2, SEALED, 0)]), 1, "it is WireGuard's");
        assert_eq!(by_ipsec(&[esp(1), flow(2, TUNNEL, 0)]), 1);
        assert_eq!(wrong(&[esp(0)], Clear::None), 2);
    }
}
