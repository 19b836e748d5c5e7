//! What the tables call nodes: by their IPv4 address, or by a number that stands for their IPv6 address.
//!
//! An address of a pod names its node in four bytes, here and in the kernel, so that an IPv6 underlay costs no memory and
//! no look-up where there is an IPv4 one. A number is this node's own affair. It is never given to another address while
//! somebody may still name it: they go round, and whoever starts again goes on behind those that it finds installed.
//!
//! A node of both families has two names. Records may use either; what is installed uses that of the address where its
//! tunnels end.
//!
//! Records of other clusters name what they like. So a number is installed only once something that is installed names it,
//! and those that no record names any more go with a sweep once there are some: also after a start, which by itself
//! changes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_global_svc::abi::{UnderlayKey, UnderlayValue};

use crate::tunnels::UnderlayProtocol;

/// Behind no node.
const NOWHERE: [u8; 4] = [0; 4];
/// Numbers are those of 0.0.0.0/8 but the first.
const NUMBERS: u32 = (1 << 24) - 1;
/// Numbers that nobody may name before they are looked for, beside half of those that were named last.
const LEFTOVERS: usize = 64;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Underlay {
    protocol: UnderlayProtocol,
    numbers: HashMap<Ipv6Addr, [u8; 4]>,
    entries: BTreeMap<[u8; 4], Entry>,
    /// The number that was given last.
    last: u32,
    /// Named when it was last looked.
    named: usize,
    is_due: bool,
    changes: HashMap<UnderlayKey, Option<UnderlayValue>>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    ip: Ipv6Addr,
    installed: bool,
}

impl Underlay {
    /// Takes over installed numbers. `named` are those that other tables name: none of them is given to a new address.
    pub(super) fn restore(
        protocol: UnderlayProtocol,
        installed: Vec<(UnderlayKey, UnderlayValue)>,
        named: impl Iterator<Item = [u8; 4]>,
    ) -> Self {
        let mut underlay = Self { protocol, ..Self::default() };
        for (key, value) in installed {
            let ip = Ipv6Addr::from(value.ip);
            let fits = place(key.number).is_some() && protocol.takes(ip.into());
            if !fits || underlay.numbers.contains_key(&ip) {
                underlay.changes.insert(key, None);
                continue;
            }
            underlay.numbers.insert(ip, key.number);
            underlay.entries.insert(key.number, Entry { ip, installed: true });
        }
        let named: HashSet<[u8; 4]> = named.collect();
        underlay.named = underlay.entries.keys().filter(|number| named.contains(*number)).count();
        let known = underlay.entries.keys().copied().chain(named);
        underlay.last = known.filter_map(place).max().unwrap_or(0);
        underlay
    }

    pub(super) fn protocol(&self) -> UnderlayProtocol {
        self.protocol
    }

    /// The name of a node's address, perhaps from now on; nowhere if no node can be there.
    pub(super) fn name(&mut self, ip: IpAddr) -> [u8; 4] {
        let ip = match ip {
            IpAddr::V4(ip) => return v4_name(ip).unwrap_or(NOWHERE),
            IpAddr::V6(ip) if ip.is_unicast_link_local() => return NOWHERE,
            IpAddr::V6(ip) => ip,
        };
        if let Some(number) = self.numbers.get(&ip) {
            return *number;
        }
        let Some(number) = self.free() else { return NOWHERE };
        self.numbers.insert(ip, number);
        self.entries.insert(number, Entry { ip, installed: false });
        number
    }

    /// The name of a node's address, if it has one.
    pub(super) fn find(&self, ip: IpAddr) -> Option<[u8; 4]> {
        match ip {
            IpAddr::V4(ip) => v4_name(ip),
            IpAddr::V6(ip) => self.numbers.get(&ip).copied(),
        }
    }

    /// The address that a name stands for; none: it is nowhere, or nobody's number.
    pub(super) fn address(&self, name: [u8; 4]) -> Option<IpAddr> {
        match place(name) {
            Some(_) => self.entries.get(&name).map(|entry| entry.ip.into()),
            None => Some(name).filter(|name| *name != NOWHERE).map(|name| Ipv4Addr::from(name).into()),
        }
    }

    /// Whether tunnels can end at the address that a name stands for: tables may use it.
    pub(super) fn is_tunnel_end(&self, name: [u8; 4]) -> bool {
        self.address(name).is_some_and(|ip| self.protocol.takes(ip))
    }

    /// Something that is to be installed names this node.
    pub(super) fn install(&mut self, node_ip: [u8; 4]) {
        if self.protocol == UnderlayProtocol::Ipv4 {
            return;
        }
        if let Some(entry) = self.entries.get_mut(&node_ip).filter(|entry| !entry.installed) {
            entry.installed = true;
            let value = UnderlayValue { ip: entry.ip.octets() };
            self.changes.insert(UnderlayKey { number: node_ip }, Some(value));
        }
    }

