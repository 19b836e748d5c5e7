//! The scenario format.
//!
//! ```yaml
//! about: one sentence on what must hold
//! topology: ../../topology-examples/two-clusters/topology.yaml
//! connected: [[alpha, beta]]       # meshed before the first step
//! steps:
//! - call:
//!     from: alpha/default/client
//!     to: http://10.96.0.5/
//!     calls: 200
//!     expect: {clusters: [alpha, beta], min-share: 0.2}
//! finally:                         # also after a failure: leaves the lab as it was found
//! - annotate: {cluster: alpha, object: service/shop/orders, set: [service.cilium.io/affinity-]}
//! ```

mod duration;
mod step;

use crate::needs::Need;
use serde::Deserialize;
use std::path::{Path, PathBuf};

pub use duration::Span;
pub use step::{
    AgentFlags, Annotate, Apply, Call, Chaos, Check, Clear, Connect, Delete, Encrypt, Fails, IdentitySeen,
    Load, LoadStop, NodeRef, Pair, ProcessRef, Propagated, Ready, Rotated, Rotation, Scale, Sealed, Shift,
    Step, Stream, StreamEnd, Tamper, TamperedTable, Tampering, Unchanged, Underlay,
};

/// One scenario file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scenario {
    /// One sentence on what must hold.
    pub about: String,
    /// Topology file of the lab, relative to this file; none: the steps need no lab.
    #[serde(default)]
    pub topology: Option<PathBuf>,
    /// Pairs of clusters that are connected before the first step; no others are.
    #[serde(default)]
    pub connected: Vec<(String, String)>,
    /// The lab is not shared with other scenarios, and gone afterwards.
    #[serde(default)]
    pub own_lab: bool,
    /// What it needs of the kernel: without it the scenario is skipped, and that is said.
    #[serde(default)]
    pub needs: Vec<Need>,
    /// What is done and expected, in order; the first failure ends the scenario.
    pub steps: Vec<Step>,
    /// Done at the end in any case.
    #[serde(default)]
    pub finally: Vec<Step>,
    /// File name without extension.
    #[serde(skip)]
    pub name: String,
    /// Folder that relative paths of the file start from.
    #[serde(skip)]
    pub base: PathBuf,
}

/// Why a scenario file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("cannot read scenario {path}: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not a scenario.
    #[error("{path} is not a scenario: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
}

impl Scenario {
    /// Reads and checks one file.
    ///
    /// # Errors
    /// [`ScenarioError`] names the file, the line and the field.
    pub fn read(path: &Path) -> Result<Self, ScenarioError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ScenarioError::Unreadable { path: path.into(), source })?;
        let malformed = |reason: String| ScenarioError::Malformed { path: path.into(), reason };
        let mut scenario: Self =
            serde_saphyr::from_str(&text).map_err(|error| malformed(error.without_snippet().to_string()))?;
        scenario.name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        scenario.base = full.parent().unwrap_or(Path::new("/")).to_path_buf();
        if scenario.steps.is_empty() {
            return Err(malformed("it has no steps, so it could not fail".into()));
        }
        if scenario.topology.is_none() && !scenario.connected.is_empty() {
            return Err(malformed("`connected` needs a `topology`".into()));
        }
        Ok(scenario)
    }

    /// The topology file, found from where the scenario is.
    pub fn topology_file(&self) -> Option<PathBuf> {
        let path = self.base.join(self.topology.as_ref()?);
        Some(path.canonicalize().unwrap_or(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Scenario, String> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("case.yaml");
        std::fs::write(&path, text).expect("writable");
        Scenario::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn the_scenarios_of_this_repository_are_well_formed() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).expect("scenarios") {
            let path = entry.expect("entry").path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let scenario = Scenario::read(&path).unwrap_or_else(|error| panic!("{error}"));
                if let Some(topology) = scenario.topology_file() {
                    assert!(topology.is_file(), "{}: no {}", path.display(), topology.display());
                }
                count += 1;
            }
        }
        assert!(count > 0);
    }

    #[test]
    fn a_misspelt_step_is_named() {
        let error = parse("about: x\nsteps:\n- cal: {}\n").expect_err("`cal` is no step");
        assert!(error.contains("cal"), "{error}");
    }

    #[test]
    fn a_misspelt_field_is_named() {
        let error =
            parse("about: x\nsteps:\n- scale: {cluster: a, object: o, replica: 1}\n").expect_err("replica");
        assert!(error.contains("replica"), "{error}");
    }

    #[test]
    fn a_scenario_without_steps_could_not_fail() {
        assert!(parse("about: x\nsteps: []\n").is_err());
    }
}
