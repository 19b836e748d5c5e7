//! The one task that owns the mesh's state and the tables.
//!
//! Edge, but only just: it takes what is waiting in its channels, hands it to the plain code ([`Core`]:
//! members, intake, mesh, reconciler) as one batch, and has it write what follows. A single change is
//! written at once; in a storm the batches grow, so that each key is written once per batch and not once
//! per event.

mod core;
mod explain;
mod intake;
mod kernel;
mod members;
mod query;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::digest::SourceTime;
use clustermesh_kvstore::import_policy::Rules;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::ReflectorEvent;
use ebpf_global_svc::{Datapath, DatapathError, MapSizes, Tables};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::mesh::{Link, Links, Macs, Routes};
use crate::netlink::{PodLink, PodLinks};
use crate::peers::{Directory, OwnCluster};
use kernel::PodHooks;

pub use self::core::{Core, Stepped};
pub use explain::{Explanation, Part, Subject};
pub use query::{DigestView, DumpError, Fill, KindView, Overview, Query, Row, TABLES};

/// Inputs that wait while a batch is written.
pub const CHANNEL: usize = 1024;

/// What a peer's task tells.
#[derive(Debug)]
pub enum Input {
    /// The cluster has a config file (or is the own one).
    Configured(ClusterName),
    /// Every cluster that was configured at start has been told.
    AllConfigured,
    /// What it may say from now on. Lists of all kinds follow, so that the rules count for what was told
    /// before, too.
    Policy {
        /// The cluster.
        name: ClusterName,
        /// The operator's rules for it.
        rules: Arc<Rules>,
    },
    /// Its cluster config is accepted, and lists of all kinds begin.
    Accepted {
        /// The cluster.
        name: ClusterName,
        /// Its ID, which nobody else has.
        id: ClusterId,
    },
    /// A reflector's event.
    Record {
        /// The cluster.
        name: ClusterName,
        /// What is reflected.
        kind: Kind,
        /// The event.
        event: ReflectorEvent,
    },
    /// Liveness takes it out of load-balancing, or back in.
    Liveness {
        /// The cluster.
        name: ClusterName,
        /// Out.
        dead: bool,
    },
    /// What its exporter states of its kinds; the suffix is the kind's name.
    Digest {
        /// The cluster.
        name: ClusterName,
        /// Of the reflector of its digests.
        event: ReflectorEvent,
    },
    /// It lost its ID; everything of it goes.
    Drained(ClusterName),
    /// Its config file is gone; everything of it goes.
    Removed(ClusterName),
}

/// What the engine starts with.
pub struct Setup {
    /// Who we are.
    pub own: OwnCluster,
    /// This node's name, as in its node record.
    pub node_name: String,
    /// This node's underlay address, if the operator gave it.
    pub node_ip: Option<std::net::Ipv4Addr>,
    /// The kernel's side; none: tables in memory.
    pub datapath: Option<Datapath>,
    /// Pods that this node routes to; none: there is no network to look at.
    pub pod_links: Option<watch::Receiver<Arc<PodLinks>>>,
    /// Of tables in memory; the datapath has chosen its own.
    pub sizes: MapSizes,
    /// From one comparison of the tables with what is wanted to the next; none: never.
    pub scan_interval: Option<Duration>,
}

/// Channels of a running engine.
pub struct Channels {
    /// From peers.
    pub inputs: mpsc::Receiver<Input>,
    /// From those who want to know.
    pub queries: mpsc::Receiver<Query>,
    /// To the routes' keeper.
    pub routes: watch::Sender<Option<Routes>>,
    /// By which kinds are listed again.
    pub directory: Directory,
    /// Ends the engine; the tables stay.
    pub stop: CancellationToken,
}

/// See the module.
pub struct Engine {
    core: Core,
    tables: Tables,
    datapath: Option<Datapath>,
    hooks: PodHooks,
    pod_links: Option<watch::Receiver<Arc<PodLinks>>>,
    started: Instant,
}

