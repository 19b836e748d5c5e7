//! Control groups: which processes belong to what, and how to end them all.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal};

/// A cgroup of the unified hierarchy, existing or not.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it, with its parents.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn create(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.0).with_context(|| format!("cannot create cgroup {}", self.0.display()))
    }

    /// Moves the calling process into it.
    ///
    /// # Errors
    /// If the cgroup does not exist.
    pub(crate) fn join(&self) -> anyhow::Result<()> {
        let file = self.0.join("cgroup.procs");
        std::fs::OpenOptions::new()
            .write(true)
            .open(&file)
            .and_then(|mut f| f.write_all(b"0"))
            .with_context(|| format!("cannot enter {}", file.display()))
    }

    /// Processes in this very cgroup, children not included. None if it does not exist.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let text = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok().and_then(Pid::from_raw)).collect()
    }

    /// Whether a process lives in it or below. Zombies do not count.
    pub(crate) fn is_populated(&self) -> bool {
        std::fs::read_to_string(self.0.join("cgroup.events"))
            .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
    }

    /// Sends `signal` to every process in it and below; returns to how many.
    pub(crate) fn signal(&self, signal: Signal) -> usize {
        let mut sent = 0;
        for pid in self.processes() {
            // It may have ended by itself a moment ago.
            sent += usize::from(rustix::process::kill_process(pid, signal).is_ok());
        }
        sent + self.children().iter().map(|child| child.signal(signal)).sum::<usize>()
    }

    /// Ends everything in it and below, forks in progress included, without a chance to object.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn kill(&self) -> anyhow::Result<()> {
        match std::fs::write(self.0.join("cgroup.kill"), "1") {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot end the processes in {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }

    /// Removes it and everything below; fails as long as a process lives in it.
    ///
    /// # Errors
    /// If a process lives in it.
    pub(crate) fn remove(&self) -> std::io::Result<()> {
        for child in self.children() {
            child.remove()?;
        }
        match std::fs::remove_dir(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn children(&self) -> Vec<Self> {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().filter_map(Result::ok);
        entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| Self(e.path())).collect()
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside the old hierarchy.
///
/// # Errors
/// If it is not mounted.
pub(crate) fn mount_point() -> anyhow::Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
    find_mount(&mounts)
        .ok_or_else(|| anyhow!("cgroup2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup"))
}

fn find_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_unified_hierarchy() {
        let hybrid =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount("proc /proc proc rw 0 0\n"), None);
    }
}
