//! The task of one cluster.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use clustermesh_kvstore::accept::{Accepted, ConfigError};
use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::EtcdSource;
use clustermesh_kvstore::key::{Kind, cluster_config_key};
use clustermesh_kvstore::reflector::{
    Connection, ConnectionOptions, ConnectionStatus, ReflectorEvent, ReflectorSpec,
};
use futures::stream::SelectAll;
use futures::{FutureExt as _, Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ids::{self, Ids};
use super::{OwnCluster, PeerState, PeerView};
use crate::engine::Input;

/// An ID that another cluster holds may become free at any time.
const RETRY: Duration = Duration::from_secs(1);

/// Kinds that an agent reads of its own cluster.
pub(crate) const OWN_KINDS: [Kind; 4] = [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::LocalServices];
/// Kinds that it reads of others.
pub(crate) const REMOTE_KINDS: [Kind; 4] = [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::Services];

/// Where backends are and who they are. A cluster's services are followed only after these: a backend
/// that is chosen before the way to it is known makes calls fail.
const BEFORE_SERVICES: [Kind; 2] = [Kind::Nodes, Kind::Ip];

/// And this much later: two clusters that are being connected learn of each other at about the same time.
/// Calls that one of them sends before the other knows its nodes are dropped there as an unknown
/// sender's, and TCP tries again only after a second.
const MUTUAL: Duration = Duration::from_millis(300);

fn is_service(kind: Kind) -> bool {
    matches!(kind, Kind::Services | Kind::LocalServices)
}

/// Events of one kind's reflector.
struct ReflectedKind {
    kind: Kind,
    events: mpsc::Receiver<ReflectorEvent>,
}

impl Stream for ReflectedKind {
    type Item = (Kind, ReflectorEvent);
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let kind = self.kind;
        self.events.poll_recv(cx).map(|event| event.map(|event| (kind, event)))
    }
}

pub(super) struct Follower {
    own: OwnCluster,
    name: ClusterName,
    connection: Connection,
    status: watch::Receiver<ConnectionStatus>,
    state: watch::Sender<PeerState>,
    ids: Arc<Mutex<Ids>>,
    engine: mpsc::Sender<Input>,
    stop: CancellationToken,
    accepted: Option<Accepted>,
    /// The config as last seen, if it could not be accepted.
    refused: Option<Vec<u8>>,
    records: SelectAll<ReflectedKind>,
    /// Of [`BEFORE_SERVICES`], those whose first list is not complete.
    awaited: Vec<Kind>,
    /// When the services of a remote cluster may be followed.
    services_at: Option<Instant>,
}

