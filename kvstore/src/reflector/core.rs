//! What a reflector does, as plain code.
//!
//! One [`Core`] follows one range of keys. It never waits and never asks for the time: the driver calls
//! [`Core::handle`] with what happened and does the [`Effect`]s in order. Each request carries a
//! [`Ticket`]; whatever comes back for an older one is ignored, so replies may come late, in any order,
//! or from a session that is gone.
//!
//! ```text
//! Away --connected--> AskCanary --missing--> AwaitCanary
//!   |                     '------exists------'
//!   |                                |
//!   '--same etcd, canary unchanged   List --last page--> Follow <--+
//!                      |                                    |      |
//!                      '------------------------------------+  compacted, revision went back: List again
//! ```

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::{Backoff, Prune, ReflectorSpec};
use crate::etcd::{KeyRange, KeyValue, WatchEvent, WatchMessage};

/// Times that steer a reflector.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Silence after which a sign of life is asked for.
    pub idle: Duration,
    /// Further silence after which the connection counts as dead.
    pub answer: Duration,
    /// First wait after a failed request.
    pub backoff_min: Duration,
    /// Longest wait after failed requests.
    pub backoff_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(10),
            answer: Duration::from_secs(10),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// Tells replies to the current request from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// There is a session.
    Connected {
        /// Counts the etcds behind the connection: the same number means the same history.
        generation: u64,
    },
    /// The session is gone.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// Reply to [`Effect::Get`].
    Got(Ticket, Option<KeyValue>, i64),
    /// Reply to [`Effect::List`].
    Page(Ticket, crate::etcd::Page),
    /// Of the watch that [`Effect::Watch`] opened.
    Watch(Ticket, WatchMessage),
    /// A request or a watch failed, but the session goes on.
    Failed(Ticket, Failure),
    /// The time of [`Core::deadline`] has come.
    Tick,
}

impl Input {
    /// etcd's revision, if this is a reply that has it.
    pub(super) fn revision(&self) -> Option<i64> {
        match self {
            Self::Got(_, _, revision) => Some(*revision),
            Self::Page(_, page) => Some(page.revision),
            Self::Watch(
                _,
                WatchMessage::Created { revision }
                | WatchMessage::Events { revision, .. }
                | WatchMessage::Progress { revision },
            ) => Some(*revision),
            _ => None,
        }
    }
}

/// Why a request failed.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The revision that the list was pinned to is compacted.
    Compacted,
    /// Anything else.
    Other(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Read one key.
    Get(Ticket, String),
    /// Read a page.
    List {
        /// For the reply.
        ticket: Ticket,
        /// Keys behind this one only.
        after: Option<Vec<u8>>,
        /// As of this revision; 0: now.
        revision: i64,
    },
    /// Close the watch, if there is one, and open another.
    Watch {
        /// For its messages.
        ticket: Ticket,
        /// What to watch.
        range: KeyRange,
        /// First revision to hear of.
        revision: i64,
    },
    /// Ask the watch for a sign of life.
    RequestProgress,
    /// The session is dead: end it.
    EndSession(String),
    /// Tell the consumer.
    Emit(Change),
}

/// What is told to the consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// etcd is another one: what follows, up to `Synced`, is told anew.
    Restarted {
        /// Which one.
        generation: u64,
    },
    /// Created or changed.
    Put {
        /// Key without the prefix.
        suffix: String,
        /// Value.
        value: Vec<u8>,
        /// Revision of the write.
        revision: i64,
        /// Lease it hangs on; 0 for none.
        lease: i64,
    },
    /// Gone.
    Delete {
        /// Key without the prefix.
        suffix: String,
        /// When.
        revision: i64,
    },
    /// All keys follow, up to `Synced`: those that do not are gone. Only if the consumer prunes.
    Relisting,
    /// Told completely.
    Synced {
        /// etcd's revision.
        revision: i64,
        /// By a list; otherwise what had been told before was resumed.
        listed: bool,
    },
    /// Alive.
    Progress {
        /// etcd's revision.
        revision: i64,
    },
    /// Cannot be followed now.
    Lost {
        /// Why.
        reason: String,
    },
}

#[derive(Debug)]
enum Phase {
    /// No session.
    Away,
    /// The canary is being read.
    AskCanary,
    /// The canary does not exist yet; its key is watched.
    AwaitCanary,
    /// Pages are being read, all as of the first one's revision.
    List { pinned: i64, after: Option<Vec<u8>> },
    /// The watch delivers.
    Follow,
    /// Something failed; once the time has come, start again.
    Retry { at: Instant },
}

