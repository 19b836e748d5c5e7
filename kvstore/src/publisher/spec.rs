//! What a publisher is asked for, and what it says of how far it is.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cluster::ClusterName;
use crate::digest::SourceTime;
use crate::key::{self, Kind, Layout};

/// What a publisher owns and how it writes.
#[derive(Clone, Debug)]
pub struct PublisherSpec {
    /// The prefixes and single keys that this publisher alone writes.
    pub owned: Vec<OwnedPrefix>,
    /// Time to live of the leases that it grants.
    pub lease_ttl: Duration,
    /// Keep [`crate::key::HEARTBEAT`] beating.
    pub heartbeat: Option<Duration>,
    /// Operations in one transaction, at most 128 (etcd's `--max-txn-ops`).
    pub batch: usize,
}

impl Default for PublisherSpec {
    /// Nothing owned; leases of 15 minutes and a heartbeat a minute, as Cilium's exporter has.
    fn default() -> Self {
        Self {
            owned: Vec::new(),
            lease_ttl: Duration::from_secs(900),
            heartbeat: Some(Duration::from_secs(60)),
            batch: 128,
        }
    }
}

/// A prefix (ends in `/`) or a single key (does not) that a publisher owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedPrefix {
    /// What the owned keys start with, or the one key.
    pub prefix: String,
    /// Key written once everything under the prefix has been.
    pub canary: Option<String>,
    /// Key in which the digest of all under the prefix is stated, see [`crate::digest`].
    pub digest: Option<String>,
}

/// Where a change comes from: what the time until it is effective elsewhere is counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An event that was seen then.
    Event(SourceTime),
    /// A revision of the etcd that is mirrored. When its event was seen, that etcd's digest record says
    /// a little later; see [`super::Publisher::source_stated`].
    Revision(i64),
}

impl OwnedPrefix {
    /// A prefix or key that has neither canary nor digest.
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), canary: None, digest: None }
    }

    /// All that a cluster writes of a kind, with canary and digest.
    pub fn of_kind(kind: Kind, cluster: &ClusterName, layout: Layout) -> Self {
        Self {
            prefix: key::data_prefix(kind, cluster, layout),
            canary: Some(key::canary_key(kind, cluster, layout)),
            digest: Some(key::digest_key(kind, cluster, layout)),
        }
    }

    /// Whether `key` belongs to it.
    pub fn covers(&self, key: &str) -> bool {
        if self.prefix.ends_with('/') { key.starts_with(&self.prefix) } else { key == self.prefix }
    }
}

/// Progress of a publisher.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublisherStatus {
    /// Keys that differ from etcd, or may.
    pub pending: usize,
    /// Keys put so far.
    pub written: u64,
    /// Keys deleted so far.
    pub deleted: u64,
    /// Of these, how many put right what somebody else did.
    pub repaired: u64,
    /// Leases in use.
    pub leases: usize,
    /// Newest failure, "" if none since the last success.
    pub last_error: String,
    /// By owned prefix: complete, flushed, and its canary (if it has one) written.
    pub synced: BTreeMap<String, bool>,
}
