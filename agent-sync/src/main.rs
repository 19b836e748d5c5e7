//! `clustermesh-agent`: one per node.
#![forbid(unsafe_code)]

mod cleanup_command;
mod encryption_flags;
mod map_sizes;
mod observe_flags;
mod outside_flags;

use std::io::IsTerminal as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use agent_sync::agent::{self, AgentError, KernelOptions, Options};
use agent_sync::liveness::LivenessOptions;
use agent_sync::peers::OwnCluster;
use agent_sync::tunnels::{Tunnels, UnderlayProtocol};
use anyhow::Context as _;
use clap::builder::RangedU64ValueParser;
use clap::{Args as _, CommandFactory as _, FromArgMatches as _, Parser, ValueEnum};
use cleanup_command::CleanupFlags;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::import_policy::PolicySource;
use ebpf_global_svc::MapSizes;
use encryption_flags::EncryptionFlags;
use map_sizes::MapSizeFlags;
use observe_flags::ObserveFlags;
use outside_flags::OutsideFlags;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Exit status for what the command line is to blame for.
const USAGE: u8 = 2;

const BPF_ROOT: &str = "/sys/fs/bpf/clustermesh";
const GRPC_SOCKET: &str = "/run/clustermesh/agent.sock";
const TUNNEL_DEVICE: &str = "cm_vxlan";
const TUNNEL_PORT: u16 = 8472;
/// The subcommand; without one the agent runs.
const CLEANUP: &str = "cleanup";

