//! What runs in a guest: the kernel tests, the programs of a lab, and a look at encryption.

use super::figures::{self, Accepted, Figures};
use super::guest::{Kind, Suite};
use super::image::Image;
use super::{SLOWNESS, kernels, page};
use crate::shell;
use crate::workspace::{self, Profile};
use anyhow::Context as _;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The package whose tests load the eBPF programs.
const PACKAGE: &str = "ebpf-global-svc";
/// The test program that prints what the verifier did.
const FIGURES: &str = "tables";
/// The programs of a lab.
const LAB: &[&str] = &[
    "clustermesh",
    "clustermesh-agent",
    "clustermesh-apiserver",
    "mesh-probe",
    "mesh-load",
    "multi-kind-tests",
];

/// The guest's files go with it: what the agents and exporters of failed scenarios have logged last is told.
pub(super) const TELL: &str =
    "{ status=$?; tail -n 40 /tmp/logs/*/*-agent-*.log /tmp/logs/*/*-apiserver.log; (exit $status); }";

/// What was built for guests.
pub(super) struct Programs {
    /// Test programs, by name.
    tests: Vec<(String, PathBuf)>,
    /// Where the programs of a lab are, if they are wanted.
    lab: Option<PathBuf>,
}

impl Programs {
    /// Builds those of a lab, the tests, or both.
    pub(super) fn build(lab: bool, tests: bool) -> anyhow::Result<Self> {
        let lab = if lab { Some(workspace::build_programs(Profile::Dev)?) } else { None };
        let tests = if tests { Self::build_tests(&["-p", PACKAGE])? } else { Vec::new() };
        Ok(Self { tests, lab })
    }

    /// The tests, where those of all packages are there already; see [`workspace::build_beside_tests`].
    pub(super) fn beside_tests() -> anyhow::Result<Self> {
        Ok(Self { tests: Self::build_tests(&["--workspace"])?, lab: None })
    }

    fn build_tests(packages: &[&str]) -> anyhow::Result<Vec<(String, PathBuf)>> {
        let mut command = workspace::cargo();
        command.arg("test").args(packages);
        command.args(["--no-run", "--message-format", "json-render-diagnostics"]);
        eprintln!("$ {}", shell::describe(&command));
        let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
        anyhow::ensure!(output.status.success(), "the kernel tests cannot be built");
        let mut tests = test_programs(&String::from_utf8_lossy(&output.stdout));
        tests.sort();
        anyhow::ensure!(
            tests.iter().any(|(name, _)| name == FIGURES),
            "cargo names no test program {FIGURES}"
        );
        Ok(tests)
    }

    /// The kernel tests that are wanted, one suite for each program: `wanted` gives beginnings of their names.
    pub(super) fn tests(
        &self,
        image: &mut Image,
        wanted: &dyn Fn(&str) -> Option<Vec<&'static str>>,
    ) -> anyhow::Result<Vec<Suite>> {
        let mut suites = Vec::new();
        for (name, path) in &self.tests {
            let Some(filters) = wanted(name) else { continue };
            image.built(path, &format!("test-{name}"))?;
            // What passed tests say: figures, and what they could not look at.
            let command = format!("test-{name} --show-output {}", filters.join(" "));
            suites.push(Suite { name: name.clone(), kind: Kind::Tests, command });
        }
        Ok(suites)
    }

    /// Scenarios, as one suite; without any only what a lab needs.
    pub(super) fn lab(&self, image: &mut Image, scenarios: &[String]) -> anyhow::Result<Option<Suite>> {
        let Some(folder) = &self.lab else { return Ok(None) };
        for name in LAB {
            image.built(&folder.join(name), name)?;
        }
        image.lab_tools()?;
        image.source(&workspace::scenarios(), "multi-kind-tests/scenarios")?;
        image.source(&workspace::root().join("topology-examples"), "topology-examples")?;
        if scenarios.is_empty() {
            return Ok(None);
        }
        let files: Vec<String> =
            scenarios.iter().map(|name| format!("multi-kind-tests/scenarios/{name}.yaml")).collect();
        let command = format!(
            "CLUSTERMESH_TEST_SLOWNESS={SLOWNESS} multi-kind-tests run --logs /tmp/logs {} || {TELL}",
            files.join(" ")
        );
        Ok(Some(Suite { name: "scenarios".into(), kind: Kind::Scenarios, command }))
    }

