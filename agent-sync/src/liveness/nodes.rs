//! The nodes of one cluster: whom to ask next, and what their answers and silence are worth.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::time::Instant;

/// Nodes of a cluster that are ever asked from here.
pub const CANDIDATES: usize = 64;
/// Nodes that are asked in one round.
pub const SAMPLE: usize = 4;
/// A node that has not answered so often while others did never will; a packet may get lost.
const FIREWALLED: u8 = 2;

/// What the nodes of a cluster say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeEvidence {
    /// When one of them answered last; none if their silence says nothing.
    pub answered: Option<Instant>,
    /// Rounds in a row in which nobody answered.
    pub silent_rounds: u32,
    /// Rounds in a row in which somebody answered.
    pub answered_rounds: u32,
}

/// Which of many nodes are asked from here, at most [`CANDIDATES`]: on one node the same ones always, on
/// other nodes others, so that the agents of a cluster together watch all of them.
pub fn candidates(nodes: impl Iterator<Item = IpAddr>, here: &str) -> Vec<IpAddr> {
    let rank = |ip: IpAddr| {
        let mut hasher = DefaultHasher::new();
        (here, ip).hash(&mut hasher);
        (hasher.finish(), ip)
    };
    let mut first: BTreeSet<(u64, IpAddr)> = BTreeSet::new();
    for ip in nodes {
        first.insert(rank(ip));
        if first.len() > CANDIDATES {
            first.pop_last();
        }
    }
    first.into_iter().map(|(_, ip)| ip).collect()
}

/// See the module.
#[derive(Debug, Default)]
pub struct Nodes {
    known: BTreeMap<IpAddr, Node>,
    /// Who was asked, and whether somebody answered since; none: no round is open.
    round: Option<(Vec<IpAddr>, bool)>,
    evidence: NodeEvidence,
}

#[derive(Debug, Default)]
struct Node {
    asked: Option<Instant>,
    answered: Option<Instant>,
    /// Times that it was asked in a round in which somebody answered.
    tried: u8,
}

impl Nodes {
    /// The cluster has these nodes now; of more than [`CANDIDATES`] the first count.
    pub fn set(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let mut before = std::mem::take(&mut self.known);
        self.known = addresses
            .into_iter()
            .take(CANDIDATES)
            .map(|ip| (ip, before.remove(&ip).unwrap_or_default()))
            .collect();
    }

    /// Begins a round. Half of the nodes asked are those that answered last, so that a cluster with one
    /// reachable node counts as reachable; the others take turns.
    pub fn ask(&mut self, now: Instant) -> Vec<IpAddr> {
        let mut by_answer: Vec<_> = self.known.iter().map(|(ip, node)| (node.answered, *ip)).collect();
        by_answer.sort_unstable_by(|a, b| b.cmp(a));
        let mut asked: Vec<IpAddr> = by_answer.iter().take(SAMPLE / 2).map(|(_, ip)| *ip).collect();
        let others = self.known.iter().filter(|(ip, _)| !asked.contains(ip));
        let mut by_turn: Vec<_> = others.map(|(ip, node)| (node.asked, *ip)).collect();
        by_turn.sort_unstable();
        asked.extend(by_turn.into_iter().take(SAMPLE - SAMPLE / 2).map(|(_, ip)| ip));
        for ip in &asked {
            if let Some(node) = self.known.get_mut(ip) {
                node.asked = Some(now);
            }
        }
        self.round = (!asked.is_empty()).then(|| (asked.clone(), false));
        asked
    }

    /// A node answered. Tells whether it is one of this cluster.
    pub fn answered(&mut self, ip: IpAddr, now: Instant) -> bool {
        let Some(node) = self.known.get_mut(&ip) else { return false };
        node.answered = Some(now);
        // A late answer is as good a sign of life as any.
        if let Some((_, heard)) = &mut self.round {
            *heard = true;
        }
        self.evidence.answered = Some(now);
        true
    }

    /// Ends a round.
    pub fn close(&mut self) {
        match self.round.take() {
            None => {}
            Some((asked, true)) => {
                for ip in asked {
                    if let Some(node) = self.known.get_mut(&ip) {
                        node.tried = node.tried.saturating_add(1);
                    }
                }
                self.evidence.answered_rounds = self.evidence.answered_rounds.saturating_add(1);
                self.evidence.silent_rounds = 0;
            }
            Some((_, false)) => {
                self.evidence.silent_rounds = self.evidence.silent_rounds.saturating_add(1);
                self.evidence.answered_rounds = 0;
            }
        }
    }

    /// What can be concluded now.
    pub fn evidence(&self) -> NodeEvidence {
        let answered = if self.silence_counts() { self.evidence.answered } else { None };
        NodeEvidence { answered, ..self.evidence }
    }

    /// Silence says something if most of those who were asked while the cluster was there have answered
    /// before. A single node that a firewall lets through would take the whole cluster with it, most
    /// likely together with an etcd that runs on it.
    fn silence_counts(&self) -> bool {
        let answered = self.known.values().filter(|node| node.answered.is_some()).count();
        let firewalled = |node: &&Node| node.tried >= FIREWALLED && node.answered.is_none();
        let firewalled = self.known.values().filter(firewalled).count();
        answered > firewalled
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    #[test]
    fn all_nodes_have_their_turn_and_those_that_answer_are_asked_each_time() {
        let mut nodes = Nodes::default();
        nodes.set((1..=20).map(ip));
        let begin = Instant::now();
        let mut seen = std::collections::BTreeSet::new();
        for round in 0..20 {
            let now = begin + Duration::from_secs(round);
            let asked = nodes.ask(now);
            assert_eq!(asked.len(), SAMPLE);
            assert!(round == 0 || asked.contains(&ip(7)) || !seen.contains(&ip(7)), "{asked:?}");
            if asked.contains(&ip(7)) {
                nodes.answered(ip(7), now);
            }
            seen.extend(asked);
            nodes.close();
        }
        assert_eq!(seen.len(), 20);
    }

    #[test]
    fn of_many_nodes_each_agent_asks_others_but_always_the_same() {
        let all = || (0..=255).map(ip);
        let here = candidates(all(), "node1");
        assert_eq!(here.len(), CANDIDATES);
        assert_eq!(here, candidates(all().rev(), "node1"));
        assert_ne!(here, candidates(all(), "node2"));
    }

    #[test]
    fn silence_of_nodes_of_which_most_never_answered_says_nothing() {
        let mut nodes = Nodes::default();
        nodes.set((1..=3).map(ip));
        let now = Instant::now();
        for _ in 0..FIREWALLED {
            assert!(nodes.evidence().answered.is_none() || nodes.evidence().answered_rounds == 1);
            nodes.ask(now);
            nodes.answered(ip(1), now);
            nodes.close();
        }
        assert_eq!(nodes.evidence().answered, None);
        nodes.answered(ip(2), now);
        assert_eq!(nodes.evidence().answered, Some(now));
        assert!(!nodes.answered(ip(9), now), "not asked");
    }

    #[test]
    fn a_cluster_without_nodes_is_neither_silent_nor_answering() {
        let mut nodes = Nodes::default();
        assert!(nodes.ask(Instant::now()).is_empty());
        nodes.close();
        assert_eq!(nodes.evidence(), NodeEvidence::default());
    }
}
