//! `clustermesh`: the command line of ClusterMesh.
#![forbid(unsafe_code)]

mod context;
mod error;
mod mesh;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

/// Connect clusters into one mesh, look into it, and try it on one machine.
#[derive(Debug, Parser)]
#[command(name = "clustermesh", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Mesh(mesh::Command),
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(error::exit_status(&error))
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        match &cli.command {
            Command::Mesh(command) => command.run().await,
        }
    })
}
