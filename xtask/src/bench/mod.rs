//! `cargo xtask bench`: what a call through the mesh costs, beside what it costs elsewhere.
//!
//! client pod - node 1 - underlay - node 2 - server pod, in a lab ([`lab`]); on the same two nodes a
//! second pair of pods that the kernel alone joins ([`kernel_path`]), with services as others make
//! them ([`nat`]). Each way ([`variant`]) is measured once per round, round after round, so that a
//! machine that gets slower for a while does so for all of them. Nothing is asserted about times.
//!
//! Everything it makes carries its process ID and is removed at the end, also after a failure or
//! Ctrl-C.

mod control_plane;
mod datapath;
mod encryption;
mod exec;
mod guest;
mod interrupt;
mod kernel_path;
mod lab;
mod machine;
mod nat;
mod report;
mod series;
mod variant;

use crate::setup;
use crate::workspace::{self, Profile};
use anyhow::ensure;
use kernel_path::KernelPath;
use lab::Lab;
use machine::{Machine, Steal};
use report::{Collected, LabFigures, Report, Settings};
use std::path::{Path, PathBuf};
use variant::{Variant, Worlds};

/// TCP and UDP port of the servers that answer round trips.
const PINGPONG_PORT: u16 = 7777;
/// TCP port of the servers that take streams.
const BULK_PORT: u16 = 7778;
/// Goes before a client, and below before a server: each end has a CPU of its own and goes before other
/// processes. Where the scheduler puts two polling processes, and whatever else runs on a small
/// machine, would otherwise decide the figures. The lab's servers get the same in their topology.
const CLIENT_CPU: &str = "taskset -c 1 nice -n -20";
const SERVER_CPU: &str = "taskset -c 0 nice -n -20";

/// Measure connect latency, round trips and throughput through the mesh and its peers (needs root).
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// How often each variant is measured; the variants take turns.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Length of one measurement of round trips; a stream runs twice as long.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Number of services, in the mesh and in the rule sets; the last one is called.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    services: u16,
    /// In a virtual machine with this kernel, which has IPVS. Its processors are interpreted: only ratios mean something.
    #[arg(long, value_parser = ["6.1", "6.12"])]
    kernel: Option<String>,
    /// Folder of programs that are built: nothing is built, say because there is no compiler here.
    #[arg(long, value_name = "FOLDER", hide = true)]
    programs: Option<PathBuf>,
    /// How the result is printed; progress goes to standard error.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

/// Something else than one number of services.
#[derive(Debug, clap::Subcommand)]
enum What {
    /// Measure the control plane beside a bare etcd client.
    ControlPlane(control_plane::ControlPlaneArgs),
    /// Measure the datapath against its targets, from one service to ten thousand.
    Datapath(datapath::DatapathArgs),
    /// Measure what WireGuard and IPsec between nodes cost, in a virtual machine.
    Encryption(encryption::EncryptionArgs),
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Output {
    /// Tables.
    Text,
    /// One JSON object.
    Json,
}

impl Output {
    /// As the flag calls it.
    fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// Builds, measures, prints.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if args.programs.is_none() {
        setup::run()?;
    }
    match &args.what {
        Some(What::ControlPlane(args)) => return control_plane::run(args),
        Some(What::Datapath(args)) => return datapath::run(args),
        Some(What::Encryption(args)) => return encryption::run(args),
        None => {}
    }
    if let Some(kernel) = &args.kernel {
        return guest::run(kernel, args);
    }
    let machine = look(args.seconds)?;
    let executables = match &args.programs {
        Some(folder) => folder.clone(),
        None => workspace::build_programs(Profile::Release)?,
    };
    interrupt::watch()?;
    // Ctrl-C also reaches the programs that measure; that they failed is then not the news.
    let asked = Paths { rounds: args.rounds, seconds: args.seconds, services: args.services };
    let report = measure(asked, machine, &executables).or_else(|error| interrupt::check().and(Err(error)))?;
    match args.output {
        Output::Text => print!("{}", report.text()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(())
}

/// Checks that it can be measured here.
fn look(seconds: f64) -> anyhow::Result<Machine> {
    ensure!(seconds > 0.0 && seconds <= 600.0, "--seconds must be more than 0 and at most 600");
    ensure!(
        workspace::is_root(),
        "the bench makes network namespaces and loads eBPF programs: run it as root"
    );
    let machine = Machine::look()?;
    ensure!(machine.cpus >= 2, "both ends poll: the bench needs two CPUs, this machine has one");
    if machine.is_busy() {
        eprintln!("this machine is busy (load {:.2}): expect noise", machine.load_before);
    }
    Ok(machine)
}

/// How the ways from the client to the server are to be measured.
#[derive(Clone, Copy)]
struct Paths {
    rounds: u32,
    seconds: f64,
    services: u16,
}

fn measure(args: Paths, machine: Machine, executables: &Path) -> anyhow::Result<Report> {
    let probe = executables.join("mesh-probe");
    eprintln!("bringing up two clusters with {} services", args.services);
    // The order matters: what is declared later is removed earlier, the lab last.
    let lab = Lab::up(executables, args.services)?;
    interrupt::check()?;
    let mut kernel = KernelPath::attach(lab.nodes()?)?;
    let server = probe.display();
    kernel.serve(&format!("{SERVER_CPU} {server} pingpong server --port {PINGPONG_PORT}"))?;
    kernel.serve(&format!("{SERVER_CPU} {server} throughput server --port {BULK_PORT}"))?;
    let worlds = Worlds { kernel: &kernel, lab: &lab, probe: &probe, services: args.services };
    let mut collected = Collected::default();
    let mut variants = Variant::ALL.to_vec();
    variants.retain(|variant| *variant != Variant::VxlanIpvs || machine.ipvs.is_some());
    let steal = Steal::start()?;
    for round in 1..=args.rounds {
        eprint!("round {round} of {}:", args.rounds);
        for variant in in_turn(&variants, round) {
            eprint!(" {}", variant.name());
            collected.add_round_trips(variant, &worlds.round_trips(variant, args.seconds)?);
        }
        for variant in in_turn(&Variant::PATHS, round) {
            eprint!(" {}-stream", variant.name());
            collected.add_throughput(variant, worlds.throughput(variant, 2.0 * args.seconds)?);
        }
        eprintln!();
    }
    let figures = LabFigures { up_seconds: lab.up_seconds(), agents: lab.agents()? };
    let settings = Settings {
        rounds: args.rounds,
        seconds_per_run: args.seconds,
        services: args.services,
        steal_percent: steal.percent()?,
    };
    Ok(collected.report(machine, settings, figures))
}

/// The variants, each round starting with another one: none always follows the same other.
fn in_turn(variants: &[Variant], round: u32) -> impl Iterator<Item = Variant> {
    let start = round as usize % variants.len();
    variants.iter().cycle().skip(start).take(variants.len()).copied()
}
