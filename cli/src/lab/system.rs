//! The processes of a cluster's system: etcd, apiserver and perhaps kvstoremesh on the first node, an agent
//! on every node.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clustermesh_kvstore::etcd::EtcdConfig;
use jiff::Timestamp;
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;

use super::agent_flags;
use super::cgroup::Cgroup;
use super::layout::Layout;
use super::netns;
use super::pki::{self, certificate, etcd_yaml};
use super::process::{Place, Spec, binaries, log_tail, spawn};
use super::state::{ClusterState, write_atomically};
use super::topology::{Cluster, Node};
use crate::ca::authority::bundle;
use crate::ca::leaf::Role;
use crate::error::usage;
use crate::wait::until;

const ETCD_PORT: u16 = 2379;
const APISERVER_PORT: u16 = 9880;
const KVSTOREMESH_PORT: u16 = 9881;
const AGENT_PORT: u16 = 9879;
/// How long a process may take to end by itself.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(5);

/// A process of a cluster: `etcd`, `apiserver`, `kvstoremesh`, `agent:NODE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    Etcd,
    Apiserver,
    Kvstoremesh,
    Agent(String),
}

impl FromStr for Process {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "etcd" => Ok(Self::Etcd),
            None if text == "apiserver" => Ok(Self::Apiserver),
            None if text == "kvstoremesh" => Ok(Self::Kvstoremesh),
            Some(("agent", node)) if !node.is_empty() => Ok(Self::Agent(node.to_owned())),
            _ => Err(format!("{text:?}: write etcd, apiserver, kvstoremesh or agent:NODE")),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Etcd => f.write_str("etcd"),
            Self::Apiserver => f.write_str("apiserver"),
            Self::Kvstoremesh => f.write_str("kvstoremesh"),
            Self::Agent(node) => write!(f, "agent:{node}"),
        }
    }
}

/// A [`Process`] of a certain cluster.
#[derive(Clone, Debug)]
pub(crate) struct SystemProcess<'a> {
    layout: &'a Layout,
    cluster: &'a Cluster,
    node: &'a Node,
    process: Process,
}

impl<'a> SystemProcess<'a> {
    /// Finds the node that `process` runs on.
    ///
    /// # Errors
    /// A usage error if there is no such node, or the cluster has no kvstoremesh.
    pub(crate) fn new(layout: &'a Layout, cluster: &'a Cluster, process: Process) -> anyhow::Result<Self> {
        let node = match &process {
            Process::Etcd | Process::Apiserver => cluster.first_node(),
            Process::Kvstoremesh if cluster.kvstoremesh => cluster.first_node(),
            Process::Kvstoremesh => {
                return Err(usage(format!(
                    "cluster {} has no kvstoremesh: write `kvstoremesh: true` in the topology",
                    cluster.name
                )));
            }
            Process::Agent(node) => cluster.node(node)?,
        };
        Ok(Self { layout, cluster, node, process })
    }

    /// All processes of `cluster`, in the order in which they are started.
    pub(crate) fn all(layout: &'a Layout, cluster: &'a Cluster, mesh: bool) -> Vec<Self> {
        let on = |process, node| Self { layout, cluster, node, process };
        let mut all = vec![on(Process::Etcd, cluster.first_node())];
        if mesh {
            all.push(on(Process::Apiserver, cluster.first_node()));
            if cluster.kvstoremesh {
                all.push(on(Process::Kvstoremesh, cluster.first_node()));
            }
            all.extend(cluster.nodes.iter().map(|node| on(Process::Agent(node.name.clone()), node)));
        }
        all
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn node(&self) -> &Node {
        self.node
    }

    pub(crate) fn cgroup(&self) -> Cgroup {
        let name = match &self.process {
            Process::Etcd => "etcd",
            Process::Apiserver => "apiserver",
            Process::Kvstoremesh => "kvstoremesh",
            Process::Agent(_) => "agent",
        };
        Cgroup::at(self.layout.process_cgroup(self.cluster.name.as_str(), &self.node.name, name))
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.layout.log(self.cluster.name.as_str(), &self.process.to_string().replace(':', "-"))
    }

    pub(crate) fn is_running(&self) -> bool {
        self.cgroup().is_populated()
    }

    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// If it runs already, ends at once, or does not listen in time; with the end of its log.
    pub(crate) async fn start(&self, state: &ClusterState, deadline: Instant) -> anyhow::Result<()> {
        if self.is_running() {
            bail!("{} of cluster {} runs already", self.process, self.cluster.name);
        }
        let mut child = self.launch(state, deadline).await?;
        self.wait_listening(&mut child, deadline).await
    }

    /// Starts it; an etcd without data is prepared first, as by an init container.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) async fn launch(&self, state: &ClusterState, deadline: Instant) -> anyhow::Result<Child> {
        let argv = match &self.process {
            Process::Etcd => {
                self.initialize_etcd(state, deadline).await?;
                self.etcd(state)
            }
            Process::Apiserver => self.apiserver()?,
            Process::Kvstoremesh => self.kvstoremesh()?,
            Process::Agent(_) => self.agent()?,
        };
        self.spawn(&argv)
    }

