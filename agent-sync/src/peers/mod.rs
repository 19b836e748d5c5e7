//! One task per cluster: its etcd connection, its cluster config, and a reflector for each kind.
//!
//! Edge. Comes in: the own etcd's configuration and changes of the config directory. Goes out: what
//! the clusters say, undecoded, into the engine's channel, where order counts: everything of a cluster
//! passes through the one channel, so a drain never overtakes what it is to drain. The decisions (is
//! this config acceptable, who holds which ID, what is followed when) are plain code in
//! [`clustermesh_kvstore::accept`], [`Ids`] and [`core`].

pub mod core;
mod follow;
mod ids;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::config_dir::ConfigChange;
use clustermesh_kvstore::digest::Ticket;
use clustermesh_kvstore::etcd::{EtcdConfig, EtcdSource};
use clustermesh_kvstore::import_policy::{CurrentPolicy, Rules};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::reflector::{Connection, ConnectionStatus};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub(crate) use self::core::{OWN_KINDS, REMOTE_KINDS};
use crate::engine::Input;
use follow::Follower;
pub use ids::{IdError, Ids};

/// Who this agent's cluster is.
#[derive(Clone, Debug)]
pub struct OwnCluster {
    /// Its name.
    pub name: ClusterName,
    /// Its ID.
    pub id: ClusterId,
    /// The mesh's width.
    pub max: MaxConnectedClusters,
}

/// A cluster as far as its connection goes.
#[derive(Clone, Debug, Default)]
pub struct PeerState {
    /// Its ID, once its config is accepted.
    pub id: Option<ClusterId>,
    /// Its data is a mirror's.
    pub cached: bool,
    /// The last error since the config was accepted (before: at all) and its time; kept after it is over.
    pub last_error: Option<(String, Instant)>,
    /// When its etcd's heartbeat changed last, as seen here.
    pub heartbeat: Option<Instant>,
    /// When a record of it changed last in a mirror, apart from lists.
    pub last_change: Option<Instant>,
}

/// What status shows of a cluster.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// State of the peer task.
    pub state: watch::Receiver<PeerState>,
    /// By which prefixes its pods are known here.
    pub virtual_cidrs: VirtualCidrs,
    /// Its etcd, for reading single keys.
    pub etcd: Connection,
    /// State of its connection.
    pub connection: watch::Receiver<ConnectionStatus>,
    /// Kinds that are to be read again.
    wishes: mpsc::Sender<(Kind, Wish)>,
}

impl PeerView {
    /// The operator's rules for the cluster, with what its configuration file says.
    pub fn rules(&self, rules: Arc<Rules>) -> Arc<Rules> {
        with_virtual_cidrs(rules, &self.virtual_cidrs)
    }
}

fn with_virtual_cidrs(mut rules: Arc<Rules>, virtual_cidrs: &VirtualCidrs) -> Arc<Rules> {
    if rules.virtual_cidrs != *virtual_cidrs {
        Arc::make_mut(&mut rules).virtual_cidrs = virtual_cidrs.clone();
    }
    rules
}

/// How a kind is to be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// By a new reflector. What is held of it stays until the list says otherwise.
    Relist,
    /// Beside its reflector, only to be summed.
    Census(Ticket),
}

/// Views of all configured clusters, the own one among them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<Mutex<BTreeMap<ClusterName, PeerView>>>);

impl Directory {
    /// The views as they are now.
    pub fn snapshot(&self) -> BTreeMap<ClusterName, PeerView> {
        self.lock().clone()
    }

    /// Has a kind of a cluster read again.
    pub fn wish(&self, name: &ClusterName, kind: Kind, wish: Wish) {
        if let Some(view) = self.lock().get(name) {
            // One that finds no room, which is made for all kinds, is that of a follower that hangs.
            let _ = view.wishes.try_send((kind, wish));
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ClusterName, PeerView>> {
        // Nothing panics while it is held; if something did, the map is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts and stops the tasks of clusters.
pub struct Peers {
    own: OwnCluster,
    engine: mpsc::Sender<Input>,
    directory: Directory,
    ids: Arc<Mutex<Ids>>,
    policy: watch::Receiver<CurrentPolicy>,
    running: BTreeMap<ClusterName, Running>,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Peers {
    /// No cluster is followed yet.
    pub fn new(
        own: OwnCluster,
        engine: mpsc::Sender<Input>,
        directory: Directory,
        policy: watch::Receiver<CurrentPolicy>,
    ) -> Self {
        let ids = Arc::new(Mutex::new(Ids::new(own.name.clone(), own.id)));
        Self { own, engine, directory, ids, policy, running: BTreeMap::new() }
    }

    /// Follows the own cluster.
    pub async fn start_own(&mut self, etcd: EtcdSource) {
        self.start(self.own.name.clone(), etcd, VirtualCidrs::default()).await;
    }

    /// Obeys the config directory.
    pub async fn change(&mut self, change: ConfigChange) {
        match change {
            ConfigChange::Set { name, path } => {
                info!(cluster = %name, "following a remote cluster");
                self.stop(&name).await;
                // A file that cannot be read connects nobody either; its connection says why.
                let virtual_cidrs =
                    EtcdConfig::load(&path).map(|config| config.virtual_pod_cidrs).unwrap_or_default();
                self.start(name, path.into(), virtual_cidrs).await;
            }
            ConfigChange::Removed { name } => {
                info!(cluster = %name, "a remote cluster is configured no more; draining it");
                self.stop(&name).await;
                self.directory.lock().remove(&name);
                self.tell(Input::Removed(name.clone())).await;
                ids::lock(&self.ids).release(&name);
            }
        }
    }

    /// All clusters that were configured at start have been started.
    pub async fn all_started(&self) {
        self.tell(Input::AllConfigured).await;
    }

    async fn start(&mut self, name: ClusterName, etcd: EtcdSource, virtual_cidrs: VirtualCidrs) {
        self.tell(Input::Configured(name.clone())).await;
        let stop = CancellationToken::new();
        let (follower, view) = Follower::new(
            self.own.clone(),
            name.clone(),
            etcd,
            self.ids.clone(),
            (self.policy.clone(), virtual_cidrs),
            self.engine.clone(),
            stop.clone(),
        );
        self.directory.lock().insert(name.clone(), view);
        let task = tokio::spawn(follower.run());
        self.running.insert(name, Running { stop, task });
    }

    /// Stops a task without draining its cluster; after this it tells the engine nothing more.
    async fn stop(&mut self, name: &ClusterName) {
        if let Some(running) = self.running.remove(name) {
            running.stop.cancel();
            // It only fails if the task panicked, which has been reported.
            let _ = running.task.await;
        }
    }

    async fn tell(&self, input: Input) {
        // Fails only when the engine has ended, and the agent with it.
        let _ = self.engine.send(input).await;
    }
}
