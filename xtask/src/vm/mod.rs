//! The kernel matrix: kernels of distributions, in virtual machines, run the kernel tests and scenarios.
//!
//! [`kernels`] fetches a kernel, [`modules`] and [`image`] make its file system, [`guest`] is what happens inside,
//! [`machine`] runs it, [`report`] counts what it says, and [`figures`] compares what its verifier did.

pub(crate) mod figures;
mod guest;
mod image;
mod kernels;
mod machine;
mod modules;
mod programs;
mod report;

use crate::tally::Suite;
use crate::{setup, workspace};
use anyhow::Context as _;
use figures::{Accepted, Figures};
use image::Image;
use kernels::{Installed, Kernel};
use programs::Programs;
use report::Report;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Run if nothing is said: a service across clusters, policies, and agents that come and go.
const SCENARIOS: &[&str] = &["global-service-v4", "policy", "agent-sigkill-restart"];
/// What `cargo xtask test` runs: test programs, and in them the tests that begin so, all if none is named. All programs
/// are loaded, hooked up, and met by traffic.
///
/// Each test has its programs verified anew, which is what takes the time in a guest.
const QUICK: &[(&str, &[&str])] = &[
    ("ebpf_global_svc", &[]),
    ("tables", &["ten_thousand", "programs_stay", "policies_and_address", "what_is_left"]),
    ("sockets", &["tcp_reaches", "a_datagram_socket"]),
    ("policy_traffic", &["streams_pass", "an_identity_reaches", "a_pod_of_an_older_version"]),
    ("upgrade", &["other_sizes_lose"]),
];
/// What a guest may take for the kernel tests, in seconds: ten times what the quick ones do on a machine at rest. They run beside
/// a build, and the machine may be a slow one.
const TESTS_LIMIT: u64 = 1200;
/// And for each scenario.
const SCENARIO_LIMIT: u64 = 400;
/// In place of `nice -n N COMMAND` where something is measured: there the kernel leaves most of its work on packets to threads
/// of its own, which processes that poll before all others would keep from it.
const EVEN: &str = "#!/bin/sh\nshift 2\nexec \"$@\"\n";
/// A guest's processor is interpreted. What has to happen in time there has so many times as long.
const SLOWNESS: u32 = 6;

#[derive(clap::Args)]
pub(crate) struct VmArgs {
    /// Which kernel.
    #[arg(long, value_name = "SERIES", default_value = "all", value_parser = ["6.1", "6.12", "all"])]
    kernel: String,
    /// This scenario instead of the usual few; may be repeated.
    #[arg(long = "scenario", value_name = "NAME")]
    scenarios: Vec<String>,
    /// All scenarios.
    #[arg(long, conflicts_with = "scenarios")]
    all_scenarios: bool,
    /// The kernel tests of the eBPF programs only.
    #[arg(long, conflicts_with_all = ["scenarios", "all_scenarios"])]
    tests_only: bool,
    /// Only what `cargo xtask test` runs on 6.1.
    #[arg(long, conflicts_with_all = ["scenarios", "all_scenarios", "tests_only"])]
    quick: bool,
    /// Scenarios only; the verifier's figures are not looked at then.
    #[arg(long, conflicts_with_all = ["tests_only", "quick", "accept"])]
    scenarios_only: bool,
    /// Write how much the verifier looked at into docs/verifier.md instead of comparing it.
    #[arg(long)]
    accept: bool,
}

/// A virtual machine that is ready to be started.
pub(crate) struct Guest {
    kernel: Kernel,
    installed: Installed,
    suites: Vec<guest::Suite>,
    folder: PathBuf,
    limit: Duration,
}

/// What became of a guest.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) suites: Vec<Suite>,
    /// What its tests said that they could not look at.
    pub(crate) skipped: Vec<String>,
    /// Why the guest did not come to its end.
    problem: Option<String>,
    figures: Figures,
}

/// Something to measure in a guest that can run a lab, with `wg`.
pub(crate) struct Script<'a> {
    pub(crate) name: &'a str,
    /// Of a shell script.
    pub(crate) text: &'a str,
    pub(crate) arguments: &'a str,
    /// In seconds.
    pub(crate) limit: u64,
    pub(crate) needs: Needs<'a>,
}

