//! A flow as it is told to observers.

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::NamespacedName;
use ebpf_global_svc::abi::{
    EVENT_ANSWER, EVENT_BOUND, EVENT_DRAINING, EVENT_EGRESS, EVENT_STANDBY, Event, event_hook, event_kind,
    reason,
};
use jiff::Timestamp;

use super::filter::Names;
use super::flow::{End, Flow, Verdict};
use crate::wire_key;

/// Labels of an end that are shown.
const LABELS: usize = 64;

/// The flow, as `node` of `cluster` has seen it.
pub(crate) fn message(flow: &Flow, names: Names<'_>, node: &str, cluster: &str) -> v1::Flow {
    let Flow { event, .. } = flow;
    let dropped = matches!(flow.verdict(), Verdict::Dropped | Verdict::Audit);
    let code = if dropped { event.reason } else { 0 };
    v1::Flow {
        time_ns: nanoseconds(flow.time),
        node_name: node.into(),
        cluster_name: cluster.into(),
        r#type: flow.kind().as_str().into(),
        verdict: flow.verdict().as_str().into(),
        drop_reason: if dropped { reason_text(code) } else { String::new() },
        drop_reason_code: code.into(),
        direction: direction(event).into(),
        observation_point: observation_point(event).into(),
        source: Some(end(&flow.source, names[0])),
        destination: Some(end(&flow.destination, names[1])),
        protocol: protocol(event),
        tcp_flags: event.tcp_flags.into(),
        icmp_type: event.icmp_type.into(),
        icmp_code: event.icmp_code.into(),
        is_reply: event.flags & EVENT_ANSWER != 0,
        policy: flow.rule.as_deref().unwrap_or_default().into(),
        service: service(flow),
        backend_notes: notes(event),
        process_id: event.process,
        process_name: text(&event.command),
        socket_cookie: event.socket,
        interface_index: event.ifindex,
        length: event.length,
    }
}

/// Since the Unix epoch; what does not fit is not of this world.
pub(crate) fn nanoseconds(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX)
}

/// The reason's name, or its number.
pub(crate) fn reason_text(code: u8) -> String {
    reason::name(code).map_or_else(|| code.to_string(), str::to_owned)
}

fn end(end: &End, name: Option<&NamespacedName>) -> v1::FlowEnd {
    let namespace = name.map(|name| name.namespace.as_str()).or(end.namespace());
    let labels = end.labels.iter().flat_map(|labels| labels.iter()).take(LABELS);
    v1::FlowEnd {
        ip: end.ip.map_or_else(String::new, |ip| ip.to_string()),
        port: end.port.into(),
        identity: end.identity,
        cluster_name: end.cluster.as_ref().map_or_else(String::new, ToString::to_string),
        namespace: namespace.unwrap_or_default().into(),
        pod_name: name.map_or_else(String::new, |name| name.name.clone()),
        node_name: end.node.as_deref().unwrap_or_default().into(),
        labels: labels.map(ToString::to_string).collect(),
    }
}

fn service(flow: &Flow) -> Option<v1::FlowService> {
    let frontend =
        wire_key::address(flow.event.family, flow.event.frontend).filter(|ip| !ip.is_unspecified());
    if flow.service.is_none() && frontend.is_none() {
        return None;
    }
    let (namespace, name) = flow.service.clone().map(|name| (name.namespace, name.name)).unwrap_or_default();
    let ip = frontend.map_or_else(String::new, |ip| ip.to_string());
    Some(v1::FlowService { namespace, name, ip, port: u16::from_be(flow.event.frontend_port).into() })
}

fn direction(event: &Event) -> &'static str {
    match (event.hook, event.flags & EVENT_EGRESS != 0) {
        (_, true) => "EGRESS",
        (event_hook::TO_OVERLAY, false) => "",
        (_, false) => "INGRESS",
    }
}

fn observation_point(event: &Event) -> &'static str {
    match (event.kind, event.reason, event.hook) {
        (event_kind::TRACE, reason::FORWARDED | reason::DECAPSULATED, _) => "to-endpoint",
        (event_kind::TRACE, reason::ENCAPSULATED, _) => "to-overlay",
        (event_kind::TRACE, reason::ANSWERED, _) => "to-network",
        (event_kind::TRACE, ..) => "to-stack",
        (_, _, event_hook::FROM_POD) => "from-pod",
        (_, _, event_hook::TO_POD) => "to-pod",
        (_, _, event_hook::FROM_OVERLAY) => "from-overlay",
        (_, _, event_hook::TO_OVERLAY) => "to-overlay",
        (_, _, event_hook::FROM_NETDEV) => "from-network",
        _ => "socket",
    }
}

fn protocol(event: &Event) -> String {
    match (event.family, event.proto) {
        (0, _) => String::new(),
        (_, 1) => "ICMPv4".into(),
        (_, 6) => "TCP".into(),
        (_, 17) => "UDP".into(),
        (_, 58) => "ICMPv6".into(),
        (_, 132) => "SCTP".into(),
        (_, other) => other.to_string(),
    }
}

fn notes(event: &Event) -> Vec<String> {
    let notes = [(EVENT_BOUND, "bound"), (EVENT_STANDBY, "standby"), (EVENT_DRAINING, "draining")];
    notes.into_iter().filter(|(flag, _)| event.flags & flag != 0).map(|(_, note)| note.into()).collect()
}

/// Up to the first zero. A process can call itself whatever it likes.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
