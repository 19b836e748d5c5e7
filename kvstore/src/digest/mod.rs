//! Do both ends hold the same records? One number per cluster and kind answers that.
//!
//! The writer of a prefix states in a record beside it ([`crate::key::digest_key`]) what the digest of
//! everything below the prefix was at a revision; a reader keeps the digest of what it was told and
//! compares. `docs/anti-entropy.md` defines both for other implementations.
//!
//! * [`Digest`], [`record_hash`]: the sum, which neither depends on an order nor has to be recomputed.
//! * [`DigestRecord`]: what stands in etcd.
//! * [`Compare`], [`RefusedRecords`]: a reader's side, as plain code: what it was told, what is stated and the
//!   time come in, a [`Verdict`] and the wish to list again come out.

mod compare;
mod record;
mod refused;
#[cfg(test)]
mod simulation;

use std::fmt;

use twox_hash::XxHash3_64;

pub use compare::{Compare, Stage, Ticket, Verdict};
pub use record::{DigestRecord, MAX_RECENT, Timed};
pub use refused::RefusedRecords;

/// Keys and values up to this many bytes are hashed without an allocation: all but large services.
const ON_STACK: usize = 512;

/// The hash of one record: XXH3 (64 bits, seed 0) of the key below its prefix, a zero byte, the value.
pub fn record_hash(suffix: &str, value: &[u8]) -> u64 {
    let (middle, end) = (suffix.len(), suffix.len() + 1 + value.len());
    let write = |out: &mut [u8]| {
        out[..middle].copy_from_slice(suffix.as_bytes());
        out[middle] = 0;
        out[middle + 1..].copy_from_slice(value);
    };
    if end <= ON_STACK {
        let mut bytes = [0; ON_STACK];
        write(&mut bytes[..end]);
        return XxHash3_64::oneshot(&bytes[..end]);
    }
    let mut bytes = vec![0; end];
    write(&mut bytes);
    XxHash3_64::oneshot(&bytes)
}

/// The sum, modulo 2^64, of the hashes of a set of records, and how many they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digest {
    /// Sum of [`record_hash`].
    pub sum: u64,
    /// Records.
    pub count: u64,
}

impl Digest {
    /// A record joins the set.
    pub const fn add(&mut self, hash: u64) {
        self.sum = self.sum.wrapping_add(hash);
        self.count = self.count.wrapping_add(1);
    }

    /// A record that was added leaves the set.
    pub const fn remove(&mut self, hash: u64) {
        self.sum = self.sum.wrapping_sub(hash);
        self.count = self.count.wrapping_sub(1);
    }

    /// A record is another one than before: `None` stands for none.
    pub fn replace(&mut self, before: Option<u64>, after: Option<u64>) {
        if let Some(hash) = before {
            self.remove(hash);
        }
        if let Some(hash) = after {
            self.add(hash);
        }
    }
}

/// The sum in 16 hexadecimal digits, as in etcd and in messages.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.sum)
    }
}

impl<'r> FromIterator<(&'r str, &'r [u8])> for Digest {
    fn from_iter<I: IntoIterator<Item = (&'r str, &'r [u8])>>(records: I) -> Self {
        let mut digest = Self::default();
        records.into_iter().for_each(|(suffix, value)| digest.add(record_hash(suffix, value)));
        digest
    }
}

/// When the event happened that a change follows from: microseconds since the Unix epoch, by the clock of
/// the machine that saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceTime(pub i64);

impl SourceTime {
    /// Now, by this machine's clock.
    pub fn now() -> Self {
        Self(jiff::Timestamp::now().as_microsecond())
    }

    /// Seconds from then to `later`. What clocks that disagree make negative is 0.
    pub fn seconds_until(self, later: Self) -> f64 {
        let micros = later.0.saturating_sub(self.0).max(0);
        // Exact up to 285 years.
        #[allow(clippy::cast_precision_loss)]
        let seconds = micros as f64 / 1e6;
        seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference values of `docs/anti-entropy.md`.
    #[test]
    fn the_hash_is_the_documented_one() {
        assert_eq!(XxHash3_64::oneshot(b""), 0x2d06_8005_38d3_94c2, "xxHash's own reference value");
        assert_eq!(record_hash("", b""), XxHash3_64::oneshot(&[0]));
        assert_eq!(format!("{:016x}", record_hash("10.1.0.7", b"{}")), "a289a9a6c7abe965");
        let mut digest = Digest::default();
        digest.add(record_hash("a", b"1"));
        digest.add(record_hash("b", b"2"));
        assert_eq!(digest.to_string(), "b62ea4ad4431b925");
    }

    #[test]
    fn a_boundary_between_key_and_value_counts() {
        assert_ne!(record_hash("ab", b"c"), record_hash("a", b"bc"));
        let long = vec![7; 2 * ON_STACK];
        let flat = [b"k\0".as_slice(), &long].concat();
        assert_eq!(record_hash("k", &long), XxHash3_64::oneshot(&flat));
    }

    #[test]
    fn order_does_not_matter_and_a_removed_record_leaves_nothing() {
        let hashes: Vec<u64> = (0..50).map(|n| record_hash(&n.to_string(), b"v")).collect();
        let (mut forth, mut back) = (Digest::default(), Digest::default());
        hashes.iter().for_each(|hash| forth.add(*hash));
        hashes.iter().rev().for_each(|hash| back.add(*hash));
        assert_eq!(forth, back);
        hashes.iter().for_each(|hash| forth.remove(*hash));
        assert_eq!(forth, Digest::default());
    }

    #[test]
    fn times_of_clocks_that_disagree_are_never_negative() {
        assert!(SourceTime(5).seconds_until(SourceTime(2)).abs() < f64::EPSILON);
        assert!((SourceTime(5).seconds_until(SourceTime(1_500_005)) - 1.5).abs() < 1e-9);
    }
}
