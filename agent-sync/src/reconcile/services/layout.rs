//! Which slot gets which backend.

use std::collections::HashSet;

use super::NO_BACKEND;

/// The slots to write so that slots `0..wanted.len()` hold exactly `wanted`.
///
/// Backends that stay keep their slots. Holes are filled with new backends, then with the last ones
/// (which stay in their old slots too, so every count from the old to the new is valid in between).
/// `wanted` has no duplicates.
pub(super) fn assign(current: &[u32], wanted: &[u32]) -> Vec<(u32, u32)> {
    let wanted_set: HashSet<u32> = wanted.iter().copied().collect();
    let kept = &current[..current.len().min(wanted.len())];
    let mut placed = HashSet::with_capacity(kept.len());
    let mut holes = Vec::new();
    for (slot, backend) in (0_u32..).zip(kept) {
        let stays = *backend != NO_BACKEND && wanted_set.contains(backend) && placed.insert(*backend);
        if !stays {
            holes.push(slot);
        }
    }
    let appended = (0_u32..).take(wanted.len()).skip(kept.len());
    let homeless = wanted.iter().copied().filter(|backend| !placed.contains(backend));
    holes.into_iter().chain(appended).zip(homeless).collect()
}

/// As [`assign`] for `current` that holds distinct backends only, of which `removed` (ascending) go and to
/// which `added` come, so that there are `count`.
pub(super) fn change(current: &[u32], count: usize, removed: &[u32], added: &[u32]) -> Vec<(u32, u32)> {
    let goes = |backend: &u32| removed.binary_search(backend).is_ok();
    let kept = &current[..current.len().min(count)];
    let beyond = current[kept.len()..].iter().filter(|backend| !goes(backend));
    let mut homeless = added.iter().chain(beyond).copied().peekable();
    if homeless.peek().is_none() {
        return Vec::new();
    }
    let holes = (0_u32..).zip(kept).filter(|(_, backend)| goes(backend)).map(|(slot, _)| slot);
    let appended = (0_u32..).take(count).skip(kept.len());
    holes.chain(appended).zip(homeless).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_leads_where_assigning_all_does() {
        let mut seed = 7_u32;
        let mut random = |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        for _ in 0..2000 {
            let mut current: Vec<u32> = (1..=random(12)).collect();
            for at in 1..current.len() {
                current.swap(at, random(u32::try_from(at).unwrap()) as usize);
            }
            let removed: Vec<u32> = (1..=12).filter(|id| current.contains(id) && random(3) == 0).collect();
            let added: Vec<u32> = (20..20 + random(4)).collect();
            let stays = current.iter().filter(|id| !removed.contains(id));
            let wanted: Vec<u32> = stays.chain(&added).copied().collect();
            let moves = change(&current, wanted.len(), &removed, &added);
            assert_eq!(moves.len(), assign(&current, &wanted).len());
            let mut slots = current.clone();
            for (slot, backend) in moves {
                let slot = slot as usize;
                slots.resize(slots.len().max(slot + 1), NO_BACKEND);
                slots[slot] = backend;
            }
            slots.truncate(wanted.len());
            slots.sort_unstable();
            let mut wanted = wanted;
            wanted.sort_unstable();
            assert_eq!(slots, wanted);
        }
    }

    #[test]
    fn one_leaving_backend_is_one_slot_write() {
        assert_eq!(assign(&[1, 2, 3, 4], &[1, 3, 4]), [(1, 4)]);
        assert_eq!(assign(&[1, 2, 3, 4], &[1, 2, 3]), []);
        let current: Vec<u32> = (1..=10_000).collect();
        let wanted: Vec<u32> = current.iter().copied().filter(|id| *id != 77).collect();
        assert_eq!(assign(&current, &wanted), [(76, 10_000)]);
    }

    #[test]
    fn new_backends_fill_holes_before_they_append() {
        assert_eq!(assign(&[1, 2, 3], &[1, 3, 4, 5]), [(1, 4), (3, 5)]);
        assert_eq!(assign(&[], &[7, 8]), [(0, 7), (1, 8)]);
    }

    #[test]
    fn missing_and_doubled_slots_are_repaired() {
        assert_eq!(assign(&[1, NO_BACKEND, 1], &[1, 2, 3]), [(1, 2), (2, 3)]);
    }
}
