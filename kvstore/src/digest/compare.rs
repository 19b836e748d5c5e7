//! Compares what is held of one kind of one cluster with what its exporter states.
//!
//! Records and statements come by different watches, so the two are compared at a common revision: what
//! was held after the events of each recent revision is remembered. A difference at a revision that has
//! been passed is real, but might still be a matter of a list or another etcd, so it has to last. Whoever
//! never gets to a stated revision, though nothing is on its way any more, has lost something, too.
//!
//! Of an exporter that states nothing a census is taken now and then: all records are listed beside the
//! watch, at one revision, and only summed. It is compared like a statement, once.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use super::DigestRecord;

/// A difference that lasts this long is one.
const PATIENCE: Duration = Duration::from_secs(2);
/// So long nothing may be heard before what was stated but never seen counts as lost.
const QUIET: Duration = Duration::from_secs(10);
/// After a list that did not help, the next one comes after this; doubled up to [`RELIST_MAX`].
const RELIST_MIN: Duration = Duration::from_secs(30);
const RELIST_MAX: Duration = Duration::from_secs(600);
/// Revisions remembered. A storm that outgrows it is compared when it is over.
const HISTORY: usize = 1024;
/// Statements that wait for their revision.
const STATEMENTS: usize = 64;

/// How what is held compares with what is stated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is stated, or so much was refused that nobody can tell.
    #[default]
    Unknown,
    /// Something is on its way.
    Pending,
    /// The same.
    InSync,
    /// Not the same for longer than anything takes; being put right.
    Differs,
}

/// Where a difference was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Between the exporter and its etcd: a new list did not help.
    Source,
    /// Between etcd and what the agent holds: a new list put it right.
    State,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Compare {
    /// Revision, and the sum of what was held after its events; ascending.
    history: VecDeque<(i64, u64)>,
    /// Not between the begin of a list and its end.
    listed: bool,
    /// Not while the connection is lost.
    live: bool,
    /// Newest last; the last one stays until a newer one comes.
    stated: VecDeque<Statement>,
    /// The newest statement has been compared at its revision.
    compared: bool,
    /// Events since the last look.
    heard: bool,
    heard_at: Option<Instant>,
    differs_since: Option<Instant>,
    verdict: Verdict,
    relist: Option<Relist>,
    mismatches: [u64; 2],
    census: Census,
}

/// Tells the result of a census that was asked for from those before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticket(u64);

/// What stands in for statements where there are none.
#[derive(Debug, Default)]
struct Census {
    /// None: never.
    interval: Option<Duration>,
    next: Option<Instant>,
    ticket: Ticket,
    /// Its result has not come yet.
    under_way: bool,
    /// What is in `stated` is its result.
    in_statements: bool,
    /// The last one found what was held.
    agreed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Statement {
    revision: i64,
    sum: u64,
    /// When it was looked at first.
    at: Option<Instant>,
}

/// A difference is being put right.
#[derive(Clone, Copy, Debug)]
struct Relist {
    next: Instant,
    wait: Duration,
    /// A list has ended since.
    done: bool,
    counted: bool,
}

impl Verdict {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Pending => "pending",
            Self::InSync => "in-sync",
            Self::Differs => "differs",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Stage {
    /// All stages.
    pub const ALL: [Self; 2] = [Self::Source, Self::State];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::State => "state",
        }
    }
}

impl Compare {
    /// Takes a census each `interval` (none: never) while nothing is stated.
    pub fn with_census(interval: Option<Duration>) -> Self {
        Self { census: Census { interval, ..Census::default() }, ..Self::default() }
    }

    /// A list begins: what is held is half of this and half of that.
    pub fn listing(&mut self) {
        self.listed = false;
        self.drop_census();
        self.census.ticket.0 += 1;
        self.census.under_way = false;
        self.census.agreed = false;
        self.history.clear();
        self.differs_since = None;
        self.heard = true;
    }

