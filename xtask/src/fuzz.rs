//! libFuzzer on everything that reads what others wrote.
//!
//! `fuzz/` has a program for each target, as `cargo fuzz` expects it. Here they are built by the stable
//! compiler, on top of the libraries that the workspace's build has made anyway: only the crates that are
//! fuzzed are compiled once more, with counters (`fuzz/instrument`).

use crate::workspace;
use crate::{setup, shell};
use anyhow::Context as _;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

/// What libFuzzer may take, in MB: far more than a reader needs for the longest input.
const MEMORY: u32 = 1024;
/// One input may take so many seconds.
const PATIENCE: u32 = 10;
/// Longest input in bytes.
const LONGEST: u32 = 4096;
/// Lines of a log that are shown of a target that failed.
const SHOWN: usize = 40;

#[derive(clap::Args)]
pub(crate) struct FuzzArgs {
    /// Only these; all if none is named.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where the choices begin; 0: somewhere else each time.
    #[arg(long, default_value_t = 0)]
    seed: u32,
    /// Run this input once instead, as one that was found.
    #[arg(long, value_name = "FILE", requires = "targets")]
    input: Option<PathBuf>,
    /// Take into the corpus in the repository what reaches more of the code than what is there.
    #[arg(long, conflicts_with = "input")]
    merge: bool,
}

/// How it went with one target.
pub(crate) struct Outcome {
    pub(crate) target: String,
    /// None: it holds.
    pub(crate) failure: Option<String>,
    /// Inputs that were tried.
    inputs: u64,
}

/// True if nothing was found.
pub(crate) fn run(args: &FuzzArgs) -> anyhow::Result<bool> {
    setup::run()?;
    let all = targets()?;
    if let Some(unknown) = args.targets.iter().find(|target| !all.contains(target)) {
        anyhow::bail!("there is no target {unknown}; there are {}", all.join(", "));
    }
    let targets = if args.targets.is_empty() { all } else { args.targets.clone() };
    let programs = build()?;
    if let Some(input) = &args.input {
        for target in &targets {
            shell::run(Command::new(programs.join(target)).arg(input))?;
        }
        return Ok(true);
    }
    let outcomes = fuzz(&programs, &targets, args.seconds, args.seed)?;
    if args.merge {
        for target in &targets {
            merge(&programs, target)?;
        }
    }
    Ok(outcomes.iter().all(|outcome| outcome.failure.is_none()))
}

/// All targets for so many seconds each, several at once, and always from the same seed: a test that fails
/// fails because of a change, not by chance.
pub(crate) fn run_all(seconds: u64) -> anyhow::Result<Vec<Outcome>> {
    fuzz(&build()?, &targets()?, seconds, 1)
}

/// Of the programs, whose names are those of their files.
fn targets() -> anyhow::Result<Vec<String>> {
    let folder = folder().join("fuzz_targets");
    let mut targets = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if let (Some(name), Some("rs")) = (path.file_stem(), path.extension().and_then(|e| e.to_str())) {
            targets.push(name.to_string_lossy().into_owned());
        }
    }
    targets.sort();
    Ok(targets)
}

/// Builds the programs; gives the folder they are in.
fn build() -> anyhow::Result<PathBuf> {
    let mut command = workspace::cargo();
    command
        .args(["build", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target-dir"])
        .arg(workspace::target())
        .env("RUSTC_WRAPPER", folder().join("instrument"));
    shell::run(&mut command)?;
    Ok(workspace::target().join("debug"))
}

fn fuzz(programs: &Path, targets: &[String], seconds: u64, seed: u32) -> anyhow::Result<Vec<Outcome>> {
    let queue = Mutex::new(targets.iter().collect::<VecDeque<_>>());
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    eprintln!("fuzzing {} targets for {seconds} s each, {at_once} at once", targets.len());
    let worker = || -> anyhow::Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        loop {
            let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
            let Some(target) = next else { return Ok(outcomes) };
            let outcome = fuzz_one(programs, target, seconds, seed)?;
            match &outcome.failure {
                None => eprintln!("  ok   {target:<16} {} inputs", outcome.inputs),
                Some(failure) => eprintln!("  FAIL {target}: {failure}"),
            }
            outcomes.push(outcome);
        }
    };
    let outcomes: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join()).collect()
    });
    let mut all = Vec::new();
    for outcomes in outcomes {
        all.extend(outcomes.map_err(|_| anyhow::anyhow!("a worker panicked"))??);
    }
    Ok(all)
}

