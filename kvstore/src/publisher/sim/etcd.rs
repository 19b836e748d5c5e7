use std::collections::BTreeMap;
use std::time::Instant;

use crate::digest::Digest;
use crate::publisher::Observed;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) value: Vec<u8>,
    pub(super) lease: i64,
    pub(super) revision: i64,
}

/// A key, and its new value and lease, or that it goes.
pub(super) type Change = (String, Option<(Vec<u8>, i64)>);

/// One etcd: keys, leases, and the history that watches read.
pub(super) struct Etcd {
    pub(super) generation: u64,
    pub(super) revision: i64,
    pub(super) keys: BTreeMap<String, Value>,
    pub(super) leases: BTreeMap<i64, Instant>,
    pub(super) history: Vec<(i64, String, Option<Value>)>,
}

impl Etcd {
    pub(super) fn new(generation: u64) -> Self {
        Self { generation, revision: 1, keys: BTreeMap::new(), leases: BTreeMap::new(), history: Vec::new() }
    }

    pub(super) fn write(&mut self, changes: Vec<Change>) -> i64 {
        self.revision += 1;
        for (key, value) in changes {
            let value = value.map(|(value, lease)| Value { value, lease, revision: self.revision });
            match &value {
                Some(v) => drop(self.keys.insert(key.clone(), v.clone())),
                None => drop(self.keys.remove(&key)),
            }
            self.history.push((self.revision, key, value));
        }
        self.revision
    }

    /// Of what stood under `prefix` at `revision`.
    pub(super) fn digest(&self, prefix: &str, revision: i64) -> Digest {
        let mut keys = BTreeMap::new();
        for (_, key, value) in self.history.iter().filter(|(at, ..)| *at <= revision) {
            match (key.strip_prefix(prefix), value) {
                (Some(suffix), Some(value)) => drop(keys.insert(suffix, &*value.value)),
                (Some(suffix), None) => drop(keys.remove(suffix)),
                (None, _) => {}
            }
        }
        keys.into_iter().collect()
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let dead: Vec<i64> = self.leases.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for lease in dead {
            self.leases.remove(&lease);
            let gone = self.keys.iter().filter(|(_, v)| v.lease == lease).map(|(k, _)| (k.clone(), None));
            let gone: Vec<_> = gone.collect();
            if !gone.is_empty() {
                self.write(gone);
            }
        }
    }
}

/// What a reflector of one prefix does: list, then history from there.
#[derive(Default)]
pub(super) struct Stream {
    pub(super) prefix: String,
    pub(super) generation: u64,
    pub(super) listed: bool,
    pub(super) read_to: i64,
    /// With the revision that was told.
    pub(super) known: BTreeMap<String, i64>,
}

impl Stream {
    /// Moves on: notices a new etcd, lists, or reads the next revision of the history. Nothing if there is
    /// nothing to read.
    pub(super) fn read(&mut self, etcd: &Etcd) -> Vec<Observed> {
        if self.generation != etcd.generation {
            self.generation = etcd.generation;
            self.listed = false;
            self.known.values_mut().for_each(|told| *told = 0);
            vec![Observed::Etcd { generation: self.generation }]
        } else if self.listed {
            self.follow(etcd)
        } else {
            self.list(etcd)
        }
    }

    fn list(&mut self, etcd: &Etcd) -> Vec<Observed> {
        let mut said = Vec::new();
        let mut gone = std::mem::take(&mut self.known);
        for (key, v) in etcd.keys.iter().filter(|(k, _)| k.starts_with(&self.prefix)) {
            // As a reflector does: what was told already is not told again.
            if gone.remove(key) != Some(v.revision) {
                said.push(present(key, v));
            }
            self.known.insert(key.clone(), v.revision);
        }
        let revision = etcd.revision;
        said.extend(gone.into_keys().map(|key| Observed::Absent { key, revision }));
        said.push(Observed::Listed { revision });
        (self.listed, self.read_to) = (true, revision);
        said
    }

    fn follow(&mut self, etcd: &Etcd) -> Vec<Observed> {
        let news = |(revision, key, _): &&(i64, String, _)| {
            *revision > self.read_to && key.starts_with(&self.prefix)
        };
        let Some(revision) = etcd.history.iter().find(news).map(|(revision, ..)| *revision) else {
            return Vec::new();
        };
        let mut said = Vec::new();
        for (_, key, value) in etcd.history.iter().filter(|(at, ..)| *at == revision) {
            if !key.starts_with(&self.prefix) {
                continue;
            }
            match value {
                Some(v) => {
                    self.known.insert(key.clone(), v.revision);
                    said.push(present(key, v));
                }
                None => {
                    self.known.remove(key);
                    said.push(Observed::Absent { key: key.clone(), revision });
                }
            }
        }
        self.read_to = revision;
        said
    }
}

fn present(key: &str, v: &Value) -> Observed {
    Observed::Present { key: key.into(), value: v.value.clone(), lease: v.lease, revision: v.revision }
}
