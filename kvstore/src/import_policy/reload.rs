//! Follows the operator's file. Edge: the file system and its events.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use super::file::{PolicyFile, PolicyFileError};

/// The file is read this often even without an event.
const RESCAN: Duration = Duration::from_secs(2);

/// The operator's file, and what to do by it.
#[derive(Clone, Debug, Default)]
pub struct PolicySource {
    /// The file; none: what is plausible is allowed.
    pub path: Option<PathBuf>,
    /// Its rules are only audited.
    pub dry_run: bool,
}

/// The policy in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CurrentPolicy {
    /// The rules.
    pub file: PolicyFile,
    /// Why the file as it is now is not in force; then the one before is.
    pub error: Option<String>,
}

/// Reads the file at once and follows it; without one, what is plausible is allowed for good. A file that
/// becomes unreadable or wrong changes nothing but [`CurrentPolicy::error`]. The follower ends when all
/// receivers are dropped.
///
/// # Errors
/// The file is no policy now.
pub fn follow(source: PolicySource) -> Result<watch::Receiver<CurrentPolicy>, PolicyFileError> {
    let PolicySource { path, dry_run } = source;
    let file = path.as_deref().map(|path| load(path, dry_run)).transpose()?.unwrap_or_default();
    let (current, receiver) = watch::channel(CurrentPolicy { file, error: None });
    if let Some(path) = path {
        tokio::spawn(keep_reading(path, dry_run, current));
    }
    Ok(receiver)
}

fn load(path: &Path, dry_run: bool) -> Result<PolicyFile, PolicyFileError> {
    let file = PolicyFile::load(path)?;
    Ok(if dry_run { file.audited() } else { file })
}

async fn keep_reading(path: PathBuf, dry_run: bool, current: watch::Sender<CurrentPolicy>) {
    let (wake, mut woken) = mpsc::channel::<()>(1);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading makes events of access; waking for them would never end.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            // Full: it is to be woken already.
            let _ = wake.try_send(());
        }
    });
    // The folder: files are replaced, and mounted ones hang on a link that is swapped. What cannot be
    // watched is read now and then.
    let watcher = watcher.and_then(|mut watcher| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        watcher.watch(folder.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive).map(|()| watcher)
    });
    if let Err(error) = &watcher {
        warn!(file = %path.display(), %error, "cannot watch the import policy; reading it now and then");
    }
    let mut rescan = interval(RESCAN);
    rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = current.closed() => return,
            _ = rescan.tick() => {}
            Some(()) = woken.recv() => {}
        }
        current.send_if_modified(|current| current.take(load(&path, dry_run)));
    }
}

impl CurrentPolicy {
    /// Takes over what was read; tells whether anything changed.
    fn take(&mut self, read: Result<PolicyFile, PolicyFileError>) -> bool {
        let before = self.clone();
        match read {
            Ok(file) => *self = Self { file, error: None },
            Err(error) => self.error = Some(error.to_string()),
        }
        if *self == before {
            return false;
        }
        match &self.error {
            Some(error) => warn!(error, "the import policy is not usable; the one before stays in force"),
            None => info!("the import policy is in force"),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_file_is_in_force_and_a_broken_one_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.yaml");
        std::fs::write(&path, "default: {mode: audit}").unwrap();
        let mut current = follow(PolicySource { path: Some(path.clone()), dry_run: false }).unwrap();
        let first = current.borrow_and_update().clone();
        assert_eq!(first.error, None);
        let mut write = async |text: &str| {
            std::fs::write(dir.path().join("new"), text).unwrap();
            std::fs::rename(dir.path().join("new"), &path).unwrap();
            tokio::time::timeout(Duration::from_secs(20), current.changed()).await.unwrap().unwrap();
            current.borrow_and_update().clone()
        };
        let broken = write("default: {mod: audit}").await;
        assert_eq!(broken.file, first.file);
        assert!(broken.error.unwrap().contains("did you mean mode?"));
        let good = write("default: {mode: enforce}").await;
        assert_eq!((good.file, good.error), (PolicyFile::default(), None));
    }

    #[tokio::test]
    async fn a_wrong_file_at_start_is_an_error() {
        let nowhere = PolicySource { path: Some("/nonexistent/policy.yaml".into()), dry_run: false };
        assert!(follow(nowhere).is_err());
        assert_eq!(*follow(PolicySource::default()).unwrap().borrow(), CurrentPolicy::default());
    }
}