/// Which history the known keys belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Incarnation {
    generation: u64,
    /// The canary as it was, if one is waited for: an etcd that was wiped and filled again under its old
    /// ID has another one.
    canary: Option<KeyValue>,
}

#[derive(Debug)]
struct Known {
    mod_revision: i64,
    /// The list that saw it last.
    list: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Core {
    range: KeyRange,
    canary: Option<String>,
    timing: Timing,
    rng: SmallRng,
    backoff: Backoff,
    phase: Phase,
    ticket: Ticket,
    generation: u64,
    /// What the state comes from; `None` until there is one.
    incarnation: Option<Incarnation>,
    /// Canary of the current session.
    canary_seen: Option<KeyValue>,
    /// The known keys are of `incarnation`, and all events up to `revision` have been told.
    complete: bool,
    revision: i64,
    /// Highest revision that etcd has shown in this incarnation.
    highest: i64,
    /// None if the consumer finds out by itself what a list lacks.
    known: Option<HashMap<String, Known>>,
    list: u64,
    /// The consumer was told `Synced` and no `Lost` since.
    live: bool,
    /// The consumer was told `Lost` and nothing since.
    lost: bool,
    heard: Instant,
    asked: Option<Instant>,
}

impl Core {
    /// `seed` is for the jitter of waits.
    pub fn new(spec: &ReflectorSpec, timing: Timing, now: Instant, seed: u64) -> Self {
        Self {
            range: KeyRange::of(&spec.prefix),
            canary: spec.canary.clone(),
            backoff: Backoff::new(timing.backoff_min, timing.backoff_max),
            timing,
            rng: SmallRng::seed_from_u64(seed),
            phase: Phase::Away,
            ticket: Ticket(0),
            generation: 0,
            incarnation: None,
            canary_seen: None,
            complete: false,
            revision: 0,
            highest: 0,
            known: (spec.prune == Prune::Reflector).then(HashMap::new),
            list: 0,
            live: false,
            lost: false,
            heard: now,
            asked: None,
        }
    }

    /// Takes what happened; appends what is to be done.
    pub fn handle(&mut self, now: Instant, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::Connected { generation } => self.connected(now, generation, out),
            Input::Disconnected { reason } => {
                self.phase = Phase::Away;
                self.new_ticket();
                self.lose(reason, out);
            }
            Input::Tick => self.tick(now, out),
            Input::Got(ticket, kv, revision) if self.expects(ticket, now) => {
                self.canary_read(kv, revision, out);
            }
            Input::Page(ticket, page) if self.expects(ticket, now) => self.page(page, out),
            Input::Watch(ticket, message) if self.expects(ticket, now) => self.watched(now, message, out),
            Input::Failed(ticket, failure) if self.expects(ticket, now) => match failure {
                // No wait: the next list pins a newer revision.
                Failure::Compacted => self.begin_list(out),
                Failure::Other(reason) => self.retry(now, reason, out),
            },
            // For a request that nobody waits for any more.
            Input::Got(..) | Input::Page(..) | Input::Watch(..) | Input::Failed(..) => {}
        }
    }

