use std::time::{Duration, Instant};

use crate::objects::{ObjectKind, Objects};

/// Whose word on identities, addresses and nodes is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Kubernetes' pods and nodes; identities are allocated here.
    Pods,
    /// Cilium's objects, addresses from its endpoints.
    Endpoints,
    /// Cilium's objects, addresses from its endpoint slices.
    Slices,
}

impl Basis {
    /// What the objects that there are ask for: Cilium's, if it left any.
    fn of(objects: &Objects) -> Self {
        let has = |kind| objects.count(kind) > 0;
        if has(ObjectKind::CiliumEndpoint) {
            Self::Endpoints
        } else if has(ObjectKind::CiliumEndpointSlice) {
            Self::Slices
        } else if has(ObjectKind::CiliumIdentity) || has(ObjectKind::CiliumNode) {
            Self::Endpoints
        } else {
            Self::Pods
        }
    }
}

/// A change of the basis at run time is a whole cluster told anew. It waits until the objects have asked
/// for the same thing this long: Cilium comes and goes object by object.
pub(super) const SETTLE: Duration = Duration::from_secs(10);

/// Which basis holds.
#[derive(Debug)]
pub(super) struct Choice {
    current: Option<Basis>,
    doubt: Option<Doubt>,
}

#[derive(Debug)]
struct Doubt {
    wanted: Basis,
    since: Instant,
    /// The objects that are exported are gone, so that nobody can say what is still valid.
    frozen: bool,
}

impl Choice {
    /// Undecided.
    pub(super) const fn new() -> Self {
        Self { current: None, doubt: None }
    }

    /// Looks at the objects; returns the basis that held so far if everything has to be computed again.
    ///
    /// The first objects decide at once: a source that may have Cilium's hands on all that it finds at the
    /// start in one piece.
    pub(super) fn decide(&mut self, objects: &Objects, now: Instant) -> Option<Basis> {
        let wanted = Basis::of(objects);
        let Some(current) = self.current else {
            self.current = Some(wanted);
            return None;
        };
        let Some(doubt) = &mut self.doubt else {
            if wanted != current {
                self.doubt = Some(Doubt { wanted, since: now, frozen: current != Basis::Pods });
            }
            return None;
        };
        if wanted == current && !doubt.frozen {
            self.doubt = None;
            return None;
        }
        if doubt.wanted != wanted {
            (doubt.wanted, doubt.since) = (wanted, now);
        }
        if now.saturating_duration_since(doubt.since) < SETTLE {
            return None;
        }
        self.doubt = None;
        self.current.replace(wanted)
    }

    /// Objects have been seen.
    pub(super) const fn is_decided(&self) -> bool {
        self.current.is_some()
    }

    /// The basis that holds.
    pub(super) fn current(&self) -> Basis {
        self.current.unwrap_or(Basis::Pods)
    }

    /// Identities, addresses and nodes stay as they are until it is clear whose word counts.
    pub(super) fn is_frozen(&self) -> bool {
        self.doubt.as_ref().is_some_and(|doubt| doubt.frozen)
    }
}
