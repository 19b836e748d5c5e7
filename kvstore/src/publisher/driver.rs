//! Does what the core decides: reflectors of its streams in, transactions and leases out.

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream::{FuturesUnordered, SelectAll, StreamExt as _};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{Core, Effect, Observed, Op, Origin, PublisherSpec, PublisherStatus};
use crate::digest::{MAX_RECENT, Timed};
use crate::etcd::{Session, SessionError, WriteOp};
use crate::reflector::core::Change;
use crate::reflector::{Connection, LiveSession, ReflectorSpec};

/// Changes in etcd, mostly echoes of our own, that are taken in before it is looked what is to be done.
const TURN: usize = 256;

/// Publishes desired values; see the module. Dropping it stops it; the keys stay until their leases end.
#[derive(Debug)]
pub struct Publisher {
    inbox: Arc<Inbox>,
    status: watch::Receiver<PublisherStatus>,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

/// What was asked for since the task looked last. Bounded by the number of keys: the last value counts.
#[derive(Debug, Default)]
struct Inbox {
    wishes: Mutex<Wishes>,
    news: Notify,
}

/// What a key is to be, and why.
type Wish = (Option<Arc<[u8]>>, Option<Origin>);

#[derive(Debug, Default)]
struct Wishes {
    values: BTreeMap<String, Wish>,
    /// By prefix: what the etcds that are mirrored have stated.
    source: BTreeMap<String, Vec<Timed>>,
    /// Prefixes that are complete; they count after the values.
    done: Vec<String>,
    waiters: Vec<oneshot::Sender<()>>,
}

impl Publisher {
    /// Starts publishing over `connection`.
    pub fn spawn(connection: Connection, spec: PublisherSpec) -> Self {
        let inbox = Arc::new(Inbox::default());
        let (publish, status) = watch::channel(PublisherStatus::default());
        let stop = CancellationToken::new();
        let task = run(connection, spec, inbox.clone(), publish, stop.clone());
        Self { inbox, status, stop, task: Some(tokio::spawn(task)) }
    }

    /// Sets the desired value of a key, which is shared, not copied; `None`: it is to be gone. A key under none of the owned
    /// prefixes is the caller's mistake; it is logged.
    pub fn set(&self, key: String, value: Option<Arc<[u8]>>) {
        self.inbox.lock().values.insert(key, (value, None));
        self.inbox.news.notify_one();
    }

    /// [`Self::set`], because of `origin`: if the key's prefix has a digest, readers learn from it how long
    /// the change took.
    pub fn set_from(&self, key: String, value: Option<Arc<[u8]>>, origin: Origin) {
        self.inbox.lock().values.insert(key, (value, Some(origin)));
        self.inbox.news.notify_one();
    }

    /// What the etcd that the owned `prefix` mirrors states (in [`crate::digest::DigestRecord::recent`]) of
    /// the times of its newest revisions: they become those of the changes that had such a revision as
    /// [`Origin`].
    pub fn source_stated(&self, prefix: &str, recent: &[Timed]) {
        let mut inbox = self.inbox.lock();
        let known = inbox.source.entry(prefix.to_owned()).or_default();
        known.extend(recent);
        known.drain(..known.len().saturating_sub(2 * MAX_RECENT));
        drop(inbox);
        self.inbox.news.notify_one();
    }

    /// All of an owned prefix has been set: other keys under it may be deleted, and once all is written,
    /// its canary.
    pub fn initial_done(&self, prefix: &str) {
        self.inbox.lock().done.push(prefix.to_owned());
        self.inbox.news.notify_one();
    }

    /// How it is going.
    pub fn status(&self) -> watch::Receiver<PublisherStatus> {
        self.status.clone()
    }

    /// Waits until all owned prefixes are complete (see [`Self::initial_done`]) and etcd has all that was
    /// set before, and the canaries.
    pub async fn flushed(&self) {
        let (waiter, flushed) = oneshot::channel();
        self.inbox.lock().waiters.push(waiter);
        self.inbox.news.notify_one();
        // An error means that the task is gone, with the runtime.
        if flushed.await.is_err() {
            pending::<()>().await;
        }
    }