    /// When to call with [`Input::Tick`], if nothing happens before.
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Retry { at } => Some(at),
            Phase::AwaitCanary | Phase::Follow => {
                Some(self.asked.map_or(self.heard + self.timing.idle, |asked| asked + self.timing.answer))
            }
            // The driver's calls have deadlines of their own.
            Phase::Away | Phase::AskCanary | Phase::List { .. } => None,
        }
    }

    fn connected(&mut self, now: Instant, generation: u64, out: &mut Vec<Effect>) {
        // A session that takes over from one that still works, as when certificates are renewed, is no loss.
        if self.live && generation != self.generation {
            self.lose("the session was replaced".into(), out);
        }
        self.generation = generation;
        self.heard = now;
        self.asked = None;
        self.start(out);
    }

    /// Begins work on a session: first the canary, if there is one.
    fn start(&mut self, out: &mut Vec<Effect>) {
        match self.canary.clone() {
            Some(key) => {
                self.phase = Phase::AskCanary;
                let ticket = self.new_ticket();
                out.push(Effect::Get(ticket, key));
            }
            None => self.resume_or_list(out),
        }
    }

    fn canary_read(&mut self, kv: Option<KeyValue>, revision: i64, out: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::AskCanary) {
            return;
        }
        match kv {
            Some(kv) => {
                self.canary_seen = Some(kv);
                self.resume_or_list(out);
            }
            None => {
                // Whatever we know is of an etcd that was.
                self.incarnation = None;
                self.complete = false;
                self.phase = Phase::AwaitCanary;
                let ticket = self.new_ticket();
                // Just read from this key: `canary` is set in this phase.
                let range = KeyRange::Key(self.canary.clone().unwrap_or_default());
                out.push(Effect::Watch { ticket, range, revision: next(revision) });
            }
        }
    }

    fn resume_or_list(&mut self, out: &mut Vec<Effect>) {
        let now_is = Incarnation { generation: self.generation, canary: self.canary_seen.clone() };
        if self.incarnation.as_ref() != Some(&now_is) {
            self.incarnation = Some(now_is);
            self.complete = false;
            self.highest = 0;
            self.revision = 0;
            // Revisions of another history compare with nothing: all keys have to be told again.
            let known = self.known.iter_mut().flat_map(HashMap::values_mut);
            known.for_each(|known| known.mod_revision = 0);
            out.push(Effect::Emit(Change::Restarted { generation: self.generation }));
        }
        if self.complete { self.begin_watch(out) } else { self.begin_list(out) }
    }

    fn begin_list(&mut self, out: &mut Vec<Effect>) {
        self.complete = false;
        self.list += 1;
        self.phase = Phase::List { pinned: 0, after: None };
        let ticket = self.new_ticket();
        out.push(Effect::List { ticket, after: None, revision: 0 });
    }

    fn page(&mut self, page: crate::etcd::Page, out: &mut Vec<Effect>) {
        let Phase::List { pinned, after } = &mut self.phase else { return };
        if *pinned == 0 {
            // None is 0 or less, which would mean "now" when asked for.
            *pinned = page.revision.max(1);
            if self.known.is_none() {
                out.push(Effect::Emit(Change::Relisting));
            }
        }
        let pinned = *pinned;
        let last = page.kvs.last().map(|kv| kv.key.clone());
        // A page that promises more but does not get further would go on for ever.
        let more = page.more && last.is_some() && last > *after;
        after.clone_from(&last);
        page.kvs.into_iter().for_each(|kv| self.put(kv, out));
        self.saw(page.revision);
        if more {
            let ticket = self.new_ticket();
            out.push(Effect::List { ticket, after: last, revision: pinned });
            return;
        }
        self.prune(pinned, out);
        self.complete = true;
        self.revision = pinned;
        self.synced(true, out);
        self.begin_watch(out);
    }

    /// Tells of keys that the list lacked.
    fn prune(&mut self, pinned: i64, out: &mut Vec<Effect>) {
        let Some(known) = &mut self.known else { return };
        let (list, before) = (self.list, out.len());
        known.retain(|suffix, known| {
            if known.list != list {
                out.push(Effect::Emit(Change::Delete { suffix: suffix.clone(), revision: pinned }));
            }
            known.list == list
        });
        // The map has no order of its own; runs with the same seed shall be the same.
        out[before..].sort_by(|a, b| deleted(a).cmp(&deleted(b)));
    }

    fn begin_watch(&mut self, out: &mut Vec<Effect>) {
        self.phase = Phase::Follow;
        self.asked = None;
        let ticket = self.new_ticket();
        out.push(Effect::Watch { ticket, range: self.range.clone(), revision: next(self.revision) });
    }

    fn watched(&mut self, now: Instant, message: WatchMessage, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::Follow => self.followed(now, message, out),
            Phase::AwaitCanary => self.awaited(now, message, out),
            Phase::Away | Phase::AskCanary | Phase::List { .. } | Phase::Retry { .. } => {}
        }
    }

    fn awaited(&mut self, now: Instant, message: WatchMessage, out: &mut Vec<Effect>) {
        match message {
            WatchMessage::Events { events, .. } => {
                // Read it again: it may be gone already, and its value belongs to the incarnation.
                if events.iter().any(|event| matches!(event, WatchEvent::Put(_))) {
                    self.start(out);
                }
            }
            WatchMessage::Progress { revision } => out.push(Effect::Emit(Change::Progress { revision })),
            WatchMessage::Created { .. } => {}
            WatchMessage::Compacted => self.start(out),
            WatchMessage::Canceled { reason } => self.retry(now, reason, out),
        }
    }

    fn followed(&mut self, now: Instant, message: WatchMessage, out: &mut Vec<Effect>) {
        match message {
            WatchMessage::Created { revision } => {
                if self.went_back(revision) {
                    return self.end_session("etcd went back to an older revision", out);
                }
                self.saw(revision);
                self.backoff.reset();
                if !self.live {
                    self.synced(false, out);
                }
            }
            WatchMessage::Events { revision, events } => {
                for event in events {
                    match event {
                        WatchEvent::Put(kv) => {
                            self.revision = self.revision.max(kv.mod_revision);
                            self.put(kv, out);
                        }
                        WatchEvent::Delete { key, revision } => {
                            self.revision = self.revision.max(revision);
                            self.delete(&key, revision, out);
                        }
                    }
                }
                self.saw(revision.max(self.revision));
            }
            WatchMessage::Progress { revision } => {
                if self.went_back(revision) {
                    return self.end_session("etcd went back to an older revision", out);
                }
                self.saw(revision);
                out.push(Effect::Emit(Change::Progress { revision }));
            }
            WatchMessage::Compacted => self.begin_list(out),
            WatchMessage::Canceled { reason } => self.retry(now, reason, out),
        }
    }

    fn put(&mut self, kv: KeyValue, out: &mut Vec<Effect>) {
        let Some(suffix) = self.range.suffix(&kv.key).map(str::to_owned) else { return };
        if let Some(known) = &mut self.known {
            let seen = Known { mod_revision: kv.mod_revision, list: self.list };
            // The same write of the same history: told already.
            let told = known.insert(suffix.clone(), seen).map(|known| known.mod_revision);
            if told == Some(kv.mod_revision) {
                return;
            }
        }
        let (value, revision, lease) = (kv.value, kv.mod_revision, kv.lease);
        out.push(Effect::Emit(Change::Put { suffix, value, revision, lease }));
    }

    fn delete(&mut self, key: &[u8], revision: i64, out: &mut Vec<Effect>) {
        let Some(suffix) = self.range.suffix(key) else { return };
        if self.known.as_mut().is_none_or(|known| known.remove(suffix).is_some()) {
            out.push(Effect::Emit(Change::Delete { suffix: suffix.to_owned(), revision }));
        }
    }

    fn tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match (&self.phase, self.asked) {
            (Phase::Retry { .. }, _) => self.start(out),
            (_, None) => {
                self.asked = Some(now);
                out.push(Effect::RequestProgress);
            }
            (_, Some(_)) => {
                let silent = self.timing.idle + self.timing.answer;
                self.end_session(&format!("etcd has been silent for {silent:?}"), out);
            }
        }
    }

    fn retry(&mut self, now: Instant, reason: String, out: &mut Vec<Effect>) {
        self.phase = Phase::Retry { at: now + self.backoff.wait(&mut self.rng) };
        self.new_ticket();
        self.lose(reason, out);
    }

    /// Who connects anew finds out which etcd it is.
    fn end_session(&mut self, reason: &str, out: &mut Vec<Effect>) {
        self.phase = Phase::Away;
        self.new_ticket();
        self.lose(reason.to_owned(), out);
        out.push(Effect::EndSession(reason.to_owned()));
    }

    fn went_back(&self, revision: i64) -> bool {
        revision < self.highest
    }

    fn saw(&mut self, revision: i64) {
        self.highest = self.highest.max(revision);
    }

    fn synced(&mut self, listed: bool, out: &mut Vec<Effect>) {
        self.live = true;
        self.lost = false;
        out.push(Effect::Emit(Change::Synced { revision: self.revision, listed }));
    }

    fn lose(&mut self, reason: String, out: &mut Vec<Effect>) {
        self.live = false;
        if !std::mem::replace(&mut self.lost, true) {
            out.push(Effect::Emit(Change::Lost { reason }));
        }
    }

    /// Whether this is a reply to the current request; any such is a sign of life.
    fn expects(&mut self, ticket: Ticket, now: Instant) -> bool {
        let current = ticket == self.ticket;
        if current {
            self.heard = now;
            self.asked = None;
        }
        current
    }

    fn new_ticket(&mut self) -> Ticket {
        self.ticket.0 += 1;
        self.ticket
    }
}

/// The revision behind one that etcd named, which may name any.
fn next(revision: i64) -> i64 {
    revision.max(0).saturating_add(1)
}

fn deleted(effect: &Effect) -> Option<&str> {
    match effect {
        Effect::Emit(Change::Delete { suffix, .. }) => Some(suffix),
        _ => None,
    }
}