    /// With the event of `revision`, the sum of what is held became `sum`.
    pub fn told(&mut self, revision: i64, sum: u64) {
        self.heard = true;
        if !self.listed {
            return;
        }
        match self.history.back_mut() {
            Some(last) if last.0 >= revision => last.1 = sum,
            _ => {
                if self.history.len() >= HISTORY {
                    self.history.pop_front();
                }
                self.history.push_back((revision, sum));
            }
        }
    }

    /// A list has ended, or was resumed, at `revision`.
    pub fn synced(&mut self, revision: i64, sum: u64) {
        self.heard = true;
        self.live = true;
        if !std::mem::replace(&mut self.listed, true) {
            self.history.push_back((revision, sum));
            if let Some(relist) = &mut self.relist {
                relist.done = true;
                // Whether it helped is to be known.
                self.census.next = None;
            }
        }
    }

    /// The connection is lost; what is held stays.
    pub fn lost(&mut self) {
        self.live = false;
        self.differs_since = None;
    }

    /// The exporter states a digest.
    pub fn stated(&mut self, record: &DigestRecord) {
        self.drop_census();
        let statement = Statement { revision: record.revision, sum: record.digest.sum, at: None };
        // Another etcd's revisions compare with nothing.
        self.stated.retain(|before| before.revision <= record.revision);
        if self.stated.len() >= STATEMENTS {
            // The oldest is the one that will be reached first.
            self.stated.pop_back();
        }
        self.stated.push_back(statement);
        self.compared = false;
    }

    /// A census has found `sum` at `revision`.
    pub fn counted(&mut self, ticket: Ticket, revision: i64, sum: u64) {
        if ticket != self.census.ticket || !std::mem::take(&mut self.census.under_way) {
            return;
        }
        if self.stated.is_empty() {
            self.stated.push_back(Statement { revision, sum, at: None });
            self.census.in_statements = true;
            self.compared = false;
            self.heard = true;
        }
    }

    /// Whether a census is to be taken now; asked once for each.
    pub fn census_due(&mut self, now: Instant) -> Option<Ticket> {
        if self.census_deadline()? > now {
            return None;
        }
        self.census.next = Some(now + self.census.interval?);
        self.census.under_way = true;
        self.census.ticket.0 += 1;
        Some(self.census.ticket)
    }

    /// When [`Self::census_due`] has something to say.
    pub fn census_deadline(&self) -> Option<Instant> {
        let idle = self.listed && self.live && self.stated.is_empty() && !self.census.under_way;
        self.census.next.filter(|_| idle)
    }

    /// The exporter states nothing any more.
    pub fn unstated(&mut self) {
        self.stated.clear();
        self.differs_since = None;
    }

    /// Compares; `sum` is that of what is held, none if nobody can tell. Returns whether the kind is to be
    /// listed again.
    pub fn check(&mut self, now: Instant, sum: Option<u64>) -> bool {
        if std::mem::take(&mut self.heard) || self.heard_at.is_none() {
            self.heard_at = Some(now);
        }
        for statement in self.stated.iter_mut().filter(|statement| statement.at.is_none()) {
            statement.at = Some(now);
        }
        self.plan_census(now);
        let (Some(sum), Some(newest)) = (sum, self.stated.back().copied()) else {
            self.verdict = if self.census.agreed { Verdict::InSync } else { Verdict::Unknown };
            return false;
        };
        if !self.listed || !self.live {
            self.verdict = Verdict::Pending;
            return false;
        }
        if newest.sum == sum {
            self.agreed(newest);
            return false;
        }
        match self.compare_passed() {
            // And nothing has become of it since but by what was told.
            Some(true)
                if self.census.in_statements && self.history.back().is_some_and(|(_, told)| *told == sum) =>
            {
                self.agreed(newest);
                return false;
            }
            Some(true) => self.differs_since = None,
            // Too many events since to know what was held then; the next one may have more luck.
            None if self.census.in_statements && self.differs_since.is_none() && self.is_past(newest) => {
                self.drop_census();
                return false;
            }
            Some(false) => self.differs_since = self.differs_since.or(Some(now)),
            None => {}
        }
        let waiting = self.stated.front().and_then(|statement| statement.at).max(self.heard_at);
        let lasts = self.differs_since.is_some_and(|since| since + PATIENCE <= now);
        let stuck = waiting.is_some_and(|since| since + QUIET <= now);
        if !lasts && !stuck && self.relist.is_none() {
            self.verdict = Verdict::Pending;
            return false;
        }
        if lasts || stuck {
            self.verdict = Verdict::Differs;
        }
        self.wants_list(now, lasts || stuck)
    }

