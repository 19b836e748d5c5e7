//! Devices for old and new keys beside each other.
//!
//! A WireGuard device has one private key, and an address belongs to one of its peers. So that a packet is taken in
//! under the old key as well as under the new one while keys change, each key is in one of two slots, the next key
//! always in the other one, and there is a device for each combination of the own key's slot and the peer's. While
//! nothing changes, a node uses those of its own key's slot only; the others are down.
//!
//! The slot is the lowest bit of the public key. So it needs no place in any record, and never disagrees with the
//! key; a new key is drawn until it has the right one.

use std::fmt;

use clustermesh_kvstore::record::WireguardKey;

/// One of two places for a key of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u8);

/// A device: between own keys of one slot and peers' keys of one slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lane {
    own: Slot,
    peer: Slot,
}

impl Slot {
    /// Of a node's first key.
    pub const FIRST: Self = Self(0);

    /// The slot of a key.
    pub fn of(key: &WireguardKey) -> Self {
        Self(key.bytes()[0] & 1)
    }

    /// The slot of the next key.
    pub const fn other(self) -> Self {
        Self(self.0 ^ 1)
    }
}

impl Lane {
    /// How many there are.
    pub const COUNT: u8 = 4;

    /// All of them, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(|number| Self { own: Slot(number >> 1), peer: Slot(number & 1) })
    }

    /// The one in which these two keys meet.
    pub fn of(own: &WireguardKey, peer: &WireguardKey) -> Self {
        Self { own: Slot::of(own), peer: Slot::of(peer) }
    }

    /// The slot of the own key.
    pub const fn own(self) -> Slot {
        self.own
    }

    /// From 0 to 3: what is added to the name of the devices, and to their port.
    pub const fn number(self) -> u8 {
        self.own.0 << 1 | self.peer.0
    }

    /// The same as the peer calls it.
    pub const fn reversed(self) -> Self {
        Self { own: self.peer, peer: self.own }
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {}", self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_mean_the_same_lane() {
        let key = |byte| WireguardKey::new([byte; 32]).unwrap();
        assert_eq!(Lane::all().map(Lane::number).collect::<Vec<_>>(), [0, 1, 2, 3]);
        for (own, peer) in [(2, 4), (2, 5), (3, 4), (3, 5)] {
            let lane = Lane::of(&key(own), &key(peer));
            assert_eq!(lane.reversed(), Lane::of(&key(peer), &key(own)));
            assert_eq!(lane.own(), Slot::of(&key(own)));
        }
        assert_eq!(Lane::of(&key(3), &key(4)).number(), 2);
        assert_ne!(Slot::of(&key(2)), Slot::of(&key(2)).other());
    }
}
