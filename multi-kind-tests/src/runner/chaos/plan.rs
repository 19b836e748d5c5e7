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
    pub(super) clusters: BTreeMap<String, Place>,
    /// `deployment/NAMESPACE/NAME`, scaled between none and [`REPLICAS`].
    pub(super) deployment: String,
    /// Its service, `service/NAMESPACE/NAME`, shared and not.
    pub(super) service: String,
}

/// Of one cluster.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The first one has the control plane: etcd, exporter, mirror.
    pub(super) nodes: Vec<String>,
    /// Its agents follow a mirror.
    pub(super) mirror: bool,
}

impl Place {
    /// Where everything runs that calls and is called: not beside the control plane, if there is a choice.
    pub(super) fn of_pods(&self) -> &str {
        self.nodes.last().map_or("", String::as_str)
    }

    /// The node that can be cut off without cutting off those pods.
    fn control(&self) -> Option<&str> {
        (self.nodes.len() > 1).then(|| self.nodes[0].as_str())
    }

    fn processes(&self) -> Vec<String> {
        let agents = self.nodes.iter().map(|node| format!("agent:{node}"));
        let control = ["etcd", "apiserver"].into_iter().chain(self.mirror.then_some("kvstoremesh"));
        agents.chain(control.map(str::to_owned)).collect()
    }
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

    /// One place at a time is cut off, so that calls always have a cluster to go to: a whole cluster, or its
    /// control plane alone, which is no reason for a call to fail.
    fn cut(&mut self) -> Step {
        let cluster = self.cluster();
        let control = self.rng.random_bool(0.5);
        let node = match self.ground.clusters[&cluster].control() {
            Some(node) if control => format!("{cluster}/{node}"),
            _ => cluster,
        };
        let node = NodeRef { node };
        self.comes_back(Step::Heal(node.clone()));
        Step::Cut(node)
    }

    /// Something that runs is killed, stopped, started anew, or hangs for a while.
    fn fell(&mut self) -> Step {
        let cluster = self.cluster();
        let processes = self.ground.clusters[&cluster].processes();
        let process = processes.choose(&mut self.rng).cloned().unwrap_or_default();
        let running = ProcessRef { cluster, process, empty: false };
        if self.is_down(&running) {
            return self.change();
        }
        let verb = self.rng.random_range(0..6);
        match verb {
            0 => return Step::Restart(running),
            1 => {
                self.comes_back(Step::Thaw(running.clone()));
                return Step::Freeze(running);
            }
            _ => {}
        }
        let empty = running.process == "etcd" && self.rng.random_bool(0.5);
        self.comes_back(Step::Start(ProcessRef { empty, ..running.clone() }));
        if verb == 2 { Step::Stop(running) } else { Step::Kill(running) }
    }

    fn comes_back(&mut self, step: Step) {
        let after = DOWN.mul_f64(self.rng.random());
        self.back.push((self.now + after, step));
    }

    fn is_down(&self, process: &ProcessRef) -> bool {
        self.back.iter().any(|(_, step)| match step {
            Step::Start(down) | Step::Thaw(down) => {
                down.cluster == process.cluster && down.process == process.process
            }
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
        let place = |mirror| Place { nodes: vec!["node1".to_owned(), "node2".to_owned()], mirror };
        Ground {
            clusters: [("alpha".to_owned(), place(true)), ("beta".to_owned(), place(false))].into(),
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
    fn everything_of_a_control_plane_is_hit_in_time() {
        let mut plan = Plan::new(1, ground(), 1);
        let steps: BTreeSet<String> = (0..2000).map(|_| format!("{:?}", plan.next().1)).collect();
        for process in ["etcd", "apiserver", "kvstoremesh", "agent:node2"] {
            for verb in ["Kill", "Stop", "Freeze", "Restart"] {
                let begin = format!("{verb}(ProcessRef {{ cluster: \"alpha\", process: \"{process}\"");
                assert!(steps.iter().any(|step| step.starts_with(&begin)), "never {begin}");
            }
        }
        for node in ["alpha", "alpha/node1"] {
            assert!(steps.contains(&format!("Cut(NodeRef {{ node: {node:?} }})")), "never cut {node}");
        }
        assert!(!steps.iter().any(|step| step.contains("beta") && step.contains("kvstoremesh")));
        assert!(!steps.iter().any(|step| step.starts_with("Cut") && step.contains("node2")));
    }

    #[test]
    fn only_what_runs_is_stopped_and_everything_comes_back() {
        for seed in 0..200 {
            let mut plan = Plan::new(seed, ground(), 1);
            let (mut down, mut cut) = (BTreeSet::new(), BTreeSet::new());
            let mut check = |step: &Step| match step {
                Step::Kill(process) | Step::Stop(process) | Step::Freeze(process) => {
                    assert!(down.insert(name(process)));
                }
                Step::Restart(process) => assert!(!down.contains(&name(process))),
                Step::Start(process) | Step::Thaw(process) => assert!(down.remove(&name(process))),
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
