use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// Decides when to read a file and when to believe that it is gone.
///
/// Not everybody writes to a temporary file and renames it. A file that is being written is left alone
/// until it has been quiet for a moment, so that half of it is not taken for all of it; one that has
/// just been emptied gets longer, since `>` empties a file before the new content comes. A file that
/// is missing may come back at once, as editors save by moving away the old one.
///
/// Plain code: listings and the time come in, decisions come out.
#[derive(Default)]
pub(super) struct Settle {
    known: BTreeMap<String, Known>,
}

/// How a file looks from outside. Whenever its content changes, so does this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Device and inode.
    pub(super) inode: (u64, u64),
    /// Bytes.
    pub(super) size: u64,
    /// Time of the last change of content, name or mode, which nobody can set.
    pub(super) changed: SystemTime,
}

#[derive(Default)]
struct Known {
    /// As of when it was read last.
    read: Option<Stamp>,
    missing_since: Option<SystemTime>,
}

/// What to do about a listing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Decisions {
    /// To be read now.
    pub(super) read: Vec<(String, Stamp)>,
    /// Gone.
    pub(super) removed: Vec<String>,
    /// Something is unsettled: look again after this time at the latest.
    pub(super) look_again: Option<Duration>,
}

const QUIET: Duration = Duration::from_millis(20);
const QUIET_IF_EMPTY: Duration = Duration::from_millis(250);
const MISSING: Duration = Duration::from_millis(50);

impl Settle {
    /// Takes a listing of all files. Files for which `unknown` holds could not be looked at; whether
    /// they are still there stays open.
    pub(super) fn decide(
        &mut self,
        listing: &BTreeMap<String, Stamp>,
        unknown: impl Fn(&str) -> bool,
        now: SystemTime,
    ) -> Decisions {
        let mut decisions = Decisions::default();
        for (name, stamp) in listing {
            let known = self.known.entry(name.clone()).or_default();
            known.missing_since = None;
            if known.read.as_ref() == Some(stamp) {
                continue;
            }
            let quiet = if stamp.size == 0 { QUIET_IF_EMPTY } else { QUIET };
            match remaining(stamp.changed, quiet, now) {
                Some(wait) => decisions.look_again_after(wait),
                None => decisions.read.push((name.clone(), stamp.clone())),
            }
        }
        self.known.retain(|name, known| {
            if listing.contains_key(name) || unknown(name) {
                return true;
            }
            let since = *known.missing_since.get_or_insert(now);
            match remaining(since, MISSING, now) {
                Some(wait) => {
                    decisions.look_again_after(wait);
                    true
                }
                None => {
                    decisions.removed.push(name.clone());
                    false
                }
            }
        });
        decisions
    }

    /// The file was read while it looked like this, before and after.
    pub(super) fn was_read(&mut self, name: &str, stamp: Stamp) {
        self.known.entry(name.to_owned()).or_default().read = Some(stamp);
    }
}

impl Decisions {
    /// Asks for another look, unless an earlier one is due.
    pub(super) fn look_again_after(&mut self, wait: Duration) {
        self.look_again = Some(self.look_again.map_or(wait, |other| other.min(wait)));
    }
}

/// How much of `period` after `start` is left. A clock that was set back must not make anybody wait.
fn remaining(start: SystemTime, period: Duration, now: SystemTime) -> Option<Duration> {
    period.checked_sub(now.duration_since(start).ok()?).filter(|rest| !rest.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn listing(size: u64, changed: SystemTime) -> BTreeMap<String, Stamp> {
        [("a.yaml".to_owned(), Stamp { inode: (1, 1), size, changed })].into()
    }

    #[test]
    fn a_file_is_read_once_it_is_quiet() {
        let mut settle = Settle::default();
        let start = SystemTime::now();
        let busy = settle.decide(&listing(5, start), |_| false, start + 5 * MS);
        assert_eq!(busy, Decisions { look_again: Some(15 * MS), ..Decisions::default() });
        let quiet = settle.decide(&listing(5, start), |_| false, start + 20 * MS);
        let [(name, stamp)] = &quiet.read[..] else { panic!("{quiet:?}") };
        settle.was_read(name, stamp.clone());
        assert_eq!(settle.decide(&listing(5, start), |_| false, start + 40 * MS), Decisions::default());
        assert_eq!(settle.decide(&listing(6, start), |_| false, start + 40 * MS).read.len(), 1);
    }

    #[test]
    fn an_emptied_file_gets_more_time() {
        let mut settle = Settle::default();
        let start = SystemTime::now();
        assert!(settle.decide(&listing(0, start), |_| false, start + 200 * MS).read.is_empty());
        assert_eq!(settle.decide(&listing(0, start), |_| false, start + 250 * MS).read.len(), 1);
    }

    #[test]
    fn a_missing_file_may_come_back() {
        let mut settle = Settle::default();
        let start = SystemTime::now();
        let full = listing(5, start);
        let none = BTreeMap::new();
        settle.was_read("a.yaml", full["a.yaml"].clone());
        assert_eq!(settle.decide(&none, |_| false, start + 60 * MS).look_again, Some(50 * MS));
        assert_eq!(settle.decide(&full, |_| false, start + 80 * MS), Decisions::default());
        assert_eq!(settle.decide(&none, |_| true, start + 500 * MS), Decisions::default());
        settle.decide(&none, |_| false, start + 600 * MS);
        assert_eq!(settle.decide(&none, |_| false, start + 650 * MS).removed, ["a.yaml"]);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_nobody_wait() {
        let mut settle = Settle::default();
        let start = SystemTime::now();
        assert_eq!(settle.decide(&listing(5, start + 60_000 * MS), |_| false, start).read.len(), 1);
    }
}
