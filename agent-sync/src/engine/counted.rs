//! What the programs count, with the names of what is counted.

use std::collections::{BTreeMap, BTreeSet};

use clustermesh_kvstore::cluster::{ClusterId, ClusterName, NamespacedName};
use ebpf_global_svc::abi::{CallKey, Counter, EventState, ServiceKey, call, event_kind};
use ebpf_global_svc::{Datapath, DatapathError, KINDS};
use tracing::warn;

use super::query::Row;
use super::{Engine, shown};
use crate::wire_key;

/// All that is shown as metrics.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Packets and events by reason.
    pub reasons: Vec<(u8, Counter)>,
    /// Calls by service and cluster, in the order in which the services came.
    pub calls: Vec<CallCount>,
    /// What became of events, by kind.
    pub events: [EventState; KINDS],
}

/// Calls of one service that went to one cluster, or to none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallCount {
    /// Its ID in the kernel.
    pub id: u32,
    /// Its name, if it is known.
    pub service: Option<NamespacedName>,
    /// The address that is called, if it is known.
    pub frontend: Option<ServiceKey>,
    /// Who answered; none: nobody, the call was refused.
    pub cluster: Option<ClusterId>,
    /// The name of that cluster, as far as it is configured.
    pub cluster_name: Option<ClusterName>,
    /// How many.
    pub calls: u64,
}

/// Words of [`event_kind`].
pub(crate) const KIND_NAMES: [&str; KINDS] = {
    let mut names = [""; KINDS];
    names[event_kind::DROP as usize] = "drop";
    names[event_kind::AUDIT as usize] = "audit";
    names[event_kind::ALLOW as usize] = "allow";
    names[event_kind::TRACE as usize] = "trace";
    names[event_kind::CALL as usize] = "call";
    names
};

/// Which counts of calls are still somebody's.
#[derive(Debug, Default)]
pub(super) struct CallCounts {
    /// Services that had gone when this was looked at last; none: it never was.
    gone: Option<u64>,
}

impl Engine {
    pub(super) fn counted(&self) -> Result<Option<Counted>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(None) };
        let calls = self.calls(datapath)?;
        Ok(Some(Counted { reasons: datapath.metrics()?, calls, events: datapath.event_states()? }))
    }

    /// `cm_calls`.
    pub(super) fn call_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = self.calls(datapath)?.into_iter().map(|call| {
            let frontend = call.frontend.map(|key| (wire_key::address(key.family, key.ip), key));
            vec![
                ("id", call.id.to_string()),
                ("service", call.service.map_or_else(|| "?".into(), |name| name.to_string())),
                ("frontend", frontend.map_or_else(|| "?".into(), |(ip, _)| shown(ip))),
                ("port", frontend.map_or_else(|| "?".into(), |(_, key)| u16::from_be(key.port).to_string())),
                (
                    "protocol",
                    frontend.map_or_else(|| "?".into(), |(_, key)| wire_key::protocol_name(key.proto)),
                ),
                ("cluster", call.cluster.map_or_else(|| "none".into(), |id| id.to_string())),
                ("calls", call.calls.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    /// What became of events.
    pub(super) fn event_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = KIND_NAMES.iter().zip(datapath.event_states()?).map(|(kind, state)| {
            vec![
                ("kind", (*kind).to_owned()),
                ("sent", state.sent.to_string()),
                ("sampled", state.sampled.to_string()),
                ("limited", state.limited.to_string()),
                ("full", state.full.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    /// Counts go with their service: another one that got its ID would inherit them. IDs are given again after a
    /// restart only, so what a predecessor left is looked at before anything is written.
    pub(super) fn forget_calls(&mut self) {
        let Some(datapath) = &self.datapath else { return };
        let gone = self.core.services_gone();
        if self.calls.gone.replace(gone) == Some(gone) {
            return;
        }
        if let Err(error) = forget_foreign(datapath, |ids| self.core.frontends_of(ids)) {
            self.calls.gone = None;
            warn!(%error, "cannot forget the counts of services that are gone");
        }
    }

    fn calls(&self, datapath: &Datapath) -> Result<Vec<CallCount>, DatapathError> {
        let counts = datapath.calls()?;
        let frontends = self.core.frontends_of(&counts.iter().map(|(key, _)| key.service).collect());
        let names: BTreeMap<_, _> =
            self.core.members().iter().filter_map(|(name, member)| Some((member.id?, name))).collect();
        let max = self.core.own().max;
        let counted = counts.into_iter().map(|(key, counter)| {
            let frontend = frontends.get(&key.service).copied();
            let cluster =
                ClusterId::new(key.cluster.into(), max).ok().filter(|_| key.outcome == call::CHOSEN);
            CallCount {
                id: key.service,
                service: frontend.and_then(|key| self.core.mesh().service_at(&key).cloned()),
                frontend,
                cluster,
                cluster_name: cluster.and_then(|id| names.get(&id)).map(|name| (*name).clone()),
                calls: counter.packets,
            }
        });
        Ok(counted.collect())
    }
}

/// Forgets counts of services that are not installed.
fn forget_foreign(
    datapath: &Datapath,
    frontends_of: impl Fn(&BTreeSet<u32>) -> BTreeMap<u32, ServiceKey>,
) -> Result<(), DatapathError> {
    let keys: Vec<CallKey> = datapath.calls()?.into_iter().map(|(key, _)| key).collect();
    let known = frontends_of(&keys.iter().map(|key| key.service).collect());
    let gone: Vec<CallKey> = keys.into_iter().filter(|key| !known.contains_key(&key.service)).collect();
    if gone.is_empty() { Ok(()) } else { datapath.forget_calls(&gone) }
}
