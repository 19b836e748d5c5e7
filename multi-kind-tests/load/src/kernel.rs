//! When a change is in a map of the kernel.
//!
//! Nothing tells of a write to a map, so the entries in question are looked at again and again, on a thread of
//! its own, but only while a change is under way, and with pauses: a thread that spins takes a CPU away from
//! the programs that it measures. A time is late by up to such a pause.

use std::collections::HashMap;
use std::mem::offset_of;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use aya::maps::{self, Map, MapData, MapError};
use ebpf_global_svc_abi::{FAMILY_V4, Group, IpKey, IpValue, MAX_SLOTS, ServiceKey, ServiceValue};
use tokio::sync::mpsc::UnboundedSender;

/// The kernel makes some 0.1 ms of it.
const PAUSE: Duration = Duration::from_micros(50);

/// What an entry is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Entry {
    /// An address has an identity.
    Address { cluster: u16, ip: Ipv4Addr, identity: u32 },
    /// A frontend has so many backends of a cluster, or the cluster has none behind it.
    Frontend { own: u16, ip: Ipv4Addr, port: u16, cluster: u16, count: u32 },
}

/// Looks until each entry says what it is to say; tells its number and the time.
pub(crate) struct Watch {
    entries: Receiver<(u32, Entry)>,
    seen: UnboundedSender<anyhow::Result<(u32, Instant)>>,
    tables: Tables,
}

impl Watch {
    /// `pins` is the folder of an agent's pinned maps.
    pub(crate) fn start(
        pins: &Path,
        entries: Receiver<(u32, Entry)>,
        seen: UnboundedSender<anyhow::Result<(u32, Instant)>>,
    ) -> anyhow::Result<()> {
        let watch = Self { entries, seen, tables: Tables::open(pins)? };
        thread::Builder::new().name("kernel".into()).spawn(move || watch.run())?;
        Ok(())
    }

    /// Until nobody has entries any more.
    fn run(self) {
        let mut under_way: HashMap<u32, Entry> = HashMap::new();
        loop {
            if under_way.is_empty() {
                let Ok((number, entry)) = self.entries.recv() else { return };
                under_way.insert(number, entry);
            }
            loop {
                match self.entries.try_recv() {
                    Ok((number, entry)) => drop(under_way.insert(number, entry)),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            under_way.retain(|number, entry| match self.tables.says(entry) {
                Ok(false) => true,
                Ok(true) => {
                    // Nobody listens any more: nobody sends any more, either.
                    let _ = self.seen.send(Ok((*number, Instant::now())));
                    false
                }
                Err(error) => {
                    let _ = self.seen.send(Err(error));
                    false
                }
            });
            pause();
        }
    }
}

type Pinned<const KEY: usize, const VALUE: usize> = maps::HashMap<MapData, [u8; KEY], [u8; VALUE]>;

/// Maps, by the bytes of their entries.
struct Tables {
    ipcache: Pinned<{ size_of::<IpKey>() }, { size_of::<IpValue>() }>,
    service: Pinned<{ size_of::<ServiceKey>() }, { size_of::<ServiceValue>() }>,
}

impl Tables {
    fn open(pins: &Path) -> anyhow::Result<Self> {
        Ok(Self { ipcache: pinned(pins, "cm_ipcache")?, service: pinned(pins, "cm_service")? })
    }

    fn says(&self, entry: &Entry) -> anyhow::Result<bool> {
        match *entry {
            Entry::Address { cluster, ip, identity } => {
                let value = look(&self.ipcache, &address_key(cluster, ip))?;
                Ok(value.is_some_and(|value| word(&value, offset_of!(IpValue, identity)) == identity))
            }
            Entry::Frontend { own, ip, port, cluster, count } => {
                let value = look(&self.service, &frontend_key(own, ip, port))?;
                Ok(value.map_or(0, |value| backends(&value, cluster)) == count)
            }
        }
    }
}

fn pinned<const KEY: usize, const VALUE: usize>(
    pins: &Path,
    name: &str,
) -> anyhow::Result<Pinned<KEY, VALUE>> {
    let path = pins.join(name);
    let map = MapData::from_pin(&path).and_then(Map::from_map_data).and_then(Pinned::try_from);
    map.with_context(|| format!("cannot read the map {}", path.display()))
}

fn look<const KEY: usize, const VALUE: usize>(
    map: &Pinned<KEY, VALUE>,
    key: &[u8; KEY],
) -> anyhow::Result<Option<[u8; VALUE]>> {
    match map.get(key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).context("cannot look into a map"),
    }
}

fn address_key(cluster: u16, ip: Ipv4Addr) -> [u8; size_of::<IpKey>()] {
    let mut key = [0; size_of::<IpKey>()];
    put(&mut key, offset_of!(IpKey, cluster), &cluster.to_ne_bytes());
    put(&mut key, offset_of!(IpKey, family), &[FAMILY_V4]);
    put(&mut key, offset_of!(IpKey, ip), &ip.octets());
    key
}

fn frontend_key(own: u16, ip: Ipv4Addr, port: u16) -> [u8; size_of::<ServiceKey>()] {
    const TCP: u8 = 6;
    let mut key = [0; size_of::<ServiceKey>()];
    put(&mut key, offset_of!(ServiceKey, cluster), &own.to_ne_bytes());
    put(&mut key, offset_of!(ServiceKey, port), &port.to_be_bytes());
    put(&mut key, offset_of!(ServiceKey, proto), &[TCP]);
    put(&mut key, offset_of!(ServiceKey, family), &[FAMILY_V4]);
    put(&mut key, offset_of!(ServiceKey, ip), &ip.octets());
    key
}

/// Backends of a cluster that a frontend's value counts.
fn backends(value: &[u8; size_of::<ServiceValue>()], cluster: u16) -> u32 {
    let n = usize::from(half(value, offset_of!(ServiceValue, n_groups)));
    let groups = (0..n).map(|n| offset_of!(ServiceValue, groups) + n * size_of::<Group>());
    let of = |group: &usize| half(value, group + offset_of!(Group, cluster)) == cluster;
    groups.filter(of).map(|group| word(value, group + offset_of!(Group, slots)) & MAX_SLOTS).sum()
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|field| field.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

#[expect(clippy::disallowed_methods, reason = "nothing tells when a map changes")]
fn pause() {
    thread::sleep(PAUSE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_those_of_the_cluster_among_the_groups_in_use() {
        let mut value = [0; size_of::<ServiceValue>()];
        put(&mut value, offset_of!(ServiceValue, n_groups), &2_u16.to_ne_bytes());
        for (n, (cluster, count)) in [(7_u16, 70_u32), (9, 90), (11, 110)].into_iter().enumerate() {
            let group = offset_of!(ServiceValue, groups) + n * size_of::<Group>();
            put(&mut value, group + offset_of!(Group, cluster), &cluster.to_ne_bytes());
            put(
                &mut value,
                group + offset_of!(Group, slots),
                &Group::new(cluster, 1, 3, count).slots.to_ne_bytes(),
            );
        }
        assert_eq!([7, 9, 11].map(|cluster| backends(&value, cluster)), [70, 90, 0]);
    }
}
