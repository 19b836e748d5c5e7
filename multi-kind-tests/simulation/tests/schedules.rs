//! Runs schedules; a failing one is made small and printed with the seed that gives it again.
//!
//! `SIMULATION_SCHEDULES` says how many (default 100,000) and `SIMULATION_FIRST` from which seed on
//! (default 0); `SIMULATION_SEED` runs one alone.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use clustermesh_simulation::faults::{Fault, Faults};
use clustermesh_simulation::schedule::{run, run_many, shrink, steps};

#[test]
fn every_schedule_keeps_the_invariants() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    // Panics of the code under test are reported with their seed.
    std::panic::set_hook(Box::new(|_| {}));
    if let Some(seed) = number("SIMULATION_SEED") {
        let outcome = run(seed, &steps(seed), &mut Faults::default());
        let failure = outcome.err().map(|problem| shrink(seed, problem));
        let _ = std::panic::take_hook();
        if let Some(failure) = failure {
            panic!("{failure}");
        }
        return;
    }
    let count = number("SIMULATION_SCHEDULES").unwrap_or(100_000);
    let report = run_many(number("SIMULATION_FIRST").unwrap_or(0), count, || {});
    let failure = report.failed.clone().map(|(seed, problem)| shrink(seed, problem));
    let _ = std::panic::take_hook();
    println!("{report}");
    if let Some(failure) = failure {
        panic!("{failure}");
    }
    if count >= 1000 {
        let missing: Vec<_> = Fault::ALL
            .iter()
            .zip(&report.faults.counts)
            .filter(|(_, n)| **n == 0)
            .map(|(f, _)| f.text())
            .collect();
        assert!(missing.is_empty(), "never happened: {missing:?}");
    }
}
