//! Connects both ends: events of the source in, keys for the publisher out.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterError, MaxConnectedClusters};
use clustermesh_kvstore::digest::SourceTime;
use clustermesh_kvstore::etcd::{EtcdConfig, EtcdConfigError, KeyRange, SessionError};
use clustermesh_kvstore::key::{self, Kind, Layout};
use clustermesh_kvstore::publisher::{Origin, OwnedPrefix, Publisher, PublisherSpec};
use clustermesh_kvstore::record::{ClusterConfig, IdentityRecord, Record};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions, ConnectionStatus, ReflectorEvent};
use futures::FutureExt as _;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::announcements;
use crate::args::{ExportArgs, SourceSpec};
use crate::connection_log::log_connection;
use crate::export::{Cluster, Exporter, KeyChange, Rules};
use crate::http;
use crate::identity::Allocator;
use crate::rights::users::{self, UsersError};
use crate::source::SourceEvent;
use crate::source::kubernetes::{self, ConnectError};
use crate::source::manifests::{self, WatchError};
use crate::status::Status;

/// A server whose inputs exist and whose address is its own.
pub struct Server {
    cluster: Cluster,
    max: MaxConnectedClusters,
    identity_grace: Duration,
    rules: Rules,
    source: mpsc::Receiver<SourceEvent>,
    connection: Connection,
    connection_status: watch::Receiver<ConnectionStatus>,
    users_file: Option<PathBuf>,
    http: Option<TcpListener>,
    status: Arc<Status>,
}

impl Server {
    /// Checks all that the operator said and takes hold of it. Whether etcd answers is left open: it may
    /// come later.
    ///
    /// # Errors
    /// Something that waiting does not cure.
    pub async fn start(args: &ExportArgs) -> Result<Self, StartError> {
        let cluster = args.cluster()?;
        EtcdConfig::load_with_files(&args.etcd_config)?;
        if let Some(path) = args.users_file() {
            users::read(path, &cluster.name)
                .map_err(|error| StartError::Users { path: path.into(), error })?;
        }
        let http = match args.http_addr {
            Some(addr) => {
                Some(TcpListener::bind(addr).await.map_err(|error| StartError::Listen { addr, error })?)
            }
            None => None,
        };
        let source = match &args.source {
            SourceSpec::Manifests(directory) => {
                if args.kubeconfig.is_some() {
                    return Err(StartError::Kubeconfig);
                }
                manifests::watch(directory.clone())?
            }
            SourceSpec::Kubernetes => {
                let client = kubernetes::connect(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
                kubernetes::watch(client, kubernetes::LOOK)
            }
        };
        // By path: certificates and endpoints may change while we run.
        let (connection, connection_status) =
            Connection::spawn(args.etcd_config.clone(), ConnectionOptions::default());
        Ok(Self {
            cluster,
            max: args.max_connected_clusters,
            identity_grace: args.identity_grace(),
            rules: args.rules(),
            source,
            status: Arc::new(Status::new(connection_status.clone())),
            connection,
            connection_status,
            users_file: args.users_file().map(Into::into),
            http,
        })
    }

    /// What the server knows about itself.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// Where HTTP is served.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Runs until `stop`. What was published stays, until its leases end or the next run takes it over.
    ///
    /// # Errors
    /// The source or the HTTP server ended by themselves.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), RunError> {
        let http = self.http.take();
        let serving = http::serve(http, Arc::clone(&self.status), stop.clone())
            .map(|done| done.map_err(RunError::Http));
        let connection_status = self.connection_status.clone();
        let (connection, cluster) = (self.connection.clone(), self.cluster.name.clone());
        let following_users = match self.users_file.take() {
            Some(path) => users::follow(connection, path, cluster).left_future(),
            None => std::future::pending().right_future(),
        };
        let exporting = async {
            tokio::select! {
                result = self.export() => result,
                () = stop.cancelled() => Ok(()),
            }
        };
        tokio::select! {
            result = async { tokio::try_join!(serving, exporting) } => result.map(drop),
            () = log_connection(connection_status) => Ok(()),
            () = following_users => Ok(()),
        }
    }

