//! The task of one cluster: does what its [`Core`] decides.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::EtcdSource;
use clustermesh_kvstore::import_policy::CurrentPolicy;
use clustermesh_kvstore::key::{Kind, Layout};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions, ConnectionStatus, ReflectorEvent};
use futures::stream::SelectAll;
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::core::{Core, Effect};
use super::ids::{self, Ids};
use super::{OwnCluster, PeerState, PeerView};
use crate::engine::Input;

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
    name: ClusterName,
    core: Core,
    connection: Connection,
    status: watch::Receiver<ConnectionStatus>,
    state: watch::Sender<PeerState>,
    ids: Arc<Mutex<Ids>>,
    policy: watch::Receiver<CurrentPolicy>,
    engine: mpsc::Sender<Input>,
    stop: CancellationToken,
    records: SelectAll<ReflectedKind>,
}

impl Follower {
    pub(super) fn new(
        own: OwnCluster,
        name: ClusterName,
        etcd: EtcdSource,
        ids: Arc<Mutex<Ids>>,
        policy: watch::Receiver<CurrentPolicy>,
        engine: mpsc::Sender<Input>,
        stop: CancellationToken,
    ) -> (Self, PeerView) {
        let (connection, status) = Connection::spawn(etcd, ConnectionOptions::default());
        let (state, view) = watch::channel(PeerState { id: None, cached: false, last_error: None });
        let view = PeerView { state: view, connection: status.clone() };
        let core = Core::new(own, name.clone());
        let records = SelectAll::new();
        (Self { name, core, connection, status, state, ids, policy, engine, stop, records }, view)
    }

    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        let mut configs = self.connection.reflect(self.core.config_spec());
        // Before anything is let in.
        self.take_policy().await;
        loop {
            let deadline = self.core.deadline();
            let deadline = async {
                match deadline {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let mut effects = Vec::new();
            tokio::select! {
                Some((kind, event)) = self.records.next(), if !self.records.is_empty() => {
                    self.core.record(now(), kind, event, &mut effects);
                }
                config = configs.recv() => match config {
                    Some(event) => self.core.config(now(), event, &mut ids::lock(&self.ids), &mut effects),
                    None => return,
                },
                Ok(()) = self.status.changed() => {
                    let error = self.status.borrow_and_update().failure();
                    effects.extend(error.map(Effect::Error));
                }
                Ok(()) = self.policy.changed() => self.take_policy().await,
                () = deadline => self.core.tick(now(), &mut ids::lock(&self.ids), &mut effects),
            }
            for effect in effects {
                self.perform(effect).await;
            }
        }
    }

    async fn take_policy(&mut self) {
        let rules = self.policy.borrow_and_update().file.rules_for(&self.name);
        let mut effects = Vec::new();
        self.core.policy(rules, &mut effects);
        for effect in effects {
            self.perform(effect).await;
        }
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            // Fails only when the engine has ended, and the agent with it.
            Effect::Tell(input) => drop(self.engine.send(input).await),
            Effect::Follow(kind, spec) => {
                let events = self.connection.reflect(spec);
                self.records.push(ReflectedKind { kind, events });
            }
            Effect::Unfollow => self.records.clear(),
            Effect::Accepted(accepted) => self.state.send_modify(|state| {
                state.id = Some(accepted.id);
                // What went wrong on the way here was not a failure of something that worked.
                state.last_error = None;
                state.cached = accepted.layout == Layout::Cache;
            }),
            Effect::Dropped => self.state.send_modify(|state| state.id = None),
            Effect::Error(error) => self.note_error(error),
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
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}
