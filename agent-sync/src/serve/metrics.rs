//! Prometheus' view, made from the status at each scrape.

mod counted;
mod digests;
mod encryption;
mod work;

use std::collections::BTreeMap;

use clustermesh_agent_api::v1::{Peer, StatusResponse};
use jiff::Timestamp;
use prometheus_client::encoding::text::encode as encode_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::engine::Counted;
use crate::liveness::Health;

/// OpenMetrics.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge>;
type Counters = Family<Labels, Counter>;

/// All metrics as text. `counted`: what the programs count, if there are any.
pub(super) fn encode(status: &StatusResponse, counted: Option<&Counted>) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("clustermesh");
    agent(status, &mut registry);
    clusters(status, &mut registry);
    certificates(status, Timestamp::now(), &mut registry);
    refusals(status, &mut registry);
    health(status, &mut registry);
    digests::register(status, &mut registry);
    work::register(status, &mut registry);
    encryption::register(status, &mut registry);
    if let Some(counted) = counted {
        counted::register(counted, &mut registry);
    }
    let mut text = String::new();
    encode_text(&mut text, &registry)?;
    Ok(text)
}

fn agent(status: &StatusResponse, registry: &mut Registry) {
    let mut one = |name, help, value| set(&gauge(registry, name, help), Labels::new(), value);
    one("agent_ready", "The own cluster is synced and installed", status.ready.into());
    one("datapath_pending_changes", "Desired changes that are not installed", status.pending_changes);
    one("agent_resident_bytes", "Resident memory of the agent", status.resident_bytes);
    if let Some(local) = &status.local {
        one("services", "Services of the own cluster", local.services);
        one("global_services", "Global services of the own cluster", local.global_services);
        one("endpoints", "Pods of this node", local.endpoints);
    }
    let entries = gauge(registry, "table_entries", "Installed entries");
    let capacity = gauge(registry, "table_capacity", "Entries that fit");
    for table in &status.tables {
        set(&entries, vec![("table", table.name.clone())], table.entries);
        set(&capacity, vec![("table", table.name.clone())], table.max_entries);
    }
    if let Some(drift) = &status.kernel_drift {
        let found = Counters::default();
        let help = "Entries that somebody else changed in the kernel, written again";
        registry.register("kernel_drift", help, found.clone());
        for one in &drift.counts {
            let labels = vec![("table", one.table.clone()), ("kind", one.kind.clone())];
            found.get_or_create(&labels).inc_by(one.count);
        }
    }
    let conflicts = gauge(registry, "conflicts", "Claims refused because another cluster holds the address");
    set(&conflicts, vec![("of", "addresses".into())], status.conflicts.len() as u64);
    set(&conflicts, vec![("of", "backends".into())], status.backend_conflicts);
}

fn clusters(status: &StatusResponse, registry: &mut Registry) {
    let mut gauge = |name, help| gauge(registry, name, help);
    let remotes = gauge("remote_clusters", "Remote clusters that are configured");
    let connected = gauge("cluster_connected", "The cluster's etcd is connected");
    let ready = gauge("cluster_ready", "Connected, config accepted, all kinds synced");
    let silence =
        gauge("cluster_last_event_age_seconds", "Since the last sign of life of the cluster's etcd");
    let reconnects = gauge("cluster_reconnects", "Sessions after the first one");
    let synced = gauge("cluster_synced", "The list of a kind is complete");
    let records = gauge("cluster_records", "Records held");
    let lists = Counters::default();
    registry.register("cluster_lists", "How often all records of a kind were listed", lists.clone());
    set(&remotes, Labels::new(), status.remotes.len() as u64);
    for peer in status.own.iter().chain(&status.remotes) {
        let labels = || vec![("target_cluster", peer.name.clone())];
        set(&connected, labels(), peer.connected.into());
        set(&ready, labels(), peer.ready.into());
        set(&silence, labels(), peer.last_event_age_ms / 1000);
        set(&reconnects, labels(), peer.reconnects);
        set_kinds(peer, &synced, &records, &lists);
    }
}

/// Negative once it has ended.
fn certificates(status: &StatusResponse, now: Timestamp, registry: &mut Registry) {
    let left =
        gauge(registry, "certificate_expiry_seconds", "Time until the client certificate for the etcd ends");
    for peer in status.own.iter().chain(&status.remotes).filter(|peer| peer.certificate_expires != 0) {
        let labels = vec![("target_cluster", peer.name.clone())];
        left.get_or_create(&labels).set(peer.certificate_expires - now.as_second());
    }
}