fn fuzz_one(programs: &Path, target: &str, seconds: u64, seed: u32) -> anyhow::Result<Outcome> {
    let place = place(target);
    fs::create_dir_all(place.join("corpus"))?;
    let log = place.join("log");
    let output = File::create(&log)?;
    let status = Command::new(programs.join(target))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-seed={seed}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-timeout={PATIENCE}"))
        .arg(format!("-max_len={LONGEST}"))
        .arg(format!("-artifact_prefix={}/", place.display()))
        .args(["-print_final_stats=1", "-verbosity=1"])
        .arg(format!("-dict={}", folder().join("dictionary").display()))
        .arg(place.join("corpus"))
        .arg(folder().join("corpus").join(target))
        .current_dir(workspace::root())
        .stdin(Stdio::null())
        .stderr(output.try_clone()?)
        .stdout(output)
        .status()
        .with_context(|| format!("cannot run {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let failure = match (status.success(), counters(&text)) {
        (true, Some(1..)) => None,
        (true, _) => Some("it was built without counters; remove it and build again".to_owned()),
        (false, _) => Some(report(target, &text, &log)),
    };
    Ok(Outcome { target: target.to_owned(), failure, inputs: inputs(&text).unwrap_or(0) })
}

/// Adds to the corpus in the repository what was found to reach more.
fn merge(programs: &Path, target: &str) -> anyhow::Result<()> {
    let mut command = Command::new(programs.join(target));
    command
        .args(["-merge=1", "-verbosity=0"])
        .arg(format!("-max_len={LONGEST}"))
        .arg(folder().join("corpus").join(target))
        .arg(place(target).join("corpus"))
        .current_dir(workspace::root());
    shell::run(&mut command)
}

/// What somebody needs who is to mend it.
fn report(target: &str, text: &str, log: &Path) -> String {
    let lines: Vec<&str> = text.lines().collect();
    // The panic comes before libFuzzer's own lines.
    let begin =
        lines.iter().position(|line| line.contains("panicked at") || line.contains("ERROR: libFuzzer"));
    let begin = begin.unwrap_or(lines.len().saturating_sub(SHOWN));
    let shown = lines[begin..].iter().take(SHOWN).copied().collect::<Vec<_>>().join("\n");
    let again = artifact(text)
        .map_or_else(String::new, |file| format!("\nagain: cargo xtask fuzz {target} --input {file}"));
    format!("see {}\n{shown}{again}", log.display())
}

/// The file with the input that was found.
fn artifact(text: &str) -> Option<&str> {
    text.lines().find_map(|line| Some(line.split_once("Test unit written to ")?.1.trim()))
}

/// Counters that the program has.
fn counters(text: &str) -> Option<u64> {
    let before = text.split_once(" inline 8-bit counters")?.0;
    before.rsplit_once('(')?.1.trim().parse().ok()
}

fn inputs(text: &str) -> Option<u64> {
    let after = text.split_once("stat::number_of_executed_units:")?.1;
    after.split_whitespace().next()?.parse().ok()
}

fn folder() -> PathBuf {
    workspace::root().join("fuzz")
}

/// What was found by this machine, and the log.
fn place(target: &str) -> PathBuf {
    workspace::target().join("fuzz").join(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "INFO: Running with entropic power schedule (0xFF, 100).\n\
        INFO: Loaded 1 modules   (64213 inline 8-bit counters): 64213 [0x55, 0x56), \n\
        thread '<unnamed>' panicked at src/records.rs:1:1:\nno\n\
        artifact_prefix='/t/'; Test unit written to /t/crash-12\n\
        stat::number_of_executed_units: 4711\n";

    #[test]
    fn reads_what_libfuzzer_prints() {
        assert_eq!(counters(LOG), Some(64_213));
        assert_eq!(counters("INFO: Loaded 0 modules"), None);
        assert_eq!(inputs(LOG), Some(4711));
        let report = report("records", LOG, Path::new("/t/log"));
        assert!(report.contains("src/records.rs:1:1:\nno\n"), "{report}");
        assert!(report.ends_with("again: cargo xtask fuzz records --input /t/crash-12"), "{report}");
    }

    #[test]
    fn every_target_has_a_corpus() {
        let targets = targets().unwrap();
        assert!(targets.len() > 5);
        for target in targets {
            assert!(folder().join("corpus").join(&target).is_dir(), "{target}");
        }
    }
}
