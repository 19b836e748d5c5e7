//! An etcd as its clients see it: revisions, history, leases, compaction; and how it is lost.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clustermesh_kvstore::etcd::{KeyRange, KeyValue, Page, WatchEvent, WatchMessage};
use clustermesh_kvstore::key::HEARTBEAT;

/// A write of a transaction: a key, and its value and lease or nothing.
pub type Write = (String, Option<(Rc<[u8]>, i64)>);

/// One etcd cluster and its data. A re-created or restored one is another value.
#[derive(Clone, Debug)]
pub struct Etcd {
    /// As etcd says it in each reply.
    pub cluster_id: u64,
    /// Of the last write.
    pub revision: i64,
    /// Nothing before this can be read any more.
    pub compacted: i64,
    keys: BTreeMap<Rc<str>, Stored>,
    log: Vec<Event>,
    leases: BTreeMap<i64, Instant>,
    next_lease: i64,
    /// Counts the writes and restorations, over all etcds that stood in this one's place.
    tick: u64,
}

#[derive(Clone, Debug)]
struct Stored {
    value: Rc<[u8]>,
    lease: i64,
    mod_revision: i64,
}

#[derive(Clone, Debug)]
struct Event {
    revision: i64,
    tick: u64,
    key: Rc<str>,
    value: Option<(Rc<[u8]>, i64)>,
}

impl Etcd {
    /// An empty one in the place of another that had come to `tick`.
    pub fn new(cluster_id: u64, tick: u64) -> Self {
        Self {
            cluster_id,
            revision: 1,
            compacted: 0,
            keys: BTreeMap::new(),
            log: Vec::new(),
            leases: BTreeMap::new(),
            // Never those of another etcd: a lease is a random number in reality.
            next_lease: i64::try_from(cluster_id).unwrap_or(1) * 1_000_000
                + i64::try_from(tick).unwrap_or(0) * 100,
            tick,
        }
    }

    /// Writes all of it at one revision.
    pub fn write(&mut self, writes: Vec<Write>) -> i64 {
        self.revision += 1;
        self.tick += 1;
        let revision = self.revision;
        for (key, value) in writes {
            let key: Rc<str> = key.into();
            match value.clone() {
                Some((value, lease)) => {
                    self.keys.insert(key.clone(), Stored { value, lease, mod_revision: revision });
                }
                // Deleting what is not there is no event.
                None if self.keys.remove(&key).is_none() => continue,
                None => {}
            }
            self.log.push(Event { revision, tick: self.tick, key, value });
        }
        revision
    }

    /// A new lease.
    pub fn grant(&mut self, now: Instant, ttl: Duration) -> i64 {
        self.next_lease += 1;
        self.leases.insert(self.next_lease, now + ttl);
        self.next_lease
    }

    /// Refreshes a lease; false if there is none.
    pub fn keep_alive(&mut self, lease: i64, now: Instant, ttl: Duration) -> bool {
        match self.leases.get_mut(&lease) {
            Some(at) => {
                *at = now + ttl;
                true
            }
            None => false,
        }
    }

    /// Whether the lease exists.
    pub fn has_lease(&self, lease: i64) -> bool {
        self.leases.contains_key(&lease)
    }

