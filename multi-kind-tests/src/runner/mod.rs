//! Carries out scenarios.
//!
//! [`Runner`] groups them by topology, so that those which allow it share a lab; a lab in which a
//! scenario failed is not used again. [`steps`] does one step, [`background`] holds what goes on
//! between steps.

mod agents;
mod background;
mod chaos;
mod etcd;
mod identity;
mod json;
mod propagation;
mod refusal;
mod rotation;
mod steps;
mod tampering;
mod underlay;

use crate::interrupt::{Interrupt, Interrupted};
use crate::lab::{Access, Binaries, Lab};
use crate::scenario::{Scenario, Step};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How to run.
#[derive(Clone)]
pub struct Options {
    /// The programs under test.
    pub binaries: Binaries,
    /// Use this lab, which is up, and leave it up.
    pub adopt: Option<String>,
    /// Print every command of the CLI that is given.
    pub show_commands: bool,
    /// Where logs of failed labs go.
    pub log_folder: PathBuf,
    /// Ends everything early.
    pub interrupt: Interrupt,
}

/// How one scenario went.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The scenario.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// Whether everything was as expected.
    pub passed: bool,
    /// What was not, with the step.
    pub error: Option<String>,
    /// Why it was not run; it counts as neither passed nor failed then.
    pub skipped: Option<String>,
    /// What was measured, a line per step that measures.
    pub figures: Vec<String>,
    /// How long it took, without bringing up the lab.
    pub seconds: f64,
}

impl Outcome {
    fn not_run(scenario: &Scenario) -> Self {
        Self {
            name: scenario.name.clone(),
            about: scenario.about.clone(),
            passed: false,
            error: None,
            skipped: None,
            figures: Vec::new(),
            seconds: 0.0,
        }
    }
}

/// What of the kernel the scenario needs and does not find.
fn lacking(scenario: &Scenario) -> anyhow::Result<Option<String>> {
    for need in &scenario.needs {
        if let Some(reason) = need.lacking()? {
            return Ok(Some(reason));
        }
    }
    Ok(None)
}

/// Runs scenarios one after the other.
pub struct Runner {
    options: Options,
    lab: Option<Lab>,
    labs_made: u32,
}

impl Runner {
    /// A runner without a lab yet.
    pub fn new(options: Options) -> Self {
        Self { options, lab: None, labs_made: 0 }
    }

    /// Runs all; an outcome for each that was begun. `progress` gets lines for people while it goes.
    pub fn run_all(&mut self, scenarios: &[Scenario], mut progress: impl FnMut(&str)) -> Vec<Outcome> {
        let mut order: Vec<&Scenario> = scenarios.iter().collect();
        // Stable: within a topology in the given order, those that share a lab first.
        order.sort_by_key(|scenario| (scenario.topology_file(), scenario.own_lab));
        let mut outcomes = Vec::new();
        for scenario in order {
            if self.options.interrupt.is_set() {
                progress("interrupted: the other scenarios are not run");
                break;
            }
            outcomes.push(match lacking(scenario) {
                Ok(None) => self.run(scenario, &mut progress),
                Ok(Some(reason)) => {
                    progress(&format!("\n{}: SKIPPED: {reason}", scenario.name));
                    Outcome { skipped: Some(reason), ..Outcome::not_run(scenario) }
                }
                Err(error) => Outcome { error: Some(format!("{error:#}")), ..Outcome::not_run(scenario) },
            });
        }
        self.drop_lab(&mut progress);
        outcomes
    }

    fn run(&mut self, scenario: &Scenario, progress: &mut dyn FnMut(&str)) -> Outcome {
        progress(&format!("\n{}: {}", scenario.name, scenario.about));
        let mut figures = Vec::new();
        let mut begin = Instant::now();
        let mut outcome = self.prepare(scenario, &mut figures, progress);
        if outcome.is_ok() {
            begin = Instant::now();
            outcome = self.carry_out(scenario, &mut figures, progress);
        }
        let passed = outcome.is_ok();
        let seconds = begin.elapsed().as_secs_f64();
        let error = outcome.err().map(|error| format!("{error:#}"));
        match &error {
            None => progress(&format!("  PASS in {seconds:.1} s")),
            Some(error) => {
                progress(&format!("  FAIL: {error}"));
                self.keep_logs(scenario, progress);
            }
        }
        if !passed || scenario.own_lab {
            self.drop_lab(progress);
        }
        Outcome {
            name: scenario.name.clone(),
            about: scenario.about.clone(),
            passed,
            error,
            skipped: None,
            figures,
            seconds,
        }
    }

