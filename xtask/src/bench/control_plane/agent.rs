//! How long an agent takes from its start until everything is read and installed, beside a bare list.

use super::Bench;
use super::etcd::Etcd;
use super::mirror::Source;
use super::netns::Netns;
use super::process::{Process, load};
use super::report::{Row, median};
use crate::bench::interrupt;
use anyhow::{Context as _, bail, ensure};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Of the agent's `/metrics`.
const PORT: u16 = 9879;
/// The longest that a round may take.
const LIMIT: Duration = Duration::from_secs(600);

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
    let mesh = Mesh::new(bench)?;
    let etcd = Etcd::start_at(bench, "mirror", mesh.netns.outside)?;
    for id in 1..=CLUSTERS {
        interrupt::check()?;
        let name = format!("cluster-{id}");
        let cluster = [format!("--name={name}"), format!("--id={id}"), format!("--endpoints={ENDPOINTS}")];
        fill(bench, &etcd, &cluster, "--cached")?;
        mesh.connect(&name, &etcd)?;
    }
    measure(bench, "agent, 250 clusters", &mesh, &[etcd.endpoint()], (CLUSTERS, CLUSTERS * ENDPOINTS))
}

fn sources(bench: &Bench, case: &str, clusters: u32, endpoints: u32) -> anyhow::Result<Vec<Row>> {
    let mesh = Mesh::new(bench)?;
    let source = |id| Source::fill_at(bench, id, endpoints, mesh.netns.outside);
    let sources: Vec<Source> = (1..=clusters).map(source).collect::<Result<_, _>>()?;
    for source in &sources {
        mesh.connect(&source.name, &source.etcd)?;
    }
    let etcds: Vec<String> = sources.iter().map(|source| source.etcd.endpoint()).collect();
    measure(bench, case, &mesh, &etcds, (clusters, clusters * endpoints))
}

fn fill(bench: &Bench, etcd: &Etcd, cluster: &[String], how: &str) -> anyhow::Result<()> {
    let mut arguments = vec!["fill".to_owned(), format!("--etcd={}", etcd.endpoint()), how.to_owned()];
    arguments.extend_from_slice(cluster);
    load(&bench.programs, &arguments).map(drop)
}

/// The own cluster of an agent, and where it runs.
struct Mesh {
    netns: Netns,
    _own: Etcd,
    dir: PathBuf,
}

impl Mesh {
    /// A cluster of one node and no pods, with the same 20 services as all others.
    fn new(bench: &Bench) -> anyhow::Result<Self> {
        let netns = Netns::new()?;
        let own = Etcd::start_at(bench, "own", netns.outside)?;
        let cluster = ["--name=local", "--id=255", "--nodes=1", "--endpoints=0", "--backends=0"];
        fill(bench, &own, &cluster.map(str::to_owned), "--private")?;
        let dir = bench.scratch.0.join("agent");
        // Of an earlier case.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("remotes"))?;
        own.write_config(&dir.join("own.yaml"))?;
        Ok(Self { netns, _own: own, dir })
    }

    fn connect(&self, name: &str, etcd: &Etcd) -> anyhow::Result<()> {
        etcd.write_config(&self.dir.join("remotes").join(name))
    }

    fn start(&self, bench: &Bench, datapath: &str) -> anyhow::Result<Process> {
        let address = SocketAddrV4::new(self.netns.inside, PORT);
        let shown = |name: &str| self.dir.join(name).display().to_string();
        let [ip, arguments @ ..] = self.netns.prefix();
        let mut arguments = arguments.to_vec();
        arguments.extend([
            bench.programs.join("clustermesh-agent").display().to_string(),
            "--cluster-name=local".to_owned(),
            "--cluster-id=255".to_owned(),
            "--node-name=local-node-0".to_owned(),
            format!("--datapath={datapath}"),
            // Not below /sys/fs/bpf: it mounts its own, which goes with its mount namespace.
            format!("--bpf-root={}", shown("bpf")),
            format!("--etcd-config={}", shown("own.yaml")),
            format!("--clustermesh-config={}", shown("remotes")),
            format!("--grpc-socket={}", shown("agent.sock")),
            format!("--http-addr={address}"),
            // There are no nodes that could answer.
            "--liveness=off".to_owned(),
        ]);
        Process::start(Path::new(&ip), &arguments, &self.dir.join("log"))
    }
}

fn measure(
    bench: &Bench,
    case: &str,
    mesh: &Mesh,
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
            let process = mesh.start(bench, datapath)?;
            let seen = wait(mesh, clusters, begin)?;
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

/// Until all clusters are synced and nothing is left to install.
fn wait(mesh: &Mesh, clusters: u32, begin: Instant) -> anyhow::Result<Metrics> {
    loop {
        interrupt::check()?;
        let asked = Instant::now();
        let seen = Metrics::scrape(mesh.netns.inside);
        if let Ok(seen) = &seen
            && seen.is_settled(clusters)
        {
            return Ok(Metrics(seen.0.clone()));
        }
        if begin.elapsed() > LIMIT {
            let log = fs::read_to_string(mesh.dir.join("log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(5).collect();
            bail!("the agent has not installed everything within {LIMIT:?}; its log ends with {tail:#?}");
        }
        // The answers cost the agent something: it shall spend most of the time on its work.
        pause((asked.elapsed() * 8).max(Duration::from_millis(20)));
    }
}

/// What `/metrics` said.
struct Metrics(String);

impl Metrics {
    fn scrape(ip: Ipv4Addr) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect_timeout(&SocketAddrV4::new(ip, PORT).into(), LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(Self(text))
    }

    fn is_settled(&self, clusters: u32) -> bool {
        let ready = self.0.lines().filter(|line| line.starts_with("clustermesh_cluster_ready{"));
        let ready = ready.filter(|line| line.ends_with(" 1")).count();
        // The own one, too.
        ready > clusters as usize && self.value("clustermesh_datapath_pending_changes{}") == Some(0)
    }

    fn value(&self, name: &str) -> Option<u64> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when another process has done its work")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
