//! The task of one remote cluster: its etcd in, a publisher to the local etcd out.

use std::future::pending;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::digest::Ticket;
use clustermesh_kvstore::etcd::{KeyRange, SessionError};
use clustermesh_kvstore::import_policy::Rules;
use clustermesh_kvstore::key::{Kind, Layout, canary_key, cluster_config_key, data_prefix};
use clustermesh_kvstore::publisher::{Origin, OwnedPrefix, Publisher, PublisherSpec};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions, ReflectorEvent, ReflectorSpec};
use futures::{Stream, StreamExt as _};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::StreamMap;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::mirror::{Effect, KINDS, Mesh, Mirror};
use super::removal;
use super::status::RemoteStatus;

/// Keys in one reply when the local etcd is read.
const PAGE: i64 = 256;

/// Events that are taken in at once: etcd tells a list by pages, and changes by transactions.
const TURN: usize = 256;

type Events = Pin<Box<dyn Stream<Item = ReflectorEvent> + Send>>;

/// Mirrors one cluster. Dropping it changes nothing in the local etcd.
pub(super) struct Remote {
    name: ClusterName,
    mirror: Mirror,
    local: Connection,
    publisher: Publisher,
    records: StreamMap<Kind, Events>,
    digests: Option<Events>,
    /// Kinds to be summed, one after the other.
    counts: mpsc::Sender<Count>,
    counted: mpsc::Receiver<Counted>,
    counter: Option<(mpsc::Receiver<Count>, mpsc::Sender<Counted>)>,
    status: Arc<RemoteStatus>,
}

impl Remote {
    pub(super) fn new(
        name: ClusterName,
        mesh: Mesh,
        rules: Arc<Rules>,
        local: Connection,
        status: Arc<RemoteStatus>,
    ) -> Self {
        let publisher = Publisher::spawn(local.clone(), publisher_spec(&name));
        status.set_publisher(publisher.status());
        let mirror = Mirror::new(name.clone(), mesh, rules, now());
        let (counts, asked) = mpsc::channel(KINDS.len());
        let (count, counted) = mpsc::channel(KINDS.len());
        Self {
            name,
            mirror,
            local,
            publisher,
            records: StreamMap::new(),
            digests: None,
            counts,
            counted,
            counter: Some((asked, count)),
            status,
        }
    }

