//! The one task that owns the mesh's state and the tables.
//!
//! Edge, but only just: it takes what is waiting in its channels, hands it to the plain code ([`Core`]:
//! members, intake, mesh, reconciler) as one batch, and has it write what follows. A single change is
//! written at once; in a storm the batches grow, so that each key is written once per batch and not once
//! per event.

mod core;
mod counted;
mod describe;
mod explain;
mod intake;
mod kernel;
mod members;
mod policy_rows;
mod query;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::digest::{SourceTime, Ticket};
use clustermesh_kvstore::import_policy::Rules;
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::ReflectorEvent;
use ebpf_global_svc::{Datapath, DatapathError, EventRules, MapSizes, Tables};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::encryption::TunnelBoard;
use crate::histogram::Histogram;
use crate::mesh::{LetIn, Link, Links, Macs};
use crate::netlink::{PodLink, PodLinks, RouteBoard};
use crate::peers::{Directory, OwnCluster};
use crate::tunnels::{Scope, Tunnels};
use counted::CallCounts;
use kernel::PodHooks;

pub use self::core::{Core, Stepped};
pub(crate) use counted::KIND_NAMES;
pub use counted::{CallCount, Counted};
pub use explain::{AddressPart, Explanation, Part, Subject};
pub use query::{DigestView, DumpError, Fill, KindView, Overview, Query, Row, TABLES};

/// Inputs that wait while a batch is written.
pub const CHANNEL: usize = 1024;

/// Upper bounds of the times that batches of records take, in seconds.
const BATCH_TIMES: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_15, 0.000_2, 0.000_3, 0.000_5, 0.000_75, 0.001, 0.001_5, 0.002, 0.003, 0.005,
    0.01, 0.025, 0.1, 1.0,
];

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
    /// This node encrypts what goes to these underlay addresses, and to no others.
    Encrypted(BTreeSet<IpAddr>),
    /// What its exporter states of its kinds; the suffix is the kind's name.
    Digest {
        /// The cluster.
        name: ClusterName,
        /// Of the reflector of its digests.
        event: ReflectorEvent,
    },
    /// All records of a kind were summed beside its reflector.
    Counted {
        /// The cluster.
        name: ClusterName,
        /// What was summed.
        kind: Kind,
        /// Of the wish for it.
        ticket: Ticket,
        /// At which they stood so.
        revision: i64,
        /// Their sum.
        sum: u64,
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
    /// What the operator says of this node's tunnels.
    pub tunnels: Tunnels,
    /// The kernel's side; none: tables in memory.
    pub datapath: Option<Datapath>,
    /// Pods that this node routes to; none: there is no network to look at.
    pub pod_links: Option<watch::Receiver<Arc<PodLinks>>>,
    /// Of tables in memory; the datapath has chosen its own.
    pub sizes: MapSizes,
    /// From one comparison of the tables with what is wanted to the next; none: never.
    pub scan_interval: Option<Duration>,
    /// From one census of a kind of which nothing is stated to the next; none: never.
    pub census_interval: Option<Duration>,
    /// What policies would drop is counted and passes.
    pub audit_policies: bool,
    /// Between which nodes nothing may go in clear, and to which nodes it does not by now; none: all may.
    pub strict: Option<(Scope, BTreeSet<IpAddr>)>,
    /// None: nobody is let in from outside.
    pub outside: Option<LetIn>,
}

/// Channels of a running engine.
pub struct Channels {
    /// From peers.
    pub inputs: mpsc::Receiver<Input>,
    /// From those who want to know.
    pub queries: mpsc::Receiver<Query>,
    /// To the routes' keeper.
    pub routes: RouteBoard,
    /// To the keeper of encryption.
    pub tunnels: TunnelBoard,
    /// What the programs are to tell.
    pub events: watch::Receiver<EventRules>,
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
    batches: Histogram,
    /// See [`Setup::strict`].
    strict: Option<Scope>,
    calls: CallCounts,
}

