//! `lab down`: leaves nothing of a lab behind, in whatever state it is.
//!
//! It does not need the lab's state: everything of a lab is found by its name.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::layout::Layout;
use super::netns;
use super::state::names;
use crate::wait::until;

/// Ends and removes everything that bears the lab's name, and checks that nothing is left. Returns whether
/// there was anything.
///
/// # Errors
/// What could not be removed.
pub(crate) async fn remove(layout: &Layout) -> anyhow::Result<bool> {
    let before = leftovers(layout);
    let cgroup = Cgroup::at(layout.cgroup());
    let deadline = Instant::now() + Duration::from_secs(10);
    // Again and again: a process that `up` had just started may have entered its cgroup after the first time.
    let ended = async || {
        cgroup.kill()?;
        Ok((!cgroup.is_populated()).then_some(()))
    };
    until(deadline, ended)
        .await?
        .with_context(|| format!("the kernel does not end the processes in {}", cgroup.path().display()))?;
    // Unpinned before their cgroups go: a pinned link keeps its program and maps alive.
    remove_tree(&layout.bpf())?;
    // Again here too: an `ip` of an `up` that was killed goes on until it has made all it was told to.
    until(deadline, async || {
        let namespaces = own_namespaces(layout);
        let commands: String = namespaces.iter().map(|name| format!("netns del {name}\n")).collect();
        netns::ip(None, &commands).await?;
        Ok(namespaces.is_empty().then_some(()))
    })
    .await?;
    until(deadline, async || {
        cgroup.kill()?;
        Ok(cgroup.remove().is_ok().then_some(()))
    })
    .await?;
    remove_tree(&layout.dir())?;
    for shared in [layout.cgroup(), layout.bpf()] {
        // Only if this was the last lab: fails otherwise, as it should.
        let _ = shared.parent().map(std::fs::remove_dir);
    }
    let after = leftovers(layout);
    if !after.is_empty() {
        bail!("cannot remove all of lab {}; left are: {}", layout.lab(), after.join(", "));
    }
    Ok(!before.is_empty())
}

/// Copies the logs of a lab that failed to start to where they survive it.
pub(crate) fn keep_logs(layout: &Layout) -> Option<PathBuf> {
    let kept = std::env::temp_dir().join(format!("clustermesh-lab-{}-logs", layout.lab()));
    let _ = std::fs::remove_dir_all(&kept);
    let logs: Vec<PathBuf> =
        std::fs::read_dir(layout.logs()).ok()?.filter_map(|e| Some(e.ok()?.path())).collect();
    if logs.is_empty() || std::fs::create_dir(&kept).is_err() {
        return None;
    }
    for log in logs {
        let _ = log.file_name().map(|name| std::fs::copy(&log, kept.join(name)));
    }
    Some(kept)
}

/// Labs that left anything on this machine: run directories, cgroups, fabrics.
pub(crate) fn found(cgroups: &Path) -> Vec<String> {
    let mut found = names();
    let tree = std::fs::read_dir(cgroups.join("clustermesh")).into_iter().flatten().filter_map(Result::ok);
    found.extend(tree.filter(|e| e.path().is_dir()).filter_map(|e| e.file_name().into_string().ok()));
    found.extend(
        netns::names()
            .iter()
            .filter_map(|name| Some(name.strip_prefix("cm-")?.strip_suffix("-fabric")?.to_owned())),
    );
    found.sort();
    found.dedup();
    found
}

fn leftovers(layout: &Layout) -> Vec<String> {
    let paths = [layout.dir(), layout.cgroup(), layout.bpf()];
    let mut left: Vec<String> =
        paths.iter().filter(|path| path.exists()).map(|path| path.display().to_string()).collect();
    left.extend(own_namespaces(layout).into_iter().map(|name| format!("network namespace {name}")));
    left
}

/// Namespaces of this lab. Those of a lab whose name merely starts like this one's are not.
fn own_namespaces(layout: &Layout) -> Vec<String> {
    let prefix = layout.netns_prefix();
    let others: Vec<String> = names()
        .into_iter()
        .filter(|other| other != layout.lab())
        .map(|other| format!("cm-{other}-"))
        .filter(|other| other.starts_with(&prefix))
        .collect();
    let own =
        |name: &String| name.starts_with(&prefix) && !others.iter().any(|other| name.starts_with(other));
    netns::names().into_iter().filter(own).collect()
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
