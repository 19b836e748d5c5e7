//! Two clusters, one mesh, and a table of what it does.

use crate::workspace::{self, Profile};
use crate::{setup, shell};
use anyhow::Context as _;
use comfy_table::{Table, presets};
use serde::Deserialize;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// What is promised, and the scenarios that show it.
const PROMISES: &[(&str, &[&str])] = &[
    (
        "1. a global service is answered by pods of both clusters",
        &["global-service-v4", "global-service-v6", "global-service-udp"],
    ),
    ("2. affinity and sharing steer it within a second", &["affinity", "shared"]),
    ("3. the far end sees the caller's identity", &["identity-in-overlay"]),
    ("4. traffic goes on while an agent is gone", &["agent-sigkill-restart"]),
    ("5. traffic goes on while an etcd is gone and comes back empty", &["etcd-stopped-and-empty"]),
    ("6. disconnected, each side has its own services only", &["disconnect"]),
];

/// How a scenario went, as the runner reports it.
#[derive(Deserialize)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) passed: bool,
    pub(crate) error: Option<String>,
    /// Why it was not run.
    pub(crate) skipped: Option<String>,
    pub(crate) figures: Vec<String>,
}

/// True if everything is as promised.
pub(crate) fn run() -> anyhow::Result<bool> {
    let begin = Instant::now();
    setup::run()?;
    anyhow::ensure!(
        workspace::is_root(),
        "the demo makes network namespaces and loads eBPF programs: run it as root"
    );
    let binaries = workspace::build_programs(Profile::Dev)?;
    let names: Vec<&str> = PROMISES.iter().flat_map(|(_, scenarios)| scenarios.iter().copied()).collect();
    let outcomes = run_scenarios(&binaries, &names)?;
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["", "promise, and what was measured"]);
    let mut all = true;
    for (promise, scenarios) in PROMISES {
        let parts: Vec<Option<&Outcome>> =
            scenarios.iter().map(|name| outcomes.iter().find(|outcome| outcome.name == *name)).collect();
        let passed = parts.iter().all(|part| part.is_some_and(|outcome| outcome.passed));
        all &= passed;
        let mut lines = vec![(*promise).to_owned()];
        for (name, part) in scenarios.iter().zip(&parts) {
            match part {
                None => lines.push(format!("   {name}: did not run")),
                Some(outcome) => {
                    lines.extend(outcome.figures.iter().map(|figure| format!("   {figure}")));
                    lines.extend(outcome.error.iter().map(|error| format!("   {name}: {error}")));
                }
            }
        }
        table.add_row([if passed { "PASS" } else { "FAIL" }.to_owned(), lines.join("\n")]);
    }
    println!("\n{table}");
    let seconds = begin.elapsed().as_secs_f64();
    println!("demo: {} in {seconds:.0} s", if all { "PASS" } else { "FAIL" });
    Ok(all)
}

/// Runs scenarios in this order, and shows what they do.
pub(crate) fn run_scenarios(binaries: &Path, names: &[&str]) -> anyhow::Result<Vec<Outcome>> {
    let report = workspace::target().join("scenario-report.json");
    // An old report must not pass for a new one.
    if report.exists() {
        std::fs::remove_file(&report)?;
    }
    let mut command = Command::new(binaries.join("multi-kind-tests"));
    command.current_dir(workspace::root()).arg("run").arg("--show-commands");
    command.arg("--report").arg(&report).arg("--logs").arg(workspace::target().join("scenario-logs"));
    if names.is_empty() {
        command.arg(workspace::scenarios());
    }
    command.args(names.iter().map(|name| workspace::scenarios().join(format!("{name}.yaml"))));
    // Its status says the same as its report, unless there is none.
    let result = shell::run_quietly(&mut command);
    let text = match std::fs::read_to_string(&report) {
        Ok(text) => text,
        Err(_) => {
            result?;
            anyhow::bail!("the scenario runner left no report");
        }
    };
    serde_json::from_str(&text).context("the scenario runner's report cannot be read")
}
