//! Looks at all packets of a network namespace and counts those of tunnels: what somebody on the wire would see.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
/// Header of an IPv6 fragment (RFC 8200, section 4.5).
const FRAGMENT: u8 = 44;
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

/// Packets between two addresses.
#[derive(Serialize)]
struct Flow {
    source: IpAddr,
    destination: IpAddr,
    /// Of IP: 17 is UDP, 50 is ESP.
    protocol: u8,
    /// UDP's destination port; 0: no UDP, or a later fragment.
    port: u16,
    packets: u64,
    /// With the marker in them.
    marked: u64,
}

/// Source, destination, protocol, UDP port.
type Ends = (IpAddr, IpAddr, u8, u16);

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
                "{} > {} port {} protocol {}  {} packets, {} marked",
                flow.source, flow.destination, flow.port, flow.protocol, flow.packets, flow.marked
            );
        }),
        Output::Json | Output::Jsonl => println!("{}", serde_json::to_string(&flows.collect::<Vec<_>>())?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Of the outer headers.
fn ends(frame: &[u8]) -> Option<Ends> {
    let packet = frame.get(ETHERNET..)?;
    match (frame.get(12..14)?, packet.first()? >> 4) {
        ([0x08, 0x00], 4) => ends_of_ipv4(packet),
        ([0x86, 0xdd], 6) => ends_of_ipv6(packet),
        _ => None,
    }
}

fn ends_of_ipv4(packet: &[u8]) -> Option<Ends> {
    let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?).into());
    let (source, destination) = (address(12)?, address(16)?);
    let header = usize::from(packet[0] & 15) * 4;
    let later_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
    let protocol = packet[9];
    let port = if later_fragment { 0 } else { udp_port(protocol, packet.get(header..)) };
    Some((source, destination, protocol, port))
}

fn ends_of_ipv6(packet: &[u8]) -> Option<Ends> {
    let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?).into());
    let (source, destination) = (address(8)?, address(24)?);
    let payload = packet.get(40..);
    let (protocol, port) = match (packet[6], payload.and_then(|payload| payload.first_chunk::<8>())) {
        (FRAGMENT, Some(&[protocol, _, high, low, ..])) => {
            let later_fragment = u16::from_be_bytes([high, low]) >> 3 != 0;
            (protocol, if later_fragment { 0 } else { udp_port(protocol, packet.get(48..)) })
        }
        (protocol, _) => (protocol, udp_port(protocol, payload)),
    };
    Some((source, destination, protocol, port))
}

/// The port that a packet of UDP goes to.
fn udp_port(protocol: u8, header: Option<&[u8]>) -> u16 {
    match header.and_then(|header| header.get(2..4)) {
        Some(port) if protocol == UDP => u16::from_be_bytes([port[0], port[1]]),
        _ => 0,
    }
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
        let [a, b] = [[172, 31, 1, 1], [172, 31, 2, 1]].map(IpAddr::from);
        assert_eq!(ends(&frame(0)), Some((a, b, UDP, 8472)));
        assert_eq!(ends(&frame(185)), Some((a, b, UDP, 0)));
        for length in 0..ETHERNET + 20 {
            assert_eq!(ends(&frame(0)[..length]), None);
        }
        let [a, b] = [1, 2].map(|last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last));
        let over_ipv6 = |next: u8, more: &[u8]| {
            let mut frame = vec![0; ETHERNET];
            frame[12..].copy_from_slice(&[0x86, 0xdd]);
            frame.extend([0x60, 0, 0, 0, 0, 0, next, 64]);
            frame.extend([a, b].map(|ip| ip.octets()).concat());
            [&frame[..], more, &[0, 1, 0x21, 0x18]].concat()
        };
        let of = |protocol, port| Some((IpAddr::from(a), IpAddr::from(b), protocol, port));
        assert_eq!(ends(&over_ipv6(UDP, &[])), of(UDP, 8472));
        assert_eq!(ends(&over_ipv6(50, &[])), of(50, 0));
        assert_eq!(ends(&over_ipv6(FRAGMENT, &[UDP, 0, 0, 1, 0, 0, 0, 0])), of(UDP, 8472));
        assert_eq!(ends(&over_ipv6(FRAGMENT, &[UDP, 0, 5, 160, 0, 0, 0, 0])), of(UDP, 0));
        for length in 0..ETHERNET + 40 {
            assert_eq!(ends(&over_ipv6(UDP, &[])[..length]), None);
        }
        assert!(holds(&frame(0), b"/marker") && !holds(&frame(0), b"/another") && !holds(&frame(0), b""));
    }
}