    /// Stops. The keys stay until their leases end.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            // A panic in there has been reported by the runtime.
            let _ended = task.await;
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Wishes> {
        // Each critical section leaves the wishes whole.
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What came of an effect.
enum Outcome {
    Txn { id: u64, result: Result<i64, SessionError> },
    Granted(Result<i64, SessionError>),
    Renewed { lease: i64, result: Result<(), SessionError> },
}

type Running = Pin<Box<dyn Future<Output = Outcome> + Send>>;
type Changes = Pin<Box<dyn tokio_stream::Stream<Item = (usize, Change)> + Send>>;

struct Driver {
    core: Core,
    session: Option<Session>,
    /// The etcd that the session is with.
    generation: u64,
    streams: Vec<Stream>,
    running: FuturesUnordered<Running>,
    lease_ttl: Duration,
}

/// What a reflector follows, and the etcd that it speaks of.
struct Stream {
    prefix: String,
    generation: u64,
}

async fn run(
    connection: Connection,
    spec: PublisherSpec,
    inbox: Arc<Inbox>,
    status: watch::Sender<PublisherStatus>,
    stop: CancellationToken,
) {
    let lease_ttl = spec.lease_ttl;
    let core = Core::new(spec);
    let streams: Vec<_> =
        core.streams().map(|prefix| Stream { prefix: prefix.to_owned(), generation: 0 }).collect();
    let mut changes: SelectAll<Changes> = SelectAll::new();
    for (index, stream) in streams.iter().enumerate() {
        let spec = ReflectorSpec::new(stream.prefix.clone(), None);
        let receiver = connection.follow(spec, move |change| Some((index, change)));
        changes.push(Box::pin(ReceiverStream::new(receiver)));
    }
    let mut changes = changes.ready_chunks(TURN);
    let mut sessions = connection.sessions();
    sessions.mark_changed();
    let running = FuturesUnordered::new();
    let mut driver = Driver { core, session: None, generation: 0, streams, running, lease_ttl };
    let mut waiters: Vec<oneshot::Sender<()>> = Vec::new();
    loop {
        let deadline = driver.deadline();
        tokio::select! {
            () = stop.cancelled() => return,
            changed = sessions.changed() => {
                if changed.is_err() {
                    return;
                }
                let live = sessions.borrow_and_update().clone();
                driver.switch(live);
            }
            () = inbox.news.notified() => {
                let mut wishes = std::mem::take(&mut *inbox.lock());
                waiters.append(&mut wishes.waiters);
                driver.wish(wishes);
            }
            Some(changes) = changes.next() => {
                changes.into_iter().for_each(|(stream, change)| driver.saw(stream, change));
            }
            Some(outcome) = driver.running.next() => {
                if let Outcome::Txn { result: Ok(revision), .. } = &outcome {
                    // What we wrote is history, too: an etcd that is back before it has lost some.
                    connection.heard().reply(Some(*revision));
                }
                driver.came_back(outcome);
            }
            () = until(deadline) => {}
        }
        driver.poll();
        if driver.core.is_flushed() {
            // Who does not wait any more does not mind.
            for waiter in waiters.drain(..) {
                let _gone = waiter.send(());
            }
        }
        status.send_if_modified(|known| driver.core.update(known));
    }
}

impl Driver {
    fn switch(&mut self, live: Option<LiveSession>) {
        let Some(LiveSession { generation, session }) = live else {
            self.session = None;
            return;
        };
        self.session = Some(session);
        self.enter(generation);
    }

    /// There is another etcd. The core hears of it at once, not when each reflector says so: until then
    /// it would write to the new etcd what the old one lacked, and canaries perhaps.
    fn enter(&mut self, generation: u64) {
        if self.generation < generation {
            self.generation = generation;
            self.core.observe(0, Observed::Etcd { generation }, now());
        }
    }

    fn wish(&mut self, wishes: Wishes) {
        for (key, (value, origin)) in wishes.values {
            if !self.core.set(&key, value, origin) {
                tracing::error!(key, "not published: it is under none of the owned prefixes");
            }
        }
        for (prefix, recent) in wishes.source {
            self.core.source_stated(&prefix, &recent);
        }
        wishes.done.iter().for_each(|prefix| self.core.initial_done(prefix));
    }

    fn saw(&mut self, index: usize, change: Change) {
        if let Change::Restarted { generation } = change {
            // A reflector may hear of a session before we do.
            self.enter(generation);
            self.streams[index].generation = generation;
        }
        let stream = &self.streams[index];
        // What a reflector had told of an earlier etcd may still have been on its way.
        if stream.generation != self.generation {
            return;
        }
        let key = |suffix: String| stream.prefix.clone() + &suffix;
        let observed = match change {
            Change::Restarted { generation } => Observed::Etcd { generation },
            Change::Put { suffix, value, revision, lease } => {
                Observed::Present { key: key(suffix), value, lease, revision }
            }
            Change::Delete { suffix, revision } => Observed::Absent { key: key(suffix), revision },
            Change::Synced { revision, listed: true } => Observed::Listed { revision },
            Change::Synced { .. } | Change::Progress { .. } | Change::Lost { .. } | Change::Relisting => {
                return;
            }
        };
        self.core.observe(index, observed, now());
    }

    fn came_back(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Txn { id, result: Ok(revision) } => self.core.txn_done(id, revision),
            Outcome::Txn { id, result: Err(error) } => {
                let lease_missing = error == SessionError::LeaseNotFound;
                let refused = matches!(error, SessionError::Refused(_));
                self.core.txn_failed(id, &error.to_string(), lease_missing, refused, now());
            }
            Outcome::Granted(Ok(lease)) => self.core.granted(lease, self.lease_ttl, now()),
            Outcome::Granted(Err(error)) => self.core.grant_failed(&error.to_string(), now()),
            Outcome::Renewed { lease, result } => match result {
                Ok(()) => self.core.lease_alive(lease, self.lease_ttl, now()),
                Err(SessionError::LeaseNotFound) => self.core.lease_gone(lease),
                Err(_) => self.core.keep_alive_failed(lease, now()),
            },
        }
    }

    /// Does what the core wants, if there is a session to do it on.
    fn poll(&mut self) {
        let Some(session) = &self.session else { return };
        for effect in self.core.poll(now(), &clock()) {
            let session = session.clone();
            self.running.push(match effect {
                Effect::Txn { id, ops } => {
                    let ops = ops.into_iter().map(WriteOp::from).collect();
                    Box::pin(async move { Outcome::Txn { id, result: session.txn(ops).await } })
                }
                Effect::Grant { ttl } => {
                    Box::pin(async move { Outcome::Granted(session.lease_grant(ttl).await) })
                }
                Effect::KeepAlive { lease } => Box::pin(async move {
                    Outcome::Renewed { lease, result: session.lease_keep_alive(lease).await }
                }),
            });
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.session.as_ref()?;
        // A heartbeat that is due but waits for something else must not make this a busy loop.
        let soon = Instant::now() + Duration::from_millis(20);
        self.core.next_deadline().map(|deadline| Instant::from_std(deadline).max(soon))
    }
}

impl From<Op> for WriteOp {
    fn from(op: Op) -> Self {
        match op {
            Op::Put { key, value, lease } => Self::Put { key: key.to_string(), value: value.to_vec(), lease },
            Op::Delete { key } => Self::Delete { key: key.to_string() },
        }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// The time as Cilium writes it: `2026-11-20T20:41:35Z`.
fn clock() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_look_like_cilium_s() {
        let now = super::clock();
        assert_eq!(now.len(), "2026-11-20T20:41:35Z".len(), "{now}");
        assert!(now.ends_with('Z') && !now.contains('.'), "{now}");
    }
}
