//! Backends of one service, packed: most have the same ports.

use std::collections::HashMap;
use std::net::IpAddr;

use super::PortMap;

/// Target ports by the names of the service's ports, for each backend. Ascending by address.
#[derive(Clone, Debug, Default)]
pub struct Backends {
    entries: Vec<Entry>,
    /// None twice. After edits there may be some that nobody has any more.
    ports: Vec<PortMap>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    ip: IpAddr,
    /// Index into the ports.
    ports: u32,
}

impl Backends {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The ports of a backend.
    pub fn get(&self, ip: IpAddr) -> Option<&PortMap> {
        let at = self.find(ip).ok()?;
        Some(self.ports_of(&self.entries[at]))
    }

    /// In order of their addresses.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&IpAddr, &PortMap)> {
        self.entries.iter().map(|entry| (&entry.ip, self.ports_of(entry)))
    }

    /// Goes through all in order of their addresses, with what `of` makes of the ports of each: it is
    /// asked once for all that have the same.
    pub fn each<T>(&self, of: impl FnMut(&PortMap) -> T, mut each: impl FnMut(IpAddr, &T)) {
        let made: Vec<T> = self.ports.iter().map(of).collect();
        self.entries.iter().for_each(|entry| each(entry.ip, &made[entry.ports as usize]));
    }

    /// Adds a backend or replaces its ports.
    pub fn insert(&mut self, ip: IpAddr, ports: PortMap) {
        let ports = self.intern(ports);
        match self.find(ip) {
            Ok(at) => self.entries[at].ports = ports,
            Err(at) => self.entries.insert(at, Entry { ip, ports }),
        }
    }

    /// Removes a backend; tells whether it was there.
    pub fn remove(&mut self, ip: IpAddr) -> bool {
        let found = self.find(ip);
        found.is_ok_and(|at| {
            self.entries.remove(at);
            true
        })
    }

    /// Kinds of ports that are kept, used or not.
    pub(super) fn distinct_ports(&self) -> usize {
        self.ports.len()
    }

    fn find(&self, ip: IpAddr) -> Result<usize, usize> {
        self.entries.binary_search_by(|entry| entry.ip.cmp(&ip))
    }

    fn ports_of(&self, entry: &Entry) -> &PortMap {
        &self.ports[entry.ports as usize]
    }

    fn intern(&mut self, ports: PortMap) -> u32 {
        let known = self.ports.iter().position(|known| *known == ports);
        index(known.unwrap_or_else(|| {
            self.ports.push(ports);
            self.ports.len() - 1
        }))
    }
}

/// Fewer ports than a record has bytes.
fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// The last of several for one address counts.
impl FromIterator<(IpAddr, PortMap)> for Backends {
    fn from_iter<I: IntoIterator<Item = (IpAddr, PortMap)>>(backends: I) -> Self {
        let mut known: HashMap<PortMap, u32> = HashMap::new();
        let mut packed = Self::default();
        for (ip, ports) in backends {
            // Mostly the same as the one before.
            let before = packed.entries.last().map(|entry| entry.ports);
            let same = before.filter(|before| packed.ports[*before as usize] == ports);
            let ports = same.or_else(|| known.get(&ports).copied()).unwrap_or_else(|| {
                let at = index(packed.ports.len());
                packed.ports.push(ports.clone());
                known.insert(ports, at);
                at
            });
            packed.entries.push(Entry { ip, ports });
        }
        packed.entries.sort_by_key(|entry| entry.ip);
        packed.entries.dedup_by(|later, kept| {
            let same = later.ip == kept.ip;
            if same {
                kept.ports = later.ports;
            }
            same
        });
        packed
    }
}

impl<'a> IntoIterator for &'a Backends {
    type Item = (&'a IpAddr, &'a PortMap);
    type IntoIter = Box<dyn Iterator<Item = Self::Item> + 'a>;
    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

impl PartialEq for Backends {
    fn eq(&self, other: &Self) -> bool {
        if self.len() != other.len() {
            return false;
        }
        // Pairs repeat: each is compared once in a row.
        let mut same = None;
        self.entries.iter().zip(&other.entries).all(|(a, b)| {
            let pair = (a.ports, b.ports);
            let equal = a.ip == b.ip && (same == Some(pair) || self.ports_of(a) == other.ports_of(b));
            same = Some(pair);
            equal
        })
    }
}

impl Eq for Backends {}

#[cfg(test)]
mod tests {
    use super::super::{Port, Protocol};
    use super::*;

    fn ports(port: u16) -> PortMap {
        [("http".to_owned(), Port { protocol: Protocol::Tcp, port })].into()
    }

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn equality_does_not_depend_on_the_way_there() {
        let mut edited: Backends =
            [(ip(2), ports(1)), (ip(1), ports(2)), (ip(1), ports(3))].into_iter().collect();
        assert_eq!(edited.get(ip(1)), Some(&ports(3)));
        edited.insert(ip(3), ports(2));
        edited.insert(ip(2), ports(2));
        assert!(edited.remove(ip(1)) && !edited.remove(ip(9)));
        let fresh: Backends = [(ip(2), ports(2)), (ip(3), ports(2))].into_iter().collect();
        assert_eq!(edited, fresh);
        edited.insert(ip(3), ports(4));
        assert_ne!(edited, fresh);
        let all: Vec<_> = edited.iter().map(|(ip, ports)| (*ip, ports.clone())).collect();
        assert_eq!(all, [(ip(2), ports(2)), (ip(3), ports(4))]);
    }
}
