use std::collections::HashMap;

use super::{Digest, record_hash};

/// More refused records of one kind are not remembered one by one.
const MAX: usize = 65_536;

/// What etcd holds of a kind and its reader refused: part of what the exporter states, not of what is held.
#[derive(Debug, Default)]
pub struct RefusedRecords {
    /// By hash of the key.
    hashes: HashMap<u64, u64>,
    digest: Digest,
    /// Some were not remembered: the digest says nothing until all is told again.
    overflown: bool,
}

impl RefusedRecords {
    /// All records are told anew.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// A record with this hash was refused.
    pub fn insert(&mut self, suffix: &str, hash: u64) {
        if self.hashes.len() >= MAX {
            self.overflown = true;
            return;
        }
        let before = self.hashes.insert(name(suffix), hash);
        self.digest.replace(before, Some(hash));
    }

    /// The record under this key was taken, or is gone.
    pub fn remove(&mut self, suffix: &str) {
        // Most kinds have none: spare them the hash.
        if !self.hashes.is_empty() {
            let before = self.hashes.remove(&name(suffix));
            self.digest.replace(before, None);
        }
    }

    /// Of all refused records; none if there were too many to remember.
    pub fn digest(&self) -> Option<Digest> {
        (!self.overflown).then_some(self.digest)
    }
}

fn name(suffix: &str) -> u64 {
    record_hash(suffix, &[])
}
