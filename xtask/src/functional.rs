//! What the datapath has to do (`multi-kind-tests/functional-tests.yaml`), and what this run has shown of it.

use crate::demo::Outcome;
use crate::tally::{Named, Suite};
use crate::workspace;
use anyhow::Context as _;
use comfy_table::{Table, presets};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// One thing that it has to do.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Item {
    id: String,
    proves: String,
    #[serde(default)]
    note: Option<String>,
    /// Why there is no test yet.
    #[serde(default)]
    pending: Option<String>,
    /// `scenario NAME`, or `PROGRAM TEST`.
    #[serde(default)]
    ipv4: Vec<String>,
    #[serde(default)]
    ipv6: Vec<String>,
    /// Of both.
    #[serde(default)]
    both: Vec<String>,
    /// Shown by the IPv6 column of all others.
    #[serde(default)]
    all_of_ipv6: bool,
}

/// What became of something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Passed(usize),
    /// A part has passed, the rest was not run for this reason.
    Partly(usize, String),
    Skipped(String),
    Pending(String),
    Failed(String),
}

/// What ran.
pub(crate) struct Ran<'a> {
    pub(crate) tests: &'a [Named],
    pub(crate) scenarios: &'a [Outcome],
    /// Why no scenarios were run.
    pub(crate) no_scenarios: Option<&'a str>,
}

/// Prints the table; a suite with a test for each line of it that was looked at. What is pending or was skipped is added to `skipped`.
pub(crate) fn report(ran: &Ran<'_>, skipped: &mut Vec<String>) -> anyhow::Result<Suite> {
    let items = read(&file())?;
    let verdicts: Vec<[Verdict; 2]> = items.iter().map(|item| item.verdicts(ran)).collect();
    let of_ipv6 = items.iter().zip(&verdicts).filter(|(item, _)| !item.all_of_ipv6).map(|(_, both)| &both[1]);
    let all_of_ipv6 = sum(of_ipv6.cloned());
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["", "the datapath", "IPv4", "IPv6"]);
    let mut suite = Suite { name: "functional tests of the datapath".into(), ..Suite::default() };
    for (item, both) in items.iter().zip(&verdicts) {
        let both = if item.all_of_ipv6 { [all_of_ipv6.clone(), all_of_ipv6.clone()] } else { both.clone() };
        let [v4, v6] = &both;
        let v4 = if item.all_of_ipv6 { String::new() } else { v4.word() };
        table.add_row([item.id.clone(), item.proves.clone(), v4, v6.word()]);
        let any = |is: fn(&Verdict) -> bool| both.iter().any(is);
        if any(|verdict| matches!(verdict, Verdict::Failed(_))) {
            suite.fail(format!("{} ({})", item.id, item.proves));
        } else if any(|verdict| matches!(verdict, Verdict::Passed(_) | Verdict::Partly(..))) {
            // What was only skipped, or is pending, counts as neither.
            suite.passed += 1;
        }
        let mut reasons: Vec<String> = both.iter().filter_map(Verdict::reason).collect();
        reasons.dedup();
        if !item.all_of_ipv6 {
            skipped
                .extend(reasons.into_iter().map(|reason| format!("{} ({}): {reason}", item.id, item.proves)));
        }
    }
    println!("\n{table}");
    for (item, both) in items.iter().zip(&verdicts) {
        for (family, verdict) in ["IPv4", "IPv6"].iter().zip(both) {
            if let (Verdict::Failed(reason), false) = (verdict, item.all_of_ipv6) {
                println!("  FAIL {} {family}: {reason}", item.id);
            }
        }
        if let Some(note) = &item.note {
            println!("  {}: {note}", item.id);
        }
    }
    Ok(suite)
}

fn file() -> PathBuf {
    workspace::root().join("multi-kind-tests/functional-tests.yaml")
}

fn read(path: &Path) -> anyhow::Result<Vec<Item>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} is not understood", path.display()))
}

impl Item {
    fn verdicts(&self, ran: &Ran<'_>) -> [Verdict; 2] {
        [&self.ipv4, &self.ipv6].map(|of_family| {
            if let Some(reason) = &self.pending {
                return Verdict::Pending(reason.clone());
            }
            sum(of_family.iter().chain(&self.both).map(|name| ran.verdict(name)))
        })
    }
}

impl Ran<'_> {
    fn verdict(&self, name: &str) -> Verdict {
        match name.split_once(' ') {
            Some(("scenario", scenario)) => self.scenario(scenario),
            Some((program, test)) => self.test(program, test),
            None => Verdict::Failed(format!("{name} is neither `scenario NAME` nor `PROGRAM TEST`")),
        }
    }

    fn scenario(&self, name: &str) -> Verdict {
        match (self.scenarios.iter().find(|outcome| outcome.name == name), self.no_scenarios) {
            (Some(Outcome { skipped: Some(reason), .. }), _) => {
                Verdict::Skipped(format!("scenario {name}: {reason}"))
            }
            (Some(Outcome { passed: true, .. }), _) => Verdict::Passed(1),
            (Some(_), _) => Verdict::Failed(format!("scenario {name} failed")),
            (None, Some(reason)) => Verdict::Skipped(format!("scenario {name}: {reason}")),
            (None, None) => Verdict::Failed(format!("scenario {name} did not run")),
        }
    }

    fn test(&self, program: &str, test: &str) -> Verdict {
        match self.tests.iter().find(|named| named.program == program && named.test == test) {
            Some(Named { result, .. }) if result == "ok" => Verdict::Passed(1),
            Some(Named { result, .. }) if result.starts_with("ignored") => {
                Verdict::Skipped(format!("{program} {test}: {result}"))
            }
            Some(_) => Verdict::Failed(format!("{program} {test} failed")),
            None => Verdict::Failed(format!("{program} {test} did not run")),
        }
    }
}

