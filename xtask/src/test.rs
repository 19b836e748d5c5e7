//! All tests, one summary line per suite, and a last line that says `N passed, N failed`.

use crate::demo::Outcome;
use crate::functional::{self, Ran};
use crate::tally::{Suite, Tally, is_noise};
use crate::workspace;
use crate::{demo, fuzz, setup, shell, vm};
use anyhow::Context as _;
use std::io::{BufRead as _, BufReader};
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct TestArgs {
    /// Only the crates' own tests, without the scenarios on the lab.
    #[arg(long)]
    no_scenarios: bool,
    /// The fuzzer on each of its targets for so many seconds; 0: only its corpus, which is a test of its own.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    fuzz_seconds: u64,
    /// No virtual machine with another kernel.
    #[arg(long)]
    no_vm: bool,
    /// Random faults on the lab for so many minutes more.
    #[arg(long, value_name = "MINUTES", conflicts_with = "no_scenarios")]
    chaos_minutes: Option<u64>,
}

/// True if nothing failed.
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<bool> {
    setup::run()?;
    let mut skipped = Vec::new();
    let Tally { mut suites, tests, .. } = crate_tests()?;
    beside_each_other(args, &mut suites, &mut skipped)?;
    let is_root = workspace::is_root();
    if !is_root {
        skipped.push("tests of the kernel datapath: they need root".to_owned());
    }
    let no_scenarios = match args.no_scenarios {
        true => Some("--no-scenarios was given"),
        false if !is_root => Some("a lab needs root (network namespaces, eBPF)"),
        false => None,
    };
    let mut outcomes = Vec::new();
    if let Some(reason) = no_scenarios {
        skipped.push(format!("scenarios: {reason}"));
    } else {
        let binaries = workspace::build_beside_tests()?;
        outcomes = demo::run_scenarios(&binaries, &[])?;
        suites.push(scenarios(&outcomes, &mut skipped));
        if let Some(minutes) = args.chaos_minutes {
            suites.push(chaos(minutes)?);
        }
    }
    let ran = Ran { tests: &tests, scenarios: &outcomes, no_scenarios };
    suites.push(functional::report(&ran, &mut skipped)?);

    println!("\nsummary");
    for suite in &suites {
        let word = if suite.failed > 0 { "FAIL" } else { "ok  " };
        println!("  {word} {:<44} {:>4} passed, {} failed", suite.name, suite.passed, suite.failed);
        suite.failures.iter().for_each(|failure| println!("       {failure}"));
        if suite.ignored > 0 {
            skipped.push(format!("{} tests of {}: marked #[ignore]", suite.ignored, suite.name));
        }
    }
    for skipped in skipped {
        println!("  SKIPPED {skipped}");
    }
    let passed: usize = suites.iter().map(|suite| suite.passed).sum();
    let failed: usize = suites.iter().map(|suite| suite.failed).sum();
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0 && passed > 0)
}

/// What is not in a hurry, at the same time: another kernel in a virtual machine, and the fuzzer.
fn beside_each_other(
    args: &TestArgs,
    suites: &mut Vec<Suite>,
    skipped: &mut Vec<String>,
) -> anyhow::Result<()> {
    let guest = match args.no_vm {
        true => Err("--no-vm was given".to_owned()),
        false => vm::oldest()?,
    };
    std::thread::scope(|scope| {
        // The thread that starts QEMU waits for it: QEMU ends with it.
        let running = guest.as_ref().ok().map(|guest| scope.spawn(|| guest.run()));
        if args.fuzz_seconds > 0 {
            suites.push(fuzzing(args.fuzz_seconds)?);
        } else {
            skipped.push("fuzzing beyond the corpus: say --fuzz-seconds N".to_owned());
        }
        match (&guest, running) {
            (Ok(guest), Some(running)) => {
                let outcome = running
                    .join()
                    .map_err(|_| anyhow::anyhow!("the virtual machine's thread panicked"))??;
                skipped.extend(outcome.skipped.iter().map(|reason| format!("in the VM: {reason}")));
                suites.push(guest.summed(outcome)?);
            }
            (Err(reason), _) => skipped.push(format!("kernel tests on another kernel, in a VM: {reason}")),
            (Ok(_), None) => {}
        }
        Ok(())
    })
}

/// `cargo test` of the workspace, one suite per test program.
fn crate_tests() -> anyhow::Result<Tally> {
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    println!("$ {}", shell::describe(&command));
    // Cargo names the test program on standard error, its result comes on standard output.
    let (reader, writer) = std::io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("cannot run cargo")?;
    // The command holds the writing end; as long as it does, the reader would not see the end.
    drop(command);
    let mut tally = Tally::default();
    for line in BufReader::new(reader).lines() {
        let line = line?;
        if !is_noise(&line) {
            println!("{line}");
        }
        tally.line(&line);
    }
    let status = child.wait()?;
    if !status.success() && tally.suites.iter().all(|suite| suite.failed == 0) {
        // It did not compile, or a test program died before it could say anything.
        let mut suite = Suite { name: "cargo test".into(), ..Suite::default() };
        suite.fail("it did not compile, or a test program died before it could say anything");
        tally.suites.push(suite);
    }
    Ok(tally)
}

/// The fuzzer, each target as one test.
fn fuzzing(seconds: u64) -> anyhow::Result<Suite> {
    let outcomes = fuzz::run_all(seconds)?;
    let mut suite = Suite { name: format!("fuzzing, {seconds} s each"), ..Suite::default() };
    for fuzz::Outcome { target, failure, .. } in outcomes {
        match failure {
            Some(failure) => suite.fail(format!("{target}: {}", failure.lines().next().unwrap_or_default())),
            None => suite.passed += 1,
        }
    }
    Ok(suite)
}

/// The scenarios, as one suite.
fn scenarios(outcomes: &[Outcome], skipped: &mut Vec<String>) -> Suite {
    let mut suite = Suite { name: "scenarios on the lab".into(), ..Suite::default() };
    for outcome in outcomes {
        match &outcome.skipped {
            Some(reason) => skipped.push(format!("scenario {}: {reason}", outcome.name)),
            None if outcome.passed => suite.passed += 1,
            None => {
                println!("FAIL {}: {}", outcome.name, outcome.error.as_deref().unwrap_or_default());
                suite.fail(outcome.name.clone());
            }
        }
    }
    suite
}

/// A long run of random faults, from a seed that it prints.
fn chaos(minutes: u64) -> anyhow::Result<Suite> {
    let binaries = workspace::build_beside_tests()?;
    let mut command = Command::new(binaries.join("multi-kind-tests"));
    command.current_dir(workspace::root()).args(["chaos", "--minutes", &minutes.to_string()]);
    let mut suite = Suite { name: "chaos on the lab".into(), ..Suite::default() };
    match shell::run_quietly(&mut command) {
        Ok(()) => suite.passed += 1,
        Err(error) => suite.fail(format!("{error:#}")),
    }
    Ok(suite)
}
