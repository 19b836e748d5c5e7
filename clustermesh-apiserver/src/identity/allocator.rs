use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, MaxConnectedClusters};
use clustermesh_kvstore::record::IdentityRecord;

/// Gives numbers to label sets.
///
/// The number is the hash of the label string, moved on to the next free one if it is taken. So the
/// same workloads get the same numbers again even if etcd has lost everything, and packets that carry
/// an identity go on meaning the same. What etcd holds at the start is adopted first and wins.
///
/// A number is in use as long as somebody holds it. After the last one has released it, it stays with
/// its labels for a grace period: pods that are replaced one by one keep their identity, and no number
/// means something new while packets with the old meaning are under way.
pub struct Allocator {
    first: u32,
    last: u32,
    grace: Duration,
    by_labels: BTreeMap<String, Entry>,
    by_number: BTreeMap<u32, String>,
    revision: u64,
}

struct Entry {
    number: u32,
    holders: usize,
    /// Since when there are no holders.
    unused: Option<Instant>,
}

/// The first numbers of a cluster's range are left free: of cluster 0 they are the reserved
/// identities, and Cilium leaves them free in every cluster.
const RESERVED: u32 = Identity::FIRST_USER.0;

impl Allocator {
    /// An allocator for the cluster's part of the identities; unused ones are freed after `grace`.
    pub fn new(cluster: ClusterId, max: MaxConnectedClusters, grace: Duration) -> Self {
        let (first, last) = cluster.identity_range(max);
        Self::with_range(first.0 + RESERVED, last.0, grace)
    }

    fn with_range(first: u32, last: u32, grace: Duration) -> Self {
        Self { first, last, grace, by_labels: BTreeMap::new(), by_number: BTreeMap::new(), revision: 0 }
    }

    /// Takes over an assignment that others may already rely on. It is unused until acquired.
    ///
    /// # Errors
    /// The assignment contradicts the range or an earlier one. It should be dropped.
    pub fn adopt(&mut self, identity: Identity, labels: &str, now: Instant) -> Result<(), AdoptError> {
        let number = identity.0;
        if !(self.first..=self.last).contains(&number) {
            return Err(AdoptError::OutOfRange { identity, first: self.first, last: self.last });
        }
        if let Some(entry) = self.by_labels.get(labels) {
            return Err(AdoptError::Twice { identity, other: Identity(entry.number) });
        }
        if self.by_number.contains_key(&number) {
            return Err(AdoptError::Taken { identity });
        }
        self.insert(labels, Entry { number, holders: 0, unused: Some(now) });
        Ok(())
    }

    /// [`Self::adopt`] for a record that stands in the etcd of `cluster`. Whoever may write there could have
    /// written it, and readers refuse what does not name its cluster.
    ///
    /// # Errors
    /// As [`Self::adopt`], and if the labels are not of this cluster.
    pub fn adopt_record(
        &mut self,
        record: &IdentityRecord,
        cluster: &ClusterName,
        now: Instant,
    ) -> Result<(), AdoptError> {
        if record.labels.cluster() != Some(cluster.as_str()) {
            return Err(AdoptError::Foreign { identity: record.id });
        }
        self.adopt(record.id, &record.labels.to_string(), now)
    }

    /// The identity of the labels, for one more holder.
    ///
    /// # Errors
    /// [`Exhausted`] if all numbers of the cluster are taken.
    pub fn acquire(&mut self, labels: &str) -> Result<Identity, Exhausted> {
        if let Some(entry) = self.by_labels.get_mut(labels) {
            entry.holders += 1;
            entry.unused = None;
            return Ok(Identity(entry.number));
        }
        let number = self.free_number(labels).ok_or(Exhausted { numbers: self.by_number.len() })?;
        self.insert(labels, Entry { number, holders: 1, unused: None });
        Ok(Identity(number))
    }

    /// One holder less. Labels that nobody acquired are ignored.
    pub fn release(&mut self, labels: &str, now: Instant) {
        let Some(entry) = self.by_labels.get_mut(labels) else { return };
        entry.holders = entry.holders.saturating_sub(1);
        if entry.holders == 0 && entry.unused.is_none() {
            entry.unused = Some(now);
        }
    }

