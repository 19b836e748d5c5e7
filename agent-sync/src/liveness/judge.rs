//! The state machine of one cluster: evidence and the time in, its health out.

use std::fmt;
use std::time::{Duration, Instant};

use super::nodes::NodeEvidence;
use super::{Health, LivenessOptions};

/// Rounds in a row without any answer before nodes count as silent, and with an answer before a dead
/// cluster may return by its nodes alone.
pub const ROUNDS: u32 = 3;
/// One side must be missing for so long before the cluster is degraded.
pub const DEGRADED_AFTER: Duration = Duration::from_secs(5);
/// A death this soon after a return is a relapse.
pub const STABLE: Duration = Duration::from_secs(600);
/// However often it relapsed, a cluster that is heard for so long returns.
pub const RETURN_MAX: Duration = Duration::from_secs(60);
/// A mirror's etcd says nothing of the cluster's own, so that its nodes alone decide: they get so many
/// times as long.
pub const MIRRORED: u32 = 2;

/// What the etcd of a cluster says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EtcdEvidence {
    /// There is a session.
    pub connected: bool,
    /// Its last sign of life: a reply, but none later than its heartbeat lasts. For a mirror: the last
    /// change of the cluster's records.
    pub heard: Option<Instant>,
    /// The etcd is a mirror's.
    pub mirrored: bool,
}

/// What is known of a cluster at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// From its nodes.
    pub nodes: NodeEvidence,
    /// From its etcd.
    pub etcd: EtcdEvidence,
}

/// What speaks against a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// No node that is asked answers, though they did before.
    pub nodes_silent: bool,
    /// Its etcd, if that can be known, is not connected.
    pub etcd_lost: bool,
    /// Its etcd is connected, but silent, or takes no writes.
    pub etcd_silent: bool,
    /// Nothing was heard of it since this agent started.
    pub unknown: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Judge {
    options: LivenessOptions,
    created: Instant,
    health: Health,
    since: Instant,
    findings: Findings,
    /// Nothing has been heard yet.
    unknown: bool,
    /// Since when the etcd has not been connected.
    disconnected: Option<Instant>,
    /// Since when it looks better than its health says.
    better: Option<Instant>,
    returned: Option<Instant>,
    relapses: u32,
    transitions: u64,
}

impl Judge {
    /// Of a cluster of which nothing is known: degraded until it is heard.
    pub fn new(options: LivenessOptions, now: Instant) -> Self {
        Self {
            options,
            created: now,
            health: Health::Degraded,
            since: now,
            findings: Findings { unknown: true, ..Findings::default() },
            unknown: true,
            disconnected: None,
            better: None,
            returned: None,
            relapses: 0,
            transitions: 0,
        }
    }

    /// A predecessor of this agent had declared it dead: so it stays until it is heard.
    pub fn adopt_dead(&mut self, now: Instant) {
        if self.health != Health::Dead {
            self.health = Health::Dead;
            self.since = now;
        }
    }

    /// Concludes what follows from `evidence`; tells whether the health is another one.
    pub fn step(&mut self, evidence: &Evidence, now: Instant) -> bool {
        let Evidence { nodes, etcd } = *evidence;
        self.disconnected = match (etcd.connected, self.disconnected) {
            (true, _) => None,
            (false, since) => since.or(Some(now)),
        };
        self.unknown &= nodes.answered.is_none() && etcd.heard.is_none();
        self.findings = self.find(evidence, now);
        let looks = self.looks(evidence, now);
        let better = match (self.health, looks) {
            (_, Health::Dead) => false,
            (Health::Dead, _) => self.is_heard(evidence, now),
            (before, looks) => before == Health::Degraded && looks == Health::Healthy,
        };
        self.better = if better { self.better.or(Some(now)) } else { None };
        let next = match (self.health, looks) {
            (Health::Dead, _) if !self.may_return(evidence, now) => Health::Dead,
            (Health::Degraded, Health::Healthy) if !self.may_recover(now) => Health::Degraded,
            (_, looks) => looks,
        };
        self.enter(next, now)
    }

    /// Its health.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Since when.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// What speaks against it at the moment.
    pub fn findings(&self) -> Findings {
        self.findings
    }

