//! How long a change of an endpoint takes from its etcd into the mirror, beside the two hops alone.

use super::Bench;
use super::etcd::Etcd;
use super::mirror::{Mirror, Source};
use super::process::{finish, load, start_load};
use super::report::{Row, median};
use anyhow::Context as _;

/// Seconds of changes in a round.
const SECONDS: u32 = 20;

pub(super) fn run(bench: &Bench, rate: u32) -> anyhow::Result<Vec<Row>> {
    let more = [format!("--rate={rate}"), format!("--count={}", rate * SECONDS)];
    rows(bench, &format!("{rate} changes a second"), "churn", &more)
}

/// Rows for `mesh-load COMMAND`, through a mirror and through a bare relay.
pub(super) fn rows(bench: &Bench, case: &str, command: &str, more: &[String]) -> anyhow::Result<Vec<Row>> {
    let sources = [Source::fill(bench, 1, 1000)?];
    let source = &sources[0];
    let (mut ours, mut raw) = (Times::default(), Times::default());
    let (mut cpu, mut peak) = (Vec::new(), Vec::new());
    for round in 1..=bench.rounds {
        eprintln!("  round {round} of {}", bench.rounds);
        let way = |mirror: &Etcd, relay: bool| -> Vec<String> {
            let mut arguments = vec![
                command.to_owned(),
                format!("--source={}", source.etcd.endpoint()),
                format!("--mirror={}", mirror.endpoint()),
                format!("--name={}", source.name),
                format!("--id={}", source.id),
            ];
            arguments.extend(relay.then(|| "--relay".to_owned()));
            arguments.extend_from_slice(more);
            arguments
        };
        let bare = Etcd::start(bench, "bare")?;
        raw.add(&load(&bench.programs, &way(&bare, true))?)?;
        drop(bare);
        let mirror = Mirror::prepare(bench, &sources)?;
        let process = mirror.start(bench)?;
        finish(start_load(&bench.programs, &mirror.wait(1))?)?;
        let before = process.cpu_seconds()?;
        ours.add(&load(&bench.programs, &way(&mirror.etcd, false))?)?;
        cpu.push(process.cpu_seconds()? - before);
        peak.push(process.peak_mib()?);
    }
    let row = |what: &str, ours: Vec<f64>, raw: Vec<f64>| Row {
        case: case.to_owned(),
        what: format!("source etcd to mirror, {what}, ms"),
        ours: median(ours),
        raw: Some(median(raw)),
        cpu_seconds: None,
        peak_mib: None,
    };
    let mut rows = vec![row("p50", ours.p50, raw.p50), row("p99", ours.p99, raw.p99)];
    rows[0].cpu_seconds = Some(median(cpu));
    rows[0].peak_mib = Some(median(peak));
    Ok(rows)
}

#[derive(Default)]
struct Times {
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Times {
    fn add(&mut self, result: &serde_json::Value) -> anyhow::Result<()> {
        let figure = |name: &str| result[name].as_f64().with_context(|| format!("mesh-load gave no {name}"));
        self.p50.push(figure("p50_ms")?);
        self.p99.push(figure("p99_ms")?);
        Ok(())
    }
}
