//! How long an agent takes from its start until everything is read and installed, beside a bare list.

use super::Bench;
use super::etcd::Etcd;
use super::mirror::Source;
use super::node::{Node, fill};
use super::process::load;
use super::report::{Row, median};
use crate::bench::interrupt;
use anyhow::{Context as _, ensure};
use std::time::Instant;

/// 12,200 records.
pub(super) fn ten_clusters(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    sources(bench, "agent, 10 clusters", 10, 1000)
}

/// 100,220 records.
pub(super) fn one_large_cluster(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    sources(bench, "agent, 100,000 endpoints", 1, 100_000)
}

/// 305,000 records; one etcd has them all, as a kvstoremesh writes them.
pub(super) fn large_mesh(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    const CLUSTERS: u32 = 250;
    const ENDPOINTS: u32 = 1000;
    let node = Node::new(bench)?;
    let own = Etcd::start_at(bench, "own", node.outside())?;
    node.own(bench, &own)?;
    let etcd = Etcd::start_at(bench, "mirror", node.outside())?;
    for id in 1..=CLUSTERS {
        interrupt::check()?;
        let name = format!("cluster-{id}");
        let endpoints = format!("--endpoints={ENDPOINTS}");
        fill(bench, &etcd, &[format!("--name={name}"), format!("--id={id}"), endpoints, "--cached".into()])?;
        node.connect(&name, &etcd)?;
    }
    measure(bench, "agent, 250 clusters", &node, &[etcd.endpoint()], (CLUSTERS, CLUSTERS * ENDPOINTS))
}

fn sources(bench: &Bench, case: &str, clusters: u32, endpoints: u32) -> anyhow::Result<Vec<Row>> {
    let node = Node::new(bench)?;
    let own = Etcd::start_at(bench, "own", node.outside())?;
    node.own(bench, &own)?;
    let source = |id| Source::fill_at(bench, id, endpoints, node.outside());
    let sources: Vec<Source> = (1..=clusters).map(source).collect::<Result<_, _>>()?;
    for source in &sources {
        node.connect(&source.name, &source.etcd)?;
    }
    let etcds: Vec<String> = sources.iter().map(|source| source.etcd.endpoint()).collect();
    measure(bench, case, &node, &etcds, (clusters, clusters * endpoints))
}

fn measure(
    bench: &Bench,
    case: &str,
    node: &Node,
    etcds: &[String],
    (clusters, endpoints): (u32, u32),
) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for datapath in ["ebpf", "memory"] {
        let (mut ours, mut raw, mut cpu, mut peak) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 1..=bench.rounds {
            eprintln!("  {datapath}, round {round} of {}", bench.rounds);
            raw.push(list(bench, etcds)?);
            let begin = Instant::now();
            let process = node.start(bench, datapath)?;
            let seen = node.wait(clusters)?;
            ours.push(begin.elapsed().as_secs_f64());
            cpu.push(process.cpu_seconds()?);
            peak.push(process.peak_mib()?);
            let installed = seen.value("clustermesh_table_entries{table=\"cm_ipcache\"}");
            ensure!(
                installed >= Some(endpoints.into()),
                "cm_ipcache has {installed:?} entries, not one for each of {endpoints} endpoints"
            );
        }
        rows.push(Row {
            case: case.to_owned(),
            what: format!("start to all installed ({datapath}), s"),
            ours: median(ours),
            raw: Some(median(raw)),
            cpu_seconds: Some(median(cpu)),
            peak_mib: Some(median(peak)),
        });
    }
    Ok(rows)
}

fn list(bench: &Bench, etcds: &[String]) -> anyhow::Result<f64> {
    let mut arguments = vec!["list".to_owned()];
    arguments.extend(etcds.iter().map(|etcd| format!("--from={etcd}")));
    load(&bench.programs, &arguments)?["seconds"].as_f64().context("mesh-load list gave no seconds")
}
