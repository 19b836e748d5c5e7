//! `multi-kind-tests run FILE...`: runs scenarios and says how they went.
#![forbid(unsafe_code)]

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use multi_kind_tests::interrupt::Interrupt;
use multi_kind_tests::lab::{Binaries, micros};
use multi_kind_tests::pace;
use multi_kind_tests::runner::{Options, Outcome, Runner};
use multi_kind_tests::scenario::{Chaos, Scenario, Span, Step};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

/// End-to-end scenarios for ClusterMesh.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run scenarios, each in a lab or in one that they share; needs root.
    Run(RunArgs),
    /// Random faults for as long as it takes to find something; needs root.
    Chaos(ChaosArgs),
    /// Read scenarios and say what they show, without running them.
    List {
        /// Scenario files, or folders of them.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

#[derive(clap::Args)]
struct RunArgs {
    /// Scenario files, or folders of them.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    how: HowArgs,
}

#[derive(clap::Args)]
struct HowArgs {
    /// Folder of the programs under test; default: that of this program.
    #[arg(long, value_name = "DIR", env = "CLUSTERMESH_BIN_DIR")]
    bin_dir: Option<PathBuf>,
    /// Use this lab, which is up already, and leave it up.
    #[arg(long, value_name = "NAME")]
    lab: Option<String>,
    /// Print every command that the scenarios give.
    #[arg(long)]
    show_commands: bool,
    /// Where the logs of failed labs are kept; default: `scenario-logs` beside the programs' folder.
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Write the outcomes as JSON into this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(clap::Args)]
struct ChaosArgs {
    /// The same seed gives the same faults; default: from the clock.
    #[arg(long)]
    seed: Option<u64>,
    /// How long, all scenarios together.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// The lab and what it starts from: the first `chaos` step of this scenario is made as long; may be
    /// repeated.
    #[arg(
        long = "scenario",
        value_name = "FILE",
        default_values = ["multi-kind-tests/scenarios/chaos.yaml", "multi-kind-tests/scenarios/chaos-kvstoremesh.yaml"]
    )]
    scenarios: Vec<PathBuf>,
    #[command(flatten)]
    how: HowArgs,
}

fn main() -> ExitCode {
    // Before any length of time is read.
    if let Err(error) = pace::factor() {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    let result = match Cli::parse().command {
        Command::Run(args) => {
            read_all(&args.files).map_err(|error| (2, error)).and_then(|scenarios| run(args.how, &scenarios))
        }
        Command::Chaos(args) => {
            chaos_scenarios(&args).map_err(|error| (2, error)).and_then(|scenarios| run(args.how, &scenarios))
        }
        Command::List { files } => list(&files),
    };
    match result {
        Ok(code) => code,
        Err((code, error)) => {
            eprintln!("error: {error:#}");
            ExitCode::from(code)
        }
    }
}

/// Exit status 2 for what the caller got wrong, 1 for the rest.
type Outcomes = Result<ExitCode, (u8, anyhow::Error)>;

fn run(args: HowArgs, scenarios: &[Scenario]) -> Outcomes {
    let report_file = args.report.clone();
    let outcomes = carry_out(args, scenarios).map_err(|error| (1, error))?;
    if let Some(file) = report_file {
        let text = serde_json::to_string_pretty(&outcomes).map_err(|error| (1, error.into()))?;
        std::fs::write(&file, text)
            .with_context(|| format!("cannot write {}", file.display()))
            .map_err(|error| (1, error))?;
    }
    let skipped = outcomes.iter().filter(|outcome| outcome.skipped.is_some()).count();
    let passed = outcomes.iter().filter(|outcome| outcome.passed).count();
    let failed = outcomes.len() - skipped - passed;
    println!();
    for outcome in &outcomes {
        if let Some(reason) = &outcome.skipped {
            println!("SKIPPED: {}: {reason}", outcome.name);
            continue;
        }
        let word = if outcome.passed { "PASS" } else { "FAIL" };
        println!("{word}  {:<32} {:>6.1} s  {}", outcome.name, outcome.seconds, outcome.about);
    }
    let not_run = if skipped > 0 { format!(", {skipped} SKIPPED") } else { String::new() };
    println!("{passed} scenarios passed, {failed} failed{not_run}");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn carry_out(args: HowArgs, scenarios: &[Scenario]) -> anyhow::Result<Vec<Outcome>> {
    let folder = match args.bin_dir {
        Some(folder) => folder,
        None => {
            std::env::current_exe()?.parent().map(Path::to_path_buf).context("this program has no folder")?
        }
    };
    let beside = || folder.parent().unwrap_or(&folder).join("scenario-logs");
    let options = Options {
        binaries: Binaries::in_folder(&folder)?,
        adopt: args.lab,
        show_commands: args.show_commands,
        log_folder: args.logs.unwrap_or_else(beside),
        interrupt: Interrupt::on_signals().context("cannot listen for Ctrl-C")?,
    };
    Ok(Runner::new(options).run_all(scenarios, |line| println!("{line}")))
}

/// The scenarios with one `chaos` step each, as it was asked for.
fn chaos_scenarios(args: &ChaosArgs) -> anyhow::Result<Vec<Scenario>> {
    let seed = match args.seed {
        Some(seed) => seed,
        None => micros(SystemTime::now())?,
    };
    // Known also to whoever interrupts the run, or whose machine dies in it.
    println!("seed {seed}");
    let count = u32::try_from(args.scenarios.len())?;
    let span = Span::seconds(args.minutes.saturating_mul(60) / u64::from(count.max(1)));
    let scenario = |file: &PathBuf| {
        let mut scenario = Scenario::read(file)?;
        let mut steps = scenario.steps.iter().filter(|step| matches!(step, Step::Chaos(_)));
        anyhow::ensure!(steps.next().is_some(), "{} has no `chaos` step", file.display());
        scenario.steps = vec![Step::Chaos(Chaos { seed: Some(seed), span })];
        Ok(scenario)
    };
    args.scenarios.iter().map(scenario).collect()
}

fn list(files: &[PathBuf]) -> Outcomes {
    for scenario in read_all(files).map_err(|error| (2, error))? {
        println!("{:<32} {}", scenario.name, scenario.about);
    }
    Ok(ExitCode::SUCCESS)
}

fn read_all(paths: &[PathBuf]) -> anyhow::Result<Vec<Scenario>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let mut found: Vec<PathBuf> = std::fs::read_dir(path)?
                .map(|entry| Ok(entry?.path()))
                .collect::<std::io::Result<Vec<_>>>()?
                .into_iter()
                .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
                .collect();
            found.sort();
            anyhow::ensure!(!found.is_empty(), "there is no scenario (*.yaml) in {}", path.display());
            files.extend(found);
        } else {
            files.push(path.clone());
        }
    }
    files.iter().map(|file| Ok(Scenario::read(file)?)).collect()
}