    /// What the verifier of this machine's own kernel does, if the table has a column for it.
    pub(super) fn host_figures(&self) -> anyhow::Result<Option<(String, Figures)>> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let series = series(&release);
        if !workspace::is_root() || !Accepted::read(&fs::read_to_string(page())?)?.knows(&series) {
            println!(
                "SKIPPED the verifier of this machine's kernel {series}: docs/verifier.md has no column for it, or this is not root"
            );
            return Ok(None);
        }
        let (_, path) =
            self.tests.iter().find(|(name, _)| name == FIGURES).context("no such test program")?;
        let output = Command::new(path).arg("--show-output").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        anyhow::ensure!(output.status.success(), "the test of the tables failed on this machine:\n{text}");
        Ok(Some((series, text.lines().filter_map(figures::parse).collect())))
    }
}

/// A script that tries what encryption between nodes needs, as one suite.
pub(super) fn encryption(image: &mut Image, folder: &Path) -> anyhow::Result<Suite> {
    wg(image, folder)?;
    image.script("opt/clustermesh/bin/try-encryption", include_str!("encryption.sh"))?;
    Ok(Suite { name: "tunnels".into(), kind: Kind::Scenarios, command: "try-encryption".into() })
}

/// The tool that sets up WireGuard.
pub(super) fn wg(image: &mut Image, folder: &Path) -> anyhow::Result<()> {
    let place = folder.join("wireguard-tools");
    let wg = place.join("root/usr/bin/wg");
    if !wg.exists() {
        fs::create_dir_all(&place)?;
        let package = kernels::download("wireguard-tools", &place)?;
        kernels::unpack(&package, &place)?;
    }
    image.program(&wg, "usr/bin", "wg")
}

/// `6.18.44-x` is `6.18`.
fn series(release: &str) -> String {
    release.trim().split(['.', '-']).take(2).collect::<Vec<_>>().join(".")
}

/// Names and paths of the test programs of [`PACKAGE`], from what cargo says.
fn test_programs(messages: &str) -> Vec<(String, PathBuf)> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        manifest_path: PathBuf,
        target: Target,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    let manifest = Path::new(PACKAGE).join("Cargo.toml");
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
    let messages = messages.filter(|message| message.manifest_path.ends_with(&manifest));
    messages.filter_map(|message| Some((message.target.name, message.executable?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_cargo_says() {
        let messages = r#"{"reason":"compiler-artifact","manifest_path":"/c/aya/Cargo.toml","target":{"name":"aya"},"executable":null}
{"reason":"compiler-artifact","manifest_path":"/w/agent-sync/Cargo.toml","target":{"name":"mesh"},"executable":"/t/mesh-1"}
{"reason":"compiler-artifact","manifest_path":"/w/ebpf-global-svc/Cargo.toml","target":{"name":"tables","kind":["test"]},"executable":"/t/tables-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(test_programs(messages), [("tables".to_owned(), PathBuf::from("/t/tables-1"))]);
    }

    #[test]
    fn series_of_releases() {
        assert_eq!(series("6.18.44-fc-v657\n"), "6.18");
        assert_eq!(series("6.1-rc3"), "6.1");
    }

    #[test]
    fn every_usual_scenario_exists() {
        for name in super::super::SCENARIOS {
            assert!(workspace::scenarios().join(format!("{name}.yaml")).is_file(), "{name}");
        }
    }
}
