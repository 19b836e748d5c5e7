//! How long a kvstoremesh takes to mirror clusters into an empty etcd, beside a plain copy.

use super::Bench;
use super::etcd::Etcd;
use super::process::{Process, finish, load, start_load};
use super::report::{Row, median};
use anyhow::Context as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Instant;

/// 12,200 records.
pub(super) fn ten_clusters(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let sources: Vec<Source> = (1..=10).map(|id| Source::fill(bench, id, 1000)).collect::<Result<_, _>>()?;
    measure(bench, "mirror of 10 clusters", &sources)
}

/// 100,220 records.
pub(super) fn one_large_cluster(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let sources = [Source::fill(bench, 1, 100_000)?];
    measure(bench, "mirror of 100,000 endpoints", &sources)
}

/// A remote cluster.
pub(super) struct Source {
    pub(super) name: String,
    pub(super) id: u32,
    pub(super) etcd: Etcd,
}

impl Source {
    /// One with 100 nodes, 100 identities and 20 services of 50 backends.
    pub(super) fn fill(bench: &Bench, id: u32, endpoints: u32) -> anyhow::Result<Self> {
        Self::fill_at(bench, id, endpoints, Ipv4Addr::LOCALHOST)
    }

    /// The same with its etcd at an address of this machine.
    pub(super) fn fill_at(bench: &Bench, id: u32, endpoints: u32, ip: Ipv4Addr) -> anyhow::Result<Self> {
        let name = format!("cluster-{id}");
        let etcd = Etcd::start_at(bench, &name, ip)?;
        let arguments = [
            "fill".to_owned(),
            format!("--etcd={}", etcd.endpoint()),
            format!("--name={name}"),
            format!("--id={id}"),
            format!("--endpoints={endpoints}"),
        ];
        load(&bench.programs, &arguments)?;
        Ok(Self { name, id, etcd })
    }
}

/// A kvstoremesh of its own cluster.
pub(super) struct Mirror {
    pub(super) etcd: Etcd,
    dir: PathBuf,
}

impl Mirror {
    /// Its etcd, empty, and its configuration; it is not started yet.
    pub(super) fn prepare(bench: &Bench, sources: &[Source]) -> anyhow::Result<Self> {
        Self::prepare_at(bench, sources, Ipv4Addr::LOCALHOST)
    }

    /// The same with its etcd at an address of this machine.
    pub(super) fn prepare_at(bench: &Bench, sources: &[Source], ip: Ipv4Addr) -> anyhow::Result<Self> {
        let etcd = Etcd::start_at(bench, "local", ip)?;
        let dir = bench.scratch.0.join("mirror");
        // Of an earlier round.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("remotes"))?;
        etcd.write_config(&dir.join("local.yaml"))?;
        for source in sources {
            source.etcd.write_config(&dir.join("remotes").join(&source.name))?;
        }
        Ok(Self { etcd, dir })
    }

    pub(super) fn start(&self, bench: &Bench) -> anyhow::Result<Process> {
        let arguments = [
            "kvstoremesh".to_owned(),
            "--cluster-name=local".to_owned(),
            "--cluster-id=255".to_owned(),
            format!("--clustermesh-config={}", self.dir.join("remotes").display()),
            format!("--etcd-config={}", self.dir.join("local.yaml").display()),
        ];
        Process::start(&bench.programs.join("clustermesh-apiserver"), &arguments, &self.dir.join("log"))
    }

    /// Arguments for a `mesh-load` that waits for all canaries.
    pub(super) fn wait(&self, sources: usize) -> [String; 4] {
        [
            "wait".to_owned(),
            format!("--etcd={}", self.etcd.endpoint()),
            "--prefix=cilium/synced/".to_owned(),
            format!("--count={}", 5 * sources),
        ]
    }
}

fn measure(bench: &Bench, case: &str, sources: &[Source]) -> anyhow::Result<Vec<Row>> {
    let (mut ours, mut raw, mut cpu, mut peak) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.rounds {
        eprintln!("  round {round} of {}", bench.rounds);
        raw.push(copy(bench, sources)?);
        let mirror = Mirror::prepare(bench, sources)?;
        let waiting = start_load(&bench.programs, &mirror.wait(sources.len()))?;
        let begin = Instant::now();
        let process = mirror.start(bench)?;
        finish(waiting)?;
        ours.push(begin.elapsed().as_secs_f64());
        cpu.push(process.cpu_seconds()?);
        peak.push(process.peak_mib()?);
    }
    Ok(vec![Row {
        case: case.to_owned(),
        what: "empty etcd to last canary, s".to_owned(),
        ours: median(ours),
        raw: Some(median(raw)),
        cpu_seconds: Some(median(cpu)),
        peak_mib: Some(median(peak)),
    }])
}

fn copy(bench: &Bench, sources: &[Source]) -> anyhow::Result<f64> {
    let to = Etcd::start(bench, "copy")?;
    let mut arguments = vec!["copy".to_owned(), format!("--to={}", to.endpoint())];
    arguments.extend(sources.iter().map(|source| format!("--from={}", source.etcd.endpoint())));
    let result = load(&bench.programs, &arguments)?;
    result["seconds"].as_f64().context("mesh-load copy gave no seconds")
}