/// What a script needs besides what every guest has.
#[derive(Clone, Copy, Default)]
pub(crate) struct Needs<'a> {
    /// Of the kernel.
    pub(crate) modules: &'a [&'a str],
    /// Programs of this machine.
    pub(crate) tools: &'a [&'a str],
    /// Of this machine, with all that is in them.
    pub(crate) folders: &'a [&'a str],
    /// The program that runs now.
    pub(crate) itself: bool,
}

/// Runs a script in a guest with this kernel, and gives each line that it says.
///
/// # Errors
/// If it fails, or there is no such kernel to be had.
pub(crate) fn measure(series: &str, script: &Script<'_>, line: impl FnMut(&str)) -> anyhow::Result<()> {
    setup::run_for_vm()?;
    let programs = Programs::build(true, false)?;
    let kernel = kernels::ALL.into_iter().find(|kernel| kernel.series == series);
    let kernel = kernel.with_context(|| format!("no kernel {series} is known"))?;
    let Needs { modules, tools, folders, itself } = script.needs;
    let guest = Guest::with(kernel, fetch(kernel)?, script.limit, modules, |image| {
        programs.lab(image, &[])?;
        programs::wg(image, &folder())?;
        tools.iter().try_for_each(|tool| image.tool(tool, "usr/bin"))?;
        folders.iter().try_for_each(|folder| image.folder(Path::new(folder)))?;
        if itself {
            image.built(&std::env::current_exe()?, "xtask")?;
        }
        image.script("opt/clustermesh/bin/nice", EVEN)?;
        image.script(&format!("opt/clustermesh/bin/{}", script.name), script.text)?;
        let command = format!("{} {} || {}", script.name, script.arguments, programs::TELL);
        Ok(vec![guest::Suite { name: script.name.to_owned(), kind: guest::Kind::Scenarios, command }])
    })?;
    let outcome = guest.run_telling(line)?;
    if let Some(problem) = &outcome.problem {
        anyhow::bail!("kernel {series}: {problem}");
    }
    anyhow::ensure!(outcome.is_ok(), "{} failed on kernel {series}; see above", script.name);
    Ok(())
}

/// True if everything passed on each kernel.
pub(crate) fn run(args: &VmArgs) -> anyhow::Result<bool> {
    let scenarios = scenarios(args)?;
    setup::run()?;
    setup::run_for_vm()?;
    let programs = Programs::build(!scenarios.is_empty(), !args.scenarios_only)?;
    let tests = |name: &str| match args {
        VmArgs { scenarios_only: true, .. } => None,
        VmArgs { quick: true, .. } => quick(name),
        _ => Some(Vec::new()),
    };
    let mut measured = Vec::new();
    let mut all = Vec::new();
    for kernel in
        kernels::ALL.into_iter().filter(|kernel| args.kernel == "all" || kernel.series == args.kernel)
    {
        let outcome = fetch(kernel)
            .and_then(|installed| Guest::new(kernel, installed, &programs, &tests, &scenarios)?.run());
        let outcome = outcome.unwrap_or_else(|error| failed(&format!("{error:#}")));
        measured.push((kernel.series.to_owned(), outcome.figures.clone()));
        all.push((kernel, outcome));
    }
    if args.scenarios_only {
        measured.clear();
    } else if let Some(host) = programs.host_figures()? {
        measured.push(host);
    }

    println!("\nsummary");
    let mut passed = true;
    for (kernel, outcome) in &all {
        for suite in &outcome.suites {
            let word = if suite.failed > 0 { "FAIL" } else { "ok  " };
            let name = format!("kernel {}: {}", kernel.series, suite.name);
            println!("  {word} {name:<44} {:>4} passed, {} failed", suite.passed, suite.failed);
            suite.failures.iter().for_each(|failure| println!("       {failure}"));
        }
        outcome.skipped.iter().for_each(|reason| println!("  SKIPPED on kernel {}: {reason}", kernel.series));
        outcome.problem.iter().for_each(|problem| println!("  FAIL kernel {}: {problem}", kernel.series));
        passed &= outcome.is_ok();
    }
    passed &= if args.accept { accept(measured)? } else { compare(&measured)? };
    println!("{}", if passed { "PASS" } else { "FAIL" });
    Ok(passed)
}

