//! Entries of one pair of subject and peer, in the form in which the kernel's longest match is right.

use std::collections::BTreeMap;

use ebpf_global_svc::abi::{
    POLICY_DENY, POLICY_PEER_BITS, POLICY_PORT_BITS, POLICY_PROTO_BITS, PolicyKey, PolicyValue,
};

use super::rules::Traffic;

/// What is installed for one subject and peer.
pub(super) type Pair = BTreeMap<PolicyKey, PolicyValue>;

/// Ports that share their leading bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PortPrefix {
    /// As in [`PolicyKey::prefixlen`].
    pub(super) bits: u32,
    pub(super) proto: u8,
    /// Host order; bits that do not count are zero.
    pub(super) port: u16,
}

impl PortPrefix {
    /// Everything.
    pub(super) const ANY: Self = Self { bits: POLICY_PEER_BITS, proto: 0, port: 0 };

    /// The fewest prefixes that make up a range of ports, both ends included.
    pub(super) fn range(proto: u8, first: u16, last: u16) -> Vec<Self> {
        let (mut first, end) = (u32::from(first), u32::from(last) + 1);
        let mut prefixes = Vec::new();
        while first < end {
            // The largest aligned block that begins here and ends within the range.
            let aligned = if first == 0 { 16 } else { first.trailing_zeros().min(16) };
            let free = (end - first).ilog2().min(aligned);
            let port = u16::try_from(first).unwrap_or(u16::MAX);
            prefixes.push(Self { bits: POLICY_PORT_BITS - free, proto, port });
            first += 1 << free;
        }
        prefixes
    }

    /// Those that hold all of this one, itself among them.
    fn around(self) -> impl Iterator<Item = Self> {
        let of_proto = (POLICY_PROTO_BITS..=self.bits.max(POLICY_PROTO_BITS)).map(move |bits| {
            let kept = bits - POLICY_PROTO_BITS;
            let mask = if kept == 0 { 0 } else { u16::MAX << (16 - kept) };
            Self { bits, proto: self.proto, port: self.port & mask }
        });
        let is_any = self.bits == POLICY_PEER_BITS;
        std::iter::once(Self::ANY).chain(of_proto.filter(move |_| !is_any))
    }
}

/// What rules say of one pair and direction.
#[derive(Debug, Default)]
pub(super) struct Found {
    allowed: BTreeMap<PortPrefix, u32>,
    denied: BTreeMap<PortPrefix, u32>,
}

impl Found {
    /// A rule is about the pair.
    pub(super) fn add(&mut self, traffic: &Traffic, is_denied: bool) {
        let found = if is_denied { &mut self.denied } else { &mut self.allowed };
        for port in &traffic.ports {
            // Of several rules that say the same, the first one counts the packets.
            found.entry(*port).or_insert(traffic.rule);
        }
    }

    /// Everything that is not denied.
    pub(super) fn allow_all(&mut self, rule: u32) {
        self.allowed.entry(PortPrefix::ANY).or_insert(rule);
    }

    /// As entries. What a denial covers is not allowed, whichever of both is longer.
    pub(super) fn write(self, subject: u32, peer: u32, direction: u8, pair: &mut Pair) {
        let Self { allowed, denied } = self;
        let allowed =
            allowed.iter().filter(|(port, _)| !port.around().any(|wider| denied.contains_key(&wider)));
        let entry = |port: &PortPrefix, rule: u32, flags: u32| {
            let PortPrefix { bits, proto, port } = *port;
            let key = PolicyKey { prefixlen: bits, subject, peer, direction, proto, port: port.to_be() };
            (key, PolicyValue { flags, rule })
        };
        pair.extend(allowed.map(|(port, rule)| entry(port, *rule, 0)));
        pair.extend(denied.iter().map(|(port, rule)| entry(port, *rule, POLICY_DENY)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_made_of_the_fewest_prefixes() {
        for (first, last, count) in [(0, 65_535, 1), (80, 80, 1), (8080, 8095, 1), (1, 65_534, 30), (1, 3, 2)]
        {
            let prefixes = PortPrefix::range(6, first, last);
            assert_eq!(prefixes.len(), count, "{first} to {last}: {prefixes:?}");
        }
        assert_eq!(PortPrefix::range(6, 0, 65_535)[0].bits, POLICY_PROTO_BITS);
        let holds = |prefix: &PortPrefix, port: u16| {
            let free = POLICY_PORT_BITS - prefix.bits;
            u32::from(port) >> free == u32::from(prefix.port) >> free
        };
        let prefixes = PortPrefix::range(17, 1000, 2999);
        for port in 0..=u16::MAX {
            let found = prefixes.iter().filter(|prefix| holds(prefix, port)).count();
            assert_eq!(found, usize::from((1000..=2999).contains(&port)), "{port}");
        }
    }

    #[test]
    fn a_wider_denial_leaves_nothing_allowed() {
        let port = PortPrefix::range(6, 80, 80)[0];
        let around: Vec<_> = port.around().collect();
        assert_eq!(around.len(), 18);
        assert_eq!((around[0], around[1].bits, around[17]), (PortPrefix::ANY, POLICY_PROTO_BITS, port));
        assert_eq!(PortPrefix::ANY.around().collect::<Vec<_>>(), [PortPrefix::ANY]);
        let mut found = Found::default();
        found.allowed.insert(port, 1);
        found.denied.insert(PortPrefix::range(6, 64, 127)[0], 2);
        found.allowed.insert(PortPrefix::range(17, 80, 80)[0], 3);
        let mut pair = Pair::new();
        found.write(7, 8, 0, &mut pair);
        let values: Vec<_> = pair.values().map(|value| (value.flags, value.rule)).collect();
        assert_eq!(values, [(POLICY_DENY, 2), (0, 3)]);
    }
}
