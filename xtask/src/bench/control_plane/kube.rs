//! A made-up API server.

use super::Bench;
use super::process::Process;
use crate::bench::interrupt;
use anyhow::{Context as _, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much it has.
pub(super) struct Size {
    nodes: u32,
    identities: u32,
    endpoints: u32,
    services: u32,
    cilium: bool,
}

impl Size {
    /// That of which Cilium's figures are known.
    pub(super) const CILIUM: Self =
        Self { nodes: 20, identities: 200, endpoints: 2000, services: 200, cilium: true };
    /// The same without Cilium's objects.
    pub(super) const PODS: Self = Self { cilium: false, ..Self::CILIUM };
    pub(super) const EMPTY: Self = Self { nodes: 0, identities: 0, endpoints: 0, services: 0, cilium: true };
}

/// A `fake-kube`; killed when dropped.
pub(super) struct Kube {
    _process: Process,
    kubeconfig: PathBuf,
}

impl Kube {
    /// Starts one and waits until it listens.
    pub(super) fn start(bench: &Bench, size: &Size) -> anyhow::Result<Self> {
        let dir = bench.scratch.0.join("kube");
        // Of an earlier case: a kubeconfig tells that the server listens.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let kubeconfig = dir.join("kubeconfig");
        let mut arguments = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--nodes={}", size.nodes),
            format!("--identities={}", size.identities),
            format!("--endpoints={}", size.endpoints),
            format!("--services={}", size.services),
            "--backends=20".to_owned(),
        ];
        arguments.extend((!size.cilium).then(|| "--plain".to_owned()));
        let process = Process::start(&bench.programs.join("fake-kube"), &arguments, &dir.join("log"))?;
        wait_for(&kubeconfig, &dir.join("log"))?;
        Ok(Self { _process: process, kubeconfig })
    }

    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }
}

/// Waits for a file with something in it.
pub(super) fn wait_for(file: &Path, log: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::metadata(file).map_or(0, |found| found.len()) == 0 {
        interrupt::check()?;
        ensure!(
            Instant::now() < deadline,
            "there is no {}; {}",
            file.display(),
            fs::read_to_string(log).context("and no log")?
        );
        pause();
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when another process has written a file")]
fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}