    /// Makes sure of a lab with the connections that the scenario starts from.
    fn prepare(
        &mut self,
        scenario: &Scenario,
        figures: &mut Vec<String>,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<()> {
        let Some(topology) = scenario.topology_file() else { return Ok(()) };
        let usable = self.lab.as_ref().is_some_and(|lab| lab.topology() == topology) && !scenario.own_lab;
        if !usable {
            self.drop_lab(progress);
            self.lab = Some(self.make_lab(&topology, figures, progress)?);
        }
        Ok(())
    }

    fn make_lab(
        &mut self,
        topology: &Path,
        figures: &mut Vec<String>,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Lab> {
        let Options { binaries, interrupt, adopt, show_commands, .. } = &self.options;
        let access =
            Access { binaries: binaries.clone(), interrupt: interrupt.clone(), show: *show_commands };
        if let Some(name) = adopt {
            return Ok(Lab::adopt(access, topology, name));
        }
        self.labs_made += 1;
        let name = format!("t{}-{}", std::process::id(), self.labs_made);
        let begin = Instant::now();
        let lab = Lab::up(access, topology, &name)?;
        let figure = format!("lab up and synced after {:.1} s", begin.elapsed().as_secs_f64());
        progress(&format!("  {name}: {figure}"));
        figures.push(figure);
        Ok(lab)
    }

    fn carry_out(
        &self,
        scenario: &Scenario,
        figures: &mut Vec<String>,
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<()> {
        let mut stage = steps::Stage::new(&self.options, self.lab.as_ref(), scenario);
        stage.connect_first()?;
        let mut result = Ok(());
        for (number, step) in scenario.steps.iter().enumerate() {
            result = do_step(&mut stage, step, &format!("{}", number + 1), figures, progress);
            if result.is_err() {
                break;
            }
        }
        for step in &scenario.finally {
            if result.as_ref().is_err_and(anyhow::Error::is::<Interrupted>) {
                break;
            }
            let tidy = do_step(&mut stage, step, "-", figures, progress);
            result = result.and(tidy);
        }
        result
    }

    fn keep_logs(&self, scenario: &Scenario, progress: &mut dyn FnMut(&str)) {
        let Some(lab) = &self.lab else { return };
        let target = self.options.log_folder.join(&scenario.name);
        match lab.save_logs(&target) {
            Ok(()) => progress(&format!("  logs are in {}", target.display())),
            Err(error) => progress(&format!("  logs could not be kept: {error:#}")),
        }
    }

    fn drop_lab(&mut self, progress: &mut dyn FnMut(&str)) {
        if let Some(lab) = self.lab.take()
            && let Err(error) = lab.down()
        {
            progress(&format!("  the lab was not taken down: {error:#}"));
        }
    }
}

fn do_step(
    stage: &mut steps::Stage<'_>,
    step: &Step,
    number: &str,
    figures: &mut Vec<String>,
    progress: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    let begin = Instant::now();
    let done = stage.step(step);
    let title = steps::title(step);
    let took = begin.elapsed().as_secs_f64();
    let done = done.map_err(|error| match error.downcast::<Interrupted>() {
        Ok(interrupted) => interrupted.into(),
        Err(error) => error.context(format!("step {number}, {title}")),
    })?;
    match done {
        Some(figure) => {
            progress(&format!("  {number:>2}  {took:>6.2} s  {title}: {figure}"));
            figures.push(figure);
        }
        None => progress(&format!("  {number:>2}  {took:>6.2} s  {title}")),
    }
    Ok(())
}
