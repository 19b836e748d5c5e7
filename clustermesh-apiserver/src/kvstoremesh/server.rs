//! The process: follows the config directory, runs a task for each cluster, serves HTTP.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_kvstore::cluster::{ClusterError, ClusterName};
use clustermesh_kvstore::config_dir::{self, ConfigChange, ConfigDirError};
use clustermesh_kvstore::etcd::{EtcdConfig, EtcdConfigError, SessionError};
use clustermesh_kvstore::import_policy::{self, CurrentPolicy, PolicyFileError, PolicySource, Rules};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions, ConnectionStatus};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::mirror::Mesh;
use super::readiness::{Patience, Readiness};
use super::remote::Remote;
use super::removal;
use super::roster::{Roster, Step};
use super::status::Status;
use crate::args::KvstoremeshArgs;
use crate::connection_log::log_connection;
use crate::http;

/// How often readiness is looked at, until there is.
const LOOK: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(1);

/// A mirror whose inputs exist and whose address is its own.
pub struct Kvstoremesh {
    own: ClusterName,
    mesh: Mesh,
    removal: Option<Duration>,
    initial: Vec<ConfigChange>,
    changes: mpsc::Receiver<ConfigChange>,
    policy: watch::Receiver<CurrentPolicy>,
    local: Connection,
    local_status: watch::Receiver<ConnectionStatus>,
    http: Option<TcpListener>,
    socket: Option<(PathBuf, UnixListener)>,
    status: Arc<Status>,
}

impl Kvstoremesh {
    /// Checks all that the operator said and takes hold of it. Whether any etcd answers is left open.
    ///
    /// # Errors
    /// Something that waiting does not cure.
    pub async fn start(args: &KvstoremeshArgs) -> Result<Self, StartError> {
        let cluster = args.cluster()?;
        let etcd_config = args.local_etcd().ok_or(StartError::NoEtcd)?;
        EtcdConfig::load_with_files(&etcd_config)?;
        let policy = import_policy::follow(PolicySource {
            path: args.import_policy.clone(),
            dry_run: args.import_policy_dry_run,
        })?;
        let http = match args.http_addr {
            Some(addr) => {
                Some(TcpListener::bind(addr).await.map_err(|error| StartError::Listen { addr, error })?)
            }
            None => None,
        };
        let socket = match &args.status_socket {
            Some(path) => {
                let failed = |error| StartError::Socket { path: path.clone(), error };
                Some((path.clone(), http::bind_unix(path).map_err(failed)?))
            }
            None => None,
        };
        let (initial, changes) = config_dir::watch(&args.clustermesh_config, &cluster.name).await?;
        let (local, local_status) = Connection::spawn(etcd_config, ConnectionOptions::default());
        let patience =
            Patience { per_cluster: args.per_cluster_ready_timeout, global: args.global_ready_timeout };
        let waited_for = initial.iter().filter_map(|change| match change {
            ConfigChange::Set { name, .. } => Some(name.clone()),
            ConfigChange::Removed { .. } => None,
        });
        let readiness = Readiness::new(waited_for.collect(), patience, Instant::now().into_std());
        Ok(Self {
            mesh: Mesh {
                own: cluster.id,
                max: args.max_connected_clusters,
                cache_ttl: args.cache_ttl(),
                census: args.relist_interval(),
            },
            status: Arc::new(Status::new(
                cluster.name.clone(),
                local_status.clone(),
                policy.clone(),
                readiness,
            )),
            own: cluster.name,
            removal: (!args.disable_drain_on_disconnection).then_some(args.removal_grace),
            initial,
            changes,
            policy,
            local,
            local_status,
            http,
            socket,
        })
    }

    /// What the mirror knows about itself.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// Where HTTP is served.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Runs until `stop`. What was mirrored stays, until its leases end or the next run takes it over.
    ///
    /// # Errors
    /// The HTTP server or the watch of the directory ended by itself.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), RunError> {
        let serving = http::serve(self.http.take(), self.status(), stop.clone());
        let (path, socket) = self.socket.take().unzip();
        let answering = http::serve(socket, self.status(), stop.clone());
        let local_status = self.local_status.clone();
        let mirroring = async {
            tokio::select! {
                result = self.mirror() => result,
                () = stop.cancelled() => Ok(()),
            }
        };
        let ended = tokio::select! {
            result = async {
                let served = serving.map(|done| done.map_err(RunError::Http));
                let answered = answering.map(|done| done.map_err(RunError::Http));
                tokio::try_join!(served, answered, mirroring)
            } => {
                result.map(drop)
            }
            () = log_connection(local_status) => Ok(()),
        };
        if let Some(path) = path {
            // It may be gone already.
            let _ = std::fs::remove_file(path);
        }
        ended
    }

    async fn mirror(&mut self) -> Result<(), RunError> {
        let mut roster = Roster::default();
        let mut tasks = Tasks {
            mesh: self.mesh.clone(),
            policy: self.policy.clone(),
            local: self.local.clone(),
            removal: self.removal,
            status: self.status(),
            running: BTreeMap::new(),
            removals: FuturesUnordered::new(),
        };
        for change in std::mem::take(&mut self.initial) {
            tasks.take(obey(&mut roster, change)).await;
        }
        let mut found = leftovers(self.local.clone()).boxed().fuse();
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let step = tokio::select! {
                change = self.changes.recv() => obey(&mut roster, change.ok_or(RunError::DirectoryEnded)?),
                Some(name) = tasks.removals.next() => {
                    tracing::info!(cluster = %name, "removed what was mirrored of a cluster");
                    roster.cleared(&name)
                }
                Ok(()) = self.policy.changed() => {
                    tasks.obey_policy().await;
                    None
                }
                names = &mut found => {
                    for name in names.into_iter().filter(|name| *name != self.own) {
                        tasks.take(roster.found(name)).await;
                    }
                    None
                }
                _ = looks.tick(), if self.status.took().is_none() => {
                    self.status.look(Instant::now().into_std());
                    if let Some(took) = self.status.took() {
                        tracing::info!(?took, "ready: what agents may read is mirrored");
                    }
                    None
                }
            };
            tasks.take(step).await;
            self.status.set_removing(roster.removing());
        }
    }
}

