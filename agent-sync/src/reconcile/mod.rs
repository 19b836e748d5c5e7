//! Makes the installed tables equal to the desired ones, in an order in which no packet sees a
//! half-made service.
//!
//! In: [`Changes`], the time, and the tables to write to. Out: nothing but writes; what could not be
//! written stays pending and is retried with back-off. No I/O of its own and no clock, so a test can
//! check every invariant after every single write.
//!
//! One round writes policies, then virtual addresses, then addresses, nodes and prefixes, then backends, then slots, then the services'
//! values, which alone make slots reachable; then it removes services, and addresses last. Slots and
//! backends that nothing reaches any more stay for a grace period (see [`services`]): a program that
//! read the old count a moment ago may still follow it.

pub mod drift;
mod plain;
mod policy;
mod services;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ebpf_global_svc::abi::{
    ClusterState, EndpointValue, IpKey, IpValue, NodeKey, NodeValue, PrefixKey, PrefixValue, ServiceKey,
    TranslateKey, TranslateValue, UnderlayKey, UnderlayValue,
};
use ebpf_global_svc::{DatapathError, Tables};

use crate::desired::{Changes, Restored};
use plain::Plain;
use policy::Policy;
use services::Services;

/// First pause before failed writes are tried again; doubled with each failure in a row.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Owns the difference between desired and installed state.
#[derive(Debug, Default)]
pub struct Reconciler {
    ipcache: Plain<IpKey, IpValue>,
    prefix: Plain<PrefixKey, PrefixValue>,
    node: Plain<NodeKey, NodeValue>,
    underlay: Plain<UnderlayKey, UnderlayValue>,
    endpoint: Plain<IpKey, EndpointValue>,
    policy: Policy,
    cidr: Plain<PrefixKey, u32>,
    translate: Plain<TranslateKey, TranslateValue>,
    services: Services,
    cluster: Plain<u32, ClusterState>,
    failures: u32,
    retry_at: Option<Instant>,
    last_error: Option<String>,
    writes: BTreeMap<&'static str, u64>,
}

impl Reconciler {
    /// Reads back what is installed, so that IDs are kept and nothing is flushed.
    ///
    /// # Errors
    /// If a table cannot be read.
    pub fn restore(tables: &Tables, now: Instant) -> Result<(Self, Restored), DatapathError> {
        let (services, service) = Services::restore(tables, now)?;
        let states = tables.cluster.dump()?.into_iter();
        let restored = Restored {
            // The array has 512 elements.
            cluster: states.filter_map(|(id, state)| Some((u16::try_from(id).ok()?, state))).collect(),
            ipcache: tables.ipcache.dump()?,
            prefix: tables.prefix.dump()?,
            node: tables.node.dump()?,
            underlay: tables.underlay.dump()?,
            endpoint: tables.endpoint.dump()?,
            policy: tables.policy.dump()?,
            cidr: tables.cidr.dump()?,
            translate: tables.translate.dump()?,
            service,
        };
        Ok((Self { services, ..Self::default() }, restored))
    }

    /// Takes over new desired state; the newest for a key counts.
    pub fn accept(&mut self, changes: Changes) {
        self.ipcache.accept(changes.ipcache);
        self.prefix.accept(changes.prefix);
        self.node.accept(changes.node);
        self.underlay.accept(changes.underlay);
        self.endpoint.accept(changes.endpoint);
        self.policy.accept(changes.policy);
        self.cidr.accept(changes.cidr);
        self.translate.accept(changes.translate);
        self.services.accept(changes.service);
        self.cluster.accept(changes.cluster);
    }

    /// Writes what is new, retries what failed if its time has come, and clears away what has been
    /// unreachable for long enough.
    pub fn run(&mut self, now: Instant, tables: &mut Tables) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.ipcache.retry();
            self.prefix.retry();
            self.node.retry();
            self.underlay.retry();
            self.endpoint.retry();
            self.policy.retry();
            self.cidr.retry();
            self.translate.retry();
            self.services.retry();
            self.cluster.retry();
        }
        let mut round = write::Round::default();
        // One write ends calls to a dead cluster; it need not wait for anything.
        self.cluster.upsert(&mut *tables.cluster, &mut round);
        // What is allowed comes before those who are named in it, and before it is enforced.
        self.policy.upsert(&mut *tables.policy, &mut round);
        self.cidr.upsert(&mut *tables.cidr, &mut round);
        // Before what says that it has to be looked for there.
        self.translate.upsert(&mut *tables.translate, &mut round);
        // Before anything names a number.
        self.underlay.upsert(&mut *tables.underlay, &mut round);
        self.ipcache.upsert(&mut *tables.ipcache, &mut round);
        self.node.upsert(&mut *tables.node, &mut round);
        self.prefix.upsert(&mut *tables.prefix, &mut round);
        self.endpoint.upsert(&mut *tables.endpoint, &mut round);
        self.services.write(now, tables, &mut round);
        self.endpoint.remove(&mut *tables.endpoint, &mut round);
        self.prefix.remove(&mut *tables.prefix, &mut round);
        self.node.remove(&mut *tables.node, &mut round);
        self.ipcache.remove(&mut *tables.ipcache, &mut round);
        self.underlay.remove(&mut *tables.underlay, &mut round);
        self.translate.remove(&mut *tables.translate, &mut round);
        self.cidr.remove(&mut *tables.cidr, &mut round);
        self.policy.remove(&mut *tables.policy, &mut round);
        // A cluster returns when everything of it is as desired.
        self.cluster.remove(&mut *tables.cluster, &mut round);
        self.services.sweep(now, tables, &mut round);
        for (table, writes) in &round.writes {
            *self.writes.entry(table).or_default() += writes;
        }
        self.schedule_retry(now, round);
    }

    /// When [`run`](Self::run) has to be called again even if nothing changes.
    pub fn deadline(&self) -> Option<Instant> {
        [self.retry_at, self.services.sweep_at()].into_iter().flatten().min()
    }

    /// Desired changes that are not installed.
    pub fn pending(&self) -> usize {
        self.ipcache.pending()
            + self.prefix.pending()
            + self.node.pending()
            + self.underlay.pending()
            + self.endpoint.pending()
            + self.policy.pending()
            + self.cidr.pending()
            + self.translate.pending()
            + self.services.pending()
            + self.cluster.pending()
    }

    /// Why something is pending.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// How many services were removed since the start.
    pub fn services_gone(&self) -> u64 {
        self.services.gone()
    }

    /// Frontends of services that have these IDs. Walks all services once.
    pub fn frontends_of(&self, ids: &BTreeSet<u32>) -> BTreeMap<u32, ServiceKey> {
        self.services.frontends_of(ids)
    }

    /// Entries written or removed since the start, by table; retries count again.
    pub fn writes(&self) -> &BTreeMap<&'static str, u64> {
        &self.writes
    }

    fn schedule_retry(&mut self, now: Instant, round: write::Round) {
        if let Some(error) = round.error {
            self.last_error = Some(error);
        }
        if self.pending() == 0 {
            self.failures = 0;
            self.retry_at = None;
            self.last_error = None;
        } else if self.retry_at.is_none() {
            let pause = RETRY_FIRST.saturating_mul(1 << self.failures.min(16)).min(RETRY_MAX);
            self.failures = self.failures.saturating_add(1);
            self.retry_at = Some(now + pause);
        }
    }
}