    /// Whether there may be too many numbers that nobody names.
    pub(super) fn wants_sweep(&self) -> bool {
        self.is_due || self.entries.len() > self.named + self.named / 2 + LEFTOVERS
    }

    /// A cluster is gone, with all that it named.
    pub(super) fn forget_some(&mut self) {
        self.is_due = !self.entries.is_empty();
    }

    /// Forgets the numbers that are none of `named`.
    pub(super) fn sweep(&mut self, named: &HashSet<[u8; 4]>) {
        let gone: Vec<[u8; 4]> =
            self.entries.keys().filter(|number| !named.contains(*number)).copied().collect();
        for number in gone {
            let Some(entry) = self.entries.remove(&number) else { continue };
            self.numbers.remove(&entry.ip);
            if entry.installed {
                self.changes.insert(UnderlayKey { number }, None);
            }
        }
        self.named = self.entries.len();
        self.is_due = false;
    }

    /// What is to be written since this was asked last.
    pub(super) fn take_changes(&mut self) -> Vec<(UnderlayKey, Option<UnderlayValue>)> {
        self.changes.drain().collect()
    }

    /// What is to be installed for a number.
    pub(super) fn wanted(&self, key: UnderlayKey) -> Option<UnderlayValue> {
        let entry = self.entries.get(&key.number).filter(|entry| entry.installed)?;
        Some(UnderlayValue { ip: entry.ip.octets() })
    }

    /// Numbers that are to be installed.
    pub(super) fn keys(&self) -> impl Iterator<Item = UnderlayKey> {
        let installed = self.entries.iter().filter(|(_, entry)| entry.installed);
        installed.map(|(number, _)| UnderlayKey { number: *number })
    }

    /// The next number that is nobody's; none: there are as many nodes.
    fn free(&mut self) -> Option<[u8; 4]> {
        for _ in 0..=self.entries.len() {
            self.last = self.last % NUMBERS + 1;
            let number = self.last.to_be_bytes();
            if !self.entries.contains_key(&number) {
                return Some(number);
            }
        }
        None
    }
}

/// An IPv4 address names itself, unless it looks like a number: no host has one of 0.0.0.0/8.
fn v4_name(ip: Ipv4Addr) -> Option<[u8; 4]> {
    Some(ip.octets()).filter(|octets| octets[0] != 0)
}

