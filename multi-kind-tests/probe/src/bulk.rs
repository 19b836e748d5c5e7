//! Bytes per second over one TCP connection, as the receiver counts them.

use crate::{Output, target};
use anyhow::Context as _;
use serde::Serialize;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

const CHUNK: usize = 256 * 1024;

#[derive(clap::Subcommand)]
pub(crate) enum ThroughputCommand {
    /// Take what clients send, until killed.
    Server {
        #[arg(long, default_value_t = 7778)]
        port: u16,
    },
    /// Send as fast as it goes.
    Client {
        /// HOST:PORT
        target: String,
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        #[arg(short, long, value_enum, default_value = "text")]
        output: Output,
    },
}

#[derive(Debug, Serialize)]
struct Report {
    /// Bytes that the receiver got.
    bytes: u64,
    seconds: f64,
    gbit_per_second: f64,
}

pub(crate) fn run(command: &ThroughputCommand) -> anyhow::Result<ExitCode> {
    match command {
        ThroughputCommand::Server { port } => {
            let listener = TcpListener::bind(("::", *port))
                .with_context(|| format!("cannot listen on TCP port {port}"))?;
            println!("throughput server on port {port}");
            loop {
                let Ok((stream, _)) = listener.accept() else { continue };
                // A client that breaks off reports that itself.
                thread::spawn(move || sink(stream));
            }
        }
        ThroughputCommand::Client { target, seconds, output } => {
            let duration = Duration::try_from_secs_f64(*seconds).context("--seconds is out of range")?;
            let address = target::resolve(target, None)?;
            let report = send(address, duration).with_context(|| format!("sending to {address}"))?;
            match output {
                Output::Text => println!("{:.2} Gbit/s", report.gbit_per_second),
                Output::Json | Output::Jsonl => println!("{}", serde_json::to_string(&report)?),
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Reads until the sender is done, then tells it how much arrived.
fn sink(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&u64::to_be_bytes(total)),
            length => total += length as u64,
        }
    }
}

fn send(address: SocketAddr, duration: Duration) -> io::Result<Report> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let chunk = vec![0x5a; CHUNK];
    let started = Instant::now();
    while started.elapsed() < duration {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    stream.read_exact(&mut total)?;
    // Until the receiver has everything: what sits in socket buffers is not throughput.
    let seconds = started.elapsed().as_secs_f64();
    let bytes = u64::from_be_bytes(total);
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let gbit_per_second = bytes as f64 * 8.0 / seconds / 1e9;
    Ok(Report { bytes, seconds, gbit_per_second })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let server = thread::spawn(move || sink(listener.accept().expect("client").0));
        let report = send(address, Duration::from_millis(50)).expect("sent");
        server.join().expect("server").expect("clean end");
        assert!(report.bytes >= CHUNK as u64);
        assert!(report.gbit_per_second > 0.0);
    }
}