impl Engine {
    /// Takes over what is installed.
    ///
    /// # Errors
    /// If the tables cannot be read.
    pub fn new(setup: Setup) -> Result<Self, DatapathError> {
        let Setup { own, node_name, tunnels, datapath, pod_links, sizes, .. } = setup;
        let tables = match &datapath {
            Some(datapath) => datapath.tables()?,
            None => Tables::memory(&sizes),
        };
        let started = Instant::now();
        let hooks = PodHooks::new(datapath.as_ref())?;
        let mut core = Core::restore(own, &node_name, tunnels, started, &tables)?;
        if let Some(how) = setup.outside {
            core.let_in(how);
        }
        core.scan_tables(setup.scan_interval, started);
        core.take_census(setup.census_interval);
        core.audit_policies(setup.audit_policies);
        let strict = setup.strict.map(|(scope, encrypted)| {
            core.require_encryption(scope, encrypted);
            scope
        });
        let batches = Histogram::new(&BATCH_TIMES);
        let calls = CallCounts::default();
        let mut engine = Self { core, tables, datapath, hooks, pod_links, started, batches, strict, calls };
        engine.take_links();
        engine.forget_calls();
        Ok(engine)
    }

    /// Runs until `stop`.
    pub async fn run(mut self, mut channels: Channels) {
        let mut batch = Vec::with_capacity(CHANNEL);
        channels.events.mark_changed();
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
                Ok(()) = channels.events.changed() => {
                    self.set_events(*channels.events.borrow_and_update());
                    continue;
                }
                () = links_changed(&mut self.pod_links) => self.take_links(),
                () = deadline => {}
            }
            let received = Instant::now();
            let has_records = batch.iter().any(|input| matches!(input, Input::Record { .. }));
            for input in batch.drain(..) {
                match (input, self.strict) {
                    (Input::Encrypted(encrypted), Some(scope)) => {
                        self.core.require_encryption(scope, encrypted)
                    }
                    (Input::Encrypted(_), None) => {}
                    (input, _) => self.core.apply(input),
                }
            }
            self.write(&channels.routes, &channels.tunnels);
            self.forget_calls();
            if has_records {
                self.batches.observe(received.elapsed().as_secs_f64());
            }
            self.core.installed(SourceTime::now());
            for (name, kind, wish) in self.core.check_digests(Instant::now()) {
                channels.directory.wish(&name, kind, wish);
            }
        }
    }

    /// Installs what the mesh wants by now.
    fn write(&mut self, routes: &RouteBoard, tunnels: &TunnelBoard) {
        let now = Instant::now();
        let stepped = self.core.step(now, &mut self.tables);
        routes.write(stepped.routes);
        tunnels.write(stepped.ends);
        let mesh = self.core.mesh();
        let (Some(datapath), Some(links)) = (&mut self.datapath, &self.pod_links) else { return };
        // Without its address, no pod is this node's.
        let may_detach = self.core.knows_own_addresses() && mesh.node().is_some();
        if stepped.pods_moved || self.hooks.wants_sync(may_detach, now) {
            let links = links.borrow().clone();
            let wanted = mesh.local_pods().iter().filter_map(|ip| Some(links.get(ip)?.ifindex));
            self.hooks.sync(wanted.collect(), may_detach, now, datapath);
        }
        // Once the programs know who has to be encrypted; an earlier life's word holds until then.
        if self.strict.is_some()
            && self.core.pending() == 0
            && let Err(error) = datapath.set_strict(true)
        {
            warn!(%error, "cannot tell the datapath to drop what is not encrypted");
        }
        // Known with the node's record at the latest; until then an earlier life's holds.
        if let Some(Err(error)) = mesh.node().map(|(node_ip, address)| datapath.set_node(node_ip, address)) {
            warn!(%error, "cannot tell the datapath this node's address");
        }
    }

    fn set_events(&mut self, rules: EventRules) {
        let Some(datapath) = &mut self.datapath else { return };
        if let Err(error) = datapath.set_events(&rules) {
            warn!(%error, "cannot tell the programs which events are wanted");
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
