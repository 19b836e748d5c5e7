//! The directory of remote clusters: one etcd configuration per file, the file's name is the cluster's.
//!
//! Edge. Follows Cilium's rules, so that a Secret mounted for its agents works as it is: a file counts
//! only if it contains `endpoints:` (keys, certificates and `..data` lie beside it); a file named after
//! the own cluster is ignored; contents are compared by hash, so that touching a file does nothing.
//! Unlike Cilium's, an empty file is one that is just being written, not the end of a connection.
//! A Secret mount replaces its contents by swapping a symlink: the directory itself is watched, and
//! re-read in whole after every event and once in [`RESCAN`] in case an event was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tracing::{info, warn};

use crate::cluster::ClusterName;

/// The directory is read this often even without an event.
const RESCAN: Duration = Duration::from_secs(1);
/// Events that follow each other this closely are one change.
const SETTLE: Duration = Duration::from_millis(20);
/// An etcd configuration is a few lines; what is larger is not one.
const MAX_FILE: u64 = 256 * 1024;

/// What happened to the set of remote clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigChange {
    /// A cluster appeared or its configuration changed: (re)connect.
    Set {
        /// The file's name.
        name: ClusterName,
        /// Its etcd configuration.
        path: PathBuf,
    },
    /// The file is gone or no configuration any more: drain this cluster.
    Removed {
        /// The file's name.
        name: ClusterName,
    },
}

/// The directory cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigDirError {
    /// It cannot be read now; at start this ends the program.
    #[error(
        "cannot read the directory of remote clusters {}: {source}; create it (an empty one is a cluster without remotes) or correct --clustermesh-config",
        path.display()
    )]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// inotify refused a watch.
    #[error("cannot watch {}: {source}; raise fs.inotify.max_user_watches / max_user_instances", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: notify::Error,
    },
}

/// Reads `dir` at once and follows it: gives its present contents, and then each change. The watcher
/// ends when the receiver is dropped. Nothing is told of `own`.
///
/// # Errors
/// [`ConfigDirError`] if the directory cannot be read or watched at all.
pub async fn watch(
    dir: &Path,
    own: &ClusterName,
) -> Result<(Vec<ConfigChange>, mpsc::Receiver<ConfigChange>), ConfigDirError> {
    let unreadable = |source| ConfigDirError::Unreadable { path: dir.into(), source };
    let mut known = Known::default();
    let mut refused = BTreeSet::new();
    let initial = known.update(scan(dir, own, &mut refused).map_err(unreadable)?);

    // One pending wake-up stands for any number of events.
    let (wake, mut events) = mpsc::channel::<()>(1);
    let watch_error = |source| ConfigDirError::Watch { path: dir.into(), source };
    let mut watcher = notify::recommended_watcher(move |event| {
        if may_be_a_change(&event) {
            // Full: a wake-up is pending already.
            let _ = wake.try_send(());
        }
    })
    .map_err(watch_error)?;
    watcher.watch(dir, RecursiveMode::NonRecursive).map_err(watch_error)?;

    let (tx, rx) = mpsc::channel(64);
    let (dir, own) = (dir.to_path_buf(), own.clone());
    tokio::spawn(async move {
        let _watcher = watcher;
        let mut rescan = interval(RESCAN);
        rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            tokio::select! {
                () = tx.closed() => return,
                _ = rescan.tick() => {}
                _ = events.recv() => {
                    let settled = Instant::now() + SETTLE;
                    while let Ok(Some(())) = timeout_at(settled, events.recv()).await {}
                }
            }
            let changes = match scan(&dir, &own, &mut refused) {
                Ok(files) => {
                    if std::mem::take(&mut failing) {
                        info!(dir = %dir.display(), "the directory of remote clusters is readable again");
                    }
                    known.update(files)
                }
                // An unreadable directory says nothing about its clusters: keep them.
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        warn!(dir = %dir.display(), %error, "cannot read the directory of remote clusters; keeping what is connected");
                    }
                    Vec::new()
                }
            };
            for change in changes {
                if tx.send(change).await.is_err() {
                    return;
                }
            }
        }
    });
    Ok((initial, rx))
}

/// Whether to look again. Our own looks make events too: waking for them would never end.
fn may_be_a_change(event: &notify::Result<notify::Event>) -> bool {
    let Ok(event) = event else { return true };
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
    }
}

/// A file of the directory.
enum File {
    /// A configuration, with the hash of its contents.
    Configuration(PathBuf, u64),
    /// Empty: somebody has truncated it and will write it next.
    Unwritten,
}

/// The configuration files last seen, by cluster.
#[derive(Default)]
struct Known(BTreeMap<ClusterName, u64>);

impl Known {
    /// Replaces what is known by `files` and tells the difference: removals first, so that a renamed
    /// cluster lets go of its ID before the new name asks for it.
    fn update(&mut self, files: BTreeMap<ClusterName, File>) -> Vec<ConfigChange> {
        let mut changes: Vec<_> = self
            .0
            .keys()
            .filter(|name| !files.contains_key(*name))
            .map(|name| ConfigChange::Removed { name: name.clone() })
            .collect();
        self.0.retain(|name, _| files.contains_key(name));
        for (name, file) in files {
            if let File::Configuration(path, hash) = file
                && self.0.insert(name.clone(), hash) != Some(hash)
            {
                changes.push(ConfigChange::Set { name, path });
            }
        }
        changes
    }
}

