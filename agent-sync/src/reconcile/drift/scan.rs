use std::time::{Duration, Instant};

use ebpf_global_svc::table::{Cursor, Table};
use ebpf_global_svc::{DatapathError, Tables};
use tracing::warn;

use super::super::Reconciler;
use super::super::write::{Round, remove_each, upsert_each};
use super::{Drift, DriftKind, Want};
use crate::mesh::Mesh;

/// Entries looked at in one go: about two milliseconds of system calls.
const CHUNK: usize = 2048;
/// From one go to the next.
const PAUSE: Duration = Duration::from_millis(100);
/// Tables that are looked at, one after the other.
const TABLES: usize = 12;

/// Compares all tables with what is wanted, again and again.
///
/// A walk over what is wanted goes by position: when entries come or go meanwhile, a few others may only
/// be looked at in the next scan.
#[derive(Debug, Default)]
pub struct Scan {
    interval: Option<Duration>,
    next: Option<Instant>,
    /// When the scan under way began, and what had been found by then.
    began: Option<(Instant, u64)>,
    place: Place,
    drift: Drift,
    round: Round,
}

/// Where a scan stands.
#[derive(Debug, Default)]
struct Place {
    table: usize,
    walk: Walk,
}

/// Both walks over one table.
#[derive(Clone, Copy, Debug)]
enum Walk {
    /// Over what is installed.
    Installed(Option<Cursor>),
    /// Over what is wanted.
    Wanted(usize),
}

impl Default for Walk {
    fn default() -> Self {
        Self::Installed(None)
    }
}

/// An entry that is to be written again; none: removed.
type Write<K, V> = (DriftKind, K, Option<V>);

impl Scan {
    /// Scans begin `interval` after one another from `now` on; none: there are no more.
    pub fn set_interval(&mut self, interval: Option<Duration>, now: Instant) {
        self.interval = interval;
        self.next = interval.map(|interval| now + interval);
        self.began = None;
        self.place = Place::default();
    }