/// The oldest kernel with the most telling kernel tests, for `cargo xtask test`; or the reason why there is none to be had here.
///
/// # Errors
/// If one is to be had and cannot be made ready.
pub(crate) fn oldest() -> anyhow::Result<Result<Guest, String>> {
    let kernel = kernels::ALL[0];
    let installed = match setup::run_for_vm().and_then(|()| fetch(kernel)) {
        Ok(installed) => installed,
        Err(reason) => return Ok(Err(format!("{reason:#}"))),
    };
    Guest::new(kernel, installed, &Programs::beside_tests()?, &quick, &[]).map(Ok)
}

impl Guest {
    /// Makes the file system.
    fn new(
        kernel: Kernel,
        installed: Installed,
        programs: &Programs,
        tests: &dyn Fn(&str) -> Option<Vec<&'static str>>,
        scenarios: &[String],
    ) -> anyhow::Result<Self> {
        let limit = TESTS_LIMIT + SCENARIO_LIMIT * u64::try_from(scenarios.len())?;
        Self::with(kernel, installed, limit, &[], |image| {
            let mut suites = programs.tests(image, tests)?;
            if !scenarios.is_empty() {
                suites.extend(programs.lab(image, scenarios)?);
                suites.push(programs::encryption(image, &self::folder())?);
            }
            Ok(suites)
        })
    }

    /// With these modules of the kernel besides the usual ones, and with what `fill` puts in and wants to have run within
    /// `limit` seconds.
    fn with(
        kernel: Kernel,
        installed: Installed,
        limit: u64,
        modules: &[&str],
        fill: impl FnOnce(&mut Image) -> anyhow::Result<Vec<guest::Suite>>,
    ) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let folder = folder().join(format!("guest-{}", kernel.series));
        let mut image = Image::new(&folder.join("root"))?;
        let modules = modules::copy(&installed.modules, modules, &image.modules())?;
        let suites = fill(&mut image)?;
        image.script("init", &guest::init(&modules, &suites, limit))?;
        let size = image.pack(&folder.join("initrd"))?;
        let seconds = begin.elapsed().as_secs_f64();
        println!(
            "kernel {}: {} modules, {} MB, packed in {seconds:.1} s",
            kernel.series,
            modules.len(),
            size >> 20
        );
        Ok(Self { kernel, installed, suites, folder, limit: Duration::from_secs(limit) })
    }

    /// Boots it and runs everything.
    pub(crate) fn run(&self) -> anyhow::Result<Outcome> {
        let series = self.kernel.series;
        println!("kernel {series}: starting {}", self.installed.release);
        let begin = Instant::now();
        let outcome = self.run_telling(|line| println!("  {series} | {line}"));
        println!("kernel {series}: ended after {:.0} s", begin.elapsed().as_secs_f64());
        outcome
    }

    /// The same; each line that a person wants to see goes to `tell`.
    fn run_telling(&self, mut tell: impl FnMut(&str)) -> anyhow::Result<Outcome> {
        let Self { installed, folder, limit, suites, .. } = self;
        let console = folder.join("console.log");
        let mut report = Report::new(suites);
        let mut log = fs::File::create(folder.join("output.log"))?;
        let ended = machine::run(installed, &folder.join("initrd"), &console, *limit, |line| {
            // Nothing depends on the log.
            let _ = std::io::Write::write_all(&mut log, format!("{line}\n").as_bytes());
            if let Some(shown) = report.line(line) {
                tell(&shown);
            }
        });
        let problem = match (ended, &report.broken, &report.up) {
            (Err(error), ..) => Some(format!("{error:#}")),
            (_, Some(what), _) => Some(what.clone()),
            (.., None) => Some(format!("it did not come up\n{}", machine::tail_of(&console))),
            (.., Some((release, _))) if *release != installed.release => {
                Some(format!("kernel {release} was booted instead of {}", installed.release))
            }
            _ if !report.is_complete() => {
                Some(format!("it ended before everything was run\n{}", machine::tail_of(&console)))
            }
            _ => None,
        };
        let (skipped, figures) = (report.skipped.clone(), report.figures.clone());
        Ok(Outcome { suites: report.into_suites(), skipped, problem, figures })
    }

    /// All that it ran, as one suite; what its verifier did has to be as it was.
    pub(crate) fn summed(&self, outcome: Outcome) -> anyhow::Result<Suite> {
        let series = self.kernel.series;
        let mut sum = Suite { name: format!("kernel {series} in a VM"), ..Suite::default() };
        outcome.suites.iter().for_each(|suite| sum.add(suite));
        if let Some(problem) = &outcome.problem {
            println!("FAIL kernel {series}: {problem}");
            sum.fail(problem.lines().next().unwrap_or_default());
        }
        if !compare(&[(series.to_owned(), outcome.figures)])? {
            sum.fail("the verifier's figures are not those of docs/verifier.md");
        }
        Ok(sum)
    }
}