    /// Frees what has been unused for the grace period; returns it.
    pub fn expire(&mut self, now: Instant) -> Vec<Identity> {
        let mut freed = Vec::new();
        self.by_labels.retain(|_, entry| {
            let expired =
                entry.unused.is_some_and(|since| now.saturating_duration_since(since) >= self.grace);
            if expired {
                freed.push(Identity(entry.number));
            }
            !expired
        });
        for identity in &freed {
            self.by_number.remove(&identity.0);
            self.revision += 1;
        }
        freed
    }

    /// The identity of the labels, if they have one.
    pub fn find(&self, labels: &str) -> Option<Identity> {
        self.by_labels.get(labels).map(|entry| Identity(entry.number))
    }

    /// Differs from what it was whenever [`Self::assignments`] do.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All assignments, those in their grace period included, by number.
    pub fn assignments(&self) -> impl Iterator<Item = (Identity, &str)> {
        self.by_number.iter().map(|(number, labels)| (Identity(*number), labels.as_str()))
    }

    fn insert(&mut self, labels: &str, entry: Entry) {
        self.revision += 1;
        self.by_number.insert(entry.number, labels.to_owned());
        self.by_labels.insert(labels.to_owned(), entry);
    }

    fn free_number(&self, labels: &str) -> Option<u32> {
        let size = self.last - self.first + 1;
        // The remainder is less than `size`, a u32.
        #[allow(clippy::cast_possible_truncation)]
        let start = self.first + (fnv1a(labels) % u64::from(size)) as u32;
        let taken_from = |from: u32, to: u32| first_gap(self.by_number.range(from..=to), from, to);
        taken_from(start, self.last).or_else(|| taken_from(self.first, start))
    }
}

/// The first number in `from..=to` that is not among the taken ones, which come in order.
fn first_gap<'a>(taken: impl Iterator<Item = (&'a u32, &'a String)>, from: u32, to: u32) -> Option<u32> {
    let mut next = from;
    for (number, _) in taken {
        if *number != next {
            break;
        }
        next += 1;
    }
    (next <= to).then_some(next)
}

/// FNV-1a with 64 bits. The numbers of a running mesh hang on it: it must stay as it is.
fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// All numbers of the cluster are taken. Fewer distinct label sets are needed: labels that differ
/// from pod to pod are the usual cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "all {numbers} identities of this cluster are in use; look for pod labels that differ from pod to pod"
)]
pub struct Exhausted {
    numbers: usize,
}