impl Follower {
    pub(super) fn new(
        own: OwnCluster,
        name: ClusterName,
        etcd: EtcdSource,
        ids: Arc<Mutex<Ids>>,
        engine: mpsc::Sender<Input>,
        stop: CancellationToken,
    ) -> (Self, PeerView) {
        let (connection, status) = Connection::spawn(etcd, ConnectionOptions::default());
        let (state, view) = watch::channel(PeerState { id: None, cached: false, last_error: None });
        let view = PeerView { state: view, connection: status.clone() };
        let follower = Self {
            own,
            name,
            connection,
            status,
            state,
            ids,
            engine,
            stop,
            accepted: None,
            refused: None,
            records: SelectAll::new(),
            awaited: Vec::new(),
            services_at: None,
        };
        (follower, view)
    }

    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        // Watched for good: a cluster that changes its ID or layout is noticed at once.
        let mut configs = self.connection.reflect(ReflectorSpec::new(cluster_config_key(&self.name), None));
        let mut has_config = false;
        loop {
            let retry = match self.refused {
                Some(_) => sleep(RETRY).left_future(),
                None => std::future::pending().right_future(),
            };
            let services = match self.services_at {
                Some(at) => sleep_until(at).left_future(),
                None => std::future::pending().right_future(),
            };
            tokio::select! {
                Some((kind, event)) = self.records.next(), if !self.records.is_empty() => {
                    let is_complete = matches!(event, ReflectorEvent::Synced { .. });
                    // The engine gets it first: what it gets of services comes after.
                    self.tell(Input::Record { name: self.name.clone(), kind, event }).await;
                    if is_complete {
                        self.note_complete(kind);
                    }
                }
                config = configs.recv() => match config {
                    Some(ReflectorEvent::Upsert { value, .. }) => {
                        has_config = true;
                        self.consider(value).await;
                    }
                    // Its lease ran out, or its etcd was re-created: no reason to let go of its state.
                    Some(ReflectorEvent::Delete { .. }) => has_config = false,
                    Some(ReflectorEvent::Synced { .. }) if !has_config => self.note_error(format!(
                        "etcd has no config of cluster {0}: is it that cluster's etcd, and does its apiserver run with --cluster-name {0}?",
                        self.name
                    )),
                    Some(ReflectorEvent::Lost { reason }) => self.note_error(reason),
                    Some(_) => {}
                    None => return,
                },
                Ok(()) = self.status.changed() => {
                    let error = self.status.borrow_and_update().failure();
                    if let Some(error) = error {
                        self.note_error(error);
                    }
                }
                () = services => {
                    self.services_at = None;
                    if let Some(accepted) = self.accepted {
                        self.follow_kinds(accepted, is_service);
                    }
                }
                () = retry => {
                    if let Some(value) = self.refused.take() {
                        self.consider(value).await;
                    }
                }
            }
        }
    }

    /// Looks at a cluster config, new or refused before.
    async fn consider(&mut self, value: Vec<u8>) {
        let accepted = match Accepted::check(&self.name, &value, self.own.max) {
            Ok(accepted) => accepted,
            // Nobody can tell what it means; what was accepted before still holds.
            Err(error @ ConfigError::Unreadable { .. }) => return self.note_error(error.to_string()),
            Err(error) => return self.refuse(value, error.to_string()).await,
        };
        if self.accepted == Some(accepted) {
            self.refused = None;
            return;
        }
        if self.accepted.is_some_and(|before| before.id != accepted.id) {
            warn!(cluster = %self.name, id = %accepted.id, "the cluster has another ID; draining it first");
            self.drain().await;
        }
        let reserved = ids::lock(&self.ids).reserve(&self.name, accepted.id);
        if let Err(error) = reserved {
            return self.refuse(value, error.to_string()).await;
        }
        info!(cluster = %self.name, id = %accepted.id, layout = ?accepted.layout, "cluster config accepted");
        self.refused = None;
        self.accepted = Some(accepted);
        self.state.send_modify(|state| {
            state.id = Some(accepted.id);
            // What went wrong on the way here was not a failure of something that worked.
            state.last_error = None;
            state.cached = accepted.layout == clustermesh_kvstore::key::Layout::Cache;
        });
        self.follow_records(accepted).await;
    }

    /// Starts a reflector for each kind but services, in place of those that ran before.
    async fn follow_records(&mut self, accepted: Accepted) {
        self.records.clear();
        self.awaited = BEFORE_SERVICES.to_vec();
        self.services_at = None;
        self.tell(Input::Accepted { name: self.name.clone(), id: accepted.id }).await;
        self.follow_kinds(accepted, |kind| !is_service(kind));
    }

    /// The list of a kind is complete; after the last one that services wait for, they follow.
    fn note_complete(&mut self, kind: Kind) {
        if let Some(at) = self.awaited.iter().position(|awaited| *awaited == kind) {
            self.awaited.swap_remove(at);
            if self.awaited.is_empty() {
                let wait = if self.name == self.own.name { Duration::ZERO } else { MUTUAL };
                self.services_at = Some(Instant::now() + wait);
            }
        }
    }

    fn follow_kinds(&mut self, accepted: Accepted, wanted: fn(Kind) -> bool) {
        let kinds = if self.name == self.own.name { OWN_KINDS } else { REMOTE_KINDS };
        for kind in kinds.into_iter().filter(|kind| wanted(*kind)) {
            let events = self.connection.reflect(accepted.reflector(kind, &self.name));
            self.records.push(ReflectedKind { kind, events });
        }
    }

    async fn refuse(&mut self, value: Vec<u8>, error: String) {
        self.note_error(error);
        self.drain().await;
        self.refused = Some(value);
    }

    /// Lets go of everything that was accepted. The own cluster has nothing that could take its place:
    /// its state stays until it is right again.
    async fn drain(&mut self) {
        self.records.clear();
        self.services_at = None;
        if self.accepted.take().is_some() && self.name != self.own.name {
            self.state.send_modify(|state| state.id = None);
            self.tell(Input::Drained(self.name.clone())).await;
        }
    }

    fn note_error(&self, error: String) {
        self.state.send_modify(|state| {
            let news = state.last_error.as_ref().is_none_or(|(before, _)| *before != error);
            if news {
                warn!(cluster = %self.name, %error, "cluster is not followed");
            }
            state.last_error = Some((error, Instant::now()));
        });
    }

    async fn tell(&self, input: Input) {
        // Fails only when the engine has ended, and the agent with it.
        let _ = self.engine.send(input).await;
    }
}
