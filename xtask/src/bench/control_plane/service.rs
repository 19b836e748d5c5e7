//! How long one changed backend of a service of 5,000 takes into the mirror.

use super::Bench;
use super::propagation::rows;
use super::report::Row;

pub(super) fn run(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let more = ["--size=5000".to_owned(), "--count=50".to_owned()];
    rows(bench, "one of 5,000 backends", "service", &more)
}
