//! Puts the parts together and runs them until the agent is told to stop.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clustermesh_kvstore::config_dir::{self, ConfigChange, ConfigDirError};
use clustermesh_kvstore::etcd::{EtcdConfig, EtcdConfigError};
use clustermesh_kvstore::import_policy::{self, PolicyFileError, PolicySource};
use clustermesh_kvstore::record::Algorithm;
use ebpf_global_svc::{Datapath, DatapathError, DatapathOptions, EventRing, MapSizes, Migrated};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::acceleration::{Acceleration, AccelerationError, accelerate};
use crate::encryption::announce::Announcer;
use crate::encryption::{
    self, EncryptionOptions, Here, Keeper, KeyError, Lines, Report, Secrets, TunnelBoard, overlay_mtu,
};
use crate::engine::{self, Channels, Engine, Query, Setup};
use crate::liveness::{Board, LivenessOptions, Watch};
use crate::mesh::LetIn;
use crate::netlink::{self, Netlink, NetlinkError, OverlaySpec, PodLinks, RouteBoard};
use crate::observe::{self, Hub, Limits, PodNames};
use crate::peers::{Directory, OwnCluster, Peers};
use crate::serve::{self, ObserveDesk, ServeError, Source};
use crate::tunnels::{Tunnels, UnderlayProtocol};

/// Of an underlay whose device is not known.
const UNDERLAY_MTU: u32 = 1500;
/// IPv6 packets of this size have to get through, and something has to be left of the underlay.
const MIN_MTU: u32 = 1280;

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who we are.
    pub own: OwnCluster,
    /// This node's name, as in its node record.
    pub node_name: String,
    /// The family of its tunnels, and this node's underlay address: their source. Without one the kernel chooses.
    pub tunnels: Tunnels,
    /// The own etcd's configuration.
    pub etcd_config: PathBuf,
    /// The directory of remote clusters.
    pub clustermesh_config: PathBuf,
    /// What remote clusters may say.
    pub import_policy: PolicySource,
    /// The kernel's side; none: tables in memory.
    pub kernel: Option<KernelOptions>,
    /// Entries that fit into each table.
    pub sizes: MapSizes,
    /// The CLI's socket.
    pub grpc_socket: PathBuf,
    /// For probes and Prometheus; none: not served.
    pub http_addr: Option<SocketAddr>,
    /// Dead clusters are taken out of load-balancing; none: no cluster is watched.
    pub liveness: Option<LivenessOptions>,
    /// From one comparison of the tables with what is wanted to the next; none: never.
    pub scan_interval: Option<Duration>,
    /// From one look at all records of a kind whose exporter states no digests to the next; none: never.
    pub relist_interval: Option<Duration>,
    /// What policies would drop is counted and passes.
    pub audit_policies: bool,
    /// How much the programs tell of single packets and calls.
    pub observe: Limits,
}

/// How the kernel is used.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Folder of the pins.
    pub bpf_root: PathBuf,
    /// Whose processes reach services; none: nobody's.
    pub cgroup_root: Option<PathBuf>,
    /// Name of the VXLAN device.
    pub tunnel_device: String,
    /// Its UDP port.
    pub tunnel_port: u16,
    /// Pods are told of packets that are too big for the tunnels.
    pub pmtu_discovery: bool,
    /// Name of the WireGuard devices, which also one without encryption has to know: it removes them.
    pub wireguard_device: String,
    /// Encryption between nodes; none: all goes in clear.
    pub encryption: Option<EncryptionOptions>,
    /// Services for what no socket hook sees.
    pub packet_services: PacketServices,
}

