//! Where things are, and how they are built.

use crate::shell;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Packages whose programs the demo, the scenarios and the bench run.
const PROGRAMS: [&str; 6] = [
    "clustermesh",
    "clustermesh-agent",
    "clustermesh-apiserver",
    "mesh-load",
    "mesh-probe",
    "multi-kind-tests",
];

/// Root of the workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap_or_else(|_| PathBuf::from("."))
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// How much the compiler optimises.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Quick to build: for the demo and the tests.
    Dev,
    /// For measurements.
    Release,
}

/// Builds the programs; gives the folder they are in.
pub(crate) fn build_programs(profile: Profile) -> anyhow::Result<PathBuf> {
    build(profile, &PROGRAMS)
}

/// Builds the programs of some packages; gives the folder they are in.
pub(crate) fn build(profile: Profile, packages: &[&str]) -> anyhow::Result<PathBuf> {
    let mut command = cargo();
    command.arg("build");
    if profile == Profile::Release {
        command.arg("--release");
    }
    for package in packages {
        command.args(["-p", package]);
    }
    shell::run(&mut command)?;
    Ok(target().join(match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    }))
}

/// Builds all programs for the tests that run them; gives the folder they are in. Together with the crates'
/// tests, which are there already: by themselves the programs need fewer features of some libraries, which
/// would all be compiled once more.
pub(crate) fn build_beside_tests() -> anyhow::Result<PathBuf> {
    shell::run(cargo().args(["build", "--workspace", "--bins", "--tests"]))?;
    Ok(target().join("debug"))
}

/// Cargo's target folder.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// Whether we are the superuser, as labs and the kernel's programs need it.
pub(crate) fn is_root() -> bool {
    shell::try_output("id", &["-u"]).is_some_and(|uid| uid.trim() == "0")
}

/// The scenarios.
pub(crate) fn scenarios() -> PathBuf {
    root().join("multi-kind-tests/scenarios")
}
