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

#[cfg(test)]
mod tests {
    use super::*;

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
