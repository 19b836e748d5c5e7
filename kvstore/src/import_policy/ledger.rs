//! Counts what was refused, in bounded memory.

use std::collections::{BTreeMap, VecDeque};

use tracing::{debug, warn};

use super::{Reason, Refusal};
use crate::cluster::ClusterName;
use crate::key::Kind;

/// Refused keys that are kept to be listed, for each kind of a cluster.
const NEWEST: usize = 32;
/// Longest part of a foreign key or sentence that is kept, in characters.
const SHOWN: usize = 160;

/// Refusals of one kind of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    by_reason: BTreeMap<Reason, Tally>,
    newest: VecDeque<RefusedKey>,
}

/// How often for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Records refused so far. One that is told again counts again.
    pub refused: u64,
    /// Records that were let in because the rules are only audited.
    pub audited: u64,
}

/// A key that was refused lately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedKey {
    /// The key without its prefix, cut if it is long.
    pub key: String,
    /// Why.
    pub reason: Reason,
    /// In a sentence.
    pub detail: String,
    /// It was let in all the same.
    pub audited: bool,
}

impl Ledger {
    /// Notes a refusal and logs it. `audited`: the record was let in all the same.
    pub fn tell(
        &mut self,
        cluster: &ClusterName,
        kind: Kind,
        suffix: &str,
        refusal: &Refusal,
        audited: bool,
    ) {
        let key = Self::shown(suffix);
        if !self.note(suffix, refusal, audited) {
            debug!(%cluster, %kind, key, %refusal, audited, "against the import policy");
        } else if audited {
            warn!(%cluster, %kind, key, %refusal, "the import policy would refuse a record; more of this reason are only counted");
        } else {
            warn!(%cluster, %kind, key, %refusal, "refused a record; more of this reason are only counted");
        }
    }

    /// Notes a refusal; tells whether it is the first for its reason. A peer must not fill a log: the
    /// first of a reason is worth a line, all others only count.
    pub fn note(&mut self, suffix: &str, refusal: &Refusal, audited: bool) -> bool {
        let tally = self.by_reason.entry(refusal.reason).or_default();
        let count = if audited { &mut tally.audited } else { &mut tally.refused };
        *count += 1;
        let is_first = *count == 1;
        let key = Self::shown(suffix);
        self.newest.retain(|known| known.key != key);
        if self.newest.len() == NEWEST {
            self.newest.pop_front();
        }
        let detail = Self::shown(&refusal.detail);
        self.newest.push_back(RefusedKey { key, reason: refusal.reason, detail, audited });
        is_first
    }

    /// As much of a foreign text as is kept, with control characters escaped.
    pub fn shown(text: &str) -> String {
        let escape = |c: char| if c.is_control() { c.escape_default().collect() } else { vec![c] };
        text.chars().take(SHOWN).flat_map(escape).collect()
    }

    /// By reason.
    pub fn by_reason(&self) -> impl Iterator<Item = (Reason, Tally)> + '_ {
        self.by_reason.iter().map(|(reason, tally)| (*reason, *tally))
    }

    /// Records refused so far.
    pub fn refused(&self) -> u64 {
        self.by_reason.values().map(|tally| tally.refused).sum()
    }

    /// Lately refused keys, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &RefusedKey> {
        self.newest.iter().rev()
    }

    /// Why `suffix` was refused, if that was lately.
    pub fn find(&self, suffix: &str) -> Option<&RefusedKey> {
        let key = Self::shown(suffix);
        self.newest.iter().find(|known| known.key == key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_small_and_keeps_the_newest() {
        let mut ledger = Ledger::default();
        let refusal = Refusal { reason: Reason::Namespace, detail: "\n".repeat(1000) };
        for n in 0..1000 {
            let key = format!("{n}{}", "x".repeat(1000));
            assert_eq!(ledger.note(&key, &refusal, false), n == 0);
        }
        assert!(ledger.note("again", &refusal, true));
        ledger.note("again", &refusal, true);
        let newest: Vec<_> = ledger.newest().collect();
        assert_eq!(newest.len(), NEWEST);
        assert_eq!((newest[0].key.as_str(), newest[0].audited), ("again", true));
        assert!(newest[1].key.starts_with("999x") && newest[1].key.len() == SHOWN, "{:?}", newest[1]);
        assert!(!newest[1].detail.contains('\n'));
        let tallies: Vec<_> = ledger.by_reason().collect();
        assert_eq!(tallies, [(Reason::Namespace, Tally { refused: 1000, audited: 2 })]);
        assert!(ledger.find("again").is_some() && ledger.find("5").is_none());
    }
}
