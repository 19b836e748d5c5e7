//! Answers to those who look at the engine: sizes, states, tables as they are installed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::policy_rows;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName};
use clustermesh_kvstore::import_policy::Ledger;
use clustermesh_kvstore::key::Kind;
use ebpf_global_svc::abi::{self, Event, IpKey};
use ebpf_global_svc::table::Table;
use ebpf_global_svc::{DatapathError, Tables};
use tokio::sync::oneshot;

use super::counted::Counted;
use super::explain::{AddressPart, Explanation, Subject};
use super::{Engine, shown};
use crate::digest::{Stage, Verdict};
use crate::histogram::Histogram;
use crate::liveness;
use crate::mesh::{Conflict, Counts, LeftOut};
use crate::observe::{Flow, reason_text};
use crate::reconcile::drift::Drift;
use crate::wire_key;

/// A question to the engine.
#[derive(Debug)]
pub enum Query {
    /// How it is.
    Overview(oneshot::Sender<Overview>),
    /// How full the tables are. They are counted beside the engine: a million entries take some 0.1 s.
    Fills(oneshot::Sender<Vec<Fill>>),
    /// Why something is as it is.
    Explain(Subject, oneshot::Sender<Result<Explanation, DatapathError>>),
    /// The same of single addresses of one cluster; each costs little, but ask for few.
    Addresses(ClusterName, Vec<IpAddr>, oneshot::Sender<Result<Vec<AddressPart>, DatapathError>>),
    /// What is in a table of [`TABLES`].
    Dump(String, oneshot::Sender<Result<Vec<Row>, DumpError>>),
    /// What the programs have counted; none without a kernel.
    Counted(oneshot::Sender<Result<Option<Counted>, DatapathError>>),
    /// What events of the programs are about: a flow for each. Their times are the reader's.
    Describe(Vec<Event>, oneshot::Sender<Vec<Flow>>),
    /// Which remote clusters there are, and their nodes.
    Remotes(oneshot::Sender<BTreeMap<ClusterName, liveness::core::Member>>),
}

/// How full a table is.
#[derive(Clone, Debug)]
pub struct Fill {
    /// Name of the map.
    pub name: &'static str,
    /// Entries in it.
    pub entries: u64,
    /// Entries that fit.
    pub capacity: u64,
}

