//! The folder in a BPF file system that outlives the agent.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use crate::{DatapathError, sys};

const BPFFS: &str = "/sys/fs/bpf";

/// Names of one agent's pins, and the lock that keeps a second agent out.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    lock: File,
}

impl Pins {
    /// Creates the folders, mounting a BPF file system if there is none.
    pub(super) fn open(root: &Path) -> Result<Self, DatapathError> {
        mount_if_missing(root)?;
        for folder in [root.join("maps"), root.join("links")] {
            fs::create_dir_all(&folder).map_err(|source| failed("create", &folder, source))?;
        }
        let lock = File::open(root).map_err(|source| failed("open", root, source))?;
        lock_root(&lock, root)?;
        Ok(Self { root: root.to_owned(), lock })
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    /// Where a map waits that is to take the place of [`Self::map`].
    pub(super) fn next_map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(format!("{name}-next"))
    }

    /// Names of all pinned links.
    pub(super) fn links(&self) -> Result<Vec<String>, DatapathError> {
        let folder = self.root.join("links");
        let entries = fs::read_dir(&folder).map_err(|source| failed("read", &folder, source))?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // An agent that could not make its first map leaves no folders behind. Nothing that holds a pin
        // can be removed this way.
        if fs::remove_dir(self.root.join("maps")).is_ok() {
            let _ = fs::remove_dir(self.root.join("links"));
            let _ = fs::remove_dir(&self.root);
        }
        sys::unlock(&self.lock);
    }
}

/// Keeps everybody else out as long as `file`, the opened root, is open.
pub(super) fn lock_root(file: &File, root: &Path) -> Result<(), DatapathError> {
    sys::lock(file, false).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => DatapathError::InUse { root: root.to_owned() },
        _ => failed("lock", root, source),
    })
}

/// Takes a pinned link off its hook and removes the pin. One that is gone is fine.
pub(super) fn detach(path: &Path) -> Result<(), DatapathError> {
    if let Ok(link) = sys::open_pin(path) {
        // It fails if the interface or cgroup is gone, and with it the attachment.
        let _ = sys::detach_link(link.as_fd());
    }
    remove(path)
}

/// Removes a pin. One that is gone is fine.
pub(super) fn remove(path: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, source)),
        _ => Ok(()),
    }
}

/// Gives a pin another name, in place of what has that name. What was pinned there lives on where it is in use.
pub(super) fn replace(from: &Path, to: &Path) -> Result<(), DatapathError> {
    fs::rename(from, to).map_err(|source| failed("rename", from, source))
}

/// Removes the whole folder: links first, so that no program runs on maps that are half gone.
pub(super) fn remove_all(root: &Path) -> Result<(), DatapathError> {
    let steps: [(_, fn(&Path) -> _); 2] = [(root.join("links"), detach), (root.join("maps"), remove)];
    for (folder, remove) in steps {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(failed("read", &folder, source)),
        };
        for entry in entries.flatten() {
            remove(&entry.path())?;
        }
        fs::remove_dir(&folder).map_err(|source| failed("remove", &folder, source))?;
    }
    match fs::remove_dir(root) {
        // A file system of its own, mounted there.
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy) => {
            Ok(())
        }
        Err(source) => Err(failed("remove", root, source)),
        Ok(()) => Ok(()),
    }
}

/// Mounts at the usual place if the pins belong there, else on the pins' own folder.
fn mount_if_missing(root: &Path) -> Result<(), DatapathError> {
    if in_bpffs(root) {
        return Ok(());
    }
    let point = if root.starts_with(BPFFS) { Path::new(BPFFS) } else { root };
    if point == root {
        fs::create_dir_all(root).map_err(|source| failed("create", root, source))?;
    }
    // Two agents that start together must not mount one file system over the other's pins.
    let below = File::open(point).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DatapathError::NoBpf { reason: format!("there is no {BPFFS}") },
        _ => failed("open", point, source),
    })?;
    sys::lock(&below, true).map_err(|source| failed("lock", point, source))?;
    if in_bpffs(root) {
        return Ok(());
    }
    sys::mount_bpffs(point).map_err(|source| failed("mount a BPF file system on", point, source))
}

/// Looks at the closest ancestor that exists.
fn in_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        .is_some_and(|ancestor| sys::is_bpffs(ancestor).unwrap_or(false))
}

pub(super) fn failed(operation: &'static str, path: &Path, source: io::Error) -> DatapathError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            DatapathError::NotPermitted { action: format!("{operation} {}", path.display()) }
        }
        _ => DatapathError::File { operation, path: path.to_owned(), source },
    }
}
