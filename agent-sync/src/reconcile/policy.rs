//! `cm_policy`, where an entry that is missing must never let more through than it would as a whole.
//!
//! A missing allowance drops too much, a missing denial lets too much pass. So denials are written first, and in
//! a full table they take the place of allowances of the same pods and direction. While one of them is missing,
//! nothing more is allowed there.

use std::collections::{HashMap, HashSet};

use ebpf_global_svc::abi::{POLICY_DENY, PolicyKey, PolicyValue};
use ebpf_global_svc::table::Table;

use super::drift::Want;
use super::plain::Plain;
use super::write::{Round, remove_each};

/// Changes of `cm_policy` that are not installed yet.
#[derive(Debug, Default)]
pub(super) struct Policy(Plain<PolicyKey, PolicyValue>);

/// Pods of one identity, and a direction: what one allowance can be in the way of.
type Scope = (u32, u8);

impl Policy {
    pub(super) fn accept(&mut self, changes: Vec<(PolicyKey, Option<PolicyValue>)>) {
        self.0.accept(changes);
    }

    /// Puts what failed among what is written next.
    pub(super) fn retry(&mut self) {
        self.0.retry();
    }

    pub(super) fn upsert(&mut self, table: &mut dyn Table<PolicyKey, PolicyValue>, round: &mut Round) {
        // Room that somebody has made is theirs before it is an allowance's.
        self.0.retry_those(denies);
        self.0.upsert_those(table, round, |_, value| denies(value));
        // Again, since a denial of others may have taken the place. It ends: each time an allowance goes.
        while self.give_way(table, round) {
            self.0.upsert_those(table, round, |_, value| denies(value));
        }
        let incomplete: HashSet<Scope> = self.refused().collect();
        self.0.upsert_those(table, round, |key, _| !incomplete.contains(&scope(key)));
    }

    pub(super) fn remove(&mut self, table: &mut dyn Table<PolicyKey, PolicyValue>, round: &mut Round) {
        self.0.remove(table, round);
    }

    /// What is to be installed under a key by now, if `value` is desired.
    pub(super) fn want(&self, key: &PolicyKey, value: Option<PolicyValue>) -> Want<PolicyValue> {
        self.0.want(key, value)
    }

    pub(super) fn pending(&self) -> usize {
        self.0.pending()
    }

    /// Of denials that could not be written.
    fn refused(&self) -> impl Iterator<Item = Scope> {
        self.0.failed().filter(|(_, value)| denies(value)).map(|(key, _)| scope(key))
    }

    /// Removes an allowance for each denial that a full table has refused, of the same scope, while there is
    /// one; both are then to be written again. Whether there was any.
    fn give_way(&mut self, table: &mut dyn Table<PolicyKey, PolicyValue>, round: &mut Round) -> bool {
        let mut refused: HashMap<Scope, usize> = HashMap::new();
        for scope in self.refused() {
            *refused.entry(scope).or_default() += 1;
        }
        if refused.is_empty() {
            return false;
        }
        let installed = match table.dump() {
            Ok(installed) => installed,
            Err(error) => {
                round.record(&error);
                return false;
            }
        };
        if (installed.len() as u64) < table.capacity() {
            // Not for want of room.
            return false;
        }
        let mut allowances = installed;
        allowances.retain(|(key, value)| {
            let wanted = if denies(value) { None } else { refused.get_mut(&scope(key)).filter(|n| **n > 0) };
            wanted.is_some_and(|n| {
                *n -= 1;
                true
            })
        });
        let keys: Vec<PolicyKey> = allowances.iter().map(|(key, _)| *key).collect();
        let gone = remove_each(table, &keys, round);
        for ((key, value), gone) in allowances.into_iter().zip(&gone) {
            if *gone {
                self.0.displaced(key, value);
            }
        }
        if gone.contains(&true) {
            self.0.retry_those(denies);
            return true;
        }
        false
    }
}

fn denies(value: &PolicyValue) -> bool {
    value.flags & POLICY_DENY != 0
}

fn scope(key: &PolicyKey) -> Scope {
    (key.subject, key.direction)
}

