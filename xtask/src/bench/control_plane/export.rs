//! How long an exporter takes from its start until a cluster of an API server stands in an empty etcd, beside
//! a plain copy of the same keys.

use super::Bench;
use super::etcd::Etcd;
use super::kube::{Kube, Size};
use super::process::{Process, finish, load, start_load};
use super::report::{Row, median};
use anyhow::Context as _;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

/// With Cilium's identities, endpoints and nodes.
pub(super) fn cilium(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    measure(bench, "export, 2,000 endpoints", &Size::CILIUM)
}

/// Without: from pods and nodes.
pub(super) fn pods(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    measure(bench, "export, 2,000 pods", &Size::PODS)
}

/// Nothing to export: what the program costs by itself.
pub(super) fn empty(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    measure(bench, "export, empty cluster", &Size::EMPTY)
}

/// An exporter of a cluster called `alpha`.
pub(super) struct Exporter {
    pub(super) etcd: Etcd,
    dir: PathBuf,
}

impl Exporter {
    /// Its etcd, empty, and its configuration; it is not started yet.
    pub(super) fn prepare(bench: &Bench) -> anyhow::Result<Self> {
        let etcd = Etcd::start(bench, "exported")?;
        let dir = bench.scratch.0.join("export");
        fs::create_dir_all(&dir)?;
        etcd.write_config(&dir.join("etcd.yaml"))?;
        Ok(Self { etcd, dir })
    }

    pub(super) fn start(&self, bench: &Bench, kube: &Kube) -> anyhow::Result<Process> {
        let arguments = [
            "clustermesh".to_owned(),
            "--cluster-name=alpha".to_owned(),
            "--cluster-id=1".to_owned(),
            "--source=kubernetes".to_owned(),
            format!("--kubeconfig={}", kube.kubeconfig().display()),
            format!("--etcd-config={}", self.dir.join("etcd.yaml").display()),
        ];
        Process::start(&bench.programs.join("clustermesh-apiserver"), &arguments, &self.dir.join("log"))
    }

    /// Arguments for a `mesh-load` that waits for all canaries.
    pub(super) fn wait(&self) -> [String; 4] {
        [
            "wait".to_owned(),
            format!("--etcd={}", self.etcd.endpoint()),
            "--prefix=cilium/synced/".to_owned(),
            // Five kinds that other clusters read, four that the own agents do.
            "--count=9".to_owned(),
        ]
    }
}

fn measure(bench: &Bench, case: &str, size: &Size) -> anyhow::Result<Vec<Row>> {
    let kube = Kube::start(bench, size)?;
    let (mut ours, mut raw, mut cpu, mut peak) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut own, mut mapped) = (Vec::new(), Vec::new());
    for round in 1..=bench.rounds {
        eprintln!("  round {round} of {}", bench.rounds);
        let exporter = Exporter::prepare(bench)?;
        let waiting = start_load(&bench.programs, &exporter.wait())?;
        let begin = Instant::now();
        let process = exporter.start(bench, &kube)?;
        finish(waiting)?;
        ours.push(begin.elapsed().as_secs_f64());
        cpu.push(process.cpu_seconds()?);
        peak.push(process.peak_mib()?);
        own.push(process.memory_mib("RssAnon")?);
        mapped.push(process.memory_mib("RssFile")?);
        drop(process);
        raw.push(copy(bench, &exporter.etcd)?);
    }
    let row = |what: &str, ours| Row {
        case: case.to_owned(),
        what: what.to_owned(),
        ours: median(ours),
        raw: None,
        cpu_seconds: None,
        peak_mib: None,
    };
    let took = Row {
        raw: Some(median(raw)),
        cpu_seconds: Some(median(cpu)),
        peak_mib: Some(median(peak)),
        ..row("start to last canary, s", ours)
    };
    Ok(vec![
        took,
        row("own memory then (RssAnon), MiB", own),
        row("pages of the executable (RssFile), MiB", mapped),
    ])
}

fn copy(bench: &Bench, from: &Etcd) -> anyhow::Result<f64> {
    let to = Etcd::start(bench, "copy")?;
    let arguments =
        ["copy".to_owned(), format!("--to={}", to.endpoint()), format!("--from={}", from.endpoint())];
    load(&bench.programs, &arguments)?["seconds"].as_f64().context("mesh-load copy gave no seconds")
}
