//! Flows for programs: as Hubble writes them (`hubble observe -o jsonpb`), so that what reads those reads these.
//!
//! Field names and numbers are those of Cilium's `flow.proto`. `drop_reason_name`, `frontend`,
//! `policy`, `process` and `backend_notes` are ours, and so is `name` in `event_type`.

use clustermesh_agent_api::v1::observe_response::What;
use clustermesh_agent_api::v1::{Flow, FlowEnd, LostFlows, ObserveResponse};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::text;

/// One object.
pub(super) fn line(told: &ObserveResponse) -> Value {
    match &told.what {
        Some(What::Flow(flow)) => {
            let (node, time) = (node(flow), time(flow.time_ns));
            json!({"flow": object(flow), "node_name": node, "time": time})
        }
        Some(What::Lost(lost)) => json!({"lost_events": missing(lost), "time": time(lost.time_ns)}),
        None => Value::Null,
    }
}

fn missing(lost: &LostFlows) -> Value {
    let source = if lost.source == "kernel" { "PERF_EVENT_RING_BUFFER" } else { "OBSERVER_EVENTS_QUEUE" };
    // 64 bits, which protobuf writes as text.
    json!({"source": source, "num_events_lost": lost.count.to_string()})
}

fn object(flow: &Flow) -> Value {
    let mut fields = Map::new();
    let mut put = |name: &str, value: Value| {
        if !is_empty(&value) {
            fields.insert(name.into(), value);
        }
    };
    put("time", time(flow.time_ns).into());
    put("verdict", flow.verdict.clone().into());
    put("drop_reason", flow.drop_reason_code.into());
    put("drop_reason_desc", drop_reason(flow.drop_reason_code).into());
    put("drop_reason_name", flow.drop_reason.clone().into());
    put("IP", ip(flow));
    put("l4", transport(flow));
    put("source", end(flow.source.as_ref()));
    put("destination", end(flow.destination.as_ref()));
    put("Type", if flow.r#type == "call" { "SOCK" } else { "L3_L4" }.into());
    put("node_name", node(flow).into());
    put(
        "event_type",
        json!({"type": event_type(flow), "sub_type": event_sub_type(flow), "name": flow.r#type}),
    );
    put(
        "traffic_direction",
        if flow.direction.is_empty() { "TRAFFIC_DIRECTION_UNKNOWN" } else { &flow.direction }.into(),
    );
    put(
        "trace_observation_point",
        if flow.r#type == "trace" { upper(&flow.observation_point) } else { String::new() }.into(),
    );
    if let Some(service) = &flow.service {
        put("destination_service", json!({"name": service.name, "namespace": service.namespace}));
        if !service.ip.is_empty() {
            put("frontend", json!({"ip": service.ip, "port": service.port}));
        }
    }
    put("policy", flow.policy.clone().into());
    put("backend_notes", flow.backend_notes.clone().into());
    if flow.process_id != 0 {
        put("process", json!({"pid": flow.process_id, "name": flow.process_name}));
    }
    if flow.socket_cookie != 0 {
        put("socket_cookie", flow.socket_cookie.to_string().into());
    }
    if flow.interface_index != 0 {
        put("interface", json!({"index": flow.interface_index}));
    }
    put("Summary", text::summary(flow).into());
    // Known of few packets, and false is an answer.
    put("is_reply", flow.is_reply.into());
    Value::Object(fields)
}

fn ip(flow: &Flow) -> Value {
    let of = |end: Option<&FlowEnd>| end.map_or("", |end| &end.ip).to_owned();
    let (source, destination) = (of(flow.source.as_ref()), of(flow.destination.as_ref()));
    if source.is_empty() && destination.is_empty() {
        return Value::Null;
    }
    let version = if source.contains(':') || destination.contains(':') { "IPv6" } else { "IPv4" };
    let mut ip = json!({"ipVersion": version});
    for (name, address) in [("source", source), ("destination", destination)] {
        if !address.is_empty() {
            ip[name] = address.into();
        }
    }
    ip
}

fn transport(flow: &Flow) -> Value {
    let port = |end: Option<&FlowEnd>| end.map_or(0, |end| end.port);
    let mut layer = match flow.protocol.as_str() {
        "TCP" | "UDP" | "SCTP" => {
            json!({"source_port": port(flow.source.as_ref()), "destination_port": port(flow.destination.as_ref())})
        }
        "ICMPv4" | "ICMPv6" => json!({"type": flow.icmp_type, "code": flow.icmp_code}),
        _ => return Value::Null,
    };
    if flow.protocol == "TCP" && flow.tcp_flags != 0 {
        let flags: Map<_, _> =
            text::tcp_flags(flow).into_iter().map(|flag| (flag.to_owned(), true.into())).collect();
        layer["flags"] = flags.into();
    }
    json!({ flow.protocol.as_str(): layer })
}

fn end(end: Option<&FlowEnd>) -> Value {
    let Some(end) = end else { return Value::Null };
    let mut fields = Map::new();
    for (name, value) in [
        ("identity", Value::from(end.identity)),
        ("cluster_name", end.cluster_name.clone().into()),
        ("namespace", end.namespace.clone().into()),
        ("labels", end.labels.clone().into()),
        ("pod_name", end.pod_name.clone().into()),
        ("node_name", end.node_name.clone().into()),
    ] {
        if !is_empty(&value) {
            fields.insert(name.into(), value);
        }
    }
    fields.into()
}

/// Cilium's numbers of kinds of messages.
fn event_type(flow: &Flow) -> u32 {
    match flow.r#type.as_str() {
        "drop" => 1,
        "policy-verdict" => 5,
        "call" => 7,
        _ => 4,
    }
}

/// Cilium's name (`DropReason` in `flow.proto`) of a reason that it has, else nothing: who reads by that file refuses a record
/// with a name that is not in it.
fn drop_reason(code: u32) -> &'static str {
    match code {
        132 => "INVALID_SOURCE_IP",
        133 => "POLICY_DENIED",
        134 => "INVALID_PACKET_DROPPED",
        147 => "ERROR_RETRIEVING_TUNNEL_KEY",
        150 => "UNKNOWN_L3_TARGET_ADDRESS",
        158 => "SERVICE_BACKEND_NOT_FOUND",
        160 => "NO_TUNNEL_OR_ENCAPSULATION_ENDPOINT",
        167 => "NO_MAPPING_FOR_NAT_MASQUERADE",
        170 => "ENCAPSULATION_TRAFFIC_IS_PROHIBITED",
        171 => "INVALID_IDENTITY",
        172 => "UNKNOWN_SENDER",
        175 => "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND",
        181 => "POLICY_DENY",
        192 => "INVALID_CLUSTER_ID",
        195 => "UNENCRYPTED_TRAFFIC",
        202 => "DROP_HOST_NOT_READY",
        _ => "",
    }
}

/// Of a drop its reason, of a trace the point (Cilium's `TraceObservationPoint`, whose zero is `to-endpoint`).
fn event_sub_type(flow: &Flow) -> u32 {
    match (flow.r#type.as_str(), flow.observation_point.as_str()) {
        ("drop", _) => flow.drop_reason_code,
        ("trace", "to-stack") => 3,
        ("trace", "to-overlay") => 4,
        ("trace", "to-network") => 11,
        _ => 0,
    }
}

fn upper(text: &str) -> String {
    text.to_ascii_uppercase().replace('-', "_")
}

fn node(flow: &Flow) -> String {
    format!("{}/{}", flow.cluster_name, flow.node_name)
}

fn time(nanoseconds: i64) -> String {
    Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// What protobuf leaves out.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) => false,
    }
}
