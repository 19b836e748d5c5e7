//! The wanted records of one kind of one cluster, and whether they are those that the cluster has.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use clustermesh_kvstore::digest::{Compare, DigestRecord, RefusedRecords, Ticket};

use super::mirror::Effect;

/// See the module. The sum of all wanted records and of all refused ones is compared with what the cluster
/// states, or with a census of it.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) prefix: String,
    /// By what follows the prefix.
    records: HashMap<Box<str>, Wanted>,
    /// The present list is complete.
    listed: bool,
    /// Of the hashes in `records`.
    sum: u64,
    refused: RefusedRecords,
    pub(super) compare: Compare,
}

#[derive(Clone, Copy, Debug)]
struct Wanted {
    /// The present list has told of it, or what followed.
    told: bool,
    /// None: the cluster has written something else since, which was refused.
    hash: Option<u64>,
}

/// What a comparison leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Looked {
    /// The cluster has something else: it is to be listed again.
    pub(super) relist: bool,
    /// All its records are to be summed.
    pub(super) census: Option<Ticket>,
}

impl Copies {
    /// None yet. A census is taken each `interval` if nothing is stated.
    pub(super) fn new(prefix: String, interval: Option<Duration>) -> Self {
        Self {
            prefix,
            records: HashMap::new(),
            listed: false,
            sum: 0,
            refused: RefusedRecords::default(),
            compare: Compare::with_census(interval),
        }
    }

    /// All records are told anew.
    pub(super) fn begin(&mut self) {
        self.listed = false;
        self.records.values_mut().for_each(|wanted| wanted.told = false);
        self.refused.clear();
        self.compare.listing();
    }

    /// The cluster has told all it has: whatever else is wanted has vanished meanwhile.
    pub(super) fn complete(&mut self, out: &mut Vec<Effect>) {
        if !std::mem::replace(&mut self.listed, true) {
            let (prefix, sum) = (&self.prefix, &mut self.sum);
            self.records.retain(|suffix, wanted| {
                if !wanted.told {
                    *sum = sum.wrapping_sub(wanted.hash.unwrap_or(0));
                    out.push(Effect::Set { key: [prefix, &**suffix].concat(), value: None, origin: None });
                }
                wanted.told
            });
            out.push(Effect::Done { prefix: prefix.clone() });
        }
    }

    /// The cluster has told all that it had at `revision`; after [`Self::complete`].
    pub(super) fn synced(&mut self, revision: i64) {
        let held = self.held().unwrap_or_default();
        self.compare.synced(revision, held);
    }

    /// A record is wanted as the cluster told it at `revision`, or (none) as an earlier run left it.
    pub(super) fn take(
        &mut self,
        suffix: &str,
        value: Vec<u8>,
        hash: u64,
        revision: Option<i64>,
        out: &mut Vec<Effect>,
    ) {
        let wanted = Wanted { told: revision.is_some(), hash: Some(hash) };
        let before = match self.records.get_mut(suffix) {
            Some(known) => std::mem::replace(known, wanted).hash,
            None => self.records.insert(suffix.into(), wanted).and_then(|before| before.hash),
        };
        self.sum = self.sum.wrapping_sub(before.unwrap_or(0)).wrapping_add(hash);
        self.refused.remove(suffix);
        // What a list tells did not just happen.
        let origin = revision.filter(|_| self.listed);
        out.push(Effect::Set { key: [&self.prefix, suffix].concat(), value: Some(value), origin });
        self.told(revision);
    }

    /// A record was refused, and what stands under its key is left.
    pub(super) fn keep(&mut self, suffix: &str, hash: u64, revision: Option<i64>) {
        if let Some(wanted) = self.records.get_mut(suffix) {
            self.sum = self.sum.wrapping_sub(wanted.hash.take().unwrap_or(0));
        }
        self.refuse(suffix, hash, revision);
    }

    /// A record was refused, and nothing is to stand under its key.
    pub(super) fn drop(&mut self, suffix: &str, hash: u64, revision: Option<i64>, out: &mut Vec<Effect>) {
        self.forget(suffix, revision, out);
        self.refuse(suffix, hash, revision);
    }

    /// A record is gone.
    pub(super) fn remove(&mut self, suffix: &str, revision: i64, out: &mut Vec<Effect>) {
        self.forget(suffix, Some(revision), out);
        self.refused.remove(suffix);
        self.told(Some(revision));
    }

    /// None is wanted any more, whatever the cluster has.
    pub(super) fn clear(&mut self, out: &mut Vec<Effect>) {
        for (suffix, _) in self.records.drain() {
            out.push(Effect::Set { key: [&self.prefix, &*suffix].concat(), value: None, origin: None });
        }
        self.sum = 0;
        self.refused.clear();
        self.compare.listing();
    }

    /// The cluster states its digest; none: it does no more.
    pub(super) fn compare_with(&mut self, record: Option<&DigestRecord>) {
        match record {
            Some(record) => self.compare.stated(record),
            None => self.compare.unstated(),
        }
    }

    /// Compares, if there is anything to compare with.
    pub(super) fn look(&mut self, now: Instant) -> Looked {
        let held = self.held();
        Looked { relist: self.compare.check(now, held), census: self.compare.census_due(now) }
    }

    pub(super) fn contains(&self, suffix: &str) -> bool {
        self.records.contains_key(suffix)
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// Of all that the cluster has, as far as it was told; none if too much of it was refused.
    fn held(&self) -> Option<u64> {
        Some(self.refused.digest()?.sum.wrapping_add(self.sum))
    }

    fn forget(&mut self, suffix: &str, revision: Option<i64>, out: &mut Vec<Effect>) {
        if let Some(wanted) = self.records.remove(suffix) {
            self.sum = self.sum.wrapping_sub(wanted.hash.unwrap_or(0));
            let origin = revision.filter(|_| self.listed);
            out.push(Effect::Set { key: [&self.prefix, suffix].concat(), value: None, origin });
        }
    }

    /// What an earlier run left and the rules forbid now is nothing that the cluster has.
    fn refuse(&mut self, suffix: &str, hash: u64, revision: Option<i64>) {
        if revision.is_some() {
            self.refused.insert(suffix, hash);
            self.told(revision);
        }
    }

    fn told(&mut self, revision: Option<i64>) {
        if let (Some(revision), Some(held)) = (revision, self.held()) {
            self.compare.told(revision, held);
        }
    }
}