/// Names and texts of a row's columns.
pub type Row = Vec<(&'static str, String)>;

/// Tables that can be dumped.
pub const TABLES: [&str; 21] = [
    "service",
    "slot",
    "backend",
    "affinity",
    "ipcache",
    "prefix",
    "endpoint",
    "node",
    "underlay",
    "cluster",
    "policy",
    "cidr",
    "translate",
    "ct",
    "nat",
    "verdict",
    "overlay",
    "metrics",
    "sockrev",
    "calls",
    "events",
];

/// A table that cannot be dumped.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The caller's.
    #[error("there is no table {0:?}; there are {tables}", tables = TABLES.join(", "))]
    Unknown(String),
    /// The kernel's.
    #[error(transparent)]
    Unreadable(#[from] DatapathError),
}

/// The engine at a glance.
#[derive(Clone, Debug)]
pub struct Overview {
    /// Own cluster synced, everything installed.
    pub ready: bool,
    /// Kinds of each configured cluster.
    pub kinds: BTreeMap<ClusterName, Vec<KindView>>,
    /// IDs of the clusters that are let in.
    pub ids: BTreeMap<ClusterName, ClusterId>,
    /// Sizes.
    pub counts: Counts,
    /// Changes that are not installed.
    pub pending: usize,
    /// Why not.
    pub error: Option<String>,
    /// Refused claims to addresses of others, and for how long.
    pub conflicts: Vec<(Conflict, Duration)>,
    /// Refused contributions to services.
    pub left_out: LeftOut,
    /// What was found in the tables that is not as it should be; none if nobody looks.
    pub drift: Option<Drift>,
    /// How long batches of records took from their arrival until what follows from them was installed.
    pub batches: Histogram,
    /// Entries written or removed, by table.
    pub writes: BTreeMap<&'static str, u64>,
    /// Since the start.
    pub uptime: Duration,
}

/// One kind of a cluster.
#[derive(Clone, Debug)]
pub struct KindView {
    /// The kind.
    pub kind: Kind,
    /// Its list is complete and its connection is up.
    pub synced: bool,
    /// Records held.
    pub records: usize,
    /// Addresses that are not installed as their records say.
    pub misplaced: usize,
    /// Records refused so far.
    pub refused: Ledger,
    /// How it compares with what its exporter states.
    pub digest: DigestView,
}

/// What is known of a kind by its digest.
#[derive(Clone, Debug, Default)]
pub struct DigestView {
    /// The same, or not.
    pub verdict: Verdict,
    /// Sum of what etcd has, as far as it was told; none if nobody can tell.
    pub held: Option<u64>,
    /// Sum and revision that the exporter stated last.
    pub stated: Option<(u64, i64)>,
    /// Differences found so far, by stage.
    pub mismatches: [u64; Stage::ALL.len()],
    /// Times from source event to kernel.
    pub propagation: Option<Histogram>,
    /// Lists that came to their end.
    pub lists: u64,
}

impl Engine {
    pub(super) fn answer(&self, query: Query) {
        // An asker that has gone away needs no answer.
        match query {
            Query::Overview(reply) => drop(reply.send(self.overview())),
            Query::Fills(reply) => {
                let fills = fills(&self.tables);
                tokio::task::spawn_blocking(move || {
                    reply.send(fills.into_iter().map(|fill| fill()).collect())
                });
            }
            Query::Explain(subject, reply) => drop(reply.send(self.explain(&subject))),
            Query::Addresses(name, ips, reply) => drop(reply.send(self.explain_addresses(&name, &ips))),
            Query::Dump(table, reply) => drop(reply.send(self.dump(&table))),
            Query::Counted(reply) => drop(reply.send(self.counted())),
            Query::Describe(events, reply) => drop(reply.send(self.describe(events))),
            Query::Remotes(reply) => drop(reply.send(self.core.remotes())),
        }
    }

    fn overview(&self) -> Overview {
        let error = self.core.last_error().or(self.hooks.last_error());
        Overview {
            ready: self.is_ready(),
            kinds: self
                .core
                .members()
                .iter()
                .map(|(name, member)| (name.clone(), self.kinds(name, member)))
                .collect(),
            ids: self
                .core
                .members()
                .iter()
                .filter_map(|(name, member)| Some((name.clone(), member.id?)))
                .collect(),
            counts: self.core.mesh().counts(),
            pending: self.core.pending() + self.hooks.pending(),
            error: error.map(str::to_owned),
            conflicts: self
                .core
                .conflicts()
                .map(|(conflict, since)| (conflict.clone(), since.elapsed()))
                .collect(),
            left_out: self.core.mesh().left_out(),
            drift: self.core.drift().cloned(),
            batches: self.batches.clone(),
            writes: self.core.writes().clone(),
            uptime: self.started.elapsed(),
        }
    }

    fn kinds(&self, name: &ClusterName, member: &super::members::Member) -> Vec<KindView> {
        let view = |kind: &Kind| KindView {
            kind: *kind,
            synced: !member.lost.contains(kind)
                && member.id.is_some_and(|id| self.core.mesh().is_synced(id, *kind)),
            records: member.id.map_or(0, |id: ClusterId| self.core.mesh().count(id, *kind)),
            misplaced: match kind {
                Kind::Ip => member.id.map_or(0, |id| self.core.mesh().misplaced(id)),
                _ => 0,
            },
            refused: member.intake.get(kind).map(|intake| intake.ledger().clone()).unwrap_or_default(),
            digest: member.digests.get(kind).zip(member.id).map_or_else(
                DigestView::default,
                |(digest, id)| {
                    let compare = digest.compare();
                    DigestView {
                        verdict: compare.verdict(),
                        held: digest.sum(self.core.mesh().digest(id, *kind)),
                        stated: compare.newest_statement(),
                        mismatches: Stage::ALL.map(|stage| compare.mismatches(stage)),
                        propagation: Some(digest.propagation().histogram().clone()),
                        lists: digest.lists(),
                    }
                },
            ),
        };
        self.core.members().kinds(name).iter().map(view).collect()
    }

    pub(super) fn dump(&self, table: &str) -> Result<Vec<Row>, DumpError> {
        let tables = &self.tables;
        Ok(match table {
            "service" => rows(&*tables.service, service_rows)?.into_iter().flatten().collect(),
            "slot" => rows(&*tables.slot, slot_row)?,
            "backend" => rows(&*tables.backend, backend_row)?,
            "affinity" => rows(&*tables.affinity, affinity_row)?,
            "ipcache" => rows(&*tables.ipcache, |key, value| self.ipcache_row(key, value))?,
            "prefix" => rows(&*tables.prefix, |key, value| self.prefix_row(key, value))?,
            "endpoint" => rows(&*tables.endpoint, endpoint_row)?,
            "node" => rows(&*tables.node, node_row)?,
            "underlay" => rows(&*tables.underlay, underlay_row)?,
            "cluster" => rows(&*tables.cluster, cluster_row)?,
            "policy" => self.policy_rows()?,
            "cidr" => rows(&*tables.cidr, policy_rows::range)?,
            "translate" => rows(&*tables.translate, translate_row)?,
            "ct" => self.connection_rows()?,
            "nat" => self.nat_rows()?,
            "verdict" => self.verdict_rows()?,
            "overlay" => self.overlay_rows()?,
            "metrics" => self.metric_rows()?,
            "sockrev" => self.socket_rows()?,
            "calls" => self.call_rows()?,
            "events" => self.event_rows()?,
            other => return Err(DumpError::Unknown(other.chars().take(64).collect())),
        })
    }

    fn overlay_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = datapath.overlay_rx()?.into_iter().map(|(key, counter)| {
            vec![
                ("identity", key.identity.to_string()),
                ("cluster", self.cluster_of(key.identity)),
                ("sender", self.node_text(key.node_ip)),
                ("packets", counter.packets.to_string()),
                ("bytes", counter.bytes.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    fn metric_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = datapath.metrics()?.into_iter().map(|(reason, counter)| {
            vec![
                ("reason", reason_text(reason)),
                ("code", reason.to_string()),
                ("packets", counter.packets.to_string()),
                ("bytes", counter.bytes.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    fn socket_rows(&self) -> Result<Vec<Row>, DatapathError> {
        let Some(datapath) = &self.datapath else { return Ok(Vec::new()) };
        let rows = datapath.sock_rev()?.into_iter().map(|(key, value)| {
            vec![
                ("cookie", key.cookie.to_string()),
                ("backend", shown(wire_key::address(key.family, key.ip))),
                ("backend_port", u16::from_be(key.port).to_string()),
                ("protocol", wire_key::protocol_name(key.proto)),
                ("frontend", shown(wire_key::address(key.family, value.ip))),
                ("frontend_port", u16::from_be(value.port).to_string()),
                ("service", value.service.to_string()),
            ]
        });
        Ok(rows.collect())
    }

    pub(super) fn ipcache_row(&self, key: IpKey, value: abi::IpValue) -> Row {
        let mut row = address_columns(&key);
        row.push(("identity", value.identity.to_string()));
        row.push(("tunnel_endpoint", self.node_text(value.node_ip)));
        row.push(("key", value.key.to_string()));
        row
    }

    fn prefix_row(&self, key: abi::PrefixKey, value: abi::PrefixValue) -> Row {
        vec![
            ("prefix", wire_key::prefix(&key).map_or_else(|| "?".into(), |prefix| prefix.to_string())),
            ("cluster", value.cluster.to_string()),
            ("tunnel_endpoint", self.node_text(value.node_ip)),
        ]
    }

    /// A node that tables name: its underlay address or, if that is not known, what they call it.
    pub(super) fn node_text(&self, node_ip: [u8; 4]) -> String {
        let end = self.core.mesh().tunnel_end(node_ip);
        end.unwrap_or_else(|| std::net::Ipv4Addr::from(node_ip).into()).to_string()
    }

    fn cluster_of(&self, identity: u32) -> String {
        clustermesh_kvstore::cluster::Identity(identity).cluster(self.core.own().max).to_string()
    }
}

fn rows<K: Ord, V, R>(table: &dyn Table<K, V>, row: impl Fn(K, V) -> R) -> Result<Vec<R>, DatapathError> {
    let mut entries = table.dump()?;
    entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    Ok(entries.into_iter().map(|(key, value)| row(key, value)).collect())
}

/// Whom a frontend answers.
fn scope_text(scope: u8) -> String {
    match scope {
        abi::scope::MESH => "mesh".to_owned(),
        abi::scope::OUTSIDE => "outside".to_owned(),
        other => other.to_string(),
    }
}

/// A row for each group; one without a cluster if there is none.
pub(super) fn service_rows(key: abi::ServiceKey, value: abi::ServiceValue) -> Vec<Row> {
    let row = |group: Option<&abi::Group>| {
        let text = |field: fn(&abi::Group) -> u32| group.map_or_else(String::new, |g| field(g).to_string());
        vec![
            ("id", value.id.to_string()),
            ("frontend", shown(wire_key::address(key.family, key.ip))),
            ("port", u16::from_be(key.port).to_string()),
            ("protocol", wire_key::protocol_name(key.proto)),
            ("scope", scope_text(key.scope)),
            ("cluster", text(|group| group.cluster.into())),
            ("weight", text(|group| group.weight.into())),
            ("tier", text(|group| group.tier().into())),
            ("count", text(abi::Group::count)),
            ("session_seconds", (u32::from(value.affinity_timeout) * abi::AFFINITY_UNIT_SECONDS).to_string()),
        ]
    };
    let groups = &value.groups[..usize::from(value.n_groups).min(abi::MAX_GROUPS)];
    if groups.is_empty() { vec![row(None)] } else { groups.iter().map(|group| row(Some(group))).collect() }
}

pub(super) fn slot_row(key: abi::SlotKey, backend: u32) -> Row {
    vec![
        ("service", key.service.to_string()),
        ("cluster", key.cluster.to_string()),
        ("slot", key.slot.to_string()),
        ("backend", backend.to_string()),
    ]
}

pub(super) fn backend_row(id: u32, value: abi::BackendValue) -> Row {
    let state = match value.state {
        abi::backend_state::ACTIVE => "active".to_owned(),
        abi::backend_state::TERMINATING => "terminating".to_owned(),
        other => other.to_string(),
    };
    vec![
        ("id", id.to_string()),
        ("cluster", value.cluster.to_string()),
        ("address", shown(wire_key::address(value.family, value.ip))),
        ("port", u16::from_be(value.port).to_string()),
        ("protocol", wire_key::protocol_name(value.proto)),
        ("state", state),
    ]
}

fn affinity_row(key: abi::AffinityKey, value: abi::AffinityValue) -> Row {
    let idle = ebpf_global_svc::program_time().saturating_sub(Duration::from_nanos(value.used));
    vec![
        ("client", key.client.to_string()),
        ("service", key.service.to_string()),
        ("backend", value.backend.to_string()),
        ("idle_seconds", idle.as_secs().to_string()),
    ]
}

fn translate_row(key: abi::TranslateKey, value: abi::TranslateValue) -> Row {
    let (from, to) = match wire_key::translation(&key, &value) {
        Some((from, to)) => (from.to_string(), to.to_string()),
        None => ("?".to_owned(), "?".to_owned()),
    };
    let way = if key.way == abi::translate::TO_REAL { "to-real" } else { "to-virtual" };
    vec![("cluster", key.cluster.to_string()), ("way", way.to_owned()), ("from", from), ("to", to)]
}

fn address_columns(key: &IpKey) -> Row {
    vec![("cluster", key.cluster.to_string()), ("address", shown(wire_key::address(key.family, key.ip)))]
}

pub(super) fn endpoint_row(key: IpKey, value: abi::EndpointValue) -> Row {
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let via_stack = value.flags & abi::ENDPOINT_VIA_STACK != 0;
    let mut row = address_columns(&key);
    row.push(("identity", value.identity.to_string()));
    row.push(("ifindex", value.ifindex.to_string()));
    row.push(("pod_mac", mac(value.pod_mac)));
    row.push(("host_mac", mac(value.host_mac)));
    row.push(("delivery", if via_stack { "stack" } else { "direct" }.to_owned()));
    row.push(("policy", policy_rows::enforced(value.flags)));
    row
}

fn underlay_row(key: abi::UnderlayKey, value: abi::UnderlayValue) -> Row {
    vec![
        ("number", std::net::Ipv4Addr::from(key.number).to_string()),
        ("address", std::net::Ipv6Addr::from(value.ip).to_string()),
    ]
}

fn node_row(key: abi::NodeKey, value: abi::NodeValue) -> Row {
    let encryption = match value.flags {
        0 => "",
        abi::NODE_CLEAR => "clear",
        abi::NODE_ENCRYPTED => "encrypted",
        _ => "?",
    };
    vec![
        ("address", shown(wire_key::address(key.family, key.ip))),
        ("cluster", value.cluster.to_string()),
        ("encryption", encryption.to_owned()),
    ]
}

fn cluster_row(id: u32, value: abi::ClusterState) -> Row {
    let state = match value.state {
        abi::cluster_state::HEALTHY => "healthy".to_owned(),
        abi::cluster_state::DRAINING => "draining".to_owned(),
        abi::cluster_state::DEAD => "dead".to_owned(),
        other => other.to_string(),
    };
    vec![("cluster", id.to_string()), ("state", state)]
}

fn fills(tables: &Tables) -> Vec<Box<dyn FnOnce() -> Fill + Send>> {
    fn fill<K, V>(table: &dyn Table<K, V>) -> Box<dyn FnOnce() -> Fill + Send> {
        let (name, capacity, counter) = (table.name(), table.capacity(), table.counter());
        Box::new(move || {
            // A table that cannot be read shows in the error of the next write.
            let entries = counter.and_then(|count| count()).unwrap_or(0);
            Fill { name, entries, capacity }
        })
    }
    vec![
        fill(&*tables.service),
        fill(&*tables.slot),
        fill(&*tables.backend),
        fill(&*tables.affinity),
        fill(&*tables.ipcache),
        fill(&*tables.prefix),
        fill(&*tables.endpoint),
        fill(&*tables.node),
        fill(&*tables.underlay),
        fill(&*tables.policy),
        fill(&*tables.cidr),
        fill(&*tables.translate),
    ]
}