/// All files in `dir` that are configurations, or may become one.
/// What cannot be one is told once and remembered in `refused`.
fn scan(
    dir: &Path,
    own: &ClusterName,
    refused: &mut BTreeSet<PathBuf>,
) -> io::Result<BTreeMap<ClusterName, File>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        // metadata() follows symlinks: Secret mounts consist of them.
        let Ok(meta) = std::fs::metadata(&path) else { continue };
        if !meta.is_file() || meta.len() > MAX_FILE {
            continue;
        }
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if !text.is_empty() && !text.contains("endpoints:") {
            continue;
        }
        match name.parse::<ClusterName>() {
            Ok(name) if name == *own => {}
            Ok(name) if text.is_empty() => {
                found.insert(name, File::Unwritten);
            }
            Ok(name) => {
                let mut hasher = DefaultHasher::new();
                text.hash(&mut hasher);
                found.insert(name, File::Configuration(path, hasher.finish()));
            }
            // Temporary files of editors and of our own CLI start with a dot.
            Err(_) if name.starts_with('.') => {}
            Err(_) if refused.contains(&path) => {}
            Err(error) => {
                warn!(file = %path.display(), %error, "ignored: the file's name must be a cluster's");
                refused.insert(path);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn name(s: &str) -> ClusterName {
        s.parse().unwrap()
    }

    async fn next(rx: &mut mpsc::Receiver<ConfigChange>) -> ConfigChange {
        tokio::time::timeout(Duration::from_secs(5), rx.recv()).await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn follows_files_and_ignores_what_is_no_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let file = |n: &str| dir.path().join(n);
        fs::write(file("alpha"), "endpoints:\n- http://own\n").unwrap();
        fs::write(file("beta"), "endpoints:\n- http://b\n").unwrap();
        fs::write(file("beta.etcd-client.crt"), "-----BEGIN CERTIFICATE-----").unwrap();
        fs::create_dir(file("gamma")).unwrap();
        let (initial, mut rx) = watch(dir.path(), &name("alpha")).await.unwrap();
        assert_eq!(initial, [ConfigChange::Set { name: name("beta"), path: file("beta") }]);

        fs::write(file("delta"), "endpoints:\n- http://d\n").unwrap();
        assert_eq!(next(&mut rx).await, ConfigChange::Set { name: name("delta"), path: file("delta") });
        // Same contents again: no event. The removal after it is the next thing we hear of.
        fs::write(file("delta"), "endpoints:\n- http://d\n").unwrap();
        fs::remove_file(file("beta")).unwrap();
        assert_eq!(next(&mut rx).await, ConfigChange::Removed { name: name("beta") });
        fs::write(file("delta"), "endpoints:\n- http://d2\n").unwrap();
        assert_eq!(next(&mut rx).await, ConfigChange::Set { name: name("delta"), path: file("delta") });
    }

    #[test]
    fn a_file_that_is_just_being_written_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("beta");
        let mut known = Known::default();
        let mut write = |text: &str| {
            fs::write(&path, text).unwrap();
            known.update(scan(dir.path(), &name("alpha"), &mut BTreeSet::new()).unwrap())
        };
        assert_eq!(write(""), []);
        assert_eq!(write("endpoints: [http://b]").len(), 1);
        assert_eq!(write(""), []);
        assert_eq!(write("endpoints: [http://b]"), []);
        assert_eq!(write("no configuration"), [ConfigChange::Removed { name: name("beta") }]);
    }

    #[tokio::test]
    async fn follows_the_symlink_swap_of_a_secret_mount() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let path = |n: &str| dir.path().join(n);
        fs::create_dir(path("..v1")).unwrap();
        fs::write(path("..v1/beta"), "endpoints: [http://1]").unwrap();
        fs::create_dir(path("..v2")).unwrap();
        fs::write(path("..v2/beta"), "endpoints: [http://2]").unwrap();
        symlink("..v1", path("..data")).unwrap();
        symlink("..data/beta", path("beta")).unwrap();
        let (initial, mut rx) = watch(dir.path(), &name("alpha")).await.unwrap();
        assert_eq!(initial, [ConfigChange::Set { name: name("beta"), path: path("beta") }]);
        symlink("..v2", path("..tmp")).unwrap();
        fs::rename(path("..tmp"), path("..data")).unwrap();
        assert_eq!(next(&mut rx).await, ConfigChange::Set { name: name("beta"), path: path("beta") });
    }

    #[test]
    fn a_look_at_the_directory_is_no_reason_for_another() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("beta"), "endpoints: [http://b]").unwrap();
        let (tx, events) = std::sync::mpsc::channel();
        let mut watcher = notify::recommended_watcher(move |event| {
            let _ = tx.send(event);
        })
        .unwrap();
        watcher.watch(dir.path(), RecursiveMode::NonRecursive).unwrap();
        assert_eq!(scan(dir.path(), &name("alpha"), &mut BTreeSet::new()).unwrap().len(), 1);
        let delta = dir.path().join("delta");
        fs::write(&delta, "endpoints: [http://d]").unwrap();
        // Events come in order: the first that wakes us must be the writer's.
        let first = events.iter().find(may_be_a_change).unwrap().unwrap();
        assert_eq!(first.paths, [delta]);
    }

    #[tokio::test]
    async fn a_missing_directory_is_an_error_that_says_what_to_do() {
        let error = watch(Path::new("/nonexistent/clustermesh"), &name("alpha")).await.unwrap_err();
        assert!(error.to_string().contains("--clustermesh-config"), "{error}");
    }
}