/// One of the states is 1, the others are 0.
fn health(status: &StatusResponse, registry: &mut Registry) {
    let health = gauge(registry, "remote_cluster_health", "How the cluster is as seen from this node");
    let transitions = Family::<Labels, Counter>::default();
    let help = "How often the health of the cluster changed";
    registry.register("remote_cluster_health_transitions", help, transitions.clone());
    for peer in &status.remotes {
        let Some(liveness) = &peer.liveness else { continue };
        for state in Health::ALL {
            let labels = vec![("target_cluster", peer.name.clone()), ("state", state.to_string())];
            set(&health, labels, (liveness.health == state.as_str()).into());
        }
        let labels = vec![("target_cluster", peer.name.clone())];
        transitions.get_or_create(&labels).inc_by(liveness.transitions);
    }
}

fn set_kinds(peer: &Peer, synced: &Gauges, records: &Gauges, lists: &Counters) {
    for kind in &peer.kinds {
        let labels = || vec![("target_cluster", peer.name.clone()), ("kind", kind.kind.clone())];
        set(synced, labels(), kind.synced.into());
        set(records, labels(), kind.records);
        lists.get_or_create(&labels()).inc_by(kind.lists);
    }
}

fn refusals(status: &StatusResponse, registry: &mut Registry) {
    let mut counters = |name, help| {
        let counters = Counters::default();
        registry.register(name, help, counters.clone());
        counters
    };
    let refused = counters("import_refused", "Records that the import policy refused");
    let audited = counters("import_audited", "Records let in only because the import policy is audited");
    for peer in status.own.iter().chain(&status.remotes) {
        for kind in &peer.kinds {
            let add = |counters: &Counters, counts: &BTreeMap<String, u64>| {
                for (reason, count) in counts {
                    let labels = [("cluster", &peer.name), ("kind", &kind.kind), ("reason", reason)]
                        .map(|(k, v)| (k, v.clone()));
                    counters.get_or_create(&labels.into()).inc_by(*count);
                }
            };
            add(&refused, &kind.refused_by_reason);
            add(&audited, &kind.audited_by_reason);
        }
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauges {
    let gauges = Gauges::default();
    registry.register(name, help, gauges.clone());
    gauges
}

fn set(gauges: &Gauges, labels: Labels, value: u64) {
    gauges.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
}

#[cfg(test)]
mod tests {
    use clustermesh_agent_api::v1::KindStatus;

    use super::*;

    #[test]
    fn a_refused_record_shows_with_its_cluster_kind_and_reason() {
        let kind = KindStatus {
            kind: "ip".into(),
            refused_by_reason: [("bad_json".to_owned(), 3)].into(),
            ..KindStatus::default()
        };
        let beta = Peer { name: "beta".into(), kinds: vec![kind], ..Peer::default() };
        let text =
            encode(&StatusResponse { remotes: vec![beta], ..StatusResponse::default() }, None).unwrap();
        let line = r#"clustermesh_import_refused_total{cluster="beta",kind="ip",reason="bad_json"} 3"#;
        assert!(text.lines().any(|l| l.starts_with(line)), "{text}");
        assert!(text.contains("clustermesh_remote_clusters{} 1"), "{text}");
    }
    #[test]
    fn certificates_count_down_by_cluster() {
        let peer =
            |name: &str, ends| Peer { name: name.into(), certificate_expires: ends, ..Peer::default() };
        let status = StatusResponse {
            own: Some(peer("alpha", 1_000_300)),
            remotes: vec![peer("beta", 999_990), peer("plain", 0)],
            ..StatusResponse::default()
        };
        let mut registry = Registry::default();
        certificates(&status, Timestamp::from_second(1_000_000).unwrap(), &mut registry);
        let mut text = String::new();
        encode_text(&mut text, &registry).unwrap();
        assert!(text.contains(r#"certificate_expiry_seconds{target_cluster="alpha"} 300"#), "{text}");
        assert!(text.contains(r#"certificate_expiry_seconds{target_cluster="beta"} -10"#), "{text}");
        assert!(!text.contains("plain"), "{text}");
    }
}
