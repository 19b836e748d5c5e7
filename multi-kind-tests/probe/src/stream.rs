//! One long TCP connection whose every frame must come back.

use crate::{Output, target};
use anyhow::Context as _;
use serde::Serialize;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A frame is its number, repeated: loss, duplication, reordering and corruption all show.
const FRAME: usize = 64;

#[derive(clap::Args)]
pub(crate) struct StreamArgs {
    /// Server (`serve --stream PORT`), as HOST:PORT.
    target: String,
    /// How long to stream.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Microseconds between two frames.
    #[arg(long, default_value_t = 1000)]
    interval_us: u64,
    /// How long the connection may stand still before it counts as broken, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    stall_ms: u64,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Report {
    frames_sent: u64,
    frames_received: u64,
    lost: u64,
    corrupted: u64,
    /// Longest time between two frames that came back.
    max_gap_ms: f64,
    seconds: f64,
    /// The connection as the application sees it.
    peer: String,
    error: Option<String>,
}

/// Exit code 1 if anything was lost or corrupted, or the connection broke.
pub(crate) fn run(args: &StreamArgs) -> anyhow::Result<ExitCode> {
    let address = target::resolve(&args.target, None)?;
    let stall = Duration::from_millis(args.stall_ms.max(1));
    let stream = TcpStream::connect_timeout(&address, stall)
        .with_context(|| format!("cannot connect to {address}"))?;
    let duration = Duration::try_from_secs_f64(args.seconds).context("--seconds is out of range")?;
    let report = exchange(stream, duration, Duration::from_micros(args.interval_us), stall)?;
    match args.output {
        Output::Text => println!(
            "{} frames sent, {} came back, {} lost, {} corrupted, longest gap {:.1} ms",
            report.frames_sent, report.frames_received, report.lost, report.corrupted, report.max_gap_ms
        ),
        Output::Json | Output::Jsonl => println!("{}", serde_json::to_string(&report)?),
    }
    let clean = report.lost == 0 && report.corrupted == 0 && report.error.is_none();
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn exchange(
    mut stream: TcpStream,
    duration: Duration,
    interval: Duration,
    stall: Duration,
) -> anyhow::Result<Report> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(stall))?;
    stream.set_write_timeout(Some(stall))?;
    let mut report = Report { peer: stream.peer_addr()?.to_string(), ..Report::default() };
    let started = Instant::now();
    let broken = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let sender = {
        let (mut stream, broken, sent) = (stream.try_clone()?, broken.clone(), sent.clone());
        thread::spawn(move || {
            while started.elapsed() < duration && !broken.load(Ordering::Relaxed) {
                stream.write_all(&frame(sent.load(Ordering::Relaxed)))?;
                sent.fetch_add(1, Ordering::Relaxed);
                pace(interval);
            }
            stream.shutdown(Shutdown::Write)
        })
    };
    let mut buffer = [0; FRAME];
    let mut last = started;
    loop {
        match stream.read_exact(&mut buffer) {
            Ok(()) => {
                if buffer != frame(report.frames_received) {
                    report.corrupted += 1;
                }
                report.frames_received += 1;
                let now = Instant::now();
                report.max_gap_ms = report.max_gap_ms.max((now - last).as_secs_f64() * 1e3);
                last = now;
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) => {
                report.error = Some(error.to_string());
                broken.store(true, Ordering::Relaxed);
                break;
            }
        }
    }
    match sender.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            report.error.get_or_insert(error.to_string());
        }
        Err(_) => anyhow::bail!("the sending thread panicked"),
    }
    report.frames_sent = sent.load(Ordering::Relaxed);
    report.lost = report.frames_sent.saturating_sub(report.frames_received);
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

fn frame(number: u64) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    for part in frame.chunks_exact_mut(8) {
        part.copy_from_slice(&number.to_be_bytes());
    }
    frame
}

/// Waits out an interval between two pieces of generated load.
#[expect(clippy::disallowed_methods, reason = "the pace of a load generator, not a synchronisation")]
pub(crate) fn pace(interval: Duration) {
    if !interval.is_zero() {
        thread::sleep(interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Runs one exchange against a peer that maps each received chunk before it sends it back.
    fn exchange_with(mut map: impl FnMut(Vec<u8>) -> Vec<u8> + Send + 'static) -> Report {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("client");
            let mut buffer = [0; FRAME];
            while stream.read_exact(&mut buffer).is_ok() {
                if stream.write_all(&map(buffer.to_vec())).is_err() {
                    break;
                }
            }
        });
        let stream = TcpStream::connect(address).expect("loopback");
        let report = exchange(
            stream,
            Duration::from_millis(100),
            Duration::from_millis(1),
            Duration::from_millis(500),
        );
        peer.join().expect("peer");
        report.expect("exchange")
    }

    #[test]
    fn an_echo_loses_nothing() {
        let report = exchange_with(|bytes| bytes);
        assert!(report.frames_sent > 10, "{report:?}");
        assert_eq!((report.lost, report.corrupted, report.error), (0, 0, None));
    }

    #[test]
    fn a_swallowed_frame_is_lost() {
        let mut frames = 0;
        let report = exchange_with(move |bytes| {
            frames += 1;
            if frames == 5 { Vec::new() } else { bytes }
        });
        assert_eq!(report.lost, 1);
        assert!(report.corrupted > 0, "all later frames carry the wrong number");
    }

    #[test]
    fn a_flipped_bit_is_corruption() {
        let report = exchange_with(|mut bytes| {
            bytes[9] ^= 1;
            bytes
        });
        assert_eq!(report.lost, 0);
        assert_eq!(report.corrupted, report.frames_received);
    }
}