impl Engine {
    /// Takes over what is installed.
    ///
    /// # Errors
    /// If the tables cannot be read.
    pub fn new(setup: Setup) -> Result<Self, DatapathError> {
        let Setup { own, node_name, node_ip, datapath, pod_links, sizes, scan_interval } = setup;
        let tables = match &datapath {
            Some(datapath) => datapath.tables()?,
            None => Tables::memory(&sizes),
        };
        let started = Instant::now();
        let hooks = PodHooks::new(datapath.as_ref())?;
        let mut core = Core::restore(own, &node_name, node_ip, started, &tables)?;
        core.scan_tables(scan_interval, started);
        let mut engine = Self { core, tables, datapath, hooks, pod_links, started };
        engine.take_links();
        Ok(engine)
    }

    /// Runs until `stop`.
    pub async fn run(mut self, mut channels: Channels) {
        let mut batch = Vec::with_capacity(CHANNEL);
        loop {
            let wakes = [self.core.deadline(), self.core.digests_deadline(), self.hooks.deadline()];
            let wake = wakes.into_iter().flatten().min();
            let deadline = async {
                match wake {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = channels.stop.cancelled() => return,
                Some(query) = channels.queries.recv() => {
                    self.answer(query);
                    continue;
                }
                received = channels.inputs.recv_many(&mut batch, CHANNEL) => {
                    if received == 0 {
                        return;
                    }
                }
                () = links_changed(&mut self.pod_links) => self.take_links(),
                () = deadline => {}
            }
            for input in batch.drain(..) {
                self.core.apply(input);
            }
            self.write(&channels.routes);
            self.core.installed(SourceTime::now());
            for (name, kind) in self.core.check_digests(Instant::now()) {
                channels.directory.relist(&name, kind);
            }
        }
    }

    /// Installs what the mesh wants by now.
    fn write(&mut self, routes: &watch::Sender<Option<Routes>>) {
        let stepped = self.core.step(Instant::now(), &mut self.tables);
        let mesh = self.core.mesh();
        if let (Some(datapath), Some(links)) = (&mut self.datapath, &self.pod_links) {
            let links = links.borrow().clone();
            let wanted = mesh.local_pods().iter().filter_map(|ip| Some(links.get(ip)?.ifindex));
            let may_detach = self.core.knows_own_addresses();
            self.hooks.sync(wanted.collect(), may_detach, Instant::now(), datapath);
            // Known with the node's record at the latest; until then an earlier life's holds.
            if let Some(Err(error)) = mesh.node_ip().map(|ip| datapath.set_node_ip(ip)) {
                warn!(%error, "cannot tell the datapath this node's address");
            }
        }
        if stepped.topology_changed || routes.borrow().is_none() {
            let now = mesh.routes();
            routes.send_if_modified(|routes| {
                let differ = now.is_some() && *routes != now;
                if differ {
                    *routes = now;
                }
                differ
            });
        }
    }

    fn take_links(&mut self) {
        let links = match &mut self.pod_links {
            None => Links::Absent,
            Some(links) => {
                let links = links.borrow_and_update();
                Links::Known(links.iter().map(|(ip, pod)| (*ip, link(pod))).collect())
            }
        };
        self.core.set_links(links);
    }

    /// Own cluster synced, and everything installed.
    fn is_ready(&self) -> bool {
        self.core.is_ready() && self.hooks.last_error().is_none()
    }
}

fn link(pod: &PodLink) -> Link {
    let macs = pod.pod_mac.map(|pod_mac| Macs { pod: pod_mac, host: pod.host_mac });
    Link { ifindex: pod.ifindex, macs }
}

/// Waits for a change of the pods' links; for ever if nobody looks.
async fn links_changed(links: &mut Option<watch::Receiver<Arc<PodLinks>>>) {
    match links {
        Some(receiver) => {
            if receiver.changed().await.is_err() {
                // The watcher is gone; its last view stays.
                std::future::pending::<()>().await;
            }
        }
        None => std::future::pending().await,
    }
}

/// An address as rows show it.
fn shown(ip: Option<IpAddr>) -> String {
    ip.map_or_else(|| "?".into(), |ip| ip.to_string())
}
