//! What a guest has said so far, and what that means.

use super::figures::{self, Figures};
use super::guest::{Event, Kind, Suite};
use crate::tally::{self, Tally};

/// Collects the lines of one guest.
pub(super) struct Report<'a> {
    suites: &'a [Suite],
    /// The suite that runs, by its place, with what was counted of it.
    running: Option<(usize, tally::Suite, Tally)>,
    finished: Vec<tally::Suite>,
    pub(super) figures: Figures,
    /// The kernel's release, and seconds from its start to that of the first suite.
    pub(super) up: Option<(String, f64)>,
    /// Why the guest gave up.
    pub(super) broken: Option<String>,
    /// What a test did not look at there, in its own words.
    pub(super) skipped: Vec<String>,
    done: bool,
}

impl<'a> Report<'a> {
    pub(super) fn new(suites: &'a [Suite]) -> Self {
        Self {
            suites,
            running: None,
            finished: Vec::new(),
            figures: Figures::new(),
            up: None,
            broken: None,
            skipped: Vec::new(),
            done: false,
        }
    }

    /// Takes a line; gives what a person wants to see of it.
    pub(super) fn line(&mut self, line: &str) -> Option<String> {
        let line = line.trim_end();
        let Some(event) = Event::parse(line) else { return self.output(line) };
        match event {
            Event::Up { release, seconds } => {
                let shown = format!("up after {seconds} s, kernel {release}");
                self.up = Some((release, seconds));
                return Some(shown);
            }
            Event::Begin { suite } => {
                let place = self.suites.iter().position(|other| other.name == suite)?;
                self.running = Some((place, named(&suite), Tally::default()));
                return Some(format!("{suite} ..."));
            }
            Event::End { suite, status } => {
                let (_, mut counted, tally) =
                    self.running.take().filter(|(_, counted, _)| counted.name == suite)?;
                for suite in tally.suites {
                    counted.add(&tally::Suite { name: String::new(), ..suite });
                }
                // It died before it could say anything, or had nothing to run.
                let nothing = counted.passed + counted.failed == 0;
                if nothing || status != 0 && counted.failed == 0 {
                    counted.fail(format!("it ended with status {status}, and nothing had failed"));
                }
                self.finished.push(counted);
            }
            Event::Broken { what } => self.broken = Some(what),
            Event::Done => self.done = true,
        }
        None
    }

    /// A line of a program.
    fn output(&mut self, line: &str) -> Option<String> {
        if let Some((program, verified)) = figures::parse(line) {
            self.figures.insert(program, verified);
        }
        if let Some((_, reason)) = line.split_once("SKIPPED: ") {
            self.skipped.push(reason.to_owned());
        }
        let (place, counted, tally) = self.running.as_mut()?;
        match self.suites.get(*place)?.kind {
            Kind::Tests => tally.line(line),
            Kind::Scenarios if line.starts_with("PASS  ") => counted.passed += 1,
            Kind::Scenarios if line.starts_with("FAIL  ") => {
                counted.fail(line.split_whitespace().nth(1).unwrap_or_default());
            }
            Kind::Scenarios => {}
        }
        (!tally::is_noise(line)).then(|| format!("  {line}"))
    }

    /// A result for each suite; one that did not come to its end has failed.
    pub(super) fn into_suites(self) -> Vec<tally::Suite> {
        let mut all = self.finished;
        for suite in self.suites {
            if !all.iter().any(|other| other.name == suite.name) {
                let mut missing = named(&suite.name);
                missing.fail("it did not end");
                all.push(missing);
            }
        }
        all
    }

    /// Whether the guest came to its end by itself.
    pub(super) fn is_complete(&self) -> bool {
        self.done && self.broken.is_none()
    }
}

fn named(name: &str) -> tally::Suite {
    tally::Suite { name: name.to_owned(), ..tally::Suite::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suites() -> Vec<Suite> {
        let suite = |name: &str, kind| Suite { name: name.into(), kind, command: String::new() };
        vec![suite("tables", Kind::Tests), suite("lab", Kind::Scenarios), suite("late", Kind::Tests)]
    }

    fn told<'a>(suites: &'a [Suite], lines: &[&str]) -> Report<'a> {
        let mut report = Report::new(suites);
        for line in lines {
            report.line(line);
        }
        report
    }

    /// Name, passed and what failed of each suite.
    #[track_caller]
    fn assert_counted(report: Report<'_>, expected: &[(&str, usize, &[&str])]) {
        let suites = report.into_suites();
        let counted: Vec<_> =
            suites.iter().map(|s| (s.name.as_str(), s.passed, s.failures.clone())).collect();
        assert!(suites.iter().all(|suite| suite.failed == suite.failures.len()), "{counted:?}");
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, passed, failures)| (*name, *passed, failures.iter().map(|&f| f.into()).collect()))
            .collect();
        assert_eq!(counted, expected);
    }

    #[test]
    fn counts_tests_and_scenarios() {
        let suites = suites();
        let report = told(
            &suites,
            &[
                "@clustermesh-vm@ up 6.1.0 7.5",
                "@clustermesh-vm@ begin tables",
                "cm_from_pod        7706 verified,  2733 long",
                "SKIPPED: links on interfaces: there are none before Linux 6.6",
                "test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\r",
                "@clustermesh-vm@ end tables 0",
                "@clustermesh-vm@ begin lab",
                "  PASS in 1.0 s",
                "PASS  policy      1.0 s  about",
                "FAIL  affinity    1.0 s  about",
                "@clustermesh-vm@ end lab 1",
                "@clustermesh-vm@ begin late",
                "test too::late ... FAILED",
                "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s",
                "@clustermesh-vm@ end late 101",
                "@clustermesh-vm@ done",
            ],
        );
        assert!(report.is_complete());
        assert_eq!(report.figures["cm_from_pod"], 7706);
        assert_eq!(report.skipped, ["links on interfaces: there are none before Linux 6.6"]);
        assert_counted(report, &[("tables", 7, &[]), ("lab", 1, &["affinity"]), ("late", 1, &["too::late"])]);
    }

    #[test]
    fn what_dies_or_never_runs_has_failed() {
        let suites = suites();
        let report = told(
            &suites,
            &[
                "@clustermesh-vm@ begin tables",
                "@clustermesh-vm@ end tables 101",
                "@clustermesh-vm@ begin lab",
                "@clustermesh-vm@ end lab 0",
                "@clustermesh-vm@ begin late",
            ],
        );
        assert!(!report.is_complete());
        let died = |status: i32| format!("it ended with status {status}, and nothing had failed");
        assert_counted(
            report,
            &[("tables", 0, &[&died(101)]), ("lab", 0, &[&died(0)]), ("late", 0, &["it did not end"])],
        );
    }
}