/// Follows all clusters of a mesh and programs this node's kernel.
///
/// Stopping it leaves the datapath running; starting it again takes over what is installed.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  clustermesh-agent --cluster-name alpha --cluster-id 1 --node-name node1 \\
    --etcd-config /etc/clustermesh/etcd.yaml --clustermesh-config /etc/clustermesh/remotes \\
    --cgroup-root /sys/fs/cgroup --http-addr 127.0.0.1:9879
  clustermesh-agent --cluster-name alpha --cluster-id 1 --node-name laptop --datapath memory \\
    --etcd-config etcd.yaml --clustermesh-config remotes --grpc-socket ./agent.sock
  clustermesh-agent cleanup --dry-run"
)]
struct Flags {
    /// Name of this cluster
    #[arg(long, env = "CLUSTER_NAME")]
    cluster_name: ClusterName,
    /// ID of this cluster, unique in the mesh
    #[arg(long, env = "CLUSTER_ID")]
    cluster_id: u32,
    /// Name of this node, as in its Node object
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// Underlay address of this node, the source of its tunnels [default: the kernel chooses]
    #[arg(long, env = "NODE_IP")]
    node_ip: Option<IpAddr>,
    /// Family of the addresses between which tunnels run, the same in the whole mesh [default: that of --node-ip, or
    /// ipv4]
    #[arg(long, value_enum, value_name = "FAMILY")]
    underlay_protocol: Option<UnderlayFlag>,
    /// etcd configuration of this cluster (Cilium's YAML)
    #[arg(long)]
    etcd_config: PathBuf,
    /// Directory of remote clusters: an etcd configuration in a file of each cluster's name
    #[arg(long)]
    clustermesh_config: PathBuf,
    /// What remote clusters may say (see docs/import-policy.md) [default: whatever is plausible]
    #[arg(long, value_name = "FILE")]
    import_policy: Option<PathBuf>,
    /// Count what breaks a rule of the import policy, but let it in
    #[arg(long, requires = "import_policy")]
    import_policy_dry_run: bool,
    /// How many clusters the mesh may have, the same in all of them: 255 or 511
    #[arg(long, default_value_t)]
    max_connected_clusters: MaxConnectedClusters,
    /// Where the tables are
    #[arg(long, value_enum, default_value_t = DatapathFlag::Ebpf)]
    datapath: DatapathFlag,
    /// Folder of the pinned maps and programs, one for each agent
    #[arg(long, default_value = BPF_ROOT)]
    bpf_root: PathBuf,
    /// Cgroup (v2) of the processes that reach services by their cluster IPs [default: none]
    #[arg(long)]
    cgroup_root: Option<PathBuf>,
    /// Unix socket on which the CLI is answered
    #[arg(long, default_value = GRPC_SOCKET)]
    grpc_socket: PathBuf,
    /// Address of /healthz, /readyz and /metrics [default: none]
    #[arg(long)]
    http_addr: Option<SocketAddr>,
    /// VXLAN device, made if it is missing
    #[arg(long, default_value = TUNNEL_DEVICE)]
    tunnel_device: String,
    /// UDP port of the tunnels, the same in the whole mesh
    #[arg(long, default_value_t = TUNNEL_PORT)]
    tunnel_port: u16,
    /// Whether pods are told of packets that are too big for the tunnels; otherwise these are sent in fragments
    #[arg(long, value_enum, value_name = "SWITCH", default_value_t = Switch::On)]
    pmtu_discovery: Switch,
    /// Whether dead remote clusters are taken out of load-balancing
    #[arg(long, value_enum, default_value_t = Switch::On)]
    liveness: Switch,
    /// A cluster is dead when neither its etcd nor any of its nodes was heard for so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = LivenessOptions::default().dead_after.as_secs(),
        value_parser = RangedU64ValueParser::<u64>::new().range(LivenessOptions::MIN_DEAD_AFTER.as_secs()..=86_400))]
    liveness_dead_after: u64,
    /// A dead cluster returns when it was heard for so many seconds; longer if it died a short time before
    #[arg(long, value_name = "SECONDS", default_value_t = LivenessOptions::default().return_after.as_secs(),
        value_parser = RangedU64ValueParser::<u64>::new().range(1..=86_400))]
    liveness_return_after: u64,
    /// Seconds from one question to the nodes of a cluster to the next [default: 5, or a third of the time
    /// after which it is dead]
    #[arg(long, value_name = "SECONDS", value_parser = RangedU64ValueParser::<u64>::new().range(1..=3600))]
    liveness_probe_interval: Option<u64>,
    /// TCP port on which a node is asked that does not answer ICMP; a refusal is an answer
    #[arg(long, value_name = "PORT", default_value_t = LivenessOptions::default().probe_port)]
    liveness_probe_port: u16,
    /// Seconds from one comparison of the tables with what is wanted to the next; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
        value_parser = RangedU64ValueParser::<u64>::new().range(0..=86_400))]
    kernel_scan_interval: u64,
    /// Seconds from one look at all records of a kind to the next, of clusters that state no digests
    /// (Cilium); what differs from what is held is listed again. 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 3600,
        value_parser = RangedU64ValueParser::<u64>::new().range(0..=604_800))]
    relist_interval: u64,
    /// Count what network policies would drop, and let it pass
    #[arg(long, value_enum, default_value_t = Switch::Off, num_args = 0..=1, default_missing_value = "on")]
    policy_audit_mode: Switch,
    #[command(flatten)]
    encryption: EncryptionFlags,
    #[command(flatten)]
    outside: OutsideFlags,
    #[command(flatten)]
    observe: ObserveFlags,
    #[command(flatten)]
    map_sizes: MapSizeFlags,
    /// How log lines look; RUST_LOG says which there are
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DatapathFlag {
    /// In the kernel; needs root
    Ebpf,
    /// In this process: to look at a mesh, and for tests
    Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum UnderlayFlag {
    Ipv4,
    Ipv6,
}

/// Flags that make no sense together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum UnderlayError {
    /// Tunnels would have no end here.
    #[error("--node-ip {ip} is no address on an underlay of --underlay-protocol {family}")]
    NodeIp { ip: IpAddr, family: &'static str },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let command = Flags::command()
        .subcommand(CleanupFlags::augment_args(clap::Command::new(CLEANUP)))
        .subcommand_negates_reqs(true)
        .args_conflicts_with_subcommands(true);
    let matches = command.get_matches();
    if let Some((CLEANUP, matches)) = matches.subcommand() {
        let flags = CleanupFlags::from_arg_matches(matches).unwrap_or_else(|error| error.exit());
        return clean_up(flags);
    }
    let flags = Flags::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    start_log(flags.log_format);
    let options = match flags.options() {
        Ok(options) => options,
        Err(error) => return fail(error.as_ref(), USAGE),
    };
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let usage = error.downcast_ref::<AgentError>().is_some_and(AgentError::is_usage);
            fail(error.as_ref(), if usage { USAGE } else { 1 })
        }
    }
}

