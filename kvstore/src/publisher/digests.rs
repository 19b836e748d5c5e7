//! What is stated of each owned prefix: the digest of what we have written, and when the events of the
//! newest changes were seen.
//!
//! The sum follows each confirmed write. It can be stated for a revision only while no write is under way:
//! at such a moment all that we have ever written is at or below the highest revision known. The last such
//! moment is remembered, and stated some time after a change, so that a burst costs one small write.
//!
//! What somebody else writes under the prefix is in no sum: the record says what should be there.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::spec::{Origin, OwnedPrefix};
use crate::digest::{Digest, DigestRecord, MAX_RECENT, SourceTime, Timed, record_hash};

/// From a change to the statement of it, and so between two statements.
const DELAY: Duration = Duration::from_millis(200);
/// Changes that wait to be stated or for their origin to become known. A storm outgrows it; then the
/// oldest are not traced.
const MAX_CHANGES: usize = 4 * MAX_RECENT;

/// The statements of all owned prefixes that want one.
pub(super) struct Digests {
    by_prefix: Vec<Option<Prefix>>,
    /// Prefixes of which there may be something to state.
    active: BTreeSet<usize>,
}

struct Prefix {
    /// Length of the prefix; what follows it in a key counts.
    data: usize,
    key: Arc<str>,
    /// Of what stands under the prefix by our will, as far as is known.
    digest: Digest,
    /// Highest revision that anything of it is known from.
    revision: i64,
    /// Everything desired stood there once: from then on the digest is worth stating.
    complete: bool,
    /// Digest and revision when last no write was under way.
    settled: Option<(Digest, i64)>,
    /// What was stated last to this etcd.
    stated: Option<Digest>,
    due: Option<Instant>,
    /// Changes to be stated.
    timed: VecDeque<Timed>,
    /// Changes whose time is not known yet: our revision, and that of the mirrored etcd.
    untimed: VecDeque<(i64, i64)>,
    /// What the mirrored etcd has told of its revisions.
    source: VecDeque<Timed>,
}

impl Digests {
    pub(super) fn new(owned: &[OwnedPrefix]) -> Self {
        let prefix = |owned: &OwnedPrefix| {
            let key = owned.digest.as_deref()?.into();
            Some(Prefix::new(owned.prefix.len(), key))
        };
        Self { by_prefix: owned.iter().map(prefix).collect(), active: BTreeSet::new() }
    }

    /// Another etcd: nothing stands there by our will yet.
    pub(super) fn start_over(&mut self) {
        for prefix in self.by_prefix.iter_mut().flatten() {
            *prefix = Prefix::new(prefix.data, prefix.key.clone());
        }
        self.active.clear();
    }

    /// A key has `value` by our will, which was seen at or written with `revision`. `ours` is the key's
    /// hash, kept with it.
    pub(super) fn confirm(
        &mut self,
        index: usize,
        key: &str,
        ours: &mut Option<u64>,
        value: Option<&[u8]>,
        revision: i64,
    ) {
        let Some(prefix) = &mut self.by_prefix[index] else { return };
        let hash = value.map(|value| record_hash(&key[prefix.data..], value));
        prefix.digest.replace(*ours, hash);
        prefix.revision = prefix.revision.max(revision);
        *ours = hash;
        self.active.insert(index);
    }

    /// The prefix was listed at `revision`.
    pub(super) fn listed(&mut self, index: usize, revision: i64) {
        if let Some(prefix) = self.by_prefix.get_mut(index).and_then(Option::as_mut) {
            prefix.revision = prefix.revision.max(revision);
            self.active.insert(index);
        }
    }

    /// A change that came from `origin` was committed.
    pub(super) fn changed(&mut self, index: usize, revision: i64, origin: Origin) {
        let Some(prefix) = &mut self.by_prefix[index] else { return };
        let at = match origin {
            Origin::Event(at) => Some(at),
            Origin::Revision(source) => time_of(source, &prefix.source),
        };
        match (at, origin) {
            (Some(at), _) => push(&mut prefix.timed, Timed { revision, at }, MAX_CHANGES),
            (None, Origin::Revision(source)) => push(&mut prefix.untimed, (revision, source), MAX_CHANGES),
            (None, Origin::Event(_)) => {}
        }
        self.active.insert(index);
    }