impl Verdict {
    fn word(&self) -> String {
        match self {
            Self::Passed(count) => format!("passed ({count})"),
            Self::Partly(count, _) => format!("passed ({count}), partly skipped"),
            Self::Skipped(_) => "SKIPPED".into(),
            Self::Pending(_) => "PENDING".into(),
            Self::Failed(_) => "FAILED".into(),
        }
    }

    /// Of what was not looked at.
    fn reason(&self) -> Option<String> {
        match self {
            Self::Partly(_, reason) | Self::Skipped(reason) => Some(reason.clone()),
            Self::Pending(reason) => Some(format!("PENDING: {reason}")),
            Self::Passed(_) | Self::Failed(_) => None,
        }
    }
}

/// All of them in one: the worst, unless some have passed and others were skipped. Nothing at all has failed.
fn sum(verdicts: impl Iterator<Item = Verdict>) -> Verdict {
    let all: Vec<Verdict> = verdicts.collect();
    let passed = all
        .iter()
        .map(|verdict| match verdict {
            Verdict::Passed(count) | Verdict::Partly(count, _) => *count,
            _ => 0,
        })
        .sum();
    match all.into_iter().max() {
        None => Verdict::Failed("there is no test".into()),
        Some(Verdict::Failed(reason)) => Verdict::Failed(reason),
        Some(Verdict::Passed(_)) => Verdict::Passed(passed),
        Some(Verdict::Partly(_, reason) | Verdict::Skipped(reason) | Verdict::Pending(reason))
            if passed > 0 =>
        {
            Verdict::Partly(passed, reason)
        }
        Some(verdict) => verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, passed: bool, skipped: Option<&str>) -> Outcome {
        let skipped = skipped.map(str::to_owned);
        Outcome { name: name.into(), passed, error: None, skipped, figures: Vec::new() }
    }

    /// Whether the source of a test has it.
    fn exists(name: &str) -> bool {
        let root = workspace::root();
        match name.split_once(' ') {
            Some(("scenario", name)) => {
                root.join(format!("multi-kind-tests/scenarios/{name}.yaml")).is_file()
            }
            Some((program, test)) => {
                let tests = root.join("ebpf-global-svc/tests");
                let (path, function) = match test.split_once("::") {
                    Some((module, function)) => (tests.join(program).join(format!("{module}.rs")), function),
                    None => (tests.join(format!("{program}.rs")), test),
                };
                std::fs::read_to_string(path)
                    .is_ok_and(|source| source.contains(&format!("#[test]\nfn {function}()")))
            }
            None => false,
        }
    }

    #[test]
    fn the_list_is_complete_and_names_tests_that_exist() {
        let items = read(&file()).expect("the list");
        let ids: Vec<&str> = items.iter().map(|item| item.id.as_str()).collect();
        let expected: Vec<String> = (1..=23).map(|n| format!("T{n}")).collect();
        assert_eq!(ids, expected);
        for item in &items {
            for name in item.ipv4.iter().chain(&item.ipv6).chain(&item.both) {
                assert!(exists(name), "{}: there is no {name}", item.id);
            }
            let complete = |of_family: &[String]| !(of_family.is_empty() && item.both.is_empty());
            let excused = item.pending.is_some() || item.all_of_ipv6;
            assert!(
                excused || complete(&item.ipv4) && complete(&item.ipv6),
                "{}: a family without a test",
                item.id
            );
        }
    }

    #[test]
    fn what_did_not_run_has_failed_unless_there_is_a_reason() {
        let tests = [("ok", "good"), ("FAILED", "bad"), ("ignored, slow", "slow")]
            .map(|(result, test)| Named { program: "p".into(), test: test.into(), result: result.into() });
        let scenarios =
            [outcome("good", true, None), outcome("bad", false, None), outcome("vm", false, Some("no"))];
        let ran = Ran { tests: &tests, scenarios: &scenarios, no_scenarios: None };
        let of = |names: &[&str]| sum(names.iter().map(|name| ran.verdict(name))).word();
        assert_eq!(of(&["p good", "scenario good"]), "passed (2)");
        for bad in ["p bad", "p gone", "scenario bad", "scenario gone", "nothing"] {
            assert_eq!(of(&["p good", bad]), "FAILED", "{bad}");
        }
        assert_eq!(of(&["p good", "scenario vm"]), "passed (1), partly skipped");
        assert_eq!(of(&["p slow", "scenario vm"]), "SKIPPED");
        assert_eq!(of(&[]), "FAILED");
        let without = Ran { no_scenarios: Some("not asked for"), scenarios: &[], ..ran };
        assert_eq!(without.verdict("scenario good").word(), "SKIPPED");
    }
}