/// Services for packets that no socket hook sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketServices {
    /// Those that pods send.
    pub of_pods: bool,
    /// Those that come in at devices of these names; empty: at the one with the node's address. None: nothing is let in.
    pub from_outside: Option<Vec<String>>,
    /// How those find a backend, if the service does not say.
    pub algorithm: Algorithm,
    /// Those that come in, past the kernel.
    pub acceleration: Acceleration,
    /// Places in a table of Maglev's, for each cluster; one of [`LetIn::TABLE_SIZES`].
    pub table_size: u32,
}

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The operator's: the own etcd's file.
    #[error("--etcd-config: {0}")]
    EtcdConfig(#[from] EtcdConfigError),
    /// The operator's: the directory of remote clusters.
    #[error(transparent)]
    ConfigDir(#[from] ConfigDirError),
    /// The operator's: what remote clusters may say.
    #[error("--import-policy: {0}")]
    ImportPolicy(#[from] PolicyFileError),
    /// The operator's: whose processes reach services.
    #[error("--cgroup-root: {path} is no cgroup of version 2 ({source}); see `findmnt -t cgroup2`")]
    Cgroup {
        /// As given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The operator's: where calls from outside come in.
    #[error("--devices: there is no device {0} in this network namespace; see `ip link`")]
    NoDevice(String),
    /// The operator's: which of the node's devices it is cannot be told.
    #[error("--enable-node-port: no device has the address {0}: correct --node-ip, or name --devices")]
    NoDeviceOf(IpAddr),
    /// Calls from outside cannot be accelerated as the operator wants it.
    #[error(transparent)]
    Acceleration(#[from] AccelerationError),
    /// The kernel's tables and programs.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The node's network.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The operator's, or the disk's: this node's private key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The operator's: packets of the mesh's smallest size would not fit.
    #[error(
        "the underlay's MTU is {underlay}, which leaves {left} bytes for packets of the mesh: {MIN_MTU} are the least"
    )]
    Mtu {
        /// Of the device with this node's address.
        underlay: u32,
        /// Less what tunnels and encryption add.
        left: u32,
    },
    /// The servers.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A part ended by itself.
    #[error("the {0} ended unexpectedly; please report this with the log")]
    Ended(&'static str),
}

impl AgentError {
    /// Whether the command line is at fault, rather than the machine.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::EtcdConfig(_)
                | Self::ImportPolicy(_)
                | Self::Cgroup { .. }
                | Self::ConfigDir(ConfigDirError::Unreadable { .. })
        )
    }
}

/// Runs until `stop`, and leaves the datapath as it is.
///
/// # Errors
/// If it cannot start, or a part of it ends.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), AgentError> {
    // Everything that an operator may have got wrong is looked at before anything is touched.
    EtcdConfig::load_with_files(&options.etcd_config)?;
    let policy = import_policy::follow(options.import_policy.clone())?;
    if let Some(cgroup) = options.kernel.as_ref().and_then(|kernel| kernel.cgroup_root.as_deref()) {
        check_cgroup(cgroup)?;
    }
    let (initial, changes) = config_dir::watch(&options.clustermesh_config, &options.own.name).await?;
    let keys = options.kernel.as_ref().and_then(|kernel| kernel.encryption.as_ref());
    let keys = keys.map(Secrets::new).transpose()?;
    let (queries, asked) = mpsc::channel(16);
    let directory = Directory::default();
    let board = Board::default();
    let (encryption_report, reported) = watch::channel(Report::default());
    let (rotate, rotations) = mpsc::channel(1);
    let encryption_view = serve::EncryptionView::new(&options, rotate, reported);
    let hub = Hub::new(options.observe);
    let observe = options.kernel.as_ref().map(|_| ObserveDesk {
        hub: hub.clone(),
        names: PodNames::new(options.own.name.clone(), directory.clone()),
    });
    let source = Source {
        own: options.own.clone(),
        node_name: options.node_name.clone(),
        datapath: if options.kernel.is_some() { "ebpf" } else { "memory" },
        queries: queries.clone(),
        directory: directory.clone(),
        policy: policy.clone(),
        board: board.clone(),
        encryption: encryption_view.clone(),
        desk: serve::Desk::default(),
        observe,
    };
    let grpc = serve::serve_grpc(source.clone(), &options.grpc_socket, stop.clone()).await?;
    let http = match options.http_addr {
        Some(address) => Some(serve::serve_http(source, address, stop.clone()).await?),
        None => None,
    };
    let http = async {
        match http {
            Some(http) => http.await,
            None => std::future::pending().await,
        }
    };

    let routes = RouteBoard::default();
    let node = match &options.kernel {
        Some(kernel) => Some(Node::open(&options, kernel, keys, routes.clone()).await?),
        None => None,
    };
    let (mut datapath, mut pod_links, mut keeper) = (None, None, None);
    if let Some(node) = node {
        encryption_view.set_mtu(node.mtu);
        (datapath, pod_links, keeper) = (Some(node.datapath), Some(node.pod_links), node.keeper);
    }
    let strict = options.kernel.as_ref().and_then(|kernel| kernel.encryption.as_ref());
    let strict = strict.filter(|encryption| encryption.strict).map(|encryption| encryption.scope);
    let encrypted = keeper.as_ref().map(Keeper::encrypted).unwrap_or_default();
    let ring = datapath.as_ref().map(Datapath::event_ring).transpose()?;
    let events = hub.rules();
    let engine = Engine::new(Setup {
        own: options.own.clone(),
        node_name: options.node_name.clone(),
        tunnels: options.tunnels,
        datapath,
        pod_links,
        sizes: options.sizes,
        scan_interval: options.scan_interval,
        census_interval: options.relist_interval,
        audit_policies: options.audit_policies,
        strict: strict.map(|scope| (scope, encrypted)),
        outside: outside(&options),
    })?;
    let (inputs, received) = mpsc::channel(engine::CHANNEL);
    let tunnels = TunnelBoard::default();
    let channels = Channels {
        inputs: received,
        queries: asked,
        routes,
        tunnels: tunnels.clone(),
        events,
        directory: directory.clone(),
        stop: stop.clone(),
    };
    let engine = tokio::spawn(engine.run(channels));
    if let Some(ring) = ring {
        tokio::spawn(follow_events(ring, queries.clone(), hub));
    }
    if let Some(liveness) = options.liveness {
        let (directory, engine) = (directory.clone(), inputs.clone());
        tokio::spawn(Watch { options: liveness, directory, queries, engine, board }.run());
    }
    let announcer = Announcer {
        cluster: options.own.name.clone(),
        node: options.node_name.clone(),
        directory: directory.clone(),
    };
    match keeper {
        Some(keeper) => {
            tokio::spawn(announcer.keep(keeper.announced()));
            let lines = Lines {
                board: tunnels,
                engine: inputs.clone(),
                report: encryption_report,
                rotate: rotations,
            };
            tokio::spawn(keeper.run(lines));
        }
        None if options.kernel.is_some() => drop(tokio::spawn(announcer.withdraw())),
        // Tables in memory say nothing about their node.
        None => {}
    }
    let peers = Peers::new(options.own.clone(), inputs, directory, policy);
    let peers = tokio::spawn(follow_clusters(peers, options.etcd_config, initial, changes));
    info!(cluster = %options.own.name, id = %options.own.id, node = options.node_name, "running");

    let outcome = tokio::select! {
        _ = engine => Err(AgentError::Ended("engine")),
        _ = peers => Err(AgentError::Ended("follower of the config directory")),
        served = grpc => served.map_err(AgentError::from),
        served = http => served.map_err(AgentError::from),
        () = stop.cancelled() => Ok(()),
    };
    if stop.is_cancelled() {
        // What ended, ended because it was told to.
        let _ = std::fs::remove_file(&options.grpc_socket);
        info!("stopped; the datapath stays as it is");
        return Ok(());
    }
    outcome
}

