//! What the programs count.

use prometheus_client::registry::Registry;

use super::{Counters, Labels};
use crate::engine::{CallCount, Counted, KIND_NAMES};
use crate::observe::reason_text;

/// Services, each times the clusters that answer it, that have series of their own; later ones are summed up. Each
/// series costs whoever keeps the metrics, and services can be many.
const MOST: usize = 1000;

pub(super) fn register(counted: &Counted, registry: &mut Registry) {
    let mut counters = |name, help| {
        let counters = Counters::default();
        registry.register(name, help, counters.clone());
        counters
    };
    let packets = counters("datapath_packets", "Packets, and events at sockets, by reason");
    let bytes = counters("datapath_bytes", "Their bytes");
    for (reason, counter) in &counted.reasons {
        let labels = vec![("reason", reason_text(*reason))];
        packets.get_or_create(&labels).inc_by(counter.packets);
        bytes.get_or_create(&labels).inc_by(counter.bytes);
    }
    let events = counters("events", "What became of the events that `clustermesh observe` shows");
    for (kind, state) in KIND_NAMES.iter().zip(&counted.events) {
        for (outcome, count) in [
            ("sent", state.sent),
            ("sampled", state.sampled),
            ("limited", state.limited),
            ("full", state.full),
        ] {
            let labels = vec![("kind", (*kind).to_owned()), ("outcome", outcome.to_owned())];
            events.get_or_create(&labels).inc_by(count);
        }
    }
    let calls = counters("service_calls", "Calls of services that got a backend, by its cluster");
    let refused = counters("service_calls_refused", "Calls of services that no cluster had a backend for");
    for (n, call) in counted.calls.iter().enumerate() {
        let labels = labels(call, n < MOST);
        let counters = if call.cluster.is_some() { &calls } else { &refused };
        counters.get_or_create(&labels).inc_by(call.calls);
    }
}

/// Those of one whose cluster or name is not known have a number.
fn labels(call: &CallCount, is_named: bool) -> Labels {
    let service = match (&call.service, is_named) {
        (_, false) => "(others)".to_owned(),
        (Some(name), true) => name.to_string(),
        (None, true) => format!("({})", call.id),
    };
    let cluster =
        call.cluster.map(|id| call.cluster_name.as_ref().map_or_else(|| id.to_string(), ToString::to_string));
    let target = cluster.map(|cluster| ("target_cluster", cluster));
    std::iter::once(("service", service)).chain(target).collect()
}

#[cfg(test)]
mod tests {
    use clustermesh_agent_api::v1::StatusResponse;
    use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters, NamespacedName};
    use ebpf_global_svc::abi::{Counter, EventState, reason};

    use super::*;

    fn call(n: u32, cluster: u32, calls: u64) -> CallCount {
        let service = NamespacedName { namespace: "shop".into(), name: format!("s{n}") };
        let cluster = ClusterId::new(cluster, MaxConnectedClusters::default()).ok();
        let cluster_name = cluster.filter(|id| id.get() == 2).map(|_| "beta".parse().unwrap());
        CallCount { id: n, service: Some(service), frontend: None, cluster, cluster_name, calls }
    }

    #[test]
    fn what_is_counted_shows_with_names_and_a_bound() {
        let mut calls = vec![call(0, 2, 7), call(0, 3, 5), call(0, 0, 2)];
        calls.extend((1..1500).map(|n| call(n, 2, 1)));
        let counted = Counted {
            reasons: vec![
                (reason::POLICY, Counter { packets: 3, bytes: 180 }),
                (99, Counter { packets: 1, bytes: 0 }),
            ],
            calls,
            events: [EventState { sent: 4, limited: 6, ..EventState::default() }; ebpf_global_svc::KINDS],
        };
        let text = super::super::encode(&StatusResponse::default(), Some(&counted)).unwrap();
        for line in [
            r#"clustermesh_datapath_packets_total{reason="policy"} 3"#,
            r#"clustermesh_datapath_bytes_total{reason="policy"} 180"#,
            r#"clustermesh_datapath_packets_total{reason="99"} 1"#,
            r#"clustermesh_events_total{kind="drop",outcome="limited"} 6"#,
            r#"clustermesh_service_calls_total{service="shop/s0",target_cluster="beta"} 7"#,
            r#"clustermesh_service_calls_total{service="shop/s0",target_cluster="3"} 5"#,
            r#"clustermesh_service_calls_refused_total{service="shop/s0"} 2"#,
            r#"clustermesh_service_calls_total{service="(others)",target_cluster="beta"} 502"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        assert_eq!(text.matches("clustermesh_service_calls_total{").count(), 1000);
    }
}