    /// All leases.
    pub fn leases(&self) -> impl Iterator<Item = i64> + '_ {
        self.leases.keys().copied()
    }

    /// Ends a lease, and the keys that hang on it.
    pub fn revoke(&mut self, lease: i64) {
        self.leases.remove(&lease);
        let gone: Vec<Write> = self
            .keys
            .iter()
            .filter(|(_, stored)| stored.lease == lease)
            .map(|(key, _)| (key.to_string(), None))
            .collect();
        if !gone.is_empty() {
            self.write(gone);
        }
    }

    /// Ends the leases whose time is over; true if there were any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let over: Vec<i64> = self.leases.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        over.iter().for_each(|lease| self.revoke(*lease));
        !over.is_empty()
    }

    /// After a restart, leases run for their whole time again; a snapshot has those of its keys.
    pub fn renew_leases(&mut self, until: Instant) {
        let used = self.keys.values().map(|stored| stored.lease).filter(|lease| *lease != 0);
        self.leases = used.map(|lease| (lease, until)).collect();
    }

    /// The value of a key and the revision of its write.
    pub fn get(&self, key: &str) -> Option<KeyValue> {
        self.keys.get_key_value(key).map(|(key, stored)| kv(key, stored))
    }

    /// Whether the key exists.
    pub fn contains(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// Revision of the newest write of data: heartbeat and digests tell the time, too.
    pub fn newest_data(&self) -> i64 {
        let is_data = |key: &str| key != HEARTBEAT && !key.contains("/digests/");
        self.log.iter().rev().find(|event| is_data(&event.key)).map_or(0, |event| event.revision)
    }

    /// Keys and values below a prefix.
    pub fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        let from = self.keys.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        from.take_while(move |(key, _)| key.starts_with(prefix)).map(|(key, stored)| (&**key, &*stored.value))
    }

    /// A page of a list as of `revision` (0: now). None: that revision is compacted.
    pub fn page(&self, range: &KeyRange, after: Option<&[u8]>, limit: usize, revision: i64) -> Option<Page> {
        if revision != 0 && revision < self.compacted {
            return None;
        }
        let past;
        let keys = if revision == 0 || revision == self.revision {
            &self.keys
        } else {
            past = self.at(revision);
            &past
        };
        let mut kvs: Vec<KeyValue> = keys
            .range::<str, _>((Bound::Included(range.start()), Bound::Unbounded))
            .take_while(|(key, _)| range.suffix(key.as_bytes()).is_some())
            .filter(|(key, _)| after.is_none_or(|after| key.as_bytes() > after))
            .take(limit + 1)
            .map(|(key, stored)| kv(key, stored))
            .collect();
        let more = kvs.len() > limit;
        kvs.truncate(limit);
        Some(Page { kvs, more, revision: self.revision })
    }

    /// The next message of a watch that has told everything before `next`, with at most `limit`
    /// revisions; also the new `next`. None: nothing happened.
    pub fn watch(&self, range: &KeyRange, next: i64, limit: usize) -> Option<(WatchMessage, i64)> {
        if next <= self.compacted {
            return Some((WatchMessage::Compacted, next));
        }
        let start = self.log.partition_point(|event| event.revision < next);
        let mut events = Vec::new();
        let mut revisions = 0;
        let mut last = 0;
        for event in &self.log[start..] {
            if range.suffix(event.key.as_bytes()).is_none() {
                continue;
            }
            if event.revision != last {
                if revisions == limit {
                    break;
                }
                revisions += 1;
                last = event.revision;
            }
            let key = event.key.as_bytes().to_vec();
            events.push(match &event.value {
                Some((value, lease)) => WatchEvent::Put(KeyValue {
                    key,
                    value: value.to_vec(),
                    mod_revision: event.revision,
                    lease: *lease,
                }),
                None => WatchEvent::Delete { key, revision: event.revision },
            });
        }
        (!events.is_empty()).then(|| (WatchMessage::Events { revision: self.revision, events }, last + 1))
    }

    /// Whether the key existed at a revision.
    pub fn existed(&self, key: &str, revision: i64) -> bool {
        let newest = self.log.iter().rev().find(|event| event.revision <= revision && &*event.key == key);
        newest.is_some_and(|event| event.value.is_some())
    }

    /// How many writes there were up to a revision.
    pub fn tick_of(&self, revision: i64) -> u64 {
        let at = self.log.partition_point(|event| event.revision < revision);
        self.log.get(at).map_or(0, |event| event.tick)
    }

    /// How many writes and restorations there were.
    pub fn tick(&self) -> u64 {
        self.tick
    }

    /// Goes back to what it was at a revision, as a restored snapshot does.
    pub fn go_back(&mut self, revision: i64) {
        self.keys = self.at(revision);
        self.log.retain(|event| event.revision <= revision);
        self.revision = revision;
        self.compacted = self.compacted.min(revision);
        // What is told from now on comes after all that was told before, also if nothing is written.
        self.tick += 1;
    }

    fn at(&self, revision: i64) -> BTreeMap<Rc<str>, Stored> {
        let mut keys = BTreeMap::new();
        for event in self.log.iter().take_while(|event| event.revision <= revision) {
            match &event.value {
                Some((value, lease)) => {
                    let stored = Stored { value: value.clone(), lease: *lease, mod_revision: event.revision };
                    keys.insert(event.key.clone(), stored);
                }
                None => drop(keys.remove(&event.key)),
            }
        }
        keys
    }

    /// What happened to some keys: number and revision of each write, and whether it was a delete.
    pub fn history(&self, keys: [&str; 2]) -> String {
        let events = self.log.iter().filter(|event| keys.contains(&&*event.key));
        let events = events.map(|event| {
            let what = if event.value.is_some() { "put" } else { "delete" };
            format!("#{} @{} {what} {}", event.tick, event.revision, event.key)
        });
        events.collect::<Vec<_>>().join(", ")
    }

    /// Whether, at some time after the write `tick`, a reader could rightly conclude that `key` is gone:
    /// it was deleted, or it was missing while `canary` said that all is there.
    pub fn could_be_gone(&self, key: &str, canary: &str, tick: u64) -> bool {
        let (mut present, mut complete) = (false, false);
        for event in &self.log {
            if event.tick > tick && complete && !present {
                return true;
            }
            if &*event.key == key {
                present = event.value.is_some();
                if !present && event.tick > tick {
                    return true;
                }
            } else if &*event.key == canary {
                complete = event.value.is_some();
            }
        }
        complete && !present
    }
}

fn kv(key: &str, stored: &Stored) -> KeyValue {
    KeyValue {
        key: key.as_bytes().to_vec(),
        value: stored.value.to_vec(),
        mod_revision: stored.mod_revision,
        lease: stored.lease,
    }
}
