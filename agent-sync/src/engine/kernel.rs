//! Which interfaces run the pods' program.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ebpf_global_svc::{Datapath, DatapathError};
use tracing::{info, warn};

/// An interface may vanish between the look-up and the attachment; most retries have nothing to do.
const RETRY: Duration = Duration::from_secs(1);

/// Keeps the program on exactly the interfaces of this node's pods.
#[derive(Debug, Default)]
pub(super) struct PodHooks {
    attached: BTreeSet<u32>,
    failed: BTreeSet<u32>,
    last_error: Option<String>,
    retry_at: Option<Instant>,
    /// Whether the last [`Self::sync`] was allowed to detach; none: there was none.
    could_detach: Option<bool>,
}

impl PodHooks {
    /// Starts from what a predecessor attached.
    pub(super) fn new(datapath: Option<&Datapath>) -> Result<Self, DatapathError> {
        let attached = match datapath {
            Some(datapath) => datapath.attached_pods()?.into_iter().collect(),
            None => BTreeSet::new(),
        };
        Ok(Self { attached, ..Self::default() })
    }

    /// Whether [`Self::sync`] has something to do although no pod changed.
    pub(super) fn wants_sync(&self, may_detach: bool, now: Instant) -> bool {
        self.could_detach != Some(may_detach) || self.retry_at.is_some_and(|at| at <= now)
    }

    pub(super) fn sync(
        &mut self,
        wanted: BTreeSet<u32>,
        may_detach: bool,
        now: Instant,
        datapath: &mut Datapath,
    ) {
        self.could_detach = Some(may_detach);
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.failed.clear();
        }
        self.failed.retain(|ifindex| wanted.contains(ifindex));
        if self.failed.is_empty() {
            self.last_error = None;
        }
        for ifindex in wanted.difference(&self.attached.clone()) {
            if self.failed.contains(ifindex) {
                continue;
            }
            match datapath.attach_pod(*ifindex) {
                Ok(()) => {
                    info!(ifindex, "attached to a pod's interface");
                    self.attached.insert(*ifindex);
                }
                Err(error) => self.note(*ifindex, &error, now),
            }
        }
        if may_detach {
            for ifindex in self.attached.difference(&wanted).copied().collect::<Vec<_>>() {
                // What cannot be detached is tried again with the next change: it does no harm.
                match datapath.detach_pod(ifindex) {
                    Ok(()) => drop(self.attached.remove(&ifindex)),
                    Err(error) => warn!(ifindex, %error, "cannot detach from a pod's interface"),
                }
            }
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    pub(super) fn pending(&self) -> usize {
        self.failed.len()
    }

    fn note(&mut self, ifindex: u32, error: &DatapathError, now: Instant) {
        let text = error.to_string();
        if self.last_error.as_ref() != Some(&text) {
            warn!(ifindex, %error, "cannot attach to a pod's interface; retrying");
        }
        self.last_error = Some(text);
        self.failed.insert(ifindex);
        self.retry_at.get_or_insert(now + RETRY);
    }
}
