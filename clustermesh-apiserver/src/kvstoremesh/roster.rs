//! Which clusters are mirrored and which are being removed, as plain code.
//!
//! A removal takes minutes. A cluster that is configured again meanwhile waits for its end: otherwise its
//! new data would be deleted as its old.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clustermesh_kvstore::cluster::ClusterName;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Mirror a cluster by this configuration; if it is mirrored already, instead of the one before.
    Mirror(ClusterName, PathBuf),
    /// Stop mirroring, and remove what was mirrored.
    Remove(ClusterName),
}

/// See the module.
#[derive(Debug, Default)]
pub struct Roster {
    clusters: BTreeMap<ClusterName, State>,
}

#[derive(Debug)]
enum State {
    Mirrored,
    /// With the configuration that came meanwhile.
    Removing(Option<PathBuf>),
}

impl Roster {
    /// A cluster is configured, or configured in another way.
    pub fn configured(&mut self, name: ClusterName, path: PathBuf) -> Option<Step> {
        if let Some(State::Removing(waiting)) = self.clusters.get_mut(&name) {
            *waiting = Some(path);
            return None;
        }
        self.clusters.insert(name.clone(), State::Mirrored);
        Some(Step::Mirror(name, path))
    }

    /// A cluster is configured no more.
    pub fn removed(&mut self, name: ClusterName) -> Option<Step> {
        match self.clusters.get_mut(&name)? {
            State::Removing(waiting) => {
                *waiting = None;
                None
            }
            mirrored @ State::Mirrored => {
                *mirrored = State::Removing(None);
                Some(Step::Remove(name))
            }
        }
    }

    /// The local etcd has data of a cluster, of an earlier run.
    pub fn found(&mut self, name: ClusterName) -> Option<Step> {
        if self.clusters.contains_key(&name) {
            return None;
        }
        self.clusters.insert(name.clone(), State::Removing(None));
        Some(Step::Remove(name))
    }

    /// A removal has come to its end.
    pub fn cleared(&mut self, name: &ClusterName) -> Option<Step> {
        match self.clusters.remove(name)? {
            State::Removing(Some(path)) => self.configured(name.clone(), path),
            State::Removing(None) => None,
            State::Mirrored => {
                self.clusters.insert(name.clone(), State::Mirrored);
                None
            }
        }
    }

    /// Clusters that are being removed.
    pub fn removing(&self) -> usize {
        self.clusters.values().filter(|state| matches!(state, State::Removing(_))).count()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Whatever order things happen in: no cluster is mirrored while it is removed, and in the end exactly
    /// the configured ones are mirrored, each by its last configuration.
    #[test]
    fn removals_and_returns_in_any_order() {
        for seed in 0..2_000 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let names = ["alpha", "beta", "gamma"].map(|name| name.parse::<ClusterName>().unwrap());
            let mut roster = Roster::default();
            let mut wanted: BTreeMap<ClusterName, PathBuf> = BTreeMap::new();
            let mut mirrored: BTreeMap<ClusterName, PathBuf> = BTreeMap::new();
            let mut removing: Vec<ClusterName> = Vec::new();
            for round in 0..60 {
                let name = names[rng.random_range(0..names.len())].clone();
                let step = match rng.random_range(0..4) {
                    0 => {
                        let path = PathBuf::from(round.to_string());
                        wanted.insert(name.clone(), path.clone());
                        roster.configured(name, path)
                    }
                    1 => {
                        wanted.remove(&name);
                        roster.removed(name)
                    }
                    2 => roster.found(name),
                    _ => removing.pop().and_then(|name| roster.cleared(&name)),
                };
                take(step, &mut mirrored, &mut removing, seed);
            }
            while let Some(name) = removing.pop() {
                take(roster.cleared(&name), &mut mirrored, &mut removing, seed);
            }
            assert_eq!(mirrored, wanted, "seed {seed}");
            assert_eq!(roster.removing(), 0, "seed {seed}");
        }
    }

    fn take(
        step: Option<Step>,
        mirrored: &mut BTreeMap<ClusterName, PathBuf>,
        removing: &mut Vec<ClusterName>,
        seed: u64,
    ) {
        match step {
            Some(Step::Mirror(name, path)) => {
                assert!(!removing.contains(&name), "seed {seed}: {name} is mirrored while it is removed");
                mirrored.insert(name, path);
            }
            Some(Step::Remove(name)) => {
                assert!(!removing.contains(&name), "seed {seed}: {name} is removed twice");
                mirrored.remove(&name);
                removing.push(name);
            }
            None => {}
        }
    }
}