/// An assignment found in etcd that cannot be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// Written under another cluster ID or by somebody else.
    #[error("identity {identity} is not one of this cluster ({first} to {last})")]
    OutOfRange {
        /// What etcd says.
        identity: Identity,
        /// First of this cluster.
        first: u32,
        /// Last of this cluster.
        last: u32,
    },
    /// Not written by an exporter of this cluster.
    #[error("the labels of identity {identity} do not name this cluster")]
    Foreign {
        /// What etcd says.
        identity: Identity,
    },
    /// The labels have an identity already.
    #[error("identity {identity} has the labels of identity {other}")]
    Twice {
        /// What etcd says too.
        identity: Identity,
        /// What counts.
        other: Identity,
    },
    /// The number stands for other labels already.
    #[error("identity {identity} is there twice")]
    Taken {
        /// The number.
        identity: Identity,
    },
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use clustermesh_kvstore::record::Record as _;
    use proptest::prelude::*;

    use super::*;

    const GRACE: Duration = Duration::from_secs(600);

    #[test]
    fn numbers_are_those_of_earlier_versions() {
        let id = ClusterId::new(1, MaxConnectedClusters::C255).unwrap();
        let mut allocator = Allocator::new(id, MaxConnectedClusters::C255, GRACE);
        // Changing these constants renumbers every mesh that loses its etcd.
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("foobar"), 0x8594_4171_f739_67e8);
        let first = 65_536 + 256;
        let expected = first + u32::try_from(fnv1a("k8s:app=web;") % (65_536 - 256)).unwrap();
        assert_eq!(allocator.acquire("k8s:app=web;"), Ok(Identity(expected)));
    }

    /// A foreign hand has overwritten an identity: the labels that it stood for keep their number.
    #[test]
    fn an_identity_without_the_cluster_is_not_adopted() {
        let id = ClusterId::new(1, MaxConnectedClusters::C255).unwrap();
        let alpha: ClusterName = "alpha".parse().unwrap();
        let labels = "k8s:app=web;k8s:io.cilium.k8s.policy.cluster=alpha;";
        let new = || Allocator::new(id, MaxConnectedClusters::C255, GRACE);
        let number = new().acquire(labels).unwrap();
        for (text, adopted) in [
            (labels, Ok(())),
            ("{\"foreign\":1}", Err(AdoptError::Foreign { identity: number })),
            ("k8s:io.cilium.k8s.policy.cluster=beta;", Err(AdoptError::Foreign { identity: number })),
        ] {
            let mut allocator = new();
            let record = IdentityRecord::decode(&number.0.to_string(), text.as_bytes()).unwrap();
            assert_eq!(allocator.adopt_record(&record, &alpha, Instant::now()), adopted, "{text}");
            assert_eq!(allocator.acquire(labels), Ok(number), "{text}");
        }
    }

    #[test]
    fn existing_assignments_win() {
        let now = Instant::now();
        let mut allocator = Allocator::with_range(1000, 1009, GRACE);
        allocator.adopt(Identity(1007), "a", now).unwrap();
        assert!(matches!(allocator.adopt(Identity(1008), "a", now), Err(AdoptError::Twice { .. })));
        assert!(matches!(allocator.adopt(Identity(1007), "b", now), Err(AdoptError::Taken { .. })));
        assert!(matches!(allocator.adopt(Identity(999), "b", now), Err(AdoptError::OutOfRange { .. })));
        assert_eq!(allocator.acquire("a"), Ok(Identity(1007)));
        assert!(allocator.expire(now + GRACE * 2).is_empty());
    }

    #[test]
    fn a_full_range_is_an_error_until_something_is_freed() {
        let now = Instant::now();
        let mut allocator = Allocator::with_range(1, 3, GRACE);
        for labels in ["a", "b", "c"] {
            allocator.acquire(labels).unwrap();
        }
        assert_eq!(allocator.acquire("d"), Err(Exhausted { numbers: 3 }));
        let freed = allocator.find("b").unwrap();
        allocator.release("b", now);
        assert!(allocator.expire(now + GRACE - Duration::from_secs(1)).is_empty());
        assert_eq!(allocator.expire(now + GRACE), [freed]);
        assert_eq!(allocator.acquire("d"), Ok(freed));
    }

    proptest! {
        /// Against a model that only counts holders.
        #[test]
        fn invariants(steps in prop::collection::vec((0..3_u8, 0..12_u8), 0..200)) {
            let start = Instant::now();
            let mut allocator = Allocator::with_range(500, 507, GRACE);
            let mut holders = BTreeMap::<String, usize>::new();
            for (minute, (step, which)) in steps.into_iter().enumerate() {
                let now = start + Duration::from_secs(60) * u32::try_from(minute).unwrap();
                let labels = format!("k8s:app={which};");
                let before = allocator.find(&labels);
                match step {
                    0 => match allocator.acquire(&labels) {
                        Ok(identity) => {
                            prop_assert!(before.is_none_or(|before| before == identity));
                            *holders.entry(labels).or_default() += 1;
                        }
                        Err(_) => prop_assert_eq!(allocator.assignments().count(), 8),
                    },
                    1 => {
                        allocator.release(&labels, now);
                        holders.entry(labels).and_modify(|n| *n = n.saturating_sub(1));
                    }
                    _ => {
                        allocator.expire(now);
                    }
                }
                // Whoever holds labels has a number; numbers are different and in range.
                for (labels, _) in holders.iter().filter(|(_, n)| **n > 0) {
                    prop_assert!(allocator.find(labels).is_some());
                }
                let all: Vec<_> = allocator.assignments().collect();
                for (id, labels) in &all {
                    prop_assert!((500..=507).contains(&id.0));
                    prop_assert_eq!(allocator.find(labels), Some(*id));
                }
                prop_assert_eq!(all.len(), allocator.by_labels.len());
            }
        }
    }
}
