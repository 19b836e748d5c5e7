//! The simulator bites: each deliberately broken variant is caught.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use clustermesh_simulation::broken::{Broken, activate};
use clustermesh_simulation::schedule::run_many;

/// Of the 100,000 schedules that run by default, this many must be enough.
const ENOUGH: u64 = 20_000;

#[test]
fn every_broken_variant_is_caught() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for broken in Broken::ALL {
        let report = run_many(0, ENOUGH, || activate(Some(*broken)));
        match report.failed {
            Some((seed, problem)) => {
                let problem: String = problem.chars().take(100).collect();
                println!("{:>6} schedules: {} ({problem})", seed + 1, broken.text());
            }
            None => missed.push(broken.text()),
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