    /// How often its health changed.
    pub fn transitions(&self) -> u64 {
        self.transitions
    }

    /// How long a dead cluster must be heard before it returns.
    pub fn hold(&self) -> Duration {
        let longest = RETURN_MAX.max(self.options.return_after);
        self.options.return_after.saturating_mul(1 << self.relapses.min(16)).min(longest)
    }

    /// Health by the evidence of this moment, without its past.
    fn looks(&self, evidence: &Evidence, now: Instant) -> Health {
        let Evidence { nodes, etcd } = evidence;
        let dead_after = match etcd.mirrored {
            true => self.options.dead_after * MIRRORED,
            false => self.options.dead_after,
        };
        let etcd_quiet = now.duration_since(etcd.heard.unwrap_or(self.created)) >= dead_after;
        if nodes_quiet(nodes, dead_after, now) && etcd_quiet {
            return Health::Dead;
        }
        if self.findings == Findings::default() { Health::Healthy } else { Health::Degraded }
    }

    fn find(&self, evidence: &Evidence, now: Instant) -> Findings {
        let Evidence { nodes, etcd } = evidence;
        let lost = self.disconnected.is_some_and(|at| now.duration_since(at) >= DEGRADED_AFTER);
        let heard = etcd.heard.unwrap_or(self.created);
        let silent = now.duration_since(heard) >= self.options.dead_after;
        Findings {
            nodes_silent: nodes_quiet(nodes, DEGRADED_AFTER, now),
            etcd_lost: !etcd.mirrored && lost,
            etcd_silent: !etcd.mirrored && etcd.connected && silent,
            unknown: self.unknown,
        }
    }

    /// There are signs of life at this moment.
    fn is_heard(&self, evidence: &Evidence, now: Instant) -> bool {
        let NodeEvidence { answered, silent_rounds, answered_rounds } = evidence.nodes;
        // A packet that gets lost now and then is no silence here either.
        let answered = answered.is_some_and(|at| at > self.since) && silent_rounds < ROUNDS;
        answered || answered_rounds > 0 || self.etcd_speaks(evidence, now)
    }

    fn etcd_speaks(&self, evidence: &Evidence, now: Instant) -> bool {
        let EtcdEvidence { connected, heard, .. } = evidence.etcd;
        connected && heard.is_some_and(|at| now.duration_since(at) < self.options.dead_after)
    }

    fn may_return(&self, evidence: &Evidence, now: Instant) -> bool {
        let long_enough = self.better.is_some_and(|at| now.duration_since(at) >= self.hold());
        long_enough && (evidence.nodes.answered_rounds >= ROUNDS || self.etcd_speaks(evidence, now))
    }

    fn may_recover(&self, now: Instant) -> bool {
        // Nobody has to prove anything after a start.
        let is_first = self.transitions == 0;
        is_first || self.better.is_some_and(|at| now.duration_since(at) >= self.options.return_after)
    }

    fn enter(&mut self, next: Health, now: Instant) -> bool {
        if next == self.health {
            return false;
        }
        if next == Health::Dead {
            let relapsed = self.returned.is_some_and(|at| now.duration_since(at) < STABLE);
            self.relapses = if relapsed { self.relapses.saturating_add(1) } else { 0 };
        }
        if self.health == Health::Dead {
            self.returned = Some(now);
        }
        self.health = next;
        self.since = now;
        self.better = None;
        self.transitions += 1;
        true
    }
}

fn nodes_quiet(nodes: &NodeEvidence, after: Duration, now: Instant) -> bool {
    nodes.silent_rounds >= ROUNDS && nodes.answered.is_some_and(|at| now.duration_since(at) >= after)
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nodes_silent, etcd_lost, etcd_silent, unknown } = *self;
        let all = [
            (unknown, "nothing was heard of it yet"),
            (nodes_silent, "none of its nodes answers"),
            (etcd_lost, "its etcd is not connected"),
            (etcd_silent, "its etcd is silent or takes no writes"),
        ];
        let mut texts = all.into_iter().filter(|(is_so, _)| *is_so).map(|(_, text)| text);
        if let Some(first) = texts.next() {
            f.write_str(first)?;
        }
        texts.try_for_each(|text| write!(f, ", {text}"))
    }
}