/// How calls from outside are let in; none: they are not.
fn outside(options: &Options) -> Option<LetIn> {
    let PacketServices { from_outside, algorithm, table_size, .. } =
        &options.kernel.as_ref()?.packet_services;
    from_outside.as_ref()?;
    let addresses = options.tunnels.node_ip.into_iter().collect();
    Some(LetIn { addresses, algorithm: *algorithm, table_size: *table_size })
}

/// Only version 2 has programs; each of its cgroups says which controllers it has.
fn check_cgroup(path: &Path) -> Result<(), AgentError> {
    match std::fs::metadata(path.join("cgroup.controllers")) {
        Ok(_) => Ok(()),
        Err(source) => Err(AgentError::Cgroup { path: path.into(), source }),
    }
}

/// The node's devices, routes and programs.
struct Node {
    datapath: Datapath,
    pod_links: watch::Receiver<Arc<PodLinks>>,
    /// Of the overlay.
    mtu: u32,
    keeper: Option<Keeper>,
}

impl Node {
    async fn open(
        options: &Options,
        kernel: &KernelOptions,
        keys: Option<Secrets>,
        routes: RouteBoard,
    ) -> Result<Self, AgentError> {
        let netlink = Netlink::open()?;
        let (underlay, mtu) = mtus(&netlink, options.tunnels, kernel.encryption.as_ref()).await?;
        let node_ip = options.tunnels.node_ip;
        let node_ip4 = node_ip.and_then(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        });
        // First: without it nothing is to be touched.
        let keeper = match (&kernel.encryption, keys) {
            (Some(encryption), Some(keys)) => {
                let here = Here {
                    cluster: options.own.id.get(),
                    node: &options.node_name,
                    tunnels: options.tunnels,
                    tunnel_port: kernel.tunnel_port,
                    underlay,
                };
                Some(Keeper::open(netlink.clone(), encryption, keys, here).await?)
            }
            _ => None,
        };
        let mut datapath = Datapath::open(&DatapathOptions {
            cgroup: kernel.cgroup_root.clone(),
            // At most 16.
            identity_shift: if options.own.max.get() == 511 { 15 } else { 16 },
            node_ip: node_ip4,
            underlay_ipv6: options.tunnels.protocol == UnderlayProtocol::Ipv6,
            overlay_port: kernel.tunnel_port,
            sizes: options.sizes,
            encrypts: kernel.encryption.is_some(),
            strict: kernel.encryption.as_ref().is_some_and(|encryption| encryption.strict),
            ..DatapathOptions::new(&kernel.bpf_root, options.own.id.get())
        })?;
        for Migrated { map, capacity, value_size, entries } in datapath.migrated() {
            info!(map, ?capacity, ?value_size, entries, "a map of another size or version was replaced");
        }
        let spec = OverlaySpec { name: kernel.tunnel_device.clone(), port: kernel.tunnel_port, mtu };
        let overlay = netlink.ensure_overlay(&spec).await?;
        datapath.attach_overlay(overlay)?;
        datapath.set_pmtu_discovery(kernel.pmtu_discovery)?;
        match &keeper {
            Some(keeper) => {
                for link in keeper.links().into_iter().flatten() {
                    datapath.attach_wireguard(*link)?;
                }
            }
            None => {
                let device = kernel.wireguard_device.clone();
                tokio::spawn(encryption::leave_quietly(netlink.clone(), device));
                tokio::spawn(encryption::ipsec::leave_quietly());
            }
        }
        let devices = serve_packets(&netlink, &mut datapath, node_ip, &kernel.packet_services).await?;
        let (wanted, encrypts) = (kernel.packet_services.acceleration, kernel.encryption.is_some());
        accelerate(&netlink, &mut datapath, &devices, wanted, encrypts).await?;
        let pod_links = netlink.watch_pod_links().await?;
        tokio::spawn(netlink::keep_routes(netlink, overlay, routes));
        Ok(Self { datapath, pod_links, mtu, keeper })
    }
}

