//! The task of one cluster: does what its [`Core`] decides.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::digest::Ticket;
use clustermesh_kvstore::etcd::EtcdSource;
use clustermesh_kvstore::import_policy::CurrentPolicy;
use clustermesh_kvstore::key::{HEARTBEAT, Kind, Layout};
use clustermesh_kvstore::reflector::{
    Connection, ConnectionOptions, ConnectionStatus, ReflectorEvent, ReflectorSpec,
};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use futures::stream::{AbortHandle, Abortable, SelectAll, abortable};
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::core::{Core, Effect};
use super::ids::{self, Ids};
use super::{OwnCluster, PeerState, PeerView, Wish, with_virtual_cidrs};
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
    virtual_cidrs: VirtualCidrs,
    engine: mpsc::Sender<Input>,
    stop: CancellationToken,
    /// Kinds whose list is complete, and whose connection was not lost since.
    listed: BTreeSet<Kind>,
    records: SelectAll<Abortable<ReflectedKind>>,
    /// Ends the present reflector of each kind.
    running: BTreeMap<Kind, AbortHandle>,
    digests: SelectAll<ReceiverStream<ReflectorEvent>>,
    wishes: mpsc::Receiver<(Kind, Wish)>,
    /// Kinds to be summed, one after the other.
    counts: mpsc::Sender<Count>,
}

/// A kind that is to be summed.
struct Count {
    kind: Kind,
    ticket: Ticket,
    prefix: String,
}

impl Follower {
    pub(super) fn new(
        own: OwnCluster,
        name: ClusterName,
        etcd: EtcdSource,
        ids: Arc<Mutex<Ids>>,
        (policy, virtual_cidrs): (watch::Receiver<CurrentPolicy>, VirtualCidrs),
        engine: mpsc::Sender<Input>,
        stop: CancellationToken,
    ) -> (Self, PeerView) {
        let (connection, status) = Connection::spawn(etcd, ConnectionOptions::default());
        let (state, view) = watch::channel(PeerState::default());
        let (wish, wishes) = mpsc::channel(2 * Kind::ALL.len());
        let view = PeerView {
            state: view,
            virtual_cidrs: virtual_cidrs.clone(),
            etcd: connection.clone(),
            connection: status.clone(),
            wishes: wish,
        };
        let (counts, counted) = mpsc::channel(Kind::ALL.len());
        let counter = count(name.clone(), connection.clone(), counted, engine.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(counter));
        let core = Core::new(own, name.clone());
        let follower = Self {
            name,
            core,
            connection,
            status,
            state,
            ids,
            policy,
            virtual_cidrs,
            engine,
            stop,
            records: SelectAll::new(),
            listed: BTreeSet::new(),
            running: BTreeMap::new(),
            digests: SelectAll::new(),
            wishes,
            counts,
        };
        (follower, view)
    }

    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        let mut configs = self.connection.reflect(self.core.config_spec());
        let mut heartbeat = self.connection.reflect(ReflectorSpec::new(HEARTBEAT, None));
        let mut last_beat = None;
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
                    self.note_change(kind, &event);
                    self.core.record(now(), kind, event, &mut effects);
                }
                Some(event) = self.digests.next(), if !self.digests.is_empty() => {
                    effects.push(Effect::Tell(Input::Digest { name: self.name.clone(), event }));
                }
                Some((kind, wish)) = self.wishes.recv() => match wish {
                    Wish::Relist => self.core.relist(kind, &mut effects),
                    Wish::Census(ticket) => self.core.count(kind, ticket, &mut effects),
                },
                config = configs.recv() => match config {
                    Some(event) => self.core.config(now(), event, &mut ids::lock(&self.ids), &mut effects),
                    None => return,
                },
                Some(event) = heartbeat.recv() => {
                    // Its value is their clock; that it changes is all that counts. A list tells it again.
                    if let ReflectorEvent::Upsert { value, .. } = event
                        && last_beat.as_ref() != Some(&value)
                    {
                        last_beat = Some(value);
                        self.note(|state| state.heartbeat = Some(Instant::now()));
                    }
                }
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
        let rules = with_virtual_cidrs(rules, &self.virtual_cidrs);
        let mut effects = Vec::new();
        self.core.policy(rules, &mut effects);
        for effect in effects {
            self.perform(effect).await;
        }
    }

    /// What changes in a mirror was changed by the cluster a moment ago; what is listed may be old.
    fn note_change(&mut self, kind: Kind, event: &ReflectorEvent) {
        match event {
            ReflectorEvent::Synced { .. } => drop(self.listed.insert(kind)),
            ReflectorEvent::Lost { .. } | ReflectorEvent::Relisting => drop(self.listed.remove(&kind)),
            ReflectorEvent::Upsert { .. } | ReflectorEvent::Delete { .. } => {
                if self.listed.contains(&kind) && self.state.borrow().cached {
                    self.note(|state| state.last_change = Some(Instant::now()));
                }
            }
            ReflectorEvent::Progress { .. } => {}
        }
    }

    /// Without waking anybody: those who want to know look now and then.
    fn note(&self, note: impl FnOnce(&mut PeerState)) {
        self.state.send_if_modified(|state| {
            note(state);
            false
        });
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            // Fails only when the engine has ended, and the agent with it.
            Effect::Tell(input) => drop(self.engine.send(input).await),
            Effect::Follow(kind, spec) => {
                let events = self.connection.reflect(spec);
                let (events, handle) = abortable(ReflectedKind { kind, events });
                self.records.push(events);
                if let Some(before) = self.running.insert(kind, handle) {
                    before.abort();
                }
            }
            Effect::Count { kind, ticket, prefix } => {
                // There is room for all kinds; more is asked for only after a list, and the next list
                // makes those before void.
                let _ = self.counts.try_send(Count { kind, ticket, prefix });
            }
            Effect::Unfollow => {
                self.records.clear();
                self.running.clear();
                self.listed.clear();
            }
            Effect::GiveUp(id) => ids::lock(&self.ids).give_up(&self.name, id),
            Effect::Accepted(accepted) => {
                self.digests.clear();
                for spec in self.core.digest_specs(accepted) {
                    self.digests.push(ReceiverStream::new(self.connection.reflect(spec)));
                }
                self.state.send_modify(|state| {
                    state.id = Some(accepted.id);
                    // What went wrong on the way here was not a failure of something that worked.
                    state.last_error = None;
                    state.cached = accepted.layout == Layout::Cache;
                });
            }
            Effect::Dropped => {
                self.digests.clear();
                self.state.send_modify(|state| state.id = None);
            }
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

/// Sums what it is asked for until nobody asks any more.
async fn count(
    name: ClusterName,
    etcd: Connection,
    mut asked: mpsc::Receiver<Count>,
    engine: mpsc::Sender<Input>,
) {
    while let Some(Count { kind, ticket, prefix }) = asked.recv().await {
        let (revision, digest) = etcd.census(&prefix).await;
        let counted = Input::Counted { name: name.clone(), kind, ticket, revision, sum: digest.sum };
        if engine.send(counted).await.is_err() {
            return;
        }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}
