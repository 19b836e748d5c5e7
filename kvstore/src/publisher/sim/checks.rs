use super::etcd::Value;
use super::world::World;
use crate::digest::DigestRecord;
use crate::publisher::Op;

/// What must hold.
impl World {
    /// A canary may only be written over a complete prefix.
    pub(super) fn check_canary(&self, op: &Op) {
        let Op::Put { key, .. } = op else { return };
        let Some(prefix) = key.strip_prefix("synced/alpha/") else { return };
        let prefix = format!("{prefix}/");
        assert!(self.complete.contains(&prefix), "canary of {prefix} before its desired state was complete");
        for (key, value) in self.desired.iter().filter(|(k, _)| k.starts_with(&prefix)) {
            let stands = self.etcd.keys.get(key).map(|v| &v.value);
            let excused = self.foreign.contains(key) || stands.is_none();
            // Absent is excused only by a lease that expired meanwhile: its deletion is in the history.
            let was_there = self.etcd.history.iter().any(|(_, k, v)| k == key && v.is_some());
            assert!(
                stands == Some(value) || (excused && was_there),
                "canary of {prefix} before {key}: wanted {value:?}, stands {stands:?}, was there: {was_there}"
            );
        }
    }

    pub(super) fn check_statement(&mut self, prefix: &str, value: &[u8]) {
        self.stated += 1;
        let record = DigestRecord::decode(value).unwrap();
        assert!(record.revision <= self.etcd.revision, "{record:?} is of a revision to come");
        if !self.tampered {
            assert_eq!(record.digest, self.etcd.digest(prefix, record.revision), "{prefix} at {record:?}");
        }
        for timed in record.recent {
            let (key, value) = &self.origins[usize::try_from(timed.at.0).unwrap()];
            let is_it = |(revision, k, v): &(i64, String, Option<Value>)| {
                *revision == timed.revision && k == key && v.as_ref().map(|v| &v.value) == value.as_ref()
            };
            assert!(self.etcd.history.iter().any(is_it), "{timed:?} is not of {key} = {value:?}");
        }
    }

    pub(super) fn check_final(&self) {
        for key in ["a/", "b/", "config/alpha"] {
            let in_etcd =
                self.etcd.keys.iter().filter(|(k, _)| k.starts_with(key)).map(|(k, v)| (k, &v.value));
            let wanted = self.desired.iter().filter(|(k, _)| k.starts_with(key));
            assert_eq!(in_etcd.collect::<Vec<_>>(), wanted.collect::<Vec<_>>());
        }
        for canary in ["synced/alpha/a", "synced/alpha/b"] {
            assert!(self.etcd.keys.contains_key(canary), "{canary} is missing");
        }
        for prefix in ["a/", "b/"] {
            let stated = &self.etcd.keys[&format!("digests/{prefix}d")].value;
            let digest = DigestRecord::decode(stated).unwrap().digest;
            assert_eq!(digest, self.etcd.digest(prefix, i64::MAX), "the last word on {prefix}");
        }
        for (key, v) in &self.etcd.keys {
            assert!(self.etcd.leases.contains_key(&v.lease), "{key} hangs on no living lease");
        }
    }
}