impl Outcome {
    fn is_ok(&self) -> bool {
        self.problem.is_none() && self.suites.iter().all(|suite| suite.failed == 0)
    }
}

fn failed(problem: &str) -> Outcome {
    Outcome { problem: Some(problem.to_owned()), ..Outcome::default() }
}

fn fetch(kernel: Kernel) -> anyhow::Result<Installed> {
    kernel.fetch(&folder()).with_context(|| format!("kernel {} is not to be had", kernel.series))
}

/// Which of a program's tests are among the quick ones; none of a program that is not.
fn quick(program: &str) -> Option<Vec<&'static str>> {
    QUICK.iter().find(|(name, _)| *name == program).map(|(_, tests)| tests.to_vec())
}

/// Names of the scenarios to run.
fn scenarios(args: &VmArgs) -> anyhow::Result<Vec<String>> {
    let mut known = Vec::new();
    for entry in fs::read_dir(workspace::scenarios())? {
        let path = entry?.path();
        if let (Some(name), Some("yaml")) = (path.file_stem(), path.extension().and_then(|e| e.to_str())) {
            known.push(name.to_string_lossy().into_owned());
        }
    }
    known.sort();
    if args.tests_only || args.quick {
        return Ok(Vec::new());
    }
    if args.all_scenarios {
        return Ok(known);
    }
    if let Some(unknown) = args.scenarios.iter().find(|name| !known.contains(name)) {
        anyhow::bail!("there is no scenario {unknown}; there are {}", known.join(", "));
    }
    let usual = || SCENARIOS.iter().map(|name| (*name).to_owned()).collect();
    Ok(if args.scenarios.is_empty() { usual() } else { args.scenarios.clone() })
}

/// Compares figures with what was accepted, and says what is wrong; true if nothing is.
pub(crate) fn compare(measured: &[(String, Figures)]) -> anyhow::Result<bool> {
    let accepted = Accepted::read(&fs::read_to_string(page())?)?;
    let mut fine = true;
    for (series, figures) in measured {
        let wrong = accepted.compare(series, figures);
        let sum: u64 = figures.values().sum();
        println!("kernel {series}: {} programs, {sum} instructions verified", figures.len());
        for (program, verified) in figures {
            println!("  {program:<16} {verified:>6}");
        }
        if !wrong.is_empty() {
            fine = false;
            println!("FAIL kernel {series}: the verifier's figures are not those of docs/verifier.md");
            wrong.iter().for_each(|line| println!("  {line}"));
            println!("  If that is how it has to be: cargo xtask vm --accept, and say why in the commit.");
        }
    }
    Ok(fine)
}

/// Writes figures into the page; true if there were any for each kernel.
fn accept(measured: Vec<(String, Figures)>) -> anyhow::Result<bool> {
    let page = page();
    let text = fs::read_to_string(&page)?;
    let mut accepted = Accepted::read(&text)?;
    let mut complete = true;
    for (series, figures) in measured {
        if figures.is_empty() {
            println!("FAIL kernel {series}: there are no figures to accept");
            complete = false;
        } else {
            accepted.accept(&series, figures);
        }
    }
    fs::write(&page, accepted.write(&text)?)?;
    println!("accepted: see docs/verifier.md");
    Ok(complete)
}

/// Where what was accepted is.
fn page() -> PathBuf {
    workspace::root().join("docs/verifier.md")
}

/// Kernels and guests.
fn folder() -> PathBuf {
    workspace::target().join("vm")
}
