//! `cargo xtask bench control-plane`: what the control plane costs, beside what the same etcds do under a
//! bare client, in one run.
//!
//! Each case ([`CASES`]) is a module of its own. It starts etcds on tmpfs ([`etcd`]) and release builds of
//! our programs ([`process`]), lets `mesh-load` fill, change and wait, and gives rows for the table
//! ([`report`]). Nothing is asserted about times.

mod agent;
mod etcd;
mod export;
mod kube;
mod leftovers;
mod mirror;
mod netns;
mod node;
mod process;
mod propagation;
mod report;

use super::interrupt;
use super::machine::Machine;
use crate::workspace::{self, Profile};
use anyhow::ensure;
use report::{Report, Row};
use std::path::{Path, PathBuf};

/// Measure the control plane beside a bare etcd client.
#[derive(Debug, clap::Args)]
pub(crate) struct ControlPlaneArgs {
    /// Only the cases whose name contains this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// How often each case is measured; medians are printed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Run debug builds: to try the bench itself, their figures mean nothing.
    #[arg(long)]
    dev: bool,
    /// How the result is printed; progress goes to standard error.
    #[arg(short, long, value_enum, default_value = "text")]
    output: super::Output,
}

/// What a case is given.
struct Bench {
    /// Folder of the builds.
    programs: PathBuf,
    /// Folder on tmpfs, removed at the end.
    scratch: Scratch,
    rounds: u32,
}

/// Something to measure.
struct Case {
    name: &'static str,
    run: fn(&Bench) -> anyhow::Result<Vec<Row>>,
}

/// Packages with the programs of all cases. All are built, whatever is measured: with other packages cargo
/// would choose other features for what they share, and build that once more.
const PACKAGES: &[&str] = &["clustermesh-agent", "clustermesh-apiserver", "fake-kube", "mesh-load"];

/// All cases, in the order in which they run.
const CASES: &[Case] = &[
    Case { name: "mirror-10-clusters", run: mirror::ten_clusters },
    Case { name: "mirror-100000-endpoints", run: mirror::one_large_cluster },
    Case { name: "agent-10-clusters", run: agent::ten_clusters },
    Case { name: "agent-100000-endpoints", run: agent::one_large_cluster },
    Case { name: "agent-250-clusters", run: agent::large_mesh },
    Case { name: "propagation-5", run: |bench| propagation::endpoint(bench, 5) },
    Case { name: "propagation-325", run: |bench| propagation::endpoint(bench, 325) },
    Case { name: "export", run: export::cilium },
    Case { name: "export-pods", run: export::pods },
    Case { name: "export-empty", run: export::empty },
    Case { name: "service-5000-backends", run: propagation::service },
];

/// Builds, measures, prints.
pub(crate) fn run(args: &ControlPlaneArgs) -> anyhow::Result<()> {
    let wanted = |case: &&Case| args.only.as_ref().is_none_or(|only| case.name.contains(only.as_str()));
    let cases: Vec<&Case> = CASES.iter().filter(wanted).collect();
    let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
    ensure!(!cases.is_empty(), "there is no such case; there are {}", names.join(", "));
    let machine = Machine::look()?;
    if machine.is_busy() {
        eprintln!("this machine is busy (load {:.2}): expect noise", machine.load_before);
    }
    let programs = workspace::build(if args.dev { Profile::Dev } else { Profile::Release }, PACKAGES)?;
    interrupt::watch()?;
    leftovers::remove();
    let bench = Bench { programs, scratch: Scratch::new()?, rounds: args.rounds };
    let mut rows = Vec::new();
    for case in cases {
        eprintln!("{}", case.name);
        rows.extend((case.run)(&bench).or_else(|error| interrupt::check().and(Err(error)))?);
        interrupt::check()?;
    }
    let report = Report { machine, rounds: args.rounds, rows };
    match args.output {
        super::Output::Text => print!("{report}"),
        super::Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    Ok(())
}

/// A folder in memory: a disk would decide the figures.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let path = Path::new(leftovers::FOLDERS).join(format!("{}{}", leftovers::FOLDER, std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left of it, the next run removes.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
