//! Round trips of one byte with both ends polling.
//!
//! With blocking sockets a round trip on one machine is mostly the scheduler waking the other end,
//! which hides what a datapath costs. Here neither end sleeps while a measurement runs, so the time
//! is that of the packets. The server goes back to napping when nobody has called for a while.

use crate::stats::Percentiles;
use crate::stream::pace;
use crate::{Output, target};
use anyhow::Context as _;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The server spins this long after the last sign of a client.
const SPIN: Duration = Duration::from_millis(300);
/// A round trip that takes longer is lost.
const LOST: Duration = Duration::from_secs(2);
/// Measured time is bounded, memory for samples as well.
const MAX_SAMPLES: usize = 4_000_000;

#[derive(clap::Subcommand)]
pub(crate) enum PingpongCommand {
    /// Echo TCP and UDP on one port, IPv4 and IPv6, until killed.
    Server {
        #[arg(long, default_value_t = 7777)]
        port: u16,
    },
    /// Measure against a server.
    Client(ClientArgs),
}

#[derive(clap::Args)]
pub(crate) struct ClientArgs {
    /// HOST:PORT
    target: String,
    /// What one round trip is.
    #[arg(long, value_enum, default_value = "tcp-rr")]
    mode: Mode,
    /// How long to measure.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// How long to run before measuring.
    #[arg(long, default_value_t = 0.2)]
    warmup: f64,
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    /// A byte forth and back over one TCP connection.
    TcpRr,
    /// Connect, a byte forth and back, close.
    TcpCrr,
    /// A datagram forth and back over one connected socket.
    UdpRr,
}

#[derive(Serialize)]
struct Report {
    mode: Mode,
    round_trips: usize,
    lost: u64,
    per_second: f64,
    round_trip_us: Percentiles,
    /// Only for tcp-crr: from `connect` until the connection can be written to.
    #[serde(skip_serializing_if = "Option::is_none")]
    connect_us: Option<Percentiles>,
}

