//! Tables by which all nodes choose the same backend for the same client, and few clients move when backends come or go.
//!
//! The algorithm is Maglev's (Eisenbud et al., NSDI 2016, section 3.4): each backend has a permutation of the table's
//! places, and they take turns to occupy the next one that is free.

use std::collections::BTreeSet;
use std::net::IpAddr;

use twox_hash::XxHash3_64;

use crate::desired::{BackendKey, TABLE_SIZES};

/// For each place the index of a backend in `backends`, which has at least one. `size`: a prime larger than 1.
///
/// What counts is only who the backends are, not their order: every node has the same table.
pub(super) fn table(backends: &[BackendKey], size: u32) -> Vec<usize> {
    const FREE: usize = usize::MAX;
    let size = size as usize;
    let mut order: Vec<(u64, u64, usize)> =
        (0..).zip(backends).map(|(index, key)| (hash(key, 0), hash(key, 1), index)).collect();
    // Who takes the first turn must not depend on where a backend stands.
    order.sort_unstable();
    let modulo = |hash: u64, by: usize| usize::try_from(hash % by as u64).unwrap_or(0);
    let mut next: Vec<(usize, usize, usize)> = order
        .into_iter()
        .map(|(offset, skip, index)| (modulo(offset, size), modulo(skip, size - 1) + 1, index))
        .collect();
    let mut table = vec![FREE; size];
    let mut left = size;
    loop {
        for (at, skip, index) in &mut next {
            if left == 0 {
                return table;
            }
            while table[*at] != FREE {
                *at = (*at + *skip) % size;
            }
            table[*at] = *index;
            left -= 1;
        }
    }
}

/// The same in every version: nodes are not all upgraded at once.
fn hash(key: &BackendKey, seed: u64) -> u64 {
    let mut bytes = [0; 21];
    match key.ip {
        IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => bytes[..16].copy_from_slice(&ip.octets()),
    }
    bytes[16..18].copy_from_slice(&key.cluster.to_be_bytes());
    bytes[18..20].copy_from_slice(&key.port.to_be_bytes());
    bytes[20] = key.proto;
    XxHash3_64::oneshot_with_seed(seed, &bytes)
}

/// Whether slots look like a table of backends.
pub(super) fn is_table(count: u32, distinct: usize) -> bool {
    TABLE_SIZES.contains(&count) && distinct < count as usize
}

/// Backends that a table is made of: those that are active, or all if none is.
pub(super) fn members(backends: &[BackendKey]) -> Vec<BackendKey> {
    let active: BTreeSet<BackendKey> = backends.iter().filter(|key| !key.terminating).copied().collect();
    if active.is_empty() { backends.to_vec() } else { active.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(n: u8) -> Vec<BackendKey> {
        let key = |n: u8| BackendKey {
            cluster: 1,
            ip: [10, 1, 0, n].into(),
            port: 80,
            proto: 6,
            terminating: false,
        };
        (1..=n).map(key).collect()
    }

    fn of(backends: &[BackendKey], size: u32) -> Vec<BackendKey> {
        table(backends, size).into_iter().map(|index| backends[index]).collect()
    }

    #[test]
    fn shares_are_equal_and_order_does_not_count() {
        let all = backends(20);
        let table = of(&all, 2039);
        for key in &all {
            let places = table.iter().filter(|other| *other == key).count();
            assert!((101..=102).contains(&places), "{key:?} has {places}");
        }
        let mut turned = all;
        turned.reverse();
        assert_eq!(of(&turned, 2039), table);
    }

    #[test]
    fn few_places_change_hands_when_one_goes() {
        let all = backends(20);
        let (before, after) = (of(&all, 2039), of(&all[..19], 2039));
        let others = before.iter().zip(&after).filter(|(b, a)| **b != all[19] && b != a).count();
        // The paper finds a few hundredths of the table.
        assert!(others < 2039 / 20, "{others} places of others changed");
        assert!(!after.contains(&all[19]));
    }

    #[test]
    fn a_place_for_each_even_if_there_are_more_backends_than_places() {
        assert_eq!(table(&backends(1), 251), vec![0; 251]);
        assert_eq!(table(&backends(255), 251).len(), 251);
    }
}