/// Has the programs look at packets to services where that is wanted, and nowhere else. Gives the devices at which calls
/// come in.
async fn serve_packets(
    netlink: &Netlink,
    datapath: &mut Datapath,
    node_ip: Option<IpAddr>,
    wanted: &PacketServices,
) -> Result<BTreeSet<u32>, AgentError> {
    let mut devices = BTreeSet::new();
    for name in wanted.from_outside.iter().flatten() {
        let device = netlink.device(name).await?;
        devices.insert(device.ok_or_else(|| AgentError::NoDevice(name.clone()))?);
    }
    if let (Some([]), Some(ip)) = (wanted.from_outside.as_deref(), node_ip) {
        devices.insert(netlink.device_of(ip).await?.ok_or(AgentError::NoDeviceOf(ip))?);
    }
    datapath.set_packet_services(wanted.of_pods)?;
    for device in &devices {
        datapath.attach_netdev(*device)?;
    }
    for other in datapath.attached_netdevs()?.into_iter().filter(|other| !devices.contains(other)) {
        datapath.detach_netdev(other)?;
    }
    Ok(devices)
}

/// MTU of the underlay, and what tunnels, and perhaps encryption, leave of it.
async fn mtus(
    netlink: &Netlink,
    tunnels: Tunnels,
    encryption: Option<&EncryptionOptions>,
) -> Result<(u32, u32), AgentError> {
    let known = match tunnels.node_ip {
        Some(ip) => netlink.mtu_of(ip).await?,
        None => None,
    };
    let underlay = known.unwrap_or(UNDERLAY_MTU);
    let left = overlay_mtu(tunnels.protocol, underlay, encryption);
    if left < MIN_MTU { Err(AgentError::Mtu { underlay, left }) } else { Ok((underlay, left)) }
}

/// Without events a node is worse to look into, but as good as any other.
async fn follow_events(ring: EventRing, queries: mpsc::Sender<Query>, hub: Hub) {
    if let Err(error) = observe::read_events(ring, queries, hub).await {
        warn!(%error, "cannot read what the programs tell; `clustermesh observe` shows nothing of this node");
    }
}

/// Follows the own cluster and whatever the directory says. Ends only with the directory's watcher.
async fn follow_clusters(
    mut peers: Peers,
    etcd_config: PathBuf,
    initial: Vec<ConfigChange>,
    mut changes: mpsc::Receiver<ConfigChange>,
) {
    peers.start_own(etcd_config.into()).await;
    for change in initial {
        peers.change(change).await;
    }
    peers.all_started().await;
    while let Some(change) = changes.recv().await {
        peers.change(change).await;
    }
}
