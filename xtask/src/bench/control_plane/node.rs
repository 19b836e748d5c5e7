//! The node of an agent: a network namespace, its own cluster's etcd, and what the agent says of itself.

use super::Bench;
use super::etcd::Etcd;
use super::netns::Netns;
use super::process::{Process, load};
use crate::bench::interrupt;
use anyhow::bail;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Of the agent's `/metrics`.
const PORT: u16 = 9879;
/// The longest that an agent may take to have installed everything.
const LIMIT: Duration = Duration::from_secs(600);

/// A node of a cluster without pods, with the same 20 services as all others.
pub(super) struct Node {
    netns: Netns,
    dir: PathBuf,
}

impl Node {
    pub(super) fn new(bench: &Bench) -> anyhow::Result<Self> {
        let netns = Netns::new()?;
        let dir = bench.scratch.0.join("agent");
        // Of an earlier case.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("remotes"))?;
        Ok(Self { netns, dir })
    }

    /// Where etcds have to listen for it.
    pub(super) fn outside(&self) -> Ipv4Addr {
        self.netns.outside
    }

    /// Makes `etcd` that of its cluster, by writing the cluster into it.
    pub(super) fn own(&self, bench: &Bench, etcd: &Etcd) -> anyhow::Result<()> {
        let cluster = ["--name=local", "--id=255", "--nodes=1", "--endpoints=0", "--backends=0", "--private"];
        fill(bench, etcd, &cluster.map(str::to_owned))?;
        etcd.write_config(&self.dir.join("own.yaml"))
    }

    pub(super) fn connect(&self, name: &str, etcd: &Etcd) -> anyhow::Result<()> {
        etcd.write_config(&self.dir.join("remotes").join(name))
    }

    pub(super) fn start(&self, bench: &Bench, datapath: &str) -> anyhow::Result<Process> {
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

    /// The pinned maps of its agent, as seen from here.
    pub(super) fn maps(&self, agent: &Process) -> PathBuf {
        let inside = self.dir.join("bpf/maps");
        agent.root().join(inside.strip_prefix("/").unwrap_or(&inside))
    }

    /// Waits until `clusters` are synced and nothing is left to install.
    pub(super) fn wait(&self, clusters: u32) -> anyhow::Result<Metrics> {
        let begin = Instant::now();
        loop {
            interrupt::check()?;
            let asked = Instant::now();
            if let Ok(seen) = self.metrics()
                && seen.is_settled(clusters)
            {
                return Ok(seen);
            }
            if begin.elapsed() > LIMIT {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                bail!("the agent has not installed everything within {LIMIT:?}; its log ends with {tail:#?}");
            }
            // The answers cost the agent something: it shall spend most of the time on its work.
            pause((asked.elapsed() * 8).max(Duration::from_millis(20)));
        }
    }

    pub(super) fn metrics(&self) -> anyhow::Result<Metrics> {
        let mut stream =
            TcpStream::connect_timeout(&SocketAddrV4::new(self.netns.inside, PORT).into(), LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(Metrics(text))
    }
}

/// What `/metrics` said.
pub(super) struct Metrics(String);

impl Metrics {
    pub(super) fn value(&self, name: &str) -> Option<f64> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// All values of a name, with their labels as they are written.
    pub(super) fn family<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.lines().filter_map(move |line| {
            let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")?;
            Some((labels, value.trim().parse().ok()?))
        })
    }

    fn is_settled(&self, clusters: u32) -> bool {
        let ready = self.family("clustermesh_cluster_ready").filter(|(_, value)| *value > 0.0).count();
        // The own one, too.
        ready > clusters as usize && self.value("clustermesh_datapath_pending_changes{}") == Some(0.0)
    }
}

/// Writes a cluster into an etcd.
pub(super) fn fill(bench: &Bench, etcd: &Etcd, cluster: &[String]) -> anyhow::Result<()> {
    let mut arguments = vec!["fill".to_owned(), format!("--etcd={}", etcd.endpoint())];
    arguments.extend_from_slice(cluster);
    load(&bench.programs, &arguments).map(drop)
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when another process has done its work")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