pub(crate) fn run(command: &PingpongCommand) -> anyhow::Result<ExitCode> {
    match command {
        PingpongCommand::Server { port } => {
            serve(*port).with_context(|| format!("pingpong server on port {port}"))?;
        }
        PingpongCommand::Client(args) => {
            let report = measure(args)?;
            match args.output {
                Output::Text => println!(
                    "{} round trips, {} lost, p50 {} us, p99 {} us, {:.0}/s",
                    report.round_trips,
                    report.lost,
                    report.round_trip_us.p50,
                    report.round_trip_us.p99,
                    report.per_second
                ),
                Output::Json | Output::Jsonl => println!("{}", serde_json::to_string(&report)?),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(port: u16) -> io::Result<()> {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    listener.set_only_v6(false)?;
    listener.set_reuse_address(true)?;
    listener.bind(&any.into())?;
    listener.listen(64)?;
    let listener = TcpListener::from(listener);
    listener.set_nonblocking(true)?;
    let udp = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    udp.set_only_v6(false)?;
    udp.bind(&any.into())?;
    let udp = UdpSocket::from(udp);
    udp.set_nonblocking(true)?;
    println!("pingpong server on port {port}");

    let mut connections: Vec<TcpStream> = Vec::new();
    let mut buffer = [0; 2048];
    let mut last_sign = Instant::now();
    loop {
        let mut busy = false;
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            connections.push(stream);
            busy = true;
        }
        connections.retain_mut(|stream| match stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                busy = true;
                stream.write_all(&buffer[..length]).is_ok()
            }
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
        if let Ok((length, from)) = udp.recv_from(&mut buffer) {
            busy = true;
            // A lost answer is the client's to count.
            let _ = udp.send_to(&buffer[..length], from);
        }
        if busy {
            last_sign = Instant::now();
        } else if last_sign.elapsed() > SPIN {
            pace(Duration::from_millis(1));
        }
    }
}

fn measure(args: &ClientArgs) -> anyhow::Result<Report> {
    let address = target::resolve(&args.target, None)?;
    let warmup = Duration::try_from_secs_f64(args.warmup).context("--warmup is out of range")?;
    let window = Duration::try_from_secs_f64(args.seconds).context("--seconds is out of range")?;
    let mut probe = Probe::open(args.mode, address).with_context(|| format!("cannot reach {address}"))?;
    let started = Instant::now();
    while started.elapsed() < warmup {
        // Neighbour entries, caches and the napping server warm up here; losses do not count.
        probe.round_trip().with_context(|| format!("no answer from {address}"))?;
    }
    let (mut trips, mut connects, mut lost) = (Vec::new(), Vec::new(), 0);
    let started = Instant::now();
    while started.elapsed() < window && trips.len() < MAX_SAMPLES {
        match probe.round_trip() {
            Ok(trip) => {
                trips.push(trip.total);
                connects.extend(trip.connect);
            }
            Err(error) if error.kind() == ErrorKind::TimedOut => lost += 1,
            Err(error) => return Err(error).with_context(|| format!("broken on the way to {address}")),
        }
    }
    let elapsed = started.elapsed().as_secs_f64();
    let round_trips = trips.len();
    Ok(Report {
        mode: args.mode,
        round_trips,
        lost,
        per_second: f64::from(u32::try_from(round_trips)?) / elapsed,
        round_trip_us: Percentiles::of(trips),
        connect_us: (!connects.is_empty()).then(|| Percentiles::of(connects)),
    })
}

struct Trip {
    total: Duration,
    connect: Option<Duration>,
}

enum Probe {
    Stream(TcpStream),
    Connect(SocketAddr),
    Datagram { socket: UdpSocket, number: u64 },
}

impl Probe {
    fn open(mode: Mode, address: SocketAddr) -> io::Result<Self> {
        Ok(match mode {
            Mode::TcpRr => {
                let stream = TcpStream::connect_timeout(&address, LOST)?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                Self::Stream(stream)
            }
            Mode::TcpCrr => Self::Connect(address),
            Mode::UdpRr => {
                let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
                socket.connect(address)?;
                socket.set_nonblocking(true)?;
                Self::Datagram { socket, number: 0 }
            }
        })
    }

    fn round_trip(&mut self) -> io::Result<Trip> {
        let begin = Instant::now();
        let mut connect = None;
        match self {
            Self::Stream(stream) => exchange(stream, begin)?,
            Self::Connect(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
                socket.set_nonblocking(true)?;
                socket.set_tcp_nodelay(true)?;
                // Closing with a reset leaves no TIME_WAIT, which would use up the local ports.
                socket.set_linger(Some(Duration::ZERO))?;
                match socket.connect(&(*address).into()) {
                    Err(error) if !in_progress(&error) => return Err(error),
                    _ => {}
                }
                let mut stream = TcpStream::from(socket);
                spin(begin, || stream.write(b"x"))?;
                connect = Some(begin.elapsed());
                spin(begin, || stream.read(&mut [0]))?;
            }
            Self::Datagram { socket, number } => {
                *number += 1;
                let request = number.to_be_bytes();
                spin(begin, || socket.send(&request))?;
                let mut answer = [0; 8];
                // A late answer to a round trip given up before must not pass for this one's.
                while answer != request {
                    spin(begin, || socket.recv(&mut answer))?;
                }
            }
        }
        Ok(Trip { total: begin.elapsed(), connect })
    }
}

fn exchange(stream: &mut TcpStream, begin: Instant) -> io::Result<()> {
    spin(begin, || stream.write(b"x"))?;
    match spin(begin, || stream.read(&mut [0]))? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Linux: EINPROGRESS has no stable `ErrorKind`.
fn in_progress(error: &io::Error) -> bool {
    const EINPROGRESS: i32 = 115;
    error.raw_os_error() == Some(EINPROGRESS) || error.kind() == ErrorKind::WouldBlock
}

/// Repeats a non-blocking operation until it is done or lost.
fn spin<T>(begin: Instant, mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if begin.elapsed() > LOST {
                    return Err(ErrorKind::TimedOut.into());
                }
                std::hint::spin_loop();
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_modes_make_round_trips() {
        // A port that was free a moment ago; the server needs the same one for TCP and UDP.
        let port = UdpSocket::bind("[::]:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        std::thread::spawn(move || serve(port).expect("server"));
        let deadline = Instant::now() + Duration::from_secs(5);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the server does not come up");
            std::thread::yield_now();
        }
        for mode in [Mode::TcpRr, Mode::TcpCrr, Mode::UdpRr] {
            let args = ClientArgs {
                target: format!("127.0.0.1:{port}"),
                mode,
                seconds: 0.05,
                warmup: 0.01,
                output: Output::Json,
            };
            let report = measure(&args).expect("measured");
            assert!(report.round_trips > 0);
            assert_eq!(report.connect_us.is_some(), mode == Mode::TcpCrr);
        }
    }
}
