use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc as wake;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::directory::{self, Listing};
use super::files::{Conflict, Files, Problem};
use super::settle::{Decisions, Settle};
use crate::objects::Change;
use crate::source::SourceEvent;

/// Follows the manifests below `root` on a thread of its own, until the receiver is dropped.
///
/// # Errors
/// The directory cannot be read now. Later on it may come and go.
pub fn watch(root: PathBuf) -> Result<mpsc::Receiver<SourceEvent>, WatchError> {
    if let Err(error) = directory::list(&root) {
        return Err(WatchError { root, error });
    }
    let (out, events) = mpsc::channel(16);
    let thread = thread::Builder::new().name("manifests".to_owned());
    thread
        .spawn({
            let root = root.clone();
            move || Follower::new(root, out).run()
        })
        .map_err(|error| WatchError { root, error })?;
    Ok(events)
}

/// The operator named a directory that cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the manifests in {}: {error}", root.display())]
pub struct WatchError {
    root: PathBuf,
    error: io::Error,
}

/// Events may be lost (links to elsewhere, directories that are replaced): a look at the whole tree
/// this often finds what they missed.
const RESCAN: Duration = Duration::from_secs(1);
/// Longest time that files which keep changing may hold up the first full state.
const FIRST_SCAN: Duration = Duration::from_secs(2);

struct Follower {
    root: PathBuf,
    out: mpsc::Sender<SourceEvent>,
    started: Instant,
    settle: Settle,
    files: Files,
    synced: bool,
    broken: usize,
    complaints: BTreeSet<String>,
    conflicts: BTreeSet<Conflict>,
}

/// Nobody listens any more.
struct Closed;

impl Follower {
    fn new(root: PathBuf, out: mpsc::Sender<SourceEvent>) -> Self {
        Self {
            root,
            out,
            started: Instant::now(),
            settle: Settle::default(),
            files: Files::default(),
            synced: false,
            broken: 0,
            complaints: BTreeSet::new(),
            conflicts: BTreeSet::new(),
        }
    }

    fn run(mut self) {
        // One pending wake-up is enough, whatever the number of events.
        let (waker, wakes) = wake::sync_channel(1);
        let mut notifier = Notifier::new(waker.clone());
        // Held, so that waiting is waiting even if there is no notifier.
        let _waker = waker;
        while !self.out.is_closed() {
            let Ok(look_again) = self.look(&mut notifier) else { return };
            // Woken or not, we look.
            let _ = wakes.recv_timeout(look_again.unwrap_or(RESCAN).min(RESCAN));
        }
    }

    /// One look at everything; returns when to look again at the latest.
    fn look(&mut self, notifier: &mut Notifier) -> Result<Option<Duration>, Closed> {
        let listing = match directory::list(&self.root) {
            Ok(listing) => listing,
            Err(error) => {
                self.complain([format!(
                    "cannot read {}: {error}; its last state stands",
                    self.root.display()
                )]);
                return Ok(None);
            }
        };
        notifier.follow(&self.root, listing.root);
        self.complain_about(&listing);
        let mut decisions =
            self.settle.decide(&listing.files, |name| listing.is_unknown(name), SystemTime::now());
        let changes = self.take(&mut decisions);
        if !changes.is_empty() {
            self.send(SourceEvent::Changes(changes))?;
        }
        if decisions.look_again.is_none() {
            self.warn_of_conflicts();
        }
        if self.broken != self.files.broken_count() {
            self.broken = self.files.broken_count();
            self.send(SourceEvent::Broken(self.broken))?;
        }
        let settled = decisions.look_again.is_none() || self.started.elapsed() > FIRST_SCAN;
        if settled && !self.synced {
            self.synced = true;
            self.send(SourceEvent::Synced)?;
        }
        Ok(decisions.look_again)
    }

    fn take(&mut self, decisions: &mut Decisions) -> Vec<Change> {
        let mut changes = Vec::new();
        for (name, stamp) in std::mem::take(&mut decisions.read) {
            let Some(content) = directory::read(&self.root, &name, &stamp) else {
                decisions.look_again_after(Duration::from_millis(1));
                continue;
            };
            self.settle.was_read(&name, stamp);
            let content = content.as_deref().map_err(Clone::clone);
            let (more, problem) = self.files.update(&name, content);
            changes.extend(more);
            self.report(&name, problem);
        }
        for name in &decisions.removed {
            changes.extend(self.files.remove(name));
        }
        changes
    }

    fn send(&self, event: SourceEvent) -> Result<(), Closed> {
        self.out.blocking_send(event).map_err(|_| Closed)
    }

    fn report(&self, name: &str, problem: Option<Problem>) {
        let path = self.root.join(name);
        match problem {
            Some(Problem::Broken { error, kept: 0 }) => {
                tracing::warn!("{}: {error}; nothing of this file counts until it is mended", path.display());
            }
            Some(Problem::Broken { error, kept }) => {
                tracing::warn!("{}: {error}; its last good state ({kept} objects) stands", path.display());
            }
            Some(Problem::Mended) => tracing::info!("{} can be read again", path.display()),
            None => {}
        }
    }

    fn complain_about(&mut self, listing: &Listing) {
        let complaints = listing.unreadable.iter().map(|(directory, error)| {
            let path = self.root.join(directory);
            format!("cannot read {}: {error}; the last state of its files stands", path.display())
        });
        self.complain(complaints.collect::<Vec<_>>());
    }

    /// Says what was not said at the last look.
    fn complain(&mut self, complaints: impl IntoIterator<Item = String>) {
        let complaints: BTreeSet<String> = complaints.into_iter().collect();
        for new in complaints.difference(&self.complaints) {
            tracing::warn!("{new}");
        }
        self.complaints = complaints;
    }

    fn warn_of_conflicts(&mut self) {
        let conflicts = self.files.conflicts();
        for new in conflicts.difference(&self.conflicts) {
            tracing::warn!("{new}");
        }
        self.conflicts = conflicts;
    }
}

/// Wakes the follower when the kernel says that something below the root changes.
struct Notifier {
    watcher: Option<RecommendedWatcher>,
    root: Option<(u64, u64)>,
}

impl Notifier {
    fn new(waker: wake::SyncSender<()>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !is_a_look(event.kind)) {
                // Full means that a wake-up is pending already.
                let _ = waker.try_send(());
            }
        });
        let watcher = watcher.inspect_err(warn_of_polling).ok();
        Self { watcher, root: None }
    }

    /// Watches the root; again if another directory has taken its place.
    fn follow(&mut self, root: &Path, inode: (u64, u64)) {
        let Some(watcher) = self.watcher.as_mut().filter(|_| self.root != Some(inode)) else { return };
        if self.root.replace(inode).is_some() {
            // It may be gone with the directory.
            let _ = watcher.unwatch(root);
        }
        if let Err(error) = watcher.watch(root, RecursiveMode::Recursive) {
            warn_of_polling(&error);
        }
    }
}

fn warn_of_polling(error: &notify::Error) {
    tracing::warn!("no change notifications for the manifests ({error}): looking every {RESCAN:?} instead");
}

/// Our own looks at the files make events too.
fn is_a_look(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
        EventKind::Access(_) => true,
        _ => false,
    }
}
