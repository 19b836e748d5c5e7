//! `cargo xtask`: the only build script.
//!
//! It depends on no other crate of the workspace, and on few others: on a fresh machine it must run
//! before what the workspace needs to be built is there.
#![forbid(unsafe_code)]

mod bench;
mod demo;
mod functional;
mod fuzz;
mod setup;
mod shell;
mod tally;
mod test;
mod vm;
mod workspace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Sets up, shows, tests and measures ClusterMesh.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and running needs, and say what and why; changes nothing that is there.
    Setup,
    /// Bring up two clusters, connect them, and show that the mesh does what it promises.
    Demo,
    /// Run all tests: of the crates, of the eBPF programs in the kernel, and the scenarios on the lab.
    Test(test::TestArgs),
    /// Look for inputs from outside that break what reads them, for longer than `test` does.
    Fuzz(fuzz::FuzzArgs),
    /// Run the kernel tests and scenarios on the kernels of distributions, in virtual machines.
    Vm(vm::VmArgs),
    /// Measure the datapath beside plain routing, nftables and iptables, in one run.
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::run().map(|()| true),
        Command::Demo => demo::run(),
        Command::Test(args) => test::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Vm(args) => vm::run(&args),
        Command::Bench(args) => bench::run(&args).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
