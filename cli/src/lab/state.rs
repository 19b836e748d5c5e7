//! What a lab remembers between commands, and the lock that serialises them.
//!
//! `state.json` holds the topology, `CLUSTER/state.json` what was asked of a cluster and which pods it has.
//! Both are replaced atomically. A pod is written down before anything of it is made in the kernel, so that
//! a crash leaves nothing that the next command does not know of.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodSpec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::layout::{LABS, Layout};
use super::objects::{ObjectName, Objects};
use super::topology::TopologyFile;
use crate::error::usage;

/// What a lab is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LabState {
    pub(crate) topology: TopologyFile,
    /// Where the topology file was read from.
    pub(crate) file: PathBuf,
    pub(crate) created: Timestamp,
    /// Whether `up` ran to its end.
    pub(crate) complete: bool,
    /// Whether the lab runs apiservers and agents.
    pub(crate) mesh: bool,
}

/// What a cluster of a lab has been asked for, and what it has.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ClusterState {
    pub(crate) objects: Objects,
    pub(crate) pods: BTreeMap<ObjectName, PodState>,
    /// ClusterIPs, IPv4 first; kept as long as the service lives.
    pub(crate) cluster_ips: BTreeMap<ObjectName, Vec<IpAddr>>,
    /// Per node, the number of the pod address that was handed out last.
    pub(crate) last_pod_number: BTreeMap<String, u32>,
    /// Ties a new etcd to this lab; a fresh one gets another.
    pub(crate) etcd_token: String,
}

/// A pod that exists.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PodState {
    pub(crate) name: ObjectName,
    pub(crate) uid: String,
    /// The deployment it belongs to.
    pub(crate) owner: Option<String>,
    pub(crate) node: String,
    /// Number of its address in the node's pod CIDRs.
    pub(crate) number: u32,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) created: Timestamp,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) spec: PodSpec,
    pub(crate) ready: bool,
    /// Set while it terminates.
    pub(crate) deleted: Option<Timestamp>,
}

impl LabState {
    /// Loads the state of the lab.
    ///
    /// # Errors
    /// A usage error if no such lab exists.
    pub(crate) fn load(layout: &Layout) -> anyhow::Result<Self> {
        load(&layout.state_file())?.ok_or_else(|| {
            let known = names();
            let known = if known.is_empty() {
                "no lab runs".to_owned()
            } else {
                format!("running: {}", known.join(", "))
            };
            usage(format!(
                "there is no lab {:?} ({known}); start one with `clustermesh lab up FILE`",
                layout.lab()
            ))
        })
    }

    /// Writes the state.
    ///
    /// # Errors
    /// If the run directory cannot be written.
    pub(crate) fn save(&self, layout: &Layout) -> anyhow::Result<()> {
        save(&layout.state_file(), self)
    }
}

impl ClusterState {
    /// Loads the state of a cluster; a cluster that was never up is empty.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn load(layout: &Layout, cluster: &str) -> anyhow::Result<Self> {
        Ok(load(&layout.cluster_state(cluster))?.unwrap_or_default())
    }

    /// Writes the state.
    ///
    /// # Errors
    /// If the run directory cannot be written.
    pub(crate) fn save(&self, layout: &Layout, cluster: &str) -> anyhow::Result<()> {
        save(&layout.cluster_state(cluster), self)
    }
}

/// Held by a command that changes a lab.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Waits until no other command changes the lab.
    ///
    /// # Errors
    /// If the lock file cannot be made.
    pub(crate) fn acquire(layout: &Layout) -> anyhow::Result<Self> {
        let path = layout.lock_file();
        std::fs::create_dir_all(LABS).with_context(|| format!("cannot create {LABS}"))?;
        loop {
            let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
            // `down` removes the file while it holds the lock: whoever waited for it then holds a lock on
            // nothing and has to try again.
            let ours = file.metadata()?;
            match std::fs::metadata(&path) {
                Ok(current) if current.ino() == ours.ino() => return Ok(Self { file, path }),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => bail!("cannot read {}: {e}", path.display()),
            }
        }
    }

    /// Lets go of the lock and removes its file: the lab is gone.
    pub(crate) fn remove(self) {
        // Whoever comes later creates it again; nothing depends on it being gone.
        let _ = std::fs::remove_file(&self.path);
        drop(self.file);
    }
}

/// Labs of this machine, half-made ones included.
pub(crate) fn names() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(LABS) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|e| e.path().is_dir())
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Replaces `path` by `contents` in one step; readers see the old file or the new one.
///
/// # Errors
/// If the directory cannot be written.
pub(crate) fn write_atomically(path: &Path, contents: &[u8], mode: u32) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The name starts with a dot and has no manifest's extension: whoever watches the directory skips it.
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(mode);
        options.open(&temporary)?.write_all(contents)?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display())).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

fn load<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => bail!("cannot read {}: {e}", path.display()),
    };
    let state = serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} was written by another version; remove the lab with `clustermesh lab down`",
            path.display()
        )
    })?;
    Ok(Some(state))
}

fn save(path: &Path, state: &impl Serialize) -> anyhow::Result<()> {
    write_atomically(path, &serde_json::to_vec_pretty(state)?, 0o644)
}