    /// The mirrored etcd tells when the events of its revisions were seen.
    pub(super) fn source_stated(&mut self, index: usize, recent: &[Timed]) {
        let Some(prefix) = &mut self.by_prefix[index] else { return };
        recent.iter().for_each(|timed| push(&mut prefix.source, *timed, 2 * MAX_RECENT));
        let (timed, source) = (&mut prefix.timed, &prefix.source);
        prefix.untimed.retain(|(revision, at_source)| match time_of(*at_source, source) {
            Some(at) => {
                push(timed, Timed { revision: *revision, at }, MAX_CHANGES);
                false
            }
            None => true,
        });
        self.active.insert(index);
    }

    /// All desired stands under the prefix.
    pub(super) fn complete(&mut self, index: usize) {
        if let Some(prefix) = self.by_prefix[index].as_mut().filter(|prefix| !prefix.complete) {
            prefix.complete = true;
            self.active.insert(index);
        }
    }

    /// Prefixes of which there may be something to state.
    pub(super) fn active(&self) -> Vec<usize> {
        self.active.iter().copied().collect()
    }

    /// No write to the prefix is under way.
    pub(super) fn settled(&mut self, index: usize, now: Instant) {
        let Some(prefix) = self.by_prefix[index].as_mut().filter(|prefix| prefix.complete) else { return };
        prefix.settled = Some((prefix.digest, prefix.revision));
        if prefix.stated.is_none() {
            prefix.due.get_or_insert(now);
        } else if prefix.stated != Some(prefix.digest) || !prefix.timed.is_empty() {
            prefix.due.get_or_insert(now + DELAY);
        }
        if prefix.due.is_none() {
            self.active.remove(&index);
        }
    }

    /// What is to be stated now, with its key. `standing` gives the value of a key.
    pub(super) fn take_due(
        &mut self,
        index: usize,
        now: Instant,
        standing: impl Fn(&str) -> Option<Arc<[u8]>>,
    ) -> Option<(Arc<str>, Arc<[u8]>)> {
        let prefix = self.by_prefix[index].as_mut()?;
        prefix.due.filter(|due| *due <= now)?;
        let (digest, revision) = prefix.settled?;
        prefix.due = None;
        let first = prefix.stated.replace(digest).is_none();
        let recent = prefix.take_recent();
        // After a restart, what an earlier run stated still holds: no need to write it again.
        let adopted = standing(&prefix.key).filter(|value| {
            let same = |record: DigestRecord| record.digest == digest;
            first && recent.is_empty() && DigestRecord::decode(value).is_ok_and(same)
        });
        let record = || DigestRecord { digest, revision, recent }.encode().into();
        Some((prefix.key.clone(), adopted.unwrap_or_else(record)))
    }

    /// When the next statement is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.active.iter().filter_map(|index| self.by_prefix[*index].as_ref()?.due).min()
    }

    /// Whether the prefix has a digest.
    pub(super) fn has(&self, index: usize) -> bool {
        self.by_prefix[index].is_some()
    }
}

impl Prefix {
    fn new(data: usize, key: Arc<str>) -> Self {
        Self {
            data,
            key,
            digest: Digest::default(),
            revision: 0,
            complete: false,
            settled: None,
            stated: None,
            due: None,
            timed: VecDeque::new(),
            untimed: VecDeque::new(),
            source: VecDeque::new(),
        }
    }

    /// The changes whose time is known, the earliest of each revision.
    fn take_recent(&mut self) -> Vec<Timed> {
        let mut recent: Vec<_> = self.timed.drain(..).collect();
        recent.sort_unstable_by_key(|timed| (timed.revision, timed.at));
        recent.dedup_by_key(|timed| timed.revision);
        recent.drain(..recent.len().saturating_sub(MAX_RECENT));
        recent
    }
}

fn time_of(revision: i64, source: &VecDeque<Timed>) -> Option<SourceTime> {
    source.iter().rev().find(|timed| timed.revision == revision).map(|timed| timed.at)
}

/// Appends, and forgets the oldest beyond `max`.
fn push<T>(queue: &mut VecDeque<T>, item: T, max: usize) {
    if queue.len() >= max {
        queue.pop_front();
    }
    queue.push_back(item);
}
