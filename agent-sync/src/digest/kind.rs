use std::time::{Duration, Instant};

use clustermesh_kvstore::digest::{Compare, DigestRecord, RefusedRecords, SourceTime, Ticket};

use super::Propagation;

/// Digest and traces of one kind of one cluster. `held` is always the sum of what the mesh holds of it.
#[derive(Debug, Default)]
pub struct KindDigest {
    compare: Compare,
    refused: RefusedRecords,
    propagation: Propagation,
    listed: bool,
    lists: u64,
}

impl KindDigest {
    /// Nothing is known yet; see [`Compare::with_census`].
    pub fn with_census(interval: Option<Duration>) -> Self {
        Self { compare: Compare::with_census(interval), ..Self::default() }
    }

    /// All records are told anew.
    pub fn listing(&mut self) {
        self.listed = false;
        self.refused.clear();
        self.compare.listing();
        self.propagation.listing();
    }

    /// The record under this key was taken, or is gone.
    pub fn taken(&mut self, suffix: &str) {
        self.refused.remove(suffix);
    }

    /// A record was refused; what is held under its key, if anything, is not in the sum any more.
    pub fn refused(&mut self, suffix: &str, hash: u64) {
        self.refused.insert(suffix, hash);
    }

    /// The event of `revision` has been taken in.
    pub fn told(&mut self, revision: i64, held: u64) {
        if self.listed {
            self.propagation.told(revision);
        }
        if let Some(sum) = self.sum(held) {
            self.compare.told(revision, sum);
        }
    }

    /// A list has ended, or was resumed.
    pub fn synced(&mut self, revision: i64, held: u64) {
        if !std::mem::replace(&mut self.listed, true) {
            self.lists += 1;
        }
        let sum = self.sum(held).unwrap_or_default();
        self.compare.synced(revision, sum);
    }

    /// The connection is lost.
    pub fn lost(&mut self) {
        self.compare.lost();
    }

    /// The exporter states its digest; none: it does no more.
    pub fn stated(&mut self, record: Option<&DigestRecord>) {
        match record {
            Some(record) => {
                self.compare.stated(record);
                self.propagation.stated(&record.recent);
            }
            None => self.compare.unstated(),
        }
    }

    /// A census has found `sum` at `revision`.
    pub fn counted(&mut self, ticket: Ticket, revision: i64, sum: u64) {
        self.compare.counted(ticket, revision, sum);
    }

    /// Whether a census is to be taken now; asked once for each.
    pub fn census_due(&mut self, now: Instant) -> Option<Ticket> {
        self.compare.census_due(now)
    }

    /// All that was told is installed.
    pub fn installed(&mut self, at: SourceTime) {
        self.propagation.installed(at);
    }

    /// Compares; returns whether the kind is to be listed again.
    pub fn check(&mut self, now: Instant, held: u64) -> bool {
        self.compare.check(now, self.sum(held))
    }

    /// Of all that etcd has, as far as it was told; none if too much of it was refused.
    pub fn sum(&self, held: u64) -> Option<u64> {
        Some(self.refused.digest()?.sum.wrapping_add(held))
    }

    /// The comparison.
    pub fn compare(&self) -> &Compare {
        &self.compare
    }

    /// Lists that came to their end.
    pub fn lists(&self) -> u64 {
        self.lists
    }

    /// The traces.
    pub fn propagation(&self) -> &Propagation {
        &self.propagation
    }
}
