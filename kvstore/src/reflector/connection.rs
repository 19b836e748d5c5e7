use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::core::{Change, Timing};
use super::generation::Generations;
use super::{Backoff, ReflectorEvent, ReflectorSpec, follow};
use crate::etcd::{EtcdSource, Session, SessionError, SessionOptions};

/// Keeps one etcd connected, for any number of reflectors and a publisher. Cheap to clone; the
/// connection ends when the last handle and the last reflector are gone.
#[derive(Clone, Debug)]
pub struct Connection {
    sessions: watch::Receiver<Option<LiveSession>>,
    heard: Heard,
    timing: Timing,
    channel: usize,
}

/// What all users of a connection hear.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    status: Arc<watch::Sender<ConnectionStatus>>,
    generations: Arc<Mutex<Generations>>,
}

impl Heard {
    /// A reply came, perhaps with etcd's revision.
    pub(crate) fn reply(&self, revision: Option<i64>) {
        if let Some(revision) = revision {
            self.generations().saw(revision);
        }
        // Without waking those who wait for a change of status.
        self.status.send_if_modified(|status| {
            status.last_event = Instant::now();
            false
        });
    }

    fn generations(&self) -> MutexGuard<'_, Generations> {
        // Counters only; they are whole at all times.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session, and which of the etcds behind a connection it is with.
#[derive(Clone, Debug)]
pub(crate) struct LiveSession {
    /// Counts the etcds: the same number means the same history.
    pub(crate) generation: u64,
    /// The session.
    pub(crate) session: Session,
}

/// How a connection behaves.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionOptions {
    /// Deadlines of each session.
    pub session: SessionOptions,
    /// Times of reflectors, and the waits between attempts to connect.
    pub timing: Timing,
    /// How often an otherwise unused connection is tried.
    pub probe: Duration,
    /// Events that wait for a slow consumer before its reflector stops reading.
    pub channel: usize,
}

impl Default for ConnectionOptions {
    fn default() -> Self {
        Self {
            session: SessionOptions::default(),
            timing: Timing::default(),
            probe: Duration::from_secs(10),
            channel: 256,
        }
    }
}

/// How a connection is.
#[derive(Clone, Debug)]
pub struct ConnectionStatus {
    /// There is a session.
    pub connected: bool,
    /// ID of the etcd cluster of the last session.
    pub etcd_cluster_id: Option<u64>,
    /// Its version.
    pub etcd_version: Option<String>,
    /// Why there is no session, or why the one before ended.
    pub last_error: Option<String>,
    /// Sessions after the first one.
    pub reconnects: u64,
    /// When etcd was last heard.
    pub last_event: Instant,
    /// Endpoints of the configuration as last read.
    pub endpoints: Vec<String>,
}

impl ConnectionStatus {
    /// Why there is no session now.
    pub fn failure(&self) -> Option<String> {
        if self.connected { None } else { self.last_error.clone() }
    }
}

impl Connection {
    /// Starts connecting, and goes on to reconnect for good.
    pub fn spawn(
        config: impl Into<EtcdSource>,
        options: ConnectionOptions,
    ) -> (Self, watch::Receiver<ConnectionStatus>) {
        let status = Arc::new(watch::Sender::new(ConnectionStatus {
            connected: false,
            etcd_cluster_id: None,
            etcd_version: None,
            last_error: None,
            reconnects: 0,
            last_event: Instant::now(),
            endpoints: Vec::new(),
        }));
        let (publish, sessions) = watch::channel(None);
        let heard = Heard { status: status.clone(), generations: Arc::default() };
        let source = config.into();
        let task = Task { source, options, status: status.clone(), heard: heard.clone(), publish, number: 0 };
        tokio::spawn(task.run());
        let receiver = status.subscribe();
        (Self { sessions, heard, timing: options.timing, channel: options.channel.max(1) }, receiver)
    }

    /// Follows keys. The channel is bounded; dropping it stops the reflector.
    pub fn reflect(&self, spec: ReflectorSpec) -> mpsc::Receiver<ReflectorEvent> {
        self.follow(spec, ReflectorEvent::from_change)
    }