    fn spawn(&self, argv: &[String]) -> anyhow::Result<Child> {
        let netns = netns::file(&self.layout.node_netns(self.cluster.name.as_str(), &self.node.name));
        let place = Place { netns, cgroup: self.cgroup().path().to_path_buf() };
        spawn(Spec { place, argv, env: Default::default(), log: self.log() })
            .with_context(|| format!("cannot start {} of cluster {}", self.process, self.cluster.name))
    }

    /// Sets users and roles, unless etcd has its data already. Works beside the data directory, so that
    /// one that exists is always complete.
    async fn initialize_etcd(&self, state: &ClusterState, deadline: Instant) -> anyhow::Result<()> {
        let cluster = self.cluster.name.as_str();
        let data = self.layout.etcd_data(cluster);
        if data.join("member").exists() {
            return Ok(());
        }
        let fresh = data.with_extension("new");
        let argv = [
            binary("clustermesh-apiserver")?,
            "etcdinit".to_owned(),
            format!("--cluster-name={cluster}"),
            format!("--etcd-cluster-name={cluster}"),
            format!("--etcd-initial-cluster-token={}", state.etcd_token),
            format!("--etcd-data-dir={}", fresh.display()),
        ];
        let mut child = self.spawn(&argv)?;
        let ended = until(deadline, async || child.try_wait().context("cannot wait for a process")).await?;
        match ended {
            Some(status) if status.success() => std::fs::rename(&fresh, &data)
                .with_context(|| format!("cannot rename {} to {}", fresh.display(), data.display())),
            Some(_) => bail!("cannot prepare etcd of cluster {cluster}:\n{}", log_tail(&self.log(), 8)),
            None => bail!("etcd of cluster {cluster} is not prepared in time; see {}", self.log().display()),
        }
    }

    /// Waits until it listens.
    ///
    /// # Errors
    /// If it ends, or does not listen before `deadline`; with the end of its log.
    pub(crate) async fn wait_listening(&self, child: &mut Child, deadline: Instant) -> anyhow::Result<()> {
        let port = match &self.process {
            Process::Etcd => ETCD_PORT,
            Process::Apiserver => APISERVER_PORT,
            Process::Kvstoremesh => KVSTOREMESH_PORT,
            Process::Agent(_) => AGENT_PORT,
        };
        let netns = self.layout.node_netns(self.cluster.name.as_str(), &self.node.name);
        let listens = until(deadline, async || {
            if let Some(status) = child.try_wait().context("cannot wait for a process")? {
                bail!(
                    "{} of cluster {} ended at once ({status}):\n{}",
                    self.process,
                    self.cluster.name,
                    log_tail(&self.log(), 8)
                );
            }
            Ok(netns::listening_ports(&netns)?.contains(&port).then_some(()))
        });
        listens.await?.with_context(|| {
            format!(
                "{} of cluster {} does not listen on port {port}; see {}",
                self.process,
                self.cluster.name,
                self.log().display()
            )
        })
    }

    /// Asks it to end, and ends it if it does not. Returns whether it ran.
    ///
    /// # Errors
    /// If it cannot be ended.
    pub(crate) async fn stop(&self) -> anyhow::Result<bool> {
        let ran = self.is_running();
        end_processes(&self.cgroup(), STOP_GRACE).await?;
        Ok(ran)
    }

