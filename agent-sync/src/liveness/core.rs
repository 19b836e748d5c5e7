//! All remote clusters: who is to be asked when, and what became of each.
//!
//! In: the clusters with their nodes and etcds, answers, the time. Out: nodes to ask, and clusters whose
//! health changed. No I/O, no clock.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName};

use super::judge::{EtcdEvidence, Evidence, Findings, Judge};
use super::nodes::Nodes;
use super::{Health, LivenessOptions};

/// A node that has not answered by then is silent in this round. Also the interval of rounds while the
/// nodes of a cluster are silent.
pub const ANSWER: Duration = Duration::from_secs(1);
/// Nodes asked per [`ANSWER`], over all clusters. Rounds that exceed it wait.
pub const BUDGET: usize = 200;

/// A cluster as the engine sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Its ID, once its config is accepted.
    pub id: Option<ClusterId>,
    /// The installed tables say that it is dead.
    pub dead: bool,
    /// Underlay addresses of its nodes, see [`super::nodes::candidates`].
    pub nodes: Vec<IpAddr>,
}

/// A health that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Whose.
    pub cluster: ClusterName,
    /// What it was.
    pub from: Health,
    /// What it is.
    pub to: Health,
    /// What speaks against the cluster now.
    pub findings: Findings,
}

/// See the module.
#[derive(Debug)]
pub struct Core {
    options: LivenessOptions,
    clusters: BTreeMap<ClusterName, Cluster>,
    budget_from: Instant,
    budget: usize,
}

#[derive(Debug)]
struct Cluster {
    id: Option<ClusterId>,
    judge: Judge,
    nodes: Nodes,
    etcd: EtcdEvidence,
    phase: Phase,
    due: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The next round begins at `due`.
    Idle,
    /// The round ends at `due`.
    Asked,
}

impl Core {
    /// No clusters yet.
    pub fn new(options: LivenessOptions, now: Instant) -> Self {
        Self { options, clusters: BTreeMap::new(), budget_from: now, budget: BUDGET }
    }

    /// The remote clusters that are configured now. Gives those whose tables say something else of them
    /// than is so: `true` if they have to say that it is dead.
    pub fn set_members(
        &mut self,
        members: BTreeMap<ClusterName, Member>,
        now: Instant,
    ) -> Vec<(ClusterName, bool)> {
        self.clusters.retain(|name, _| members.contains_key(name));
        let mut differ = Vec::new();
        for (name, member) in members {
            let options = self.options;
            let cluster = self.clusters.entry(name.clone()).or_insert_with(|| Cluster::new(options, now));
            cluster.nodes.set(member.nodes);
            if member.id.is_none() {
                continue;
            }
            // What is found when a cluster becomes known was written by a predecessor of this agent.
            if member.dead && cluster.id.is_none() {
                cluster.judge.adopt_dead(now);
            }
            cluster.id = member.id;
            let is_dead = cluster.judge.health() == Health::Dead;
            if is_dead != member.dead {
                differ.push((name, is_dead));
            }
        }
        differ
    }

    /// How the etcd of a cluster is.
    pub fn set_etcd(&mut self, name: &ClusterName, etcd: EtcdEvidence) {
        if let Some(cluster) = self.clusters.get_mut(name) {
            // A connection that was made anew has heard nothing yet.
            cluster.etcd = EtcdEvidence { heard: etcd.heard.max(cluster.etcd.heard), ..etcd };
        }
    }

    /// A node answered.
    pub fn answered(&mut self, ip: IpAddr, now: Instant) {
        for cluster in self.clusters.values_mut() {
            // An address is one cluster's only.
            if cluster.nodes.answered(ip, now) {
                return;
            }
        }
    }

    /// Ends rounds and begins others; gives whom to ask, and whose health changed.
    pub fn step(&mut self, now: Instant) -> (Vec<IpAddr>, Vec<Transition>) {
        if now.duration_since(self.budget_from) >= ANSWER {
            (self.budget_from, self.budget) = (now, BUDGET);
        }
        let mut due: Vec<_> = self.clusters.values_mut().filter(|cluster| cluster.due <= now).collect();
        // Whoever waited longest is first.
        due.sort_by_key(|cluster| cluster.due);
        let mut ask = Vec::new();
        for cluster in due {
            if cluster.phase == Phase::Asked {
                cluster.nodes.close();
                cluster.phase = Phase::Idle;
                cluster.due = now + cluster.pause(self.options.probe_interval);
            }
            if cluster.due <= now && self.budget > 0 {
                let asked = cluster.nodes.ask(now);
                self.budget = self.budget.saturating_sub(asked.len());
                ask.extend(asked);
                cluster.phase = Phase::Asked;
                cluster.due = now + ANSWER;
            }
        }
        let mut transitions = Vec::new();
        for (name, cluster) in &mut self.clusters {
            let from = cluster.judge.health();
            let evidence = Evidence { nodes: cluster.nodes.evidence(), etcd: cluster.etcd };
            if cluster.judge.step(&evidence, now) {
                let (to, findings) = (cluster.judge.health(), cluster.judge.findings());
                transitions.push(Transition { cluster: name.clone(), from, to, findings });
            }
        }
        (ask, transitions)
    }

    /// When [`step`](Self::step) has something to do even if nothing is heard.
    pub fn deadline(&self) -> Option<Instant> {
        let due = self.clusters.values().map(|cluster| match cluster.phase {
            Phase::Idle if self.budget == 0 => cluster.due.max(self.budget_from + ANSWER),
            _ => cluster.due,
        });
        due.min()
    }

    /// Each cluster's state machine.
    pub fn judges(&self) -> impl Iterator<Item = (&ClusterName, &Judge)> {
        self.clusters.iter().map(|(name, cluster)| (name, &cluster.judge))
    }
}

impl Cluster {
    fn new(options: LivenessOptions, now: Instant) -> Self {
        Self {
            id: None,
            judge: Judge::new(options, now),
            nodes: Nodes::default(),
            etcd: EtcdEvidence { connected: false, heard: None, mirrored: false },
            phase: Phase::Idle,
            due: now,
        }
    }

    /// From the end of a round to the begin of the next one.
    fn pause(&self, calm: Duration) -> Duration {
        let evidence = self.nodes.evidence();
        let silent = evidence.answered.is_some() && evidence.silent_rounds > 0;
        if silent || self.judge.health() == Health::Dead {
            Duration::ZERO
        } else {
            calm.saturating_sub(ANSWER)
        }
    }
}
