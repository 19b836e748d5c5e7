use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::core::{Change, Timing};
use super::generation::Generations;
use super::{Backoff, ReflectorEvent, ReflectorSpec, follow};
use crate::etcd::{Credentials, EtcdSource, Session, SessionError, SessionOptions};

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
    /// How often configuration and certificates are read again. A symlink that is swapped, as Kubernetes
    /// does for secrets, is seen like any other change.
    pub renewal: Duration,
    /// Events that wait for a slow consumer before its reflector stops reading.
    pub channel: usize,
}

impl Default for ConnectionOptions {
    fn default() -> Self {
        Self {
            session: SessionOptions::default(),
            timing: Timing::default(),
            probe: Duration::from_secs(10),
            renewal: Duration::from_secs(5),
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
    /// When our own certificate ends, as last read.
    pub certificate_expires: Option<Timestamp>,
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
            certificate_expires: None,
        }));
        let (publish, sessions) = watch::channel(None);
        let heard = Heard { status: status.clone(), generations: Arc::default() };
        let source = config.into();
        let task = Task { source, options, status: status.clone(), heard: heard.clone(), publish };
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

/// A client certificate that ends in less than this is worth a warning.
const EXPIRES_SOON: SignedDuration = SignedDuration::from_hours(30 * 24);

/// A session that nobody has yet.
struct Fresh {
    session: Session,
    credentials: Credentials,
    /// The highest revision that was known before it began.
    highest: i64,
}

struct Task {
    source: EtcdSource,
    options: ConnectionOptions,
    status: Arc<watch::Sender<ConnectionStatus>>,
    heard: Heard,
    publish: watch::Sender<Option<LiveSession>>,
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
                Ok(fresh) => {
                    let Some(error) = self.attend(fresh).await else { return };
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

    async fn connect(&self) -> Result<Fresh, SessionError> {
        let credentials = self.load()?;
        self.open(credentials).await
    }

    /// Configuration and certificates as they are now.
    fn load(&self) -> Result<Credentials, SessionError> {
        let credentials = Credentials::load(self.source.load()?)?;
        self.status.send_if_modified(|status| {
            let differ = status.endpoints != credentials.config().endpoints;
            status.endpoints.clone_from(&credentials.config().endpoints);
            status.certificate_expires = credentials.expires();
            differ
        });
        Ok(credentials)
    }

    async fn open(&self, credentials: Credentials) -> Result<Fresh, SessionError> {
        let highest = self.heard.generations().highest();
        let session = Session::open(&credentials, self.options.session).await?;
        if let Some(expires) = credentials.expires() {
            let left = expires.duration_since(Timestamp::now());
            if left < EXPIRES_SOON {
                let path = credentials.config().cert_file.as_deref().map(Path::display);
                tracing::warn!(certificate = ?path, %expires, "the client certificate ends soon: renew it; no restart is needed");
            }
        }
        Ok(Fresh { session, credentials, highest })
    }

    /// Hands out sessions until one ends; gives the reason, or nothing once nobody wants them. A session
    /// whose certificates or configuration were changed is replaced by one that works with the new ones;
    /// until there is one, it goes on.
    async fn attend(&mut self, mut fresh: Fresh) -> Option<SessionError> {
        loop {
            let Fresh { session, credentials, highest } = fresh;
            self.hand_out(&session, highest);
            let renewed = self.renewed(&credentials);
            tokio::pin!(renewed);
            let next = loop {
                tokio::select! {
                    () = self.publish.closed() => return None,
                    error = session.ended() => break Err(error),
                    next = &mut renewed => break Ok(next),
                    () = self.probe(&session) => {}
                }
            };
            match next {
                // Whoever uses the old one may finish what it does there.
                Ok(next) => fresh = next,
                Err(error) => {
                    self.publish.send_replace(None);
                    return Some(error);
                }
            }
        }
    }

    fn hand_out(&self, session: &Session, highest: i64) {
        self.status.send_modify(|status| {
            status.connected = true;
            // The first one is not counted.
            status.reconnects += u64::from(status.etcd_cluster_id.is_some());
            status.etcd_cluster_id = Some(session.cluster_id());
            status.etcd_version = session.version().map(str::to_owned);
            status.last_event = Instant::now();
        });
        let generation = self.heard.generations().since(highest, session.cluster_id(), session.revision());
        self.publish.send_replace(Some(LiveSession { generation, session: session.clone() }));
    }

    /// Waits for other credentials than `current` that give a session.
    async fn renewed(&self, current: &Credentials) -> Fresh {
        let mut told = None;
        loop {
            sleep(self.options.renewal).await;
            let attempt = match self.load() {
                Ok(credentials) if credentials == *current => continue,
                Ok(credentials) => self.open(credentials).await,
                Err(error) => Err(error),
            };
            match attempt {
                Ok(fresh) => {
                    tracing::info!(
                        endpoint = fresh.session.endpoint(),
                        "certificates or configuration were changed: connected again with the new ones"
                    );
                    return fresh;
                }
                // Files may be replaced one after another.
                Err(error) => {
                    if told.as_ref() != Some(&error) {
                        tracing::warn!(%error, "changed certificates or configuration do not work (yet); the session before goes on");
                    }
                    told = Some(error);
                }
            }
        }
    }

    /// Finds out whether the session still works, also if nothing else uses it; a session that fails ends.
    async fn probe(&self, session: &Session) {
        if session.ping().await.is_ok() {
            self.status.send_if_modified(|known| {
                known.last_event = Instant::now();
                false
            });
        }
        // An early return here would be a pause cut short; the caller comes back for the next probe.
        let _ended = timeout(self.options.probe, session.ended()).await;
    }
}
