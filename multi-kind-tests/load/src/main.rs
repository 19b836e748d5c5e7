//! `mesh-load`: fills etcds with clusters, copies and changes them, and measures how long that takes.
//!
//! It knows nothing of the programs that it is a load for but the layout of the kernel's maps, to see when
//! a change has got there: it is a bare client, so that what it does itself (a copy, a relay) is what any
//! program could do at best.
#![forbid(unsafe_code)]

mod cluster;
mod copy;
mod etcd;
mod fill;
mod hops;
mod kernel;
mod wait;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fills etcds with clusters, copies and changes them, and measures how long that takes.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write a cluster as its exporter would: config, heartbeat, records, canaries.
    Fill(fill::FillArgs),
    /// Copy everything from some etcds into another.
    Copy(copy::CopyArgs),
    /// Read everything in some etcds.
    List(copy::ListArgs),
    /// Wait until a prefix holds a number of keys.
    Wait(wait::WaitArgs),
    /// Change one endpoint after the other at a rate; wait for each change in another etcd and in the kernel.
    Churn(hops::ChurnArgs),
    /// Take a backend out of a large service and put it back, again and again; wait as for `churn`.
    Service(hops::ServiceArgs),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Fill(args) => fill::run(&args).await,
        Command::Copy(args) => copy::run(&args).await,
        Command::List(args) => copy::list_all(&args).await,
        Command::Wait(args) => wait::run(&args).await,
        Command::Churn(args) => hops::churn(&args).await,
        Command::Service(args) => hops::service(&args).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
