//! Looks at all packets of a network namespace and counts those of tunnels: what somebody on the wire would see.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _};
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::Output;

/// `ETH_P_ALL` of linux/if_ether.h.
const ALL: u16 = 3;
const ETHERNET: usize = 14;
const UDP: u8 = 17;
/// A frame that segmentation has not cut yet.
const LONGEST: usize = 1 << 17;
/// The socket's buffer: what comes while the processor is elsewhere.
const BUFFER: usize = 8 << 20;

#[derive(Args)]
pub(crate) struct CaptureArgs {
    /// How long.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Count packets that hold this text apart.
    #[arg(long, default_value = "")]
    marker: String,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// Packets between two addresses, IPv4 only.
#[derive(Serialize)]
struct Flow {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    /// Of IP: 17 is UDP, 50 is ESP.
    protocol: u8,
    /// UDP's destination port; 0: no UDP, or a later fragment.
    port: u16,
    packets: u64,
    /// With the marker in them.
    marked: u64,
}

/// Source, destination, protocol, UDP port.
type Ends = (Ipv4Addr, Ipv4Addr, u8, u16);

pub(crate) fn run(args: &CaptureArgs) -> anyhow::Result<ExitCode> {
    let seconds = Duration::try_from_secs_f64(args.seconds).context("--seconds is out of range")?;
    let protocol = Protocol::from(i32::from(ALL.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))
        .context("cannot capture; it needs root and the module af_packet")?;
    // As much as the system allows.
    let _ = socket.set_recv_buffer_size(BUFFER);
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut flows: BTreeMap<Ends, (u64, u64)> = BTreeMap::new();
    let mut frame = vec![0; LONGEST];
    let until = Instant::now() + seconds;
    while Instant::now() < until {
        let length = match (&socket).read(&mut frame) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            Err(error) => return Err(error).context("cannot capture"),
        };
        let Some(ends) = ends(&frame[..length]) else { continue };
        let (packets, marked) = flows.entry(ends).or_default();
        *packets += 1;
        *marked += u64::from(holds(&frame[..length], args.marker.as_bytes()));
    }
    let flows = flows.into_iter().map(|((source, destination, protocol, port), (packets, marked))| Flow {
        source,
        destination,
        protocol,
        port,
        packets,
        marked,
    });
    match args.output {
        Output::Text => flows.for_each(|flow| {
            println!(
                "{} > {}:{} protocol {}  {} packets, {} marked",
                flow.source, flow.destination, flow.port, flow.protocol, flow.packets, flow.marked
            );
        }),
        Output::Json | Output::Jsonl => println!("{}", serde_json::to_string(&flows.collect::<Vec<_>>())?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Of the outer headers.
fn ends(frame: &[u8]) -> Option<Ends> {
    let ethertype = frame.get(12..14)?;
    let packet = frame.get(ETHERNET..)?;
    if ethertype != [8, 0] || packet.len() < 20 || packet[0] >> 4 != 4 {
        return None;
    }
    let address = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
    let header = usize::from(packet[0] & 15) * 4;
    let later_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
    let port = match packet.get(header + 2..header + 4) {
        Some(port) if packet[9] == UDP && !later_fragment => u16::from_be_bytes([port[0], port[1]]),
        _ => 0,
    };
    Some((address(12), address(16), packet[9], port))
}

fn holds(frame: &[u8], marker: &[u8]) -> bool {
    !marker.is_empty() && frame.windows(marker.len()).any(|window| window == marker)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(fragment: u16) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET];
        frame[12] = 8;
        let mut ip = vec![0x46, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0, 172, 31, 1, 1, 172, 31, 2, 1];
        ip[6..8].copy_from_slice(&fragment.to_be_bytes());
        // Four bytes of options.
        ip.extend([1; 4]);
        frame.extend(ip);
        frame.extend([0, 1, 0x21, 0x18]);
        frame.extend(b"....GET /marker");
        frame
    }

    #[test]
    fn reads_outer_headers() {
        let [a, b] = [[172, 31, 1, 1], [172, 31, 2, 1]].map(Ipv4Addr::from);
        assert_eq!(ends(&frame(0)), Some((a, b, UDP, 8472)));
        assert_eq!(ends(&frame(185)), Some((a, b, UDP, 0)));
        for length in 0..ETHERNET + 20 {
            assert_eq!(ends(&frame(0)[..length]), None);
        }
        assert!(holds(&frame(0), b"/marker") && !holds(&frame(0), b"/another") && !holds(&frame(0), b""));
    }
}