    /// The result of the last [`Self::check`].
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// What the exporter stated last: sum and revision.
    pub fn newest_statement(&self) -> Option<(u64, i64)> {
        let newest = self.stated.back().filter(|_| !self.census.in_statements)?;
        Some((newest.sum, newest.revision))
    }

    /// Differences found so far.
    pub fn mismatches(&self, stage: Stage) -> u64 {
        self.mismatches[stage as usize]
    }

    /// Whether [`Self::check`] may have another result later although nothing comes in.
    pub fn is_settled(&self) -> bool {
        !self.heard && matches!(self.verdict, Verdict::Unknown | Verdict::InSync)
    }

    fn agreed(&mut self, newest: Statement) {
        self.verdict = Verdict::InSync;
        self.differs_since = None;
        self.stated.clear();
        if self.census.in_statements {
            self.census.in_statements = false;
            self.census.agreed = true;
        } else {
            self.stated.push_back(newest);
        }
        self.compared = true;
        let newest = self.history.len().saturating_sub(1);
        self.history.drain(..newest);
        if let Some(relist) = self.relist.take()
            && !relist.counted
        {
            self.mismatches[Stage::State as usize] += 1;
        }
    }

    /// The first one comes an interval after the list, or at once if the list was to put something right.
    fn plan_census(&mut self, now: Instant) {
        let Some(interval) = self.census.interval else { return };
        if self.census.next.is_none() && self.listed && self.live {
            let hurry = self.relist.is_some_and(|relist| relist.done);
            self.census.next = Some(if hurry { now } else { now + interval });
        }
    }

    fn is_past(&self, statement: Statement) -> bool {
        self.history.back().is_some_and(|(reached, _)| *reached > statement.revision)
    }

    fn drop_census(&mut self) {
        if std::mem::take(&mut self.census.in_statements) {
            self.stated.clear();
        }
    }

    /// Compares at the newest stated revision that has been passed since the last time; none if there is
    /// none.
    fn compare_passed(&mut self) -> Option<bool> {
        let reached = self.history.back()?.0;
        let passed = self.stated.iter().rposition(|statement| statement.revision <= reached)?;
        let (last, statement) = (passed + 1 == self.stated.len(), self.stated[passed]);
        // More events of the very revision may come; of one that lies behind, none.
        let final_word = last && statement.revision < reached;
        if std::mem::replace(&mut self.compared, final_word) && final_word {
            return None;
        }
        // The newest one stays, to be compared with what will be held.
        self.stated.drain(..if last { passed } else { passed + 1 });
        let held = self.history.iter().rposition(|(revision, _)| *revision <= statement.revision)?;
        let sum = self.history[held].1;
        self.history.drain(..held);
        Some(sum == statement.sum)
    }

    /// Whether the next list is due. If one has ended and the difference is still there, it is not ours.
    fn wants_list(&mut self, now: Instant, differs: bool) -> bool {
        let wait = match &mut self.relist {
            None => RELIST_MIN,
            Some(relist) => {
                if relist.done && differs && !std::mem::replace(&mut relist.counted, true) {
                    self.mismatches[Stage::Source as usize] += 1;
                }
                if now < relist.next {
                    return false;
                }
                (relist.wait * 2).min(RELIST_MAX)
            }
        };
        if !differs {
            return false;
        }
        let counted = self.relist.is_some_and(|relist| relist.counted);
        self.relist = Some(Relist { next: now + wait, wait, done: false, counted });
        true
    }
}