    pub(crate) fn follow<E: Send + 'static>(
        &self,
        spec: ReflectorSpec,
        translate: impl Fn(Change) -> Option<E> + Send + 'static,
    ) -> mpsc::Receiver<E> {
        let (events, receiver) = mpsc::channel(self.channel);
        let sessions = self.sessions.clone();
        tokio::spawn(follow(sessions, self.heard.clone(), spec, self.timing, events, translate));
        receiver
    }

    /// The current session, or the next one.
    pub async fn session(&self) -> Session {
        let mut sessions = self.sessions.clone();
        loop {
            let live = sessions.wait_for(Option::is_some).await.map(|live| live.clone());
            match live {
                Ok(Some(live)) => return live.session,
                Ok(None) => {}
                // Only when the runtime shuts down: then nobody waits for us either.
                Err(_) => std::future::pending().await,
            }
        }
    }

    pub(crate) fn heard(&self) -> &Heard {
        &self.heard
    }

    pub(crate) fn sessions(&self) -> watch::Receiver<Option<LiveSession>> {
        self.sessions.clone()
    }
}

struct Task {
    source: EtcdSource,
    options: ConnectionOptions,
    status: Arc<watch::Sender<ConnectionStatus>>,
    heard: Heard,
    publish: watch::Sender<Option<LiveSession>>,
    number: u64,
}

impl Task {
    async fn run(mut self) {
        let timing = self.options.timing;
        let mut backoff = Backoff::new(timing.backoff_min, timing.backoff_max);
        let mut rng = SmallRng::from_os_rng();
        loop {
            let began = Instant::now();
            let attempt = tokio::select! {
                () = self.publish.closed() => return,
                attempt = self.connect() => attempt,
            };
            let error = match attempt {
                Ok(session) => {
                    let probed = self.attend(session).await;
                    let Some(error) = probed else { return };
                    // A session that ends at once is no success.
                    if began.elapsed() > timing.backoff_max {
                        backoff.reset();
                    }
                    error
                }
                Err(error) => error,
            };
            // Whoever owns the connection knows whose etcd this is, and what it means that it is gone.
            tracing::debug!(%error, "etcd is not connected");
            self.status.send_modify(|status| {
                status.connected = false;
                status.last_error = Some(error.to_string());
            });
            let wait = backoff.wait(&mut rng);
            tokio::select! {
                () = self.publish.closed() => return,
                () = sleep(wait) => {}
            }
        }
    }

    async fn connect(&self) -> Result<Session, SessionError> {
        let config = self.source.load()?;
        self.status.send_if_modified(|status| {
            let differ = status.endpoints != config.endpoints;
            status.endpoints.clone_from(&config.endpoints);
            differ
        });
        Session::connect(&config, self.options.session).await
    }

    /// Hands out a session until it ends; gives the reason, or nothing once nobody wants it.
    async fn attend(&mut self, session: Session) -> Option<SessionError> {
        self.number += 1;
        let number = self.number;
        self.status.send_modify(|status| {
            status.connected = true;
            status.etcd_cluster_id = Some(session.cluster_id());
            status.reconnects = number - 1;
            status.last_event = Instant::now();
        });
        let generation = self.heard.generations().of(session.cluster_id(), session.revision());
        self.publish.send_replace(Some(LiveSession { generation, session: session.clone() }));
        let error = loop {
            tokio::select! {
                () = self.publish.closed() => return None,
                error = session.ended() => break error,
                () = self.probe(&session) => {}
            }
        };
        self.publish.send_replace(None);
        Some(error)
    }

    /// Finds out whether the session still works, also if nothing else uses it; a session that fails ends.
    async fn probe(&self, session: &Session) {
        if let Ok(status) = session.status().await {
            self.status.send_if_modified(|known| {
                known.last_event = Instant::now();
                let news = known.etcd_version.as_ref() != Some(&status.version);
                known.etcd_version = Some(status.version);
                news
            });
        }
        // An early return here would be a pause cut short; the caller comes back for the next probe.
        let _ended = timeout(self.options.probe, session.ended()).await;
    }
}
