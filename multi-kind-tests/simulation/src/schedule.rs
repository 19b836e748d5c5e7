//! Schedules: drawn from seeds, run by many threads, made small when they fail.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::faults::{Fault, Faults};
use crate::step::Step;
use crate::world::World;

/// The steps that a seed stands for.
pub fn steps(seed: u64) -> Vec<Step> {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x5eed);
    let length = if rng.random_bool(0.1) { 120 } else { 40 };
    (0..rng.random_range(3..length)).map(|_| Step::random(&mut rng)).collect()
}

/// Runs a schedule in a new world, and adds its faults to `faults`.
///
/// # Errors
/// What went wrong, and after how many steps.
pub fn run(seed: u64, steps: &[Step], faults: &mut Faults) -> Result<(), String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed)?;
        let outcome = drive(&mut world, seed, steps);
        faults.add(&world.faults);
        outcome
    }));
    outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

fn drive(world: &mut World, seed: u64, steps: &[Step]) -> Result<(), String> {
    for step in steps {
        world.step(*step)?;
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    world.settle(&mut rng)?;
    if seed.is_multiple_of(4) {
        world.restart_silently(&mut rng)?;
    }
    Ok(())
}

/// A schedule that failed.
#[derive(Debug)]
pub struct Failure {
    /// Where it comes from.
    pub seed: u64,
    /// What went wrong.
    pub problem: String,
    /// The fewest steps found with which something goes wrong.
    pub steps: Vec<Step>,
    /// What goes wrong with these.
    pub minimal_problem: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "SIMULATION_SEED={} fails: {}", self.seed, self.problem)?;
        writeln!(
            f,
            "{} of {} steps are enough for: {}",
            self.steps.len(),
            steps(self.seed).len(),
            self.minimal_problem
        )?;
        self.steps
            .iter()
            .enumerate()
            .try_for_each(|(n, step)| writeln!(f, "  {:>3} {:?} ({:#x})", n + 1, step.action, step.salt))
    }
}

/// Leaves out steps for as long as it still fails.
pub fn shrink(seed: u64, problem: String) -> Failure {
    let mut left = steps(seed);
    let mut minimal_problem = problem.clone();
    let mut chunk = left.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        let mut smaller = false;
        while at < left.len() {
            let mut candidate = left.clone();
            candidate.drain(at..(at + chunk).min(candidate.len()));
            match run(seed, &candidate, &mut Faults::default()) {
                // Another failure than the first would be another bug.
                Err(error) if class(&error) == class(&problem) => {
                    (left, minimal_problem, smaller) = (candidate, error, true);
                }
                _ => at += chunk,
            }
        }
        if chunk == 1 && !smaller {
            return Failure { seed, problem, steps: left, minimal_problem };
        }
        chunk = chunk.div_ceil(2).max(1);
    }
}

fn class(problem: &str) -> &str {
    problem.split(':').next().unwrap_or_default()
}

/// What came of many schedules.
#[derive(Debug, Default)]
pub struct Report {
    /// How many ran.
    pub schedules: u64,
    /// Their steps.
    pub steps: u64,
    /// Their faults.
    pub faults: Faults,
    /// How long it took.
    pub elapsed: Duration,
    /// The one with the lowest number among those that failed, as it is.
    pub failed: Option<(u64, String)>,
}

/// Runs schedules `first..first + count` on all processors, until one fails. `prepare` is called in
/// each thread before it starts.
pub fn run_many(first: u64, count: u64, prepare: impl Fn() + Sync) -> Report {
    let began = Instant::now();
    let next = AtomicU64::new(first);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Report::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                prepare();
                let mut report = Report::default();
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    let steps = steps(seed);
                    report.schedules += 1;
                    report.steps += steps.len() as u64;
                    if let Err(problem) = run(seed, &steps, &mut report.faults) {
                        report.failed = Some((seed, problem));
                        stop.store(true, Ordering::Relaxed);
                    }
                }
                total.lock().unwrap_or_else(PoisonError::into_inner).add(report);
            });
        }
    });
    let mut report = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.elapsed = began.elapsed();
    report
}

impl Report {
    fn add(&mut self, other: Self) {
        self.schedules += other.schedules;
        self.steps += other.steps;
        self.faults.add(&other.faults);
        let failed = self.failed.take().into_iter().chain(other.failed);
        self.failed = failed.min_by_key(|(seed, _)| *seed);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.schedules as f64 / self.elapsed.as_secs_f64().max(0.001);
        writeln!(
            f,
            "{} schedules, {} steps, {:.1?}, {rate:.0} schedules/s",
            self.schedules, self.steps, self.elapsed
        )?;
        Fault::ALL
            .iter()
            .zip(&self.faults.counts)
            .try_for_each(|(fault, count)| writeln!(f, "  {count:>10} {}", fault.text()))
    }
}
