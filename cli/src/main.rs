//! `clustermesh`: the command line of ClusterMesh.
#![forbid(unsafe_code)]

mod ca;
mod context;
mod error;
mod lab;
mod mesh;
mod output;
mod wait;

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};

/// Connect clusters into one mesh, look into it, and try it on one machine.
#[derive(Debug, Parser)]
#[command(
    name = "clustermesh",
    version,
    after_help = "Examples:
  clustermesh lab up topology-examples/two-clusters/topology.yaml
  clustermesh connect --context alpha --destination-context beta --wait
  clustermesh status --context alpha
  clustermesh lab exec alpha/client -- mesh-probe call http://10.96.0.5/ -n 200
  clustermesh lab down"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Mesh(mesh::Command),
    /// Certificates of a mesh: issue, rotate, show
    Ca(ca::CaArgs),
    /// Several clusters on this machine: start, change, break, remove
    Lab(lab::args::LabArgs),
    /// Print the completions of a shell
    #[command(after_help = "Example:\n  clustermesh completions bash > /etc/bash_completion.d/clustermesh")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
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
    // Before the runtime starts threads: only a process of one thread moves to another namespace whole.
    if let Command::Lab(args) = &cli.command
        && lab::become_command(args)?
    {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        match &cli.command {
            Command::Mesh(command) => command.run().await,
            Command::Ca(args) => args.run(),
            Command::Lab(args) => lab::run(args).await,
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut Cli::command(), "clustermesh", &mut script);
                output::print_line(String::from_utf8_lossy(&script).trim_end());
                Ok(())
            }
            Command::Version => {
                output::print_line(format_args!("clustermesh {}", env!("CARGO_PKG_VERSION")));
                Ok(())
            }
        }
    })
}