    /// When [`Self::run`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.next
    }

    /// What was found so far; none if nobody looks.
    pub fn drift(&self) -> Option<&Drift> {
        self.interval.map(|_| &self.drift)
    }

    /// Looks at the next entries if it is time, and writes what differs. What `mesh` wants must have been
    /// accepted by `reconciler`.
    pub fn run(&mut self, now: Instant, mesh: &Mesh, reconciler: &Reconciler, tables: &mut Tables) {
        let Some(interval) = self.interval.filter(|_| self.next.is_some_and(|at| at <= now)) else {
            return;
        };
        let found = self.drift.total();
        let (began, _) = *self.began.get_or_insert((now, found));
        let mut budget = CHUNK;
        while budget > 0 && self.place.table < TABLES {
            let looked = self.look(budget, now, mesh, reconciler, tables);
            // Each look counts, so that this ends however little there is.
            budget = budget.saturating_sub(looked.max(1));
        }
        self.next = Some(now + PAUSE);
        if self.place.table == TABLES {
            self.finish();
            self.next = Some((began + interval).max(now + PAUSE));
        }
    }

    fn finish(&mut self) {
        self.place = Place::default();
        self.drift.scans += 1;
        let before = self.began.take().map_or(0, |(_, found)| found);
        let found = self.drift.total() - before;
        if found > 0 {
            warn!(found, "somebody else changed tables of the datapath; wrote the entries again");
        }
        let error = self.round.error.take();
        if let Some(error) = error.as_ref().filter(|error| self.drift.error.as_ref() != Some(error)) {
            warn!(%error, "cannot compare or repair all tables of the datapath");
        }
        self.drift.error = error;
    }

    /// A part of the table whose turn it is. Gives the number of entries looked at.
    fn look(
        &mut self,
        limit: usize,
        now: Instant,
        mesh: &Mesh,
        reconciler: &Reconciler,
        tables: &mut Tables,
    ) -> usize {
        let services = &reconciler.services;
        match self.place.table {
            // What others lead to comes first.
            0 => {
                let want = |id: &u32| services.want_backend(*id);
                self.table(limit, now, &mut *tables.backend, want, || services.backend_ids())
            }
            1 => {
                let slots = services.slots();
                let want = |key: &_| slots.want(key);
                self.table(limit, now, &mut *tables.slot, want, || services.slot_keys())
            }
            2 => {
                let want = |key: &_| services.want_value(key);
                self.table(limit, now, &mut *tables.service, want, || services.keys())
            }
            3 => {
                let want = |key: &_| reconciler.ipcache.want(key, mesh.wanted_address(key));
                self.table(limit, now, &mut *tables.ipcache, want, || mesh.address_keys())
            }
            4 => {
                let want = |key: &_| reconciler.prefix.want(key, mesh.wanted_prefix(key));
                self.table(limit, now, &mut *tables.prefix, want, || mesh.prefix_keys())
            }
            5 => {
                let want = |key: &_| reconciler.node.want(key, mesh.wanted_node(key));
                self.table(limit, now, &mut *tables.node, want, || mesh.node_keys())
            }
            6 => {
                let want = |key: &_| reconciler.underlay.want(key, mesh.wanted_underlay(key));
                self.table(limit, now, &mut *tables.underlay, want, || mesh.underlay_keys())
            }
            7 => {
                let want = |key: &_| reconciler.endpoint.want(key, mesh.wanted_endpoint(key));
                self.table(limit, now, &mut *tables.endpoint, want, || mesh.endpoint_keys())
            }
            8 => {
                let want = |key: &_| reconciler.policy.want(key, mesh.wanted_policy(key));
                self.table(limit, now, &mut *tables.policy, want, || mesh.policy_keys())
            }
            9 => {
                let want = |key: &_| reconciler.cidr.want(key, mesh.wanted_cidr(key));
                self.table(limit, now, &mut *tables.cidr, want, || mesh.cidr_keys())
            }
            10 => {
                let want = |key: &_| reconciler.translate.want(key, mesh.wanted_translation(key));
                self.table(limit, now, &mut *tables.translate, want, || mesh.translation_keys())
            }
            _ => {
                let want = |id: &u32| reconciler.cluster.want(id, mesh.wanted_state(*id));
                self.table(limit, now, &mut *tables.cluster, want, || mesh.state_keys())
            }
        }
    }

    fn table<K, V, I>(
        &mut self,
        limit: usize,
        now: Instant,
        table: &mut dyn Table<K, V>,
        want: impl Fn(&K) -> Want<V>,
        keys: impl FnOnce() -> I,
    ) -> usize
    where
        K: Copy,
        V: Copy + PartialEq,
        I: Iterator<Item = K>,
    {
        match next_part(&mut self.place.walk, limit, table, want, keys) {
            Ok((looked, end, writes)) => {
                self.write(now, table, &writes);
                if end {
                    self.place = Place { table: self.place.table + 1, ..Place::default() };
                }
                looked
            }
            Err(error) => {
                self.round.record(&error);
                self.place = Place { table: self.place.table + 1, ..Place::default() };
                0
            }
        }
    }

    fn write<K: Copy, V: Copy>(&mut self, now: Instant, table: &mut dyn Table<K, V>, writes: &[Write<K, V>]) {
        let entries: Vec<(K, V)> =
            writes.iter().filter_map(|(_, key, value)| value.map(|value| (*key, value))).collect();
        let foreign: Vec<K> =
            writes.iter().filter(|(_, _, value)| value.is_none()).map(|(_, key, _)| *key).collect();
        upsert_each(table, &entries, &mut self.round);
        remove_each(table, &foreign, &mut self.round);
        for (kind, ..) in writes {
            *self.drift.found.entry((table.name(), *kind)).or_default() += 1;
            self.drift.last = Some(now);
        }
    }
}

/// Entries looked at, whether they were the table's last, and what differs.
type Part<K, V> = (usize, bool, Vec<Write<K, V>>);

fn next_part<K, V, I>(
    walk: &mut Walk,
    limit: usize,
    table: &dyn Table<K, V>,
    want: impl Fn(&K) -> Want<V>,
    keys: impl FnOnce() -> I,
) -> Result<Part<K, V>, DatapathError>
where
    K: Copy,
    V: Copy + PartialEq,
    I: Iterator<Item = K>,
{
    match *walk {
        Walk::Installed(mut cursor) => {
            let entries = table.page(&mut cursor, limit)?;
            *walk = cursor.map_or(Walk::Wanted(0), |cursor| Walk::Installed(Some(cursor)));
            let differs = |(key, value): &(K, V)| match want(key) {
                Want::Value(wanted) if wanted != *value => Some((DriftKind::Altered, *key, Some(wanted))),
                Want::Nothing => Some((DriftKind::Foreign, *key, None)),
                Want::Value(_) | Want::Unsettled => None,
            };
            Ok((entries.len(), false, entries.iter().filter_map(differs).collect()))
        }
        Walk::Wanted(position) => {
            let keys: Vec<K> = keys().skip(position).take(limit).collect();
            *walk = Walk::Wanted(position + keys.len());
            let installed = table.get(&keys)?;
            let differs = |(key, value): (&K, Option<V>)| match (want(key), value) {
                (Want::Value(wanted), None) => Some((DriftKind::Missing, *key, Some(wanted))),
                (Want::Value(wanted), Some(value)) if wanted != value => {
                    Some((DriftKind::Altered, *key, Some(wanted)))
                }
                _ => None,
            };
            Ok((keys.len(), keys.len() < limit, keys.iter().zip(installed).filter_map(differs).collect()))
        }
    }
}
