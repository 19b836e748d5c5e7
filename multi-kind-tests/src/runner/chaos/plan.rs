//! What happens when: from a seed, without any I/O.

use crate::scenario::{Annotate, NodeRef, ProcessRef, Scale, Step};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use std::collections::BTreeMap;
use std::time::Duration;

/// From one event to the next, at most.
const PAUSE: Duration = Duration::from_millis(1500);
/// What is down comes back after this, at most; a cluster that is cut off for so long is declared dead.
const DOWN: Duration = Duration::from_secs(20);
/// Of the deployment that is scaled.
const REPLICAS: u32 = 4;

/// The names that a plan works with.
#[derive(Clone, Debug)]
pub(super) struct Ground {
    /// Nodes by cluster.
    pub(super) clusters: BTreeMap<String, Vec<String>>,
    /// `deployment/NAMESPACE/NAME`, scaled between none and [`REPLICAS`].
    pub(super) deployment: String,
    /// Its service, `service/NAMESPACE/NAME`, shared and not.
    pub(super) service: String,
}

/// How the manifests of a cluster stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) replicas: u32,
    pub(super) shared: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Plan {
    ground: Ground,
    rng: StdRng,
    now: Duration,
    /// When what is down comes back, and how.
    back: Vec<(Duration, Step)>,
    wanted: BTreeMap<String, Wanted>,
}

impl Plan {
    /// Everything is up, and each cluster shares `replicas` pods.
    pub(super) fn new(seed: u64, ground: Ground, replicas: u32) -> Self {
        let wanted = Wanted { replicas, shared: true };
        let wanted = ground.clusters.keys().map(|name| (name.clone(), wanted)).collect();
        Self { ground, rng: StdRng::seed_from_u64(seed), now: Duration::ZERO, back: Vec::new(), wanted }
    }

    /// The next event and its time since the begin.
    pub(super) fn next(&mut self) -> (Duration, Step) {
        self.now += PAUSE.mul_f64(self.rng.random());
        if let Some(at) = self.back.iter().position(|(at, _)| *at <= self.now) {
            return (self.now, self.back.swap_remove(at).1);
        }
        let step = match self.rng.random_range(0..10) {
            0..=3 => self.change(),
            4 if !self.is_cut() => self.cut(),
            _ => self.fell(),
        };
        (self.now, step)
    }

    /// Brings back what is down.
    pub(super) fn heal(&mut self) -> Vec<Step> {
        std::mem::take(&mut self.back).into_iter().map(|(_, step)| step).collect()
    }

    /// What the manifests say at the moment.
    pub(super) fn wanted(&self) -> &BTreeMap<String, Wanted> {
        &self.wanted
    }

    fn change(&mut self) -> Step {
        let cluster = self.cluster();
        let replicas = self.rng.random_range(0..=REPLICAS);
        let wanted = self.wanted.entry(cluster.clone()).or_insert(Wanted { replicas, shared: true });
        if self.rng.random_bool(0.7) {
            wanted.replicas = replicas;
            return Step::Scale(Scale { cluster, object: self.ground.deployment.clone(), replicas });
        }
        wanted.shared = !wanted.shared;
        let set = if wanted.shared { "service.cilium.io/shared-" } else { "service.cilium.io/shared=false" };
        Step::Annotate(Annotate { cluster, object: self.ground.service.clone(), set: vec![set.into()] })
    }

    /// One cluster at a time is cut off, so that calls always have a cluster to go to.
    fn cut(&mut self) -> Step {
        let node = NodeRef { node: self.cluster() };
        self.comes_back(Step::Heal(node.clone()));
        Step::Cut(node)
    }

    /// Something that runs is killed, stopped or started anew.
    fn fell(&mut self) -> Step {
        let cluster = self.cluster();
        let nodes = self.ground.clusters[&cluster].iter().map(|node| format!("agent:{node}"));
        let processes: Vec<String> = nodes.chain(["etcd".into(), "apiserver".into()]).collect();
        let process = processes.choose(&mut self.rng).cloned().unwrap_or_default();
        let running = ProcessRef { cluster, process, empty: false };
        if self.is_down(&running) {
            return self.change();
        }
        let verb = self.rng.random_range(0..4);
        if verb == 0 {
            return Step::Restart(running);
        }
        let empty = running.process == "etcd" && self.rng.random_bool(0.5);
        self.comes_back(Step::Start(ProcessRef { empty, ..running.clone() }));
        if verb == 1 { Step::Stop(running) } else { Step::Kill(running) }
    }

    fn comes_back(&mut self, step: Step) {
        let after = DOWN.mul_f64(self.rng.random());
        self.back.push((self.now + after, step));
    }

    fn is_down(&self, process: &ProcessRef) -> bool {
        self.back.iter().any(|(_, step)| match step {
            Step::Start(start) => start.cluster == process.cluster && start.process == process.process,
            _ => false,
        })
    }

    fn is_cut(&self) -> bool {
        self.back.iter().any(|(_, step)| matches!(step, Step::Heal(_)))
    }

    fn cluster(&mut self) -> String {
        let names: Vec<&String> = self.ground.clusters.keys().collect();
        names.choose(&mut self.rng).map_or_else(String::new, |name| (*name).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn ground() -> Ground {
        let nodes = vec!["node1".to_owned(), "node2".to_owned()];
        Ground {
            clusters: [("alpha".to_owned(), nodes.clone()), ("beta".to_owned(), nodes)].into(),
            deployment: "deployment/chaos/churn".into(),
            service: "service/chaos/churn".into(),
        }
    }

    fn name(process: &ProcessRef) -> String {
        format!("{}/{}", process.cluster, process.process)
    }

    #[test]
    fn a_seed_always_gives_the_same_plan() {
        let steps = |seed| {
            let mut plan = Plan::new(seed, ground(), 1);
            (0..200).map(|_| format!("{:?}", plan.next())).collect::<Vec<_>>()
        };
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
    }

    #[test]
    fn only_what_runs_is_stopped_and_everything_comes_back() {
        for seed in 0..200 {
            let mut plan = Plan::new(seed, ground(), 1);
            let (mut down, mut cut) = (BTreeSet::new(), BTreeSet::new());
            let mut check = |step: &Step| match step {
                Step::Kill(process) | Step::Stop(process) => assert!(down.insert(name(process))),
                Step::Restart(process) => assert!(!down.contains(&name(process))),
                Step::Start(process) => assert!(down.remove(&name(process))),
                Step::Cut(node) => {
                    assert!(cut.is_empty(), "one at a time");
                    cut.insert(node.node.clone());
                }
                Step::Heal(node) => assert!(cut.remove(&node.node)),
                _ => {}
            };
            (0..300).for_each(|_| check(&plan.next().1));
            plan.heal().iter().for_each(&mut check);
            assert!(down.is_empty() && cut.is_empty());
        }
    }
}
