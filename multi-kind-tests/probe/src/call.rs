//! Many short calls, each over a new connection or socket, counted by who answered.

use crate::stats::Percentiles;
use crate::stream::pace;
use crate::target::{Scheme, Target};
use crate::whoami::{Answer, canonical};
use crate::{Output, http};
use anyhow::Context as _;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
pub(crate) struct CallArgs {
    /// `http://HOST[:PORT]/PATH` or `udp://HOST:PORT`; IPv6 in brackets.
    #[arg(value_parser = Target::parse)]
    target: Target,
    /// Number of calls; without it, --duration or --until-eof ends the run (one call if none is given).
    #[arg(short = 'n', long)]
    calls: Option<u64>,
    /// Stop after this many seconds.
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Stop when standard input is closed.
    #[arg(long)]
    until_eof: bool,
    /// Milliseconds from the start of one call to the start of the next; 0: no pause.
    #[arg(long, default_value_t = 0.0, value_name = "MILLISECONDS")]
    interval: f64,
    /// Milliseconds after which a call has failed.
    #[arg(long, default_value_t = 1000, value_name = "MILLISECONDS")]
    timeout: u64,
    /// UDP: do not connect the socket; the answer must then come from the address that was called.
    #[arg(long)]
    unconnected: bool,
    /// text, json, or jsonl: one line per call while it runs.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// One finished call.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Call {
    /// When the call began: microseconds since the Unix epoch.
    t: u64,
    /// How long it took, in microseconds.
    us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    /// `CLUSTER/POD`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    #[serde(skip)]
    peername_differs: bool,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Report {
    target: String,
    calls: u64,
    ok: u64,
    failed: u64,
    /// Failed calls by reason.
    failures: BTreeMap<&'static str, u64>,
    by_cluster: BTreeMap<String, u64>,
    /// By `CLUSTER/POD`.
    by_pod: BTreeMap<String, u64>,
    /// Calls whose socket named another peer than the one that was called.
    peername_differs: u64,
    latency_us: Percentiles,
    seconds: f64,
}

/// Exit code 1 if any call failed.
pub(crate) fn run(args: &CallArgs) -> anyhow::Result<ExitCode> {
    let target = &args.target;
    let interval = Duration::try_from_secs_f64(args.interval / 1e3).context("--interval is out of range")?;
    let duration =
        args.duration.map(Duration::try_from_secs_f64).transpose().context("--duration is out of range")?;
    let limit = match (args.calls, duration, args.until_eof) {
        (None, None, false) => 1,
        (calls, ..) => calls.unwrap_or(u64::MAX),
    };
    let stop = Arc::new(AtomicBool::new(false));
    if args.until_eof {
        stop_at_eof(stop.clone());
    }
    let started = Instant::now();
    let mut tally = Tally::new(&target.text);
    for number in 0..limit {
        let begin = Instant::now();
        if stop.load(Ordering::Relaxed) || duration.is_some_and(|duration| started.elapsed() >= duration) {
            break;
        }
        let call = one_call(target, number, Duration::from_millis(args.timeout.max(1)), args.unconnected);
        if args.output == Output::Jsonl {
            println!("{}", serde_json::to_string(&call)?);
        }
        tally.add(call);
        pace(interval.saturating_sub(begin.elapsed()));
    }
    let report = tally.finish(started.elapsed());
    match args.output {
        Output::Text => print_text(&report),
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Jsonl => println!("{}", serde_json::json!({ "summary": report })),
    }
    Ok(if report.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn stop_at_eof(stop: Arc<AtomicBool>) {
    thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut buffer = [0; 256];
        while matches!(input.read(&mut buffer), Ok(length) if length > 0) {}
        stop.store(true, Ordering::Relaxed);
    });
}

fn print_text(report: &Report) {
    println!(
        "{} calls, {} failed, p50 {} us, p99 {} us",
        report.calls, report.failed, report.latency_us.p50, report.latency_us.p99
    );
    for (cluster, count) in &report.by_cluster {
        println!("  cluster {cluster}: {count}");
    }
    for (pod, count) in &report.by_pod {
        println!("  pod {pod}: {count}");
    }
    for (reason, count) in &report.failures {
        println!("  failed, {reason}: {count}");
    }
}

fn one_call(target: &Target, number: u64, timeout: Duration, unconnected: bool) -> Call {
    let t = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let begin = Instant::now();
    let result = match &target.scheme {
        Scheme::Http { path } => call_http(target, path, timeout),
        Scheme::Udp => call_udp(target.address, number, timeout, unconnected),
    };
    let us = saturating_micros(begin.elapsed());
    let t = saturating_micros(t);
    match result {
        Ok((answer, peer)) => Call {
            t,
            us,
            // Pods of two clusters may well have the same name.
            pod: Some(format!("{}/{}", answer.cluster, answer.pod)),
            cluster: Some(answer.cluster),
            error: None,
            peername_differs: canonical(peer) != canonical(target.address),
        },
        Err(error) => {
            Call { t, us, cluster: None, pod: None, error: Some(reason(&error)), peername_differs: false }
        }
    }
}

fn saturating_micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn call_http(target: &Target, path: &str, timeout: Duration) -> io::Result<(Answer, SocketAddr)> {
    let stream = TcpStream::connect_timeout(&target.address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?;
    http::write_request(&stream, &target.authority, path)?;
    let (answer, _body) = http::read_answer(&stream)?;
    let answer = answer.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "anonymous answer"))?;
    Ok((answer, peer))
}