fn clean_up(flags: CleanupFlags) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome =
        runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(flags.run()));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref(), if cleanup_command::is_usage(&error) { USAGE } else { 1 }),
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    // One worker for the engine and one for connections; more would only cost memory.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let stopper = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopper.cancel();
        });
        Ok(agent::run(options, stop).await?)
    })
}

fn fail(error: &dyn std::error::Error, status: u8) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(status)
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Where tunnels run.
fn tunnels(protocol: Option<UnderlayFlag>, node_ip: Option<IpAddr>) -> Result<Tunnels, UnderlayError> {
    let (protocol, family) = match (protocol, node_ip) {
        (Some(UnderlayFlag::Ipv6), _) | (None, Some(IpAddr::V6(_))) => (UnderlayProtocol::Ipv6, "ipv6"),
        _ => (UnderlayProtocol::Ipv4, "ipv4"),
    };
    match node_ip.filter(|ip| !protocol.takes(*ip)) {
        Some(ip) => Err(UnderlayError::NodeIp { ip, family }),
        None => Ok(Tunnels { protocol, node_ip }),
    }
}

impl Flags {
    fn options(self) -> anyhow::Result<Options> {
        let max = self.max_connected_clusters;
        let own = OwnCluster { name: self.cluster_name, id: ClusterId::new(self.cluster_id, max)?, max };
        let dead_after = Duration::from_secs(self.liveness_dead_after);
        let asked = self.liveness_probe_interval.map(Duration::from_secs);
        let liveness = LivenessOptions {
            dead_after,
            return_after: Duration::from_secs(self.liveness_return_after),
            probe_interval: asked.unwrap_or(LivenessOptions::default().probe_interval.min(dead_after / 3)),
            probe_port: self.liveness_probe_port,
        };
        let wireguard_device = self.encryption.device().to_owned();
        let tunnels = tunnels(self.underlay_protocol, self.node_ip)?;
        let encryption = self.encryption.options(self.tunnel_port)?;
        let kernel = KernelOptions {
            bpf_root: self.bpf_root,
            cgroup_root: self.cgroup_root,
            tunnel_device: self.tunnel_device,
            tunnel_port: self.tunnel_port,
            pmtu_discovery: self.pmtu_discovery == Switch::On,
            wireguard_device,
            encryption,
            packet_services: self.outside.options(),
        };
        Ok(Options {
            own,
            node_name: self.node_name,
            tunnels,
            etcd_config: self.etcd_config,
            clustermesh_config: self.clustermesh_config,
            import_policy: PolicySource { path: self.import_policy, dry_run: self.import_policy_dry_run },
            kernel: matches!(self.datapath, DatapathFlag::Ebpf).then_some(kernel),
            sizes: MapSizes { events: self.observe.ring_bytes(), ..self.map_sizes.sizes() },
            grpc_socket: self.grpc_socket,
            http_addr: self.http_addr,
            liveness: (self.liveness == Switch::On).then_some(liveness),
            scan_interval: (self.kernel_scan_interval > 0)
                .then_some(Duration::from_secs(self.kernel_scan_interval)),
            relist_interval: (self.relist_interval > 0).then_some(Duration::from_secs(self.relist_interval)),
            audit_policies: self.policy_audit_mode == Switch::On,
            observe: self.observe.limits(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_have_the_family_of_the_nodes_address_unless_told_otherwise() {
        let family = |flag, ip: Option<&str>| tunnels(flag, ip.map(|ip| ip.parse().unwrap()));
        let protocol = |flag, ip| family(flag, ip).map(|tunnels| tunnels.protocol);
        assert_eq!(protocol(None, None), Ok(UnderlayProtocol::Ipv4));
        assert_eq!(protocol(None, Some("192.0.2.1")), Ok(UnderlayProtocol::Ipv4));
        assert_eq!(protocol(None, Some("fd00::1")), Ok(UnderlayProtocol::Ipv6));
        assert_eq!(protocol(Some(UnderlayFlag::Ipv6), None), Ok(UnderlayProtocol::Ipv6));
        for (flag, ip) in [
            (Some(UnderlayFlag::Ipv6), "192.0.2.1"),
            (Some(UnderlayFlag::Ipv4), "fd00::1"),
            (None, "fe80::1"),
        ] {
            let error = family(flag, Some(ip)).unwrap_err().to_string();
            assert!(error.contains(ip) && error.contains("--underlay-protocol ipv"), "{error}");
        }
    }
}