    fn etcd(&self, state: &ClusterState) -> Vec<String> {
        let cluster = self.cluster.name.as_str();
        let server = certificate(self.layout, self.cluster, Role::Server);
        let client = etcd_endpoint(self.cluster);
        // Peers are this process only: plain HTTP inside the node's own namespace.
        let peer = "http://127.0.0.1:2380";
        let text = |path: &Path| path.display().to_string();
        [
            ("--name", cluster.to_owned()),
            ("--data-dir", text(&self.layout.etcd_data(cluster))),
            ("--listen-client-urls", format!("{client},https://127.0.0.1:{ETCD_PORT}")),
            ("--advertise-client-urls", client),
            ("--listen-peer-urls", peer.to_owned()),
            ("--initial-advertise-peer-urls", peer.to_owned()),
            ("--initial-cluster", format!("{cluster}={peer}")),
            ("--initial-cluster-token", state.etcd_token.clone()),
            ("--trusted-ca-file", text(&bundle(&self.layout.pki()))),
            ("--cert-file", text(&server.cert)),
            ("--key-file", text(&server.key)),
            ("--auto-compaction-mode", "periodic".to_owned()),
            ("--auto-compaction-retention", "1h".to_owned()),
            ("--logger", "zap".to_owned()),
        ]
        .into_iter()
        .fold(vec!["etcd".to_owned(), "--client-cert-auth".to_owned()], |mut argv, (flag, value)| {
            argv.extend([flag.to_owned(), value]);
            argv
        })
    }

    fn apiserver(&self) -> anyhow::Result<Vec<String>> {
        let cluster = self.cluster.name.as_str();
        let mut argv = vec![binary("clustermesh-apiserver")?];
        self.add_cluster_flags(&mut argv);
        argv.extend([
            "--source".to_owned(),
            format!("manifests:{}", self.layout.manifests(cluster).display()),
            "--etcd-config".to_owned(),
            self.layout.etcd_config(cluster, "admin").display().to_string(),
            "--http-addr".to_owned(),
            format!("0.0.0.0:{APISERVER_PORT}"),
            "--cluster-users-enabled".to_owned(),
            "--cluster-users-config-path".to_owned(),
            self.layout.users(cluster).display().to_string(),
        ]);
        Ok(argv)
    }

    fn kvstoremesh(&self) -> anyhow::Result<Vec<String>> {
        let cluster = self.cluster.name.as_str();
        let mut argv = vec![binary("clustermesh-apiserver")?, "kvstoremesh".to_owned()];
        self.add_cluster_flags(&mut argv);
        argv.extend([
            "--clustermesh-config".to_owned(),
            self.layout.kvstoremesh_config(cluster).display().to_string(),
            "--etcd-config".to_owned(),
            self.layout.etcd_config(cluster, "admin").display().to_string(),
            // Here a removed cluster's agents hear of it at once.
            "--removal-grace".to_owned(),
            "2s".to_owned(),
            "--http-addr".to_owned(),
            format!("0.0.0.0:{KVSTOREMESH_PORT}"),
            "--status-socket".to_owned(),
            self.layout.kvstoremesh_socket(cluster).display().to_string(),
        ]);
        Ok(argv)
    }

    fn agent(&self) -> anyhow::Result<Vec<String>> {
        let (layout, cluster, node) = (self.layout, self.cluster.name.as_str(), self.node.name.as_str());
        let mut argv = vec![binary("clustermesh-agent")?];
        self.add_cluster_flags(&mut argv);
        for (flag, path) in [
            ("--etcd-config", layout.etcd_config(cluster, "agent")),
            ("--clustermesh-config", layout.clustermesh_config(cluster)),
            ("--bpf-root", layout.node_bpf(cluster, node)),
            ("--cgroup-root", layout.node_cgroup(cluster, node)),
            ("--grpc-socket", layout.agent_socket(cluster, node)),
            ("--state-dir", layout.node_state(cluster, node)),
        ] {
            argv.extend([flag.to_owned(), path.display().to_string()]);
        }
        argv.extend(["--node-name", node, "--datapath", "ebpf", "--enable-node-port"].map(str::to_owned));
        argv.extend(["--node-ip".to_owned(), self.node.tunnel_end().to_string()]);
        // A lab's tables are small, and somebody who breaks them is watching.
        argv.extend(["--kernel-scan-interval", "5"].map(str::to_owned));
        argv.extend(["--http-addr".to_owned(), format!("0.0.0.0:{AGENT_PORT}")]);
        argv.extend(agent_flags::all(layout, cluster)?);
        Ok(argv)
    }