#[cfg(test)]
mod tests {
    use ebpf_global_svc::abi::POLICY_PEER_BITS;
    use ebpf_global_svc::table::MemoryTable;
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    fn key(subject: u32, peer: u32) -> PolicyKey {
        PolicyKey { prefixlen: POLICY_PEER_BITS, subject, peer, direction: 0, proto: 0, port: 0 }
    }

    fn value(deny: bool) -> PolicyValue {
        PolicyValue { flags: if deny { POLICY_DENY } else { 0 }, rule: 1 }
    }

    fn retry(policy: &mut Policy, table: &mut MemoryTable<PolicyKey, PolicyValue>) {
        policy.retry();
        write(policy, table);
    }

    fn write(policy: &mut Policy, table: &mut MemoryTable<PolicyKey, PolicyValue>) {
        let mut round = Round::default();
        policy.upsert(table, &mut round);
        policy.remove(table, &mut round);
    }

    #[test]
    fn an_allowance_gives_way_to_a_denial_that_does_not_fit() {
        let mut table = MemoryTable::new("cm_policy", 3);
        let mut policy = Policy::default();
        policy.accept(vec![(key(1, 1), Some(value(false))), (key(1, 2), Some(value(false)))]);
        policy.accept(vec![(key(2, 1), Some(value(false)))]);
        retry(&mut policy, &mut table);
        assert_eq!((policy.pending(), table.count().unwrap()), (0, 3));
        policy.accept(vec![(key(1, 3), Some(value(true)))]);
        retry(&mut policy, &mut table);
        let installed: HashMap<_, _> = table.dump().unwrap().into_iter().collect();
        assert_eq!(installed.get(&key(1, 3)), Some(&value(true)));
        assert_eq!(installed.get(&key(2, 1)), Some(&value(false)), "others' allowances stay");
        assert_eq!((policy.pending(), installed.len()), (1, 3));
        // Room again: what gave way returns.
        policy.accept(vec![(key(2, 1), None)]);
        retry(&mut policy, &mut table);
        retry(&mut policy, &mut table);
        assert_eq!((policy.pending(), table.count().unwrap()), (0, 3));
    }

    /// Whatever comes and goes in tables of all sizes: no pod has an allowance while a denial of its is missing,
    /// and with room all is as desired.
    #[test]
    fn nothing_is_allowed_for_want_of_room() {
        for seed in 0..2000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let capacity = rng.random_range(1..12);
            let mut table = MemoryTable::new("cm_policy", capacity);
            let mut policy = Policy::default();
            let mut desired: HashMap<PolicyKey, PolicyValue> = HashMap::new();
            for _ in 0..40 {
                let mut changes = Vec::new();
                for _ in 0..rng.random_range(1..4) {
                    let key = key(rng.random_range(1..3), rng.random_range(0..8));
                    let value = rng.random_bool(0.6).then(|| value(rng.random_bool(0.4)));
                    match value {
                        Some(value) => desired.insert(key, value),
                        None => desired.remove(&key),
                    };
                    changes.push((key, value));
                }
                policy.accept(changes);
                match rng.random() {
                    true => retry(&mut policy, &mut table),
                    false => write(&mut policy, &mut table),
                }
                let installed: HashMap<_, _> = table.dump().unwrap().into_iter().collect();
                let missing: HashSet<Scope> = desired
                    .iter()
                    .filter(|(key, value)| denies(value) && installed.get(key) != Some(value))
                    .map(|(key, _)| scope(key))
                    .collect();
                for (key, value) in &installed {
                    assert!(
                        denies(value) || !missing.contains(&scope(key)),
                        "seed {seed}: {key:?} is allowed, a denial is missing in {installed:?}"
                    );
                }
                if desired.len() as u64 <= capacity {
                    // What had to go first makes room for what comes.
                    retry(&mut policy, &mut table);
                    let installed: HashMap<_, _> = table.dump().unwrap().into_iter().collect();
                    assert_eq!((policy.pending(), installed), (0, desired.clone()), "seed {seed}");
                }
            }
        }
    }
}
