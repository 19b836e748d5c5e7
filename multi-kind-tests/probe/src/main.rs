//! `mesh-probe`: the small server that runs in lab pods, and the clients that count its answers.
//!
//! A server says who it is (pod, node, cluster) over HTTP and UDP; a client makes calls and reports
//! who answered, how fast, and what failed for which reason. Everything is blocking standard library
//! code on purpose: what is measured is the network below, not a runtime.
#![forbid(unsafe_code)]

mod bulk;
mod call;
mod capture;
mod http;
mod pingpong;
mod serve;
mod stats;
mod stream;
mod target;
mod whoami;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Says who it is, and counts who answers.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve HTTP, UDP and TCP streams on IPv4 and IPv6.
    Serve(serve::ServeArgs),
    /// Call a server many times, each time over a new connection or socket, and count the answers.
    Call(call::CallArgs),
    /// Count the packets of tunnels that pass through this network namespace.
    Capture(capture::CaptureArgs),
    /// Keep one TCP connection busy with numbered frames and check that all of them come back.
    Stream(stream::StreamArgs),
    /// Measure round trips with both ends polling, so that the scheduler's wake-ups do not count.
    #[command(subcommand)]
    Pingpong(pingpong::PingpongCommand),
    /// Measure how many bytes one TCP connection carries.
    #[command(subcommand)]
    Throughput(bulk::ThroughputCommand),
}

/// How a result is printed.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// A few lines for people.
    Text,
    /// One JSON object.
    Json,
    /// One JSON object per call as it happens, then one with the key `summary`.
    Jsonl,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::Call(args) => call::run(&args),
        Command::Capture(args) => capture::run(&args),
        Command::Stream(args) => stream::run(&args),
        Command::Pingpong(command) => pingpong::run(&command),
        Command::Throughput(command) => bulk::run(&command),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