    fn add_cluster_flags(&self, argv: &mut Vec<String>) {
        for (flag, value) in [
            ("--cluster-name", self.cluster.name.to_string()),
            ("--cluster-id", self.cluster.id.to_string()),
            ("--max-connected-clusters", self.cluster.max_connected.to_string()),
        ] {
            argv.extend([flag.to_owned(), value]);
        }
    }
}

/// Asks the processes of a cgroup to end, and after `grace` ends them.
///
/// # Errors
/// If they survive even that.
pub(crate) async fn end_processes(cgroup: &Cgroup, grace: Duration) -> anyhow::Result<()> {
    let ended = async || Ok((!cgroup.is_populated()).then_some(()));
    cgroup.signal(Signal::TERM);
    // A stopped process would never see the request.
    cgroup.signal(Signal::CONT);
    if until(Instant::now() + grace, ended).await?.is_none() {
        cgroup.kill()?;
        until(Instant::now() + Duration::from_secs(5), ended).await?.with_context(|| {
            format!("the kernel does not end the processes in {}", cgroup.path().display())
        })?;
    }
    Ok(())
}

/// Writes a cluster's certificates, its etcd client configurations and its context.
///
/// # Errors
/// If they cannot be written.
pub(crate) fn prepare(layout: &Layout, cluster: &Cluster) -> anyhow::Result<()> {
    let name = cluster.name.as_str();
    let config_dirs = [layout.clustermesh_config(name), layout.kvstoremesh_config(name)];
    for dir in config_dirs.into_iter().chain([layout.logs(), layout.manifests(name)]) {
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    for node in &cluster.nodes {
        let dir = layout.node(name, &node.name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Cgroup::at(layout.node_cgroup(name, &node.name)).create()?;
    }
    pki::issue(layout, cluster, cluster.first_node().address)?;
    let (endpoints, ca) = ([etcd_endpoint(cluster)], bundle(&layout.pki()));
    for role in [Role::Admin, Role::Agent] {
        let yaml = etcd_yaml(&endpoints, &ca, &certificate(layout, cluster, role));
        write_atomically(&layout.etcd_config(name, role.as_str()), yaml.as_bytes(), 0o644)?;
    }
    write_atomically(&layout.users(name), b"users: []\n", 0o644)?;
    let remote = certificate(layout, cluster, Role::Remote);
    let agents = cluster
        .nodes
        .iter()
        .map(|node| json!({"node": node.name, "socket": layout.agent_socket(name, &node.name)}));
    let local = EtcdConfig::load(&layout.etcd_config(name, "agent"))?;
    let kvstoremesh = cluster
        .kvstoremesh
        .then(|| json!({"clustermeshConfig": layout.kvstoremesh_config(name), "etcd": local, "socket": layout.kvstoremesh_socket(name)}));
    let mut context = json!({
        "cluster": {"name": name, "id": cluster.id.get()},
        "etcd": {
            "endpoints": endpoints,
            "trusted-ca-file": ca,
        },
        "remote": {"cert-file": remote.cert, "key-file": remote.key},
        "users": layout.users(name),
        "clustermeshConfig": layout.clustermesh_config(name),
        "agents": agents.collect::<Vec<_>>(),
    });
    if let Some(kvstoremesh) = kvstoremesh {
        context["kvstoremesh"] = kvstoremesh;
    }
    let yaml = serde_saphyr::to_string(&context).context("cannot write the context as YAML")?;
    write_atomically(&layout.context(name), yaml.as_bytes(), 0o644)
}

/// A token that no etcd of this cluster had before: a fresh etcd gets a cluster ID of its own by it.
pub(crate) fn new_etcd_token(layout: &Layout, cluster: &str) -> String {
    format!("{}-{cluster}-{}", layout.lab(), Timestamp::now().as_nanosecond())
}

/// Path of a companion of this program.
///
/// # Errors
/// If it is not there, with how to build it.
pub(crate) fn binary(name: &str) -> anyhow::Result<String> {
    let dir = binaries().context("cannot find the path of this program")?;
    let path = dir.join(name);
    if !path.is_file() {
        let package = if name == "clustermesh-agent" { "clustermesh-agent" } else { name };
        return Err(usage(format!("{name} is not in {}; build it: cargo build -p {package}", dir.display())));
    }
    Ok(path.display().to_string())
}

fn etcd_endpoint(cluster: &Cluster) -> String {
    format!("https://{}", SocketAddr::new(cluster.first_node().address, ETCD_PORT))
}