    async fn export(&mut self) -> Result<(), RunError> {
        let identities = self.adopt_identities().await;
        let inherited = identities.assignments().next().is_some();
        self.status.progress().identities_adopted = true;

        let publisher = Publisher::spawn(self.connection.clone(), self.publisher_spec());
        self.status.set_publisher(publisher.status());
        publisher.set(key::cluster_config_key(&self.cluster.name), Some(self.cluster_config().into()));

        let mut exporter = Exporter::new(self.cluster.clone(), identities, self.rules);
        // Before the first node: its record must not lack for a moment what it had before.
        let mut announced = announcements::follow(&self.connection, &self.cluster.name);
        for (node, value) in announcements::listed(&mut announced).await {
            exporter.announced(&node, Some(&value), Instant::now());
        }
        let mut sweep = tokio::time::interval(announcements::SWEEP);
        let mut ticks = tokio::time::interval(self.identity_grace.clamp(TICK_MIN, TICK_MAX));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let changes = tokio::select! {
                event = self.source.recv() => self.take(event.ok_or(RunError::SourceEnded)?, &mut exporter),
                Some(event) = announced.recv() => announce(event, &mut exporter),
                _ = ticks.tick() => exporter.tick(Instant::now()),
                _ = sweep.tick(), if self.status.progress().state_complete => {
                    let orphans = exporter.orphaned_announcements(Instant::now());
                    announcements::remove(&self.connection, &self.cluster.name, orphans);
                    continue;
                }
            };
            // What was there before us did not happen now.
            let origin = self.status.progress().state_complete.then(|| Origin::Event(SourceTime::now()));
            publish(&publisher, changes, origin);
            self.report(&mut exporter);
            self.complete(&publisher, inherited);
        }
    }

    fn take(&self, event: SourceEvent, exporter: &mut Exporter) -> Vec<KeyChange> {
        match event {
            SourceEvent::Changes(changes) => {
                self.status.progress().changes += changes.len() as u64;
                return exporter.apply(changes, Instant::now());
            }
            SourceEvent::Synced => self.status.progress().source_synced = true,
            SourceEvent::Trouble(trouble) => self.status.progress().source_trouble = trouble,
            SourceEvent::Broken(broken) => self.status.progress().broken_inputs = broken,
        }
        Vec::new()
    }

    fn report(&self, exporter: &mut Exporter) {
        let problems = exporter.take_problems();
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        let mut progress = self.status.progress();
        progress.problems += problems.len() as u64;
        progress.count(exporter);
    }

    /// Tells the publisher, once, that the desired state is complete, so that it may delete what else it
    /// finds and write the canaries.
    ///
    /// Of a file that is broken at the start no good state is known; but if an earlier run has published,
    /// its keys still show it. They stay until the file is mended.
    fn complete(&self, publisher: &Publisher, inherited: bool) {
        let mut progress = self.status.progress();
        if progress.state_complete || !progress.source_synced || (inherited && progress.broken_inputs > 0) {
            return;
        }
        progress.state_complete = true;
        for prefix in self.publisher_spec().owned {
            publisher.initial_done(&prefix.prefix);
        }
    }

    fn publisher_spec(&self) -> PublisherSpec {
        let mut owned: Vec<OwnedPrefix> =
            Kind::ALL.map(|kind| OwnedPrefix::of_kind(kind, &self.cluster.name, Layout::State)).into();
        owned.push(OwnedPrefix::new(key::cluster_config_key(&self.cluster.name)));
        PublisherSpec { owned, ..PublisherSpec::default() }
    }

    fn cluster_config(&self) -> Vec<u8> {
        let config = ClusterConfig {
            id: self.cluster.id.get().into(),
            synced_canaries: true,
            cached: false,
            max_connected_clusters: Some(self.max.get().into()),
            service_exports_enabled: Some(false),
        };
        config.encode()
    }

    /// The assignments that etcd holds, as soon as it answers.
    async fn adopt_identities(&self) -> Allocator {
        let mut complaints = BTreeSet::new();
        loop {
            match self.read_identities().await {
                Ok(allocator) => return allocator,
                Err(error) => {
                    let error = error.to_string();
                    if complaints.insert(error.clone()) {
                        tracing::warn!("cannot read the identities that etcd holds, trying again: {error}");
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn read_identities(&self) -> Result<Allocator, SessionError> {
        let mut allocator = Allocator::new(self.cluster.id, self.max, self.identity_grace);
        for kind in [Kind::Identities, Kind::LocalIdentities] {
            self.read_identities_of(kind, &mut allocator).await?;
        }
        Ok(allocator)
    }

    async fn read_identities_of(&self, kind: Kind, allocator: &mut Allocator) -> Result<(), SessionError> {
        let range = KeyRange::of(&key::data_prefix(kind, &self.cluster.name, Layout::State));
        let session = self.connection.session().await;
        let mut last: Option<Vec<u8>> = None;
        let mut revision = 0;
        let now = Instant::now();
        loop {
            let page = session.list_page(&range, last.as_deref(), PAGE, revision).await?;
            revision = page.revision;
            for kv in &page.kvs {
                let Some(suffix) = range.suffix(&kv.key) else { continue };
                match IdentityRecord::decode(suffix, &kv.value) {
                    Ok(record) => {
                        if let Err(error) = allocator.adopt_record(&record, &self.cluster.name, now) {
                            tracing::warn!("dropping what etcd holds: {error}");
                        }
                    }
                    Err(error) => tracing::warn!("dropping identity {suffix:?} that etcd holds: {error}"),
                }
            }
            last = page.kvs.last().map(|kv| kv.key.clone());
            if !page.more || last.is_none() {
                return Ok(());
            }
        }
    }
}

/// How often time passes for the exporter: unused identities are freed, doubts are settled.
const TICK_MIN: Duration = Duration::from_millis(100);
const TICK_MAX: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(1);
const PAGE: i64 = 1000;

fn announce(event: ReflectorEvent, exporter: &mut Exporter) -> Vec<KeyChange> {
    let now = Instant::now();
    match event {
        ReflectorEvent::Upsert { suffix, value, .. } => exporter.announced(&suffix, Some(&value), now),
        ReflectorEvent::Delete { suffix, .. } => exporter.announced(&suffix, None, now),
        // What a new list lacks stays: an etcd that came back empty is told again by the agents.
        _ => Vec::new(),
    }
}

fn publish(publisher: &Publisher, changes: Vec<KeyChange>, origin: Option<Origin>) {
    for KeyChange { key, value } in changes {
        match origin {
            Some(origin) => publisher.set_from(key, value, origin),
            None => publisher.set(key, value),
        }
    }
}

/// What the operator has to put right before a start makes sense.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Flags.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The etcd configuration.
    #[error(transparent)]
    Etcd(#[from] EtcdConfigError),
    /// The users file.
    #[error("users file {}: {error}", path.display())]
    Users {
        /// `--cluster-users-config-path`.
        path: PathBuf,
        /// What is wrong with it.
        error: UsersError,
    },
    /// The directory of manifests.
    #[error(transparent)]
    Manifests(#[from] WatchError),
    /// The way to the API server.
    #[error(transparent)]
    Kubernetes(#[from] ConnectError),
    /// Flags that do not belong together.
    #[error("--kubeconfig is for --source kubernetes")]
    Kubeconfig,
    /// Somebody else has the address, or it is not one of this host.
    #[error("cannot listen on {addr}: {error}")]
    Listen {
        /// `--http-addr`.
        addr: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
}

impl StartError {
    /// Whether flags or files are wrong, rather than the state of the host.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Listen { .. })
    }
}

/// Why a server ended that nobody stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A bug: sources do not end.
    #[error("the source has ended by itself")]
    SourceEnded,
    /// The HTTP server.
    #[error("the HTTP server failed: {0}")]
    Http(io::Error),
}
