//! A client's connection to an etcd, and the reflectors on it: replies that are late, lost or twice.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use clustermesh_kvstore::etcd::{KeyRange, WatchMessage};
use clustermesh_kvstore::reflector::core::{Change, Core, Effect, Failure, Input, Ticket, Timing};
use clustermesh_kvstore::reflector::{Generations, Prune, ReflectorSpec};
use rand::Rng as _;
use rand::rngs::SmallRng;

use crate::broken::{self, Broken};
use crate::faults::{Fault, Faults};
use crate::place::Place;

/// First wait before another attempt to connect.
const RECONNECT: Duration = Duration::from_millis(200);

/// One connection. It ends when the etcd behind it is another one, as real ones do.
pub struct Link<T> {
    generations: Generations,
    session: Option<Session>,
    sessions: u64,
    retry_at: Instant,
    /// The reflectors, each with what it is for.
    pub reflectors: Vec<Reflector<T>>,
}

#[derive(Clone, Copy)]
struct Session {
    number: u64,
    generation: u64,
    /// Which etcd of its place it is with.
    incarnation: u64,
}

/// A reflector's core with its requests, its watch, and what it has said.
pub struct Reflector<T> {
    /// What it is for.
    pub tag: T,
    /// What it said and nobody has heard yet; with the number of writes that etcd had seen by then.
    pub said: VecDeque<(Change, u64)>,
    /// It has said everything up to now, as far as it knows.
    pub live: bool,
    core: Core,
    range: KeyRange,
    page: usize,
    session: Option<Session>,
    request: Option<Effect>,
    replies: VecDeque<Input>,
    watch: Option<Watch>,
    told: Told,
}

struct Watch {
    ticket: Ticket,
    range: KeyRange,
    next: i64,
    created: bool,
    asked: bool,
}

/// What must hold of everything that a reflector says.
#[derive(Default)]
struct Told {
    prune: Prune,
    generation: u64,
    /// Newest revision of [`Change::Synced`] within a generation.
    synced: i64,
    /// Generation and newest revision of [`Change::Progress`], which may come before it is told that
    /// another one begins: it waits for its canary.
    progress: (u64, i64),
    keys: BTreeMap<String, i64>,
}

impl<T> Link<T> {
    /// Not connected yet.
    pub fn new(now: Instant) -> Self {
        Self {
            generations: Generations::default(),
            session: None,
            sessions: 0,
            retry_at: now,
            reflectors: Vec::new(),
        }
    }

    /// Starts a reflector.
    pub fn reflect(&mut self, tag: T, spec: &ReflectorSpec, now: Instant, rng: &mut SmallRng) {
        self.reflectors.push(Reflector {
            tag,
            said: VecDeque::new(),
            live: false,
            core: Core::new(spec, Timing::default(), now, 7),
            range: KeyRange::of(&spec.prefix),
            page: rng.random_range(1..5),
            session: None,
            request: None,
            replies: VecDeque::new(),
            watch: None,
            told: Told { prune: spec.prune, ..Told::default() },
        });
    }

    /// Whether there is a session with the etcd that stands there now.
    pub fn is_with(&self, place: &Place) -> bool {
        self.session.is_some_and(|session| place.up && session.incarnation == place.incarnation)
    }

    /// Tells one session from another.
    pub fn session_number(&self) -> u64 {
        self.session.map_or(0, |session| session.number)
    }

    /// The number of the etcd that the session is with, as the client counts.
    pub fn generation(&self) -> Option<u64> {
        self.session.map(|session| session.generation)
    }

    /// A reply to another request than a reflector's had this revision.
    pub fn saw(&mut self, revision: i64) {
        self.generations.saw(revision);
    }

    /// Ends the session.
    pub fn cut(&mut self, now: Instant) {
        if self.session.take().is_some() {
            self.retry_at = now + RECONNECT;
        }
    }

    /// Opens a session if there is none and its time has come.
    pub fn connect(&mut self, place: &Place, now: Instant) -> bool {
        if self.session.is_some_and(|session| session.incarnation != place.incarnation || !place.up) {
            self.cut(now);
        }
        if self.session.is_some() || self.retry_at > now {
            return false;
        }
        if !place.up || place.stalled {
            self.retry_at = now + RECONNECT;
            return false;
        }
        self.sessions += 1;
        let generation = match broken::is(Broken::ResumesAnywhere) {
            true => 1,
            false => self.generations.of(place.etcd.cluster_id, place.etcd.revision),
        };
        self.session = Some(Session { number: self.sessions, generation, incarnation: place.incarnation });
        true
    }

    /// Ends the session and opens another one at once.
    pub fn reconnect(&mut self, place: &Place, now: Instant) {
        self.cut(now);
        self.retry_at = now;
        self.connect(place, now);
    }

    /// When something happens by itself.
    pub fn deadline(&self) -> Option<Instant> {
        let retry = self.session.is_none().then_some(self.retry_at);
        self.reflectors.iter().filter_map(|reflector| reflector.core.deadline()).chain(retry).min()
    }