fn call_udp(
    address: SocketAddr,
    number: u64,
    timeout: Duration,
    unconnected: bool,
) -> io::Result<(Answer, SocketAddr)> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    let request = format!("call {number}");
    if unconnected {
        socket.send_to(request.as_bytes(), address)?;
    } else {
        socket.connect(address)?;
        socket.send(request.as_bytes())?;
    }
    let deadline = Instant::now() + timeout;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let (length, from) = match socket.recv_from(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            other => other?,
        };
        let body: serde_json::Value = serde_json::from_slice(&buffer[..length])?;
        if body["echo"] != request {
            continue;
        }
        if unconnected && canonical(from) != canonical(address) {
            return Err(io::Error::new(ErrorKind::AddrNotAvailable, "answer from another address"));
        }
        let peer = if unconnected { from } else { socket.peer_addr()? };
        return Ok((serde_json::from_value(body)?, peer));
    }
}

/// A short stable word for what failed.
fn reason(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => "reset",
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout",
        ErrorKind::HostUnreachable => "host_unreachable",
        ErrorKind::NetworkUnreachable => "network_unreachable",
        ErrorKind::PermissionDenied => "not_permitted",
        ErrorKind::UnexpectedEof => "cut_short",
        ErrorKind::InvalidData => "bad_answer",
        ErrorKind::AddrNotAvailable => "wrong_source",
        _ => "other",
    }
}

struct Tally {
    report: Report,
    latencies: Vec<Duration>,
}

impl Tally {
    fn new(target: &str) -> Self {
        Self { report: Report { target: target.to_owned(), ..Report::default() }, latencies: Vec::new() }
    }

    fn add(&mut self, call: Call) {
        let report = &mut self.report;
        report.calls += 1;
        if let Some(reason) = call.error {
            report.failed += 1;
            *report.failures.entry(reason).or_default() += 1;
            return;
        }
        report.ok += 1;
        report.peername_differs += u64::from(call.peername_differs);
        *report.by_cluster.entry(call.cluster.unwrap_or_default()).or_default() += 1;
        *report.by_pod.entry(call.pod.unwrap_or_default()).or_default() += 1;
        self.latencies.push(Duration::from_micros(call.us));
    }

    fn finish(self, elapsed: Duration) -> Report {
        Report { latency_us: Percentiles::of(self.latencies), seconds: elapsed.as_secs_f64(), ..self.report }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(cluster: &str, pod: &str) -> Call {
        Call {
            t: 0,
            us: 10,
            cluster: Some(cluster.into()),
            pod: Some(pod.into()),
            error: None,
            peername_differs: false,
        }
    }

    #[test]
    fn counts_by_cluster_pod_and_reason() {
        let mut tally = Tally::new("http://10.96.0.10/");
        tally.add(answered("alpha", "a"));
        tally.add(answered("beta", "b"));
        tally.add(answered("beta", "c"));
        tally.add(Call { cluster: None, pod: None, error: Some("refused"), ..answered("", "") });
        let report = tally.finish(Duration::from_secs(1));
        assert_eq!((report.calls, report.ok, report.failed), (4, 3, 1));
        assert_eq!(report.by_cluster, BTreeMap::from([("alpha".into(), 1), ("beta".into(), 2)]));
        assert_eq!(report.by_pod.len(), 3);
        assert_eq!(report.failures, BTreeMap::from([("refused", 1)]));
    }

    #[test]
    fn nobody_listening_is_refused() {
        // Bound but never listening: nobody else can take the port meanwhile.
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
        let any: SocketAddr = "127.0.0.1:0".parse().expect("literal");
        socket.bind(&any.into()).expect("loopback");
        let port = socket.local_addr().expect("bound").as_socket().expect("inet").port();
        let target = Target::parse(&format!("http://127.0.0.1:{port}/")).expect("target");
        assert_eq!(one_call(&target, 0, Duration::from_secs(1), false).error, Some("refused"));
    }
}
