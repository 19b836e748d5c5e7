//! Does what the core decides.

use std::future::{Future, pending};
use std::pin::Pin;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::core::{Change, Core, Effect, Failure, Input, Ticket, Timing};
use super::{Heard, LiveSession, ReflectorSpec};
use crate::etcd::{KeyRange, KeyValue, Session, SessionError, WatchStream};

/// Follows `spec` over all sessions to come, until nobody listens to `events`.
pub(crate) async fn follow<E: Send + 'static>(
    mut sessions: watch::Receiver<Option<LiveSession>>,
    heard: Heard,
    spec: ReflectorSpec,
    timing: Timing,
    events: mpsc::Sender<E>,
    translate: impl Fn(Change) -> Option<E>,
) {
    let core = Core::new(&spec, timing, Instant::now().into_std(), rand::random());
    let range = KeyRange::of(&spec.prefix);
    let mut driver =
        Driver { core, range, pages: Pages::new(spec.page_size), session: None, request: None, watch: None };
    // A session that exists already is news, too.
    sessions.mark_changed();
    loop {
        let deadline = driver.core.deadline();
        let input = tokio::select! {
            biased;
            () = events.closed() => return,
            changed = sessions.changed() => match changed {
                Ok(()) => {
                    let live = sessions.borrow_and_update().clone();
                    driver.switch(live)
                }
                Err(_) => return,
            },
            reply = reply(&mut driver.request) => driver.replied(reply),
            message = message(&mut driver.watch) => message,
            () = until(deadline) => Some(Input::Tick),
        };
        let Some(input) = input else { continue };
        let now = Instant::now();
        if !matches!(input, Input::Tick | Input::Disconnected { .. }) {
            heard.reply(input.revision());
        }
        let mut effects = Vec::new();
        driver.core.handle(now.into_std(), input, &mut effects);
        for effect in effects {
            match effect {
                Effect::Emit(change) => {
                    let Some(event) = translate(change) else { continue };
                    if events.send(event).await.is_err() {
                        return;
                    }
                }
                other => driver.perform(other).await,
            }
        }
    }
}

struct Driver {
    core: Core,
    range: KeyRange,
    pages: Pages,
    session: Option<Session>,
    /// The one request under way; a new one replaces it.
    request: Option<Request>,
    watch: Option<(Ticket, Box<WatchStream>)>,
}

/// How many keys to ask for: each page costs a round trip, but a reply is held in memory as a whole.
struct Pages {
    first: i64,
    limit: i64,
}

impl Pages {
    /// Keys and values of a page, in bytes, that larger pages are to come close to.
    const BYTES: usize = 1 << 20;
    /// Pages grow at most by this factor.
    const GROWTH: i64 = 16;

    fn new(first: i64) -> Self {
        let first = first.max(1);
        Self { first, limit: first }
    }

    fn learn(&mut self, kvs: &[KeyValue]) {
        if kvs.is_empty() {
            return;
        }
        let bytes: usize = kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
        let fit = Self::BYTES * kvs.len() / bytes.max(1);
        let most = self.first.saturating_mul(Self::GROWTH);
        self.limit = i64::try_from(fit).unwrap_or(most).clamp(1, most);
    }
}

type Request = Pin<Box<dyn Future<Output = Reply> + Send>>;

enum Reply {
    Input(Input),
    Watch(Ticket, Box<WatchStream>),
    Failed(Ticket, SessionError),
}

impl Driver {
    fn switch(&mut self, live: Option<LiveSession>) -> Option<Input> {
        self.request = None;
        self.watch = None;
        let reason = || "etcd is not connected".to_owned();
        match live {
            Some(LiveSession { generation, session }) => {
                self.session = Some(session);
                Some(Input::Connected { generation })
            }
            None => self.session.take().map(|_| Input::Disconnected { reason: reason() }),
        }
    }

    fn replied(&mut self, reply: Reply) -> Option<Input> {
        self.request = None;
        match reply {
            Reply::Input(input) => {
                if let Input::Page(_, page) = &input {
                    self.pages.learn(&page.kvs);
                }
                Some(input)
            }
            Reply::Watch(ticket, stream) => {
                self.watch = Some((ticket, stream));
                None
            }
            Reply::Failed(ticket, error) => failed(ticket, error),
        }
    }

    async fn perform(&mut self, effect: Effect) {
        let Some(session) = self.session.clone() else { return };
        match effect {
            Effect::Get(ticket, key) => self.request = Some(Box::pin(get(session, ticket, key))),
            Effect::List { ticket, after, revision } => {
                let (range, limit) = (self.range.clone(), self.pages.limit);
                self.request = Some(Box::pin(async move {
                    match session.list_page(&range, after.as_deref(), limit, revision).await {
                        Ok(page) => Reply::Input(Input::Page(ticket, page)),
                        Err(error) => Reply::Failed(ticket, error),
                    }
                }));
            }
            Effect::Watch { ticket, range, revision } => {
                self.watch = None;
                self.request = Some(Box::pin(async move {
                    match session.watch(&range, revision).await {
                        Ok(stream) => Reply::Watch(ticket, Box::new(stream)),
                        Err(error) => Reply::Failed(ticket, error),
                    }
                }));
            }
            Effect::RequestProgress => {
                if let Some((_, stream)) = &mut self.watch
                    && let Err(error) = stream.request_progress().await
                {
                    session.end(error);
                }
            }
            Effect::EndSession(reason) => session.end(SessionError::Lost(reason)),
            Effect::Emit(_) => {}
        }
    }
}

async fn get(session: Session, ticket: Ticket, key: String) -> Reply {
    match session.list_page(&KeyRange::Key(key), None, 1, 0).await {
        Ok(mut page) => Reply::Input(Input::Got(ticket, page.kvs.pop(), page.revision)),
        Err(error) => Reply::Failed(ticket, error),
    }
}

/// What the core hears of an error: nothing if the session ends, for that comes by itself.
fn failed(ticket: Ticket, error: SessionError) -> Option<Input> {
    match error {
        SessionError::Compacted { .. } => Some(Input::Failed(ticket, Failure::Compacted)),
        fatal if fatal.is_fatal() => None,
        other => Some(Input::Failed(ticket, Failure::Other(other.to_string()))),
    }
}

async fn reply(request: &mut Option<Request>) -> Reply {
    match request {
        Some(request) => request.await,
        None => pending().await,
    }
}

async fn message(watch: &mut Option<(Ticket, Box<WatchStream>)>) -> Option<Input> {
    let Some((ticket, stream)) = watch else { return pending().await };
    let ticket = *ticket;
    match stream.message().await {
        Ok(message) => Some(Input::Watch(ticket, message)),
        Err(error) => {
            *watch = None;
            failed(ticket, error)
        }
    }
}

async fn until(deadline: Option<std::time::Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => pending().await,
    }
}