    /// One thing happens to one reflector; false if there was nothing to happen.
    pub fn advance(
        &mut self,
        index: usize,
        place: &Place,
        now: Instant,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Result<bool, String> {
        let Some(reflector) = self.reflectors.get_mut(index) else { return Ok(false) };
        let Some(input) = reflector.next(self.session, place, now, rng, faults) else { return Ok(false) };
        let Some(input) = input else { return Ok(true) };
        if let Some(revision) = revision(&input) {
            self.generations.saw(revision);
        }
        let ended = reflector.handle(input, place, now)?;
        if ended {
            self.cut(now);
        }
        Ok(true)
    }
}

impl<T> Reflector<T> {
    /// What happens next; `Some(None)`: something that the core does not hear of.
    #[allow(clippy::option_option, reason = "nothing, something unheard, something heard")]
    fn next(
        &mut self,
        session: Option<Session>,
        place: &Place,
        now: Instant,
        rng: &mut SmallRng,
        faults: &mut Faults,
    ) -> Option<Option<Input>> {
        if self.session.map(|s| s.number) != session.map(|s| s.number) {
            self.session = session;
            self.request = None;
            self.watch = None;
            return Some(Some(match session {
                Some(Session { generation, .. }) => Input::Connected { generation },
                None => Input::Disconnected { reason: "cut".into() },
            }));
        }
        if !self.replies.is_empty() {
            // Not always the oldest.
            let at = rng.random_range(0..self.replies.len());
            if at > 0 {
                faults.note(Fault::Reordered);
            }
            return Some(self.replies.remove(at));
        }
        let answers =
            session.is_some_and(|s| s.incarnation == place.incarnation) && place.up && !place.stalled;
        if answers {
            if let Some(request) = self.request.take() {
                let reply = self.serve(request, place, faults);
                if faults.chance(rng, 0.03) {
                    faults.note(Fault::Repeated);
                    self.replies.push_back(reply.clone());
                }
                if faults.chance(rng, 0.1) {
                    // It comes later, perhaps after what is asked next.
                    faults.note(Fault::Delayed);
                    self.replies.push_back(reply);
                    return Some(None);
                }
                return Some(Some(reply));
            }
            if let Some(message) = self.message(place, rng, faults) {
                return Some(Some(message));
            }
        }
        self.core.deadline().filter(|at| *at <= now).map(|_| Some(Input::Tick))
    }

    fn serve(&self, request: Effect, place: &Place, faults: &mut Faults) -> Input {
        let etcd = &place.etcd;
        match request {
            Effect::Get(ticket, key) => Input::Got(ticket, etcd.get(&key), etcd.revision),
            Effect::List { ticket, after, revision } => {
                let revision = if broken::is(Broken::ListsUnpinned) { 0 } else { revision };
                match etcd.page(&self.range, after.as_deref(), self.page, revision) {
                    Some(page) => Input::Page(ticket, page),
                    None => {
                        faults.note(Fault::ListCompacted);
                        Input::Failed(ticket, Failure::Compacted)
                    }
                }
            }
            other => unreachable!("{other:?} is no request"),
        }
    }

    fn message(&mut self, place: &Place, rng: &mut SmallRng, faults: &mut Faults) -> Option<Input> {
        let watch = self.watch.as_mut()?;
        let revision = place.etcd.revision;
        let ticket = watch.ticket;
        if !watch.created {
            watch.created = true;
            return Some(Input::Watch(ticket, WatchMessage::Created { revision }));
        }
        if faults.chance(rng, 0.002) {
            faults.note(Fault::WatchCanceled);
            self.watch = None;
            let reason = "etcd has other things to do".into();
            return Some(Input::Watch(ticket, WatchMessage::Canceled { reason }));
        }
        match place.etcd.watch(&watch.range, watch.next, rng.random_range(1..4)) {
            Some((WatchMessage::Compacted, _)) if broken::is(Broken::IgnoresCompaction) => {
                watch.next = place.etcd.compacted + 1;
                None
            }
            Some((WatchMessage::Compacted, _)) => {
                faults.note(Fault::WatchCompacted);
                self.watch = None;
                Some(Input::Watch(ticket, WatchMessage::Compacted))
            }
            Some((message, next)) => {
                watch.next = next;
                Some(Input::Watch(ticket, message))
            }
            None if std::mem::take(&mut watch.asked) => {
                Some(Input::Watch(ticket, WatchMessage::Progress { revision }))
            }
            None => None,
        }
    }

    /// A request gets no answer, or the watch ends.
    pub fn lose(&mut self) -> bool {
        match self.request.take() {
            Some(Effect::Get(ticket, _) | Effect::List { ticket, .. }) => {
                self.replies.push_back(Input::Failed(ticket, Failure::Other("no leader".into())));
                true
            }
            _ => false,
        }
    }