    /// Mirrors the etcd that `path` describes until `stop`.
    pub(super) async fn run(mut self, path: PathBuf, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.mirror(path) => {}
        }
        self.publisher.shutdown().await;
    }

    async fn mirror(&mut self, path: PathBuf) {
        // It connects while we look at what is here.
        let (source, mut connection) = Connection::spawn(path, ConnectionOptions::default());
        self.inherit().await;
        self.status.set_connection(connection.clone());
        if let Some((asked, counted)) = self.counter.take() {
            tokio::spawn(count(source.clone(), asked, counted));
        }
        let mut configs = source.reflect(ReflectorSpec::new(cluster_config_key(&self.name), None));
        let mut has_config = false;
        let (mut events, mut effects) = (Vec::new(), Vec::new());
        loop {
            let deadline = self.mirror.deadline();
            tokio::select! {
                _some = self.records.next_many(&mut events, TURN), if !self.records.is_empty() => {
                    for (kind, event) in events.drain(..) {
                        self.mirror.event(kind, event, &mut effects);
                    }
                }
                Some(event) = next(&mut self.digests) => self.mirror.stated(&event, &mut effects),
                Some(found) = self.counted.recv() => {
                    self.mirror.counted(found.kind, found.ticket, found.revision, found.sum);
                }
                event = configs.recv() => match event {
                    Some(ReflectorEvent::Upsert { value, .. }) => {
                        has_config = true;
                        match self.mirror.config(&value, &mut effects) {
                            Ok(()) => self.status.succeeded(),
                            Err(error) => self.status.failed(&self.name, error.to_string()),
                        }
                    }
                    // Its lease ran out, or its etcd was re-created: no reason to let go of what is mirrored.
                    Some(ReflectorEvent::Delete { .. }) => has_config = false,
                    Some(ReflectorEvent::Synced { .. }) if has_config => self.mirror.reached(&mut effects),
                    Some(ReflectorEvent::Synced { .. }) => self.status.failed(&self.name, format!(
                        "etcd has no config of cluster {0}: is it that cluster's etcd, and does its apiserver run with --cluster-name {0}?",
                        self.name
                    )),
                    Some(ReflectorEvent::Lost { reason }) => {
                        self.mirror.lost(now());
                        self.status.failed(&self.name, reason);
                    }
                    Some(ReflectorEvent::Progress { .. } | ReflectorEvent::Relisting) => {}
                    // Only when the runtime shuts down.
                    None => return pending().await,
                },
                Ok(()) = connection.changed() => {
                    let error = connection.borrow_and_update().failure();
                    if let Some(error) = error {
                        self.status.failed(&self.name, error);
                    }
                }
                () = until(deadline) => self.mirror.tick(now(), &mut effects),
            }
            self.carry_out(Some(&source), &mut effects);
            self.status.progress(&self.mirror);
        }
    }

    /// Without a source nothing can be followed; nothing is, before the cluster has said who it is.
    fn carry_out(&mut self, source: Option<&Connection>, effects: &mut Vec<Effect>) {
        for effect in effects.drain(..) {
            match effect {
                Effect::Follow(kind, spec) => {
                    if let Some(source) = source {
                        let events: Events = Box::pin(ReceiverStream::new(source.reflect(spec)));
                        self.records.insert(kind, events);
                    }
                }
                Effect::Leave(kind) => drop(self.records.remove(&kind)),
                Effect::FollowDigests(spec) => {
                    let follow = |source: &Connection| -> Events {
                        Box::pin(ReceiverStream::new(source.reflect(spec)))
                    };
                    self.digests = source.map(follow);
                }
                Effect::Count { kind, ticket, prefix } => {
                    // There is room for all kinds; more is asked for only after a list, and the next list
                    // makes those before void.
                    let _ = self.counts.try_send(Count { kind, ticket, prefix });
                }
                Effect::Set { key, value, origin: Some(revision) } => {
                    self.publisher.set_from(key, value.map(Into::into), Origin::Revision(revision));
                }
                Effect::Set { key, value, origin: None } => self.publisher.set(key, value.map(Into::into)),
                Effect::Stated { prefix, recent } => self.publisher.source_stated(&prefix, &recent),
                Effect::Done { prefix } => self.publisher.initial_done(&prefix),
            }
        }
    }

    /// Takes over what an earlier run left, as soon as the local etcd answers.
    async fn inherit(&mut self) {
        let mut backoff = removal::backoff();
        let mut rng = SmallRng::from_os_rng();
        loop {
            match self.read_local().await {
                Ok(()) => return,
                Err(error) => {
                    self.status.failed(&self.name, format!("cannot read the local etcd: {error}"));
                    sleep(backoff.wait(&mut rng)).await;
                }
            }
        }
    }

    async fn read_local(&mut self) -> Result<(), SessionError> {
        let session = self.local.session().await;
        let mut effects = Vec::new();
        if let Some(config) = session.get(&cluster_config_key(&self.name)).await? {
            self.mirror.inherit_config(config.value, &mut effects);
        }
        for kind in KINDS {
            // Before the records: what was complete then is complete now.
            let canary = session.get(&canary_key(kind, &self.name, Layout::Cache)).await?;
            let range = KeyRange::of(&data_prefix(kind, &self.name, Layout::Cache));
            let (mut last, mut revision) = (None, 0);
            loop {
                let page = session.list_page(&range, last.as_deref(), PAGE, revision).await?;
                revision = page.revision;
                let end = page.kvs.last().map(|kv| kv.key.clone());
                for kv in page.kvs {
                    if let Some(suffix) = range.suffix(&kv.key) {
                        self.mirror.inherit(kind, suffix, kv.value, &mut effects);
                    }
                }
                self.carry_out(None, &mut effects);
                if !page.more || end.is_none() {
                    break;
                }
                last = end;
            }
            self.mirror.inherited(kind, canary.is_some(), &mut effects);
            self.carry_out(None, &mut effects);
        }
        Ok(())
    }
}

/// A kind that is to be summed.
struct Count {
    kind: Kind,
    ticket: Ticket,
    prefix: String,
}

/// What was found.
struct Counted {
    kind: Kind,
    ticket: Ticket,
    revision: i64,
    sum: u64,
}

/// Sums what it is asked for until nobody listens any more.
async fn count(source: Connection, mut asked: mpsc::Receiver<Count>, found: mpsc::Sender<Counted>) {
    while let Some(Count { kind, ticket, prefix }) = asked.recv().await {
        let (revision, digest) = tokio::select! {
            found = source.census(&prefix) => found,
            () = found.closed() => return,
        };
        if found.send(Counted { kind, ticket, revision, sum: digest.sum }).await.is_err() {
            return;
        }
    }
}

fn publisher_spec(name: &ClusterName) -> PublisherSpec {
    let mut owned = vec![OwnedPrefix::new(cluster_config_key(name))];
    owned.extend(KINDS.map(|kind| OwnedPrefix::of_kind(kind, name, Layout::Cache)));
    // The heartbeat is the exporter's.
    PublisherSpec { owned, heartbeat: None, ..PublisherSpec::default() }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

async fn next(events: &mut Option<Events>) -> Option<ReflectorEvent> {
    match events {
        Some(events) => events.next().await,
        None => pending().await,
    }
}

async fn until(deadline: Option<std::time::Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => pending().await,
    }
}