fn obey(roster: &mut Roster, change: ConfigChange) -> Option<Step> {
    match change {
        ConfigChange::Set { name, path } => roster.configured(name, path),
        ConfigChange::Removed { name } => roster.removed(name),
    }
}

/// Clusters that an earlier run has mirrored, as soon as the local etcd answers.
async fn leftovers(local: Connection) -> BTreeSet<ClusterName> {
    loop {
        match removal::mirrored(&local).await {
            Ok(names) => return names,
            Err(error @ SessionError::PermissionDenied { .. }) => {
                tracing::warn!(%error, "cannot look for clusters that are configured no more");
                return pending().await;
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// What runs for clusters.
struct Tasks {
    mesh: Mesh,
    policy: watch::Receiver<CurrentPolicy>,
    local: Connection,
    /// The grace of a removal; none: what was mirrored is left to its leases.
    removal: Option<Duration>,
    status: Arc<Status>,
    running: BTreeMap<ClusterName, Running>,
    removals: FuturesUnordered<BoxFuture<'static, ClusterName>>,
}

struct Running {
    path: PathBuf,
    rules: Arc<Rules>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Tasks {
    async fn take(&mut self, step: Option<Step>) {
        match step {
            Some(Step::Mirror(name, path)) => {
                self.stop(&name).await;
                tracing::info!(cluster = %name, "mirroring a cluster");
                let status = self.status.add(&name);
                let rules = self.policy.borrow().file.rules_for(&name);
                let remote =
                    Remote::new(name.clone(), self.mesh.clone(), rules.clone(), self.local.clone(), status);
                let stop = CancellationToken::new();
                let task = tokio::spawn(remote.run(path.clone(), stop.clone()));
                self.running.insert(name, Running { path, rules, stop, task });
            }
            Some(Step::Remove(name)) => {
                self.stop(&name).await;
                self.status.remove(&name);
                let Some(grace) = self.removal else {
                    tracing::info!(cluster = %name, "a cluster is configured no more; what was mirrored expires with its leases");
                    self.removals.push(async { name }.boxed());
                    return;
                };
                tracing::info!(cluster = %name, ?grace, "a cluster is configured no more; removing what was mirrored");
                let local = self.local.clone();
                self.removals.push(
                    async move {
                        removal::remove(&local, &name, grace).await;
                        name
                    }
                    .boxed(),
                );
            }
            None => {}
        }
    }

    /// Begins anew with the clusters whose rules have changed: what stands in the local etcd and what the
    /// clusters have is judged by the new ones.
    async fn obey_policy(&mut self) {
        let file = self.policy.borrow().file.clone();
        let changed = |(name, running): (&ClusterName, &Running)| {
            (file.rules_for(name) != running.rules).then(|| (name.clone(), running.path.clone()))
        };
        let changed: Vec<_> = self.running.iter().filter_map(changed).collect();
        for (name, path) in changed {
            tracing::info!(cluster = %name, "the import policy changed");
            self.take(Some(Step::Mirror(name, path))).await;
        }
    }

    /// Ends a task; the local etcd stays as it is.
    async fn stop(&mut self, name: &ClusterName) {
        if let Some(running) = self.running.remove(name) {
            running.stop.cancel();
            // It only fails if the task panicked, which has been reported.
            let _ended = running.task.await;
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.running.values().for_each(|running| running.stop.cancel());
    }
}

/// What the operator has to put right before a start makes sense.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Flags.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// No local etcd.
    #[error(
        "name the configuration of the local etcd: --etcd-config FILE, or --kvstore-opt etcd.config=FILE"
    )]
    NoEtcd,
    /// The configuration of the local etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdConfigError),
    /// What remote clusters may say.
    #[error(transparent)]
    Policy(#[from] PolicyFileError),
    /// The directory of remote clusters.
    #[error(transparent)]
    ConfigDir(#[from] ConfigDirError),
    /// Somebody else has the address, or it is not one of this host.
    #[error("cannot listen on {addr}: {error}")]
    Listen {
        /// `--http-addr`.
        addr: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The command line's socket cannot be made.
    #[error("cannot listen on {path}: {error}; correct --status-socket")]
    Socket {
        /// `--status-socket`.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl StartError {
    /// Whether flags or files are wrong, rather than the state of the host.
    pub fn is_usage(&self) -> bool {
        !matches!(
            self,
            Self::Listen { .. } | Self::Socket { .. } | Self::ConfigDir(ConfigDirError::Watch { .. })
        )
    }
}

/// Why a mirror ended that nobody stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A bug: it does not end by itself.
    #[error("the watch of the config directory has ended by itself")]
    DirectoryEnded,
    /// The HTTP server.
    #[error("the HTTP server failed: {0}")]
    Http(io::Error),
}