    /// Whether the core wants the session to end.
    fn handle(&mut self, input: Input, place: &Place, now: Instant) -> Result<bool, String> {
        let mut effects = Vec::new();
        self.core.handle(now, input, &mut effects);
        let mut ended = false;
        for effect in effects {
            match effect {
                Effect::Get(..) | Effect::List { .. } => self.request = Some(effect),
                Effect::Watch { ticket, range, revision } => {
                    let revision = revision + i64::from(broken::is(Broken::WatchesTooLate));
                    self.request = None;
                    self.watch = Some(Watch { ticket, range, next: revision, created: false, asked: false });
                }
                Effect::RequestProgress => {
                    if let Some(watch) = &mut self.watch {
                        watch.asked = true;
                    }
                }
                Effect::EndSession(_) => ended = true,
                Effect::Emit(change) => self.say(change, place)?,
            }
        }
        Ok(ended)
    }

    fn say(&mut self, change: Change, place: &Place) -> Result<(), String> {
        // Only of the etcd that stands there now the model still knows everything.
        let known = self.session.is_some_and(|session| session.incarnation == place.incarnation);
        let generation = self.session.map_or(0, |session| session.generation);
        self.told.check(&change, self.range.start(), generation, known.then_some(place))?;
        match change {
            Change::Synced { .. } => self.live = true,
            Change::Lost { .. } => self.live = false,
            _ => {}
        }
        let tick = match &change {
            Change::Put { revision, .. } if known => place.etcd.tick_of(*revision),
            _ => 0,
        };
        self.pass_on(change, tick);
        Ok(())
    }

    /// The consumer will hear of it, unless something is broken.
    fn pass_on(&mut self, change: Change, tick: u64) {
        let every_fifth = |revision: i64| revision % 5 == 0;
        match &change {
            Change::Delete { revision, .. } if every_fifth(*revision) && broken::is(Broken::LosesDeletes) => {
                return;
            }
            Change::Put { revision, .. } if every_fifth(*revision) && broken::is(Broken::LosesPuts) => return,
            Change::Relisting if broken::is(Broken::KeepsStale) => return,
            Change::Relisting if broken::is(Broken::FlushesOnRelist) => {
                for suffix in self.told.keys.keys() {
                    self.said.push_back((Change::Delete { suffix: suffix.clone(), revision: 1 }, 0));
                }
            }
            _ => {}
        }
        let synced_now = matches!(change, Change::Relisting) && broken::is(Broken::SyncedTooEarly);
        self.said.push_back((change, tick));
        if synced_now {
            self.said.push_back((Change::Synced { revision: 1, listed: true }, 0));
        }
        if let (true, [.., a, b]) = (broken::is(Broken::SwapsEvents), self.said.make_contiguous()) {
            let both_events = |change: &Change| matches!(change, Change::Put { .. } | Change::Delete { .. });
            if both_events(&a.0) && both_events(&b.0) {
                std::mem::swap(a, b);
            }
        }
    }
}

impl Told {
    fn check(
        &mut self,
        change: &Change,
        prefix: &str,
        generation: u64,
        place: Option<&Place>,
    ) -> Result<(), String> {
        match change {
            Change::Restarted { generation } => {
                if *generation < self.generation {
                    return Err(format!("I6: generation {generation} after {}", self.generation));
                }
                self.generation = *generation;
                self.synced = 0;
                self.keys.values_mut().for_each(|revision| *revision = 0);
            }
            Change::Put { suffix, revision, .. } => {
                let before = self.keys.insert(suffix.clone(), *revision).unwrap_or(0);
                if before > *revision || before == *revision && self.prune == Prune::Reflector {
                    return Err(format!("I6: {prefix}{suffix} told at {revision} after {before}"));
                }
            }
            Change::Delete { suffix, revision } => {
                let before = self.keys.remove(suffix).or((self.prune == Prune::Consumer).then_some(0));
                let Some(before) = before else {
                    return Err(format!("I5: {prefix}{suffix} deleted before it was told"));
                };
                if before > *revision {
                    return Err(format!("I5: {prefix}{suffix} of {before} deleted at {revision}"));
                }
                let key = format!("{prefix}{suffix}");
                if place.is_some_and(|place| place.etcd.existed(&key, *revision)) {
                    return Err(format!("I5: {key} deleted at {revision}, where etcd has it"));
                }
            }
            Change::Synced { revision, .. } => {
                if *revision < self.synced {
                    return Err(format!("I6: {prefix} synced at {revision} after {}", self.synced));
                }
                self.synced = *revision;
            }
            Change::Progress { revision } => {
                if (generation, *revision) < self.progress {
                    return Err(format!("I6: {prefix} came to {revision} after {}", self.progress.1));
                }
                self.progress = (generation, *revision);
            }
            Change::Relisting | Change::Lost { .. } => {}
        }
        Ok(())
    }
}

fn revision(input: &Input) -> Option<i64> {
    match input {
        Input::Got(_, _, revision) => Some(*revision),
        Input::Page(_, page) => Some(page.revision),
        Input::Watch(
            _,
            WatchMessage::Created { revision }
            | WatchMessage::Events { revision, .. }
            | WatchMessage::Progress { revision },
        ) => Some(*revision),
        _ => None,
    }
}
