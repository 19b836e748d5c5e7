//! How long a change takes from its etcd into the mirror, and on into the kernel of a node that follows the
//! mirror, beside the two hops between etcds alone.

use super::Bench;
use super::etcd::Etcd;
use super::mirror::{Mirror, Source};
use super::node::{Metrics, Node};
use super::process::{Process, load};
use super::report::{Row, median};
use anyhow::Context as _;
use serde_json::Value;

/// Seconds of changes in a round.
const SECONDS: u32 = 20;

pub(super) fn endpoint(bench: &Bench, rate: u32) -> anyhow::Result<Vec<Row>> {
    let more = [format!("--rate={rate}"), format!("--count={}", rate * SECONDS)];
    rows(bench, &format!("{rate} changes a second"), "churn", &more)
}

pub(super) fn service(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let more = ["--size=5000".to_owned(), "--count=50".to_owned()];
    rows(bench, "one of 5,000 backends", "service", &more)
}

/// Rows for `mesh-load COMMAND`, through our programs and through a bare relay.
fn rows(bench: &Bench, case: &str, command: &str, more: &[String]) -> anyhow::Result<Vec<Row>> {
    let sources = [Source::fill(bench, 1, 1000)?];
    let source = &sources[0];
    let way = |mirror: &Etcd, last: String| -> Vec<String> {
        let mut arguments = vec![
            command.to_owned(),
            format!("--source={}", source.etcd.endpoint()),
            format!("--mirror={}", mirror.endpoint()),
            format!("--name={}", source.name),
            format!("--id={}", source.id),
            last,
        ];
        arguments.extend_from_slice(more);
        arguments
    };
    let (mut mirrored, mut installed, mut raw) = (Times::default(), Times::default(), Times::default());
    let (mut mirrors, mut agents) = (Used::default(), Used::default());
    let mut work = Work::default();
    for round in 1..=bench.rounds {
        eprintln!("  round {round} of {}", bench.rounds);
        let bare = Etcd::start(bench, "bare")?;
        raw.add(&load(&bench.programs, &way(&bare, "--relay".to_owned()))?)?;
        drop(bare);
        let node = Node::new(bench)?;
        let mirror = Mirror::prepare_at(bench, &sources, node.outside())?;
        node.own(bench, &mirror.etcd)?;
        node.connect(&source.name, &mirror.etcd)?;
        let mirroring = mirror.start(bench)?;
        let agent = node.start(bench, "ebpf")?;
        let before = (node.wait(1)?, mirroring.cpu_seconds()?, agent.cpu_seconds()?);
        let result =
            load(&bench.programs, &way(&mirror.etcd, format!("--kernel={}", node.maps(&agent).display())))?;
        mirrored.add(&result)?;
        installed.add(&result["kernel"])?;
        mirrors.add(&mirroring, before.1)?;
        agents.add(&agent, before.2)?;
        work.add(&before.0, &node.metrics()?, &result)?;
    }
    let row = |what: String, ours: f64, raw: Option<f64>, used: Option<(f64, f64)>| Row {
        case: case.to_owned(),
        what,
        ours,
        raw,
        cpu_seconds: used.map(|(cpu, _)| cpu),
        peak_mib: used.map(|(_, peak)| peak),
    };
    let (raw50, raw99) = (median(raw.p50), median(raw.p99));
    let mut rows = Vec::new();
    for (end, times, used) in [("mirror's etcd", mirrored, mirrors), ("kernel", installed, agents)] {
        rows.push(row(format!("source to {end}, p50, ms"), median(times.p50), Some(raw50), used.median()));
        rows.push(row(format!("source to {end}, p99, ms"), median(times.p99), Some(raw99), None));
    }
    rows.push(row("in the agent's engine, p50, ms".into(), median(work.p50), None, None));
    rows.push(row("in the agent's engine, p99, ms".into(), median(work.p99), None, None));
    rows.push(row("map writes of one change".into(), median(work.writes), None, None));
    Ok(rows)
}

#[derive(Default)]
struct Times {
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Times {
    fn add(&mut self, result: &Value) -> anyhow::Result<()> {
        let figure = |name: &str| result[name].as_f64().with_context(|| format!("mesh-load gave no {name}"));
        self.p50.push(figure("p50_ms")?);
        self.p99.push(figure("p99_ms")?);
        Ok(())
    }
}

/// What a program has used for the changes.
#[derive(Default)]
struct Used {
    cpu: Vec<f64>,
    peak: Vec<f64>,
}

impl Used {
    fn add(&mut self, process: &Process, cpu_before: f64) -> anyhow::Result<()> {
        self.cpu.push(process.cpu_seconds()? - cpu_before);
        self.peak.push(process.peak_mib()?);
        Ok(())
    }

    fn median(self) -> Option<(f64, f64)> {
        Some((median(self.cpu), median(self.peak)))
    }
}

/// What the agent says of its work for the changes.
#[derive(Default)]
struct Work {
    p50: Vec<f64>,
    p99: Vec<f64>,
    writes: Vec<f64>,
}

impl Work {
    fn add(&mut self, before: &Metrics, after: &Metrics, result: &Value) -> anyhow::Result<()> {
        let counts = |seen: &Metrics| -> Vec<(f64, f64)> {
            let buckets = seen.family("clustermesh_engine_batch_seconds_bucket");
            buckets.filter_map(|(labels, count)| Some((bound(labels)?, count))).collect()
        };
        let (before_counts, after_counts) = (counts(before), counts(after));
        let new: Vec<(f64, f64)> =
            after_counts.iter().zip(&before_counts).map(|((le, now), (_, then))| (*le, now - then)).collect();
        let at = |part: f64| quantile(&new, part).context("the agent tells no times of its batches");
        self.p50.push(at(0.5)? * 1000.0);
        self.p99.push(at(0.99)? * 1000.0);
        let writes = |seen: &Metrics| -> f64 {
            seen.family("clustermesh_table_writes_total").map(|(_, value)| value).sum()
        };
        let changes = result["changes"].as_f64().context("mesh-load gave no changes")?;
        self.writes.push((writes(after) - writes(before)) / changes);
        Ok(())
    }
}

/// The upper bound of a histogram's bucket.
fn bound(labels: &str) -> Option<f64> {
    let (_, rest) = labels.split_once("le=\"")?;
    rest.split_once('"')?.0.parse().ok().or(Some(f64::INFINITY))
}

/// The bound that a part of all does not exceed, by cumulative buckets: no more can be said.
fn quantile(buckets: &[(f64, f64)], part: f64) -> Option<f64> {
    let all = buckets.last()?.1;
    buckets.iter().find(|(_, count)| *count >= part * all).map(|(bound, _)| *bound)
}