/// Where a number stands in their order; none if it is none.
fn place(number: [u8; 4]) -> Option<u32> {
    Some(u32::from_be_bytes(number)).filter(|place| (1..=NUMBERS).contains(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u16) -> IpAddr {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n).into()
    }

    fn over_ipv6(installed: Vec<(UnderlayKey, UnderlayValue)>, named: &[[u8; 4]]) -> Underlay {
        Underlay::restore(UnderlayProtocol::Ipv6, installed, named.iter().copied())
    }

    fn entry(number: [u8; 4], n: u16) -> (UnderlayKey, UnderlayValue) {
        let IpAddr::V6(ip) = ip(n) else { unreachable!("it is one") };
        (UnderlayKey { number }, UnderlayValue { ip: ip.octets() })
    }

    /// Installed entries after all changes so far.
    fn follow(underlay: &mut Underlay, installed: &mut BTreeMap<UnderlayKey, UnderlayValue>) {
        for (key, value) in underlay.take_changes() {
            match value {
                Some(value) => drop(installed.insert(key, value)),
                None => drop(installed.remove(&key)),
            }
        }
        let wanted: BTreeMap<_, _> =
            underlay.keys().map(|key| (key, underlay.wanted(key).unwrap())).collect();
        assert_eq!(*installed, wanted);
    }

    #[test]
    fn over_ipv4_an_address_names_itself() {
        let mut underlay = Underlay::default();
        let v4 = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
        assert_eq!(underlay.name(v4), [192, 0, 2, 1]);
        assert_eq!(underlay.find(v4), Some([192, 0, 2, 1]));
        assert_eq!(underlay.address([192, 0, 2, 1]), Some(v4));
        assert_eq!((underlay.find(ip(1)), underlay.address(NOWHERE)), (None, None));
        let other = underlay.name(ip(1));
        assert_eq!((underlay.address(other), underlay.is_tunnel_end(other)), (Some(ip(1)), false));
        underlay.install([192, 0, 2, 1]);
        underlay.install(other);
        assert_eq!(underlay.take_changes(), []);
    }

    #[test]
    fn no_address_passes_for_a_number() {
        let mut underlay = over_ipv6(vec![entry([0, 0, 0, 5], 5)], &[]);
        let number = IpAddr::from([0, 0, 0, 5]);
        assert_eq!((underlay.name(number), underlay.find(number)), (NOWHERE, None));
        assert_eq!(underlay.address([0, 0, 0, 6]), None);
    }

    #[test]
    fn over_ipv6_each_address_has_a_number_of_its_own_which_is_installed_once_it_is_used() {
        let mut underlay = over_ipv6(Vec::new(), &[]);
        let mut installed = BTreeMap::new();
        let numbers: HashSet<[u8; 4]> = (0..500).map(|n| underlay.name(ip(n))).collect();
        assert_eq!(numbers.len(), 500);
        assert!(numbers.iter().all(|number| number[0] == 0 && *number != NOWHERE));
        for n in 0..500 {
            let number = underlay.name(ip(n));
            assert_eq!((underlay.address(number), underlay.find(ip(n))), (Some(ip(n)), Some(number)));
        }
        assert_eq!(underlay.name("fe80::1".parse().unwrap()), NOWHERE);
        let v4 = underlay.name([192, 0, 2, 1].into());
        assert!(!underlay.is_tunnel_end(v4) && underlay.is_tunnel_end(underlay.find(ip(7)).unwrap()));
        follow(&mut underlay, &mut installed);
        assert!(installed.is_empty(), "nobody names them");
        underlay.install(underlay.find(ip(7)).unwrap());
        underlay.install(NOWHERE);
        follow(&mut underlay, &mut installed);
        assert_eq!(installed.len(), 1);
        underlay.install(underlay.find(ip(7)).unwrap());
        assert_eq!(underlay.take_changes(), [], "it is there already");
    }

    #[test]
    fn a_restart_keeps_numbers_and_a_sweep_forgets_those_that_nobody_names() {
        let before = vec![
            entry([0, 0, 0, 5], 5),
            entry([0, 0, 0, 9], 9),
            // Nobody's: an address of the other family, a second number, and none at all.
            entry([10, 0, 0, 1], 1),
            entry([0, 0, 0, 7], 5),
            entry(NOWHERE, 2),
        ];
        let mut installed: BTreeMap<_, _> = before.iter().copied().collect();
        let mut underlay = over_ipv6(before, &[[0, 0, 0, 20], [192, 0, 2, 1]]);
        follow(&mut underlay, &mut installed);
        assert_eq!(installed.len(), 2);
        assert_eq!(underlay.name(ip(9)), [0, 0, 0, 9]);
        assert_eq!(underlay.name(ip(3)), [0, 0, 0, 21], "behind those that are named without being there");
        assert!(!underlay.wants_sweep(), "a few that nobody names do no harm");
        underlay.sweep(&HashSet::from([[0, 0, 0, 9], [0, 0, 0, 21]]));
        follow(&mut underlay, &mut installed);
        assert_eq!(installed.keys().map(|key| key.number).collect::<Vec<_>>(), [[0, 0, 0, 9]]);
        assert_eq!(underlay.name(ip(5)), [0, 0, 0, 22], "its old number is not given again");
    }

    #[test]
    fn leftovers_do_not_add_up_over_restarts() {
        let before: Vec<_> = (1..=LEFTOVERS + 3).map(|n| u16::try_from(n).unwrap()).collect();
        let installed = before.iter().map(|n| entry(u32::from(*n).to_be_bytes(), *n)).collect();
        let underlay = over_ipv6(installed, &[[0, 0, 0, 1], [0, 0, 0, 1]]);
        assert!(underlay.wants_sweep(), "one of them is named, however often");
    }

    #[test]
    fn another_family_begins_anew() {
        let mut underlay =
            Underlay::restore(UnderlayProtocol::Ipv4, vec![entry([0, 0, 0, 5], 5)], std::iter::empty());
        assert_eq!(underlay.take_changes(), [(UnderlayKey { number: [0, 0, 0, 5] }, None)]);
    }

    #[test]
    fn numbers_go_round_and_whoever_names_many_in_turn_does_not_use_them_up() {
        let mut underlay = over_ipv6(vec![entry([0, 0, 0, 1], 1)], &[[0, 255, 255, 254]]);
        assert_eq!(underlay.name(ip(2)), [0, 255, 255, 255]);
        assert_eq!(underlay.name(ip(3)), [0, 0, 0, 2], "the first is somebody's");
        let mut most = 0;
        for n in 10..2000 {
            underlay.name(ip(n));
            if underlay.wants_sweep() {
                underlay.sweep(&HashSet::from([[0, 0, 0, 1]]));
                most = most.max(underlay.named);
            }
            assert!(underlay.entries.len() <= 1 + 2 * LEFTOVERS);
        }
        assert_eq!(most, 1);
        assert_eq!(underlay.address([0, 0, 0, 1]), Some(ip(1)));
    }
}
