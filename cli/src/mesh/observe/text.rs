//! Flows for people: in lines as Hubble writes them, or in columns.

use clustermesh_agent_api::v1::observe_response::What;
use clustermesh_agent_api::v1::{Flow, FlowEnd, LostFlows, ObserveResponse};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::super::terminal::{Style, Tone, one_line};

/// First identity that means something in the whole mesh.
const FIRST_USER: u32 = 256;
/// What reserved identities are called.
const RESERVED: [(u32, &str); 3] = [(1, "host"), (2, "world"), (6, "remote-node")];
/// Of a TCP header, as they are written in one.
const TCP_FLAGS: [(u32, &str); 6] =
    [(2, "SYN"), (16, "ACK"), (1, "FIN"), (4, "RST"), (8, "PSH"), (32, "URG")];

/// One line.
pub(super) fn line(flow: &Flow, zone: &TimeZone, style: Style, with_node: bool) -> String {
    let node = if with_node { format!(" [{}]", node(flow)) } else { String::new() };
    format!(
        "{}{node}: {} -> {} {}{} {} ({})",
        time(flow.time_ns, zone),
        source(flow),
        end(flow.destination.as_ref(), flow),
        what(flow),
        if flow.direction.is_empty() || flow.r#type != "policy-verdict" {
            String::new()
        } else {
            format!(" {}", flow.direction)
        },
        verdict(flow, style),
        summary(flow),
    )
}

/// All of them under headings.
pub(super) fn table(told: &[ObserveResponse], zone: &TimeZone, style: Style) -> String {
    let flows = told.iter().filter_map(|told| match &told.what {
        Some(What::Flow(flow)) => Some(flow),
        _ => None,
    });
    let rows: Vec<_> = flows
        .map(|flow| {
            let destination = end(flow.destination.as_ref(), flow);
            [
                time(flow.time_ns, zone),
                node(flow),
                source(flow),
                destination,
                what(flow),
                verdict(flow, style),
                summary(flow),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "no flows".into();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["TIMESTAMP", "NODE", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"]);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Why there is a gap.
pub(super) fn lost(lost: &LostFlows, zone: &TimeZone) -> String {
    let why = match lost.source.as_str() {
        "kernel" => {
            "there were more than the node tells (--observe-rate, --observe-idle-rate and --events-bytes of its agent)"
        }
        _ => "they came faster than they were read: narrow the filter, or take a --sample",
    };
    format!("{}: {} flows are missing before this: {why}", time(lost.time_ns, zone), lost.count)
}

/// What is known of a packet's content.
pub(super) fn summary(flow: &Flow) -> String {
    let mut parts = vec![match flow.protocol.as_str() {
        "" => "no IP".to_owned(),
        "TCP" if flow.r#type != "call" && flow.tcp_flags != 0 => {
            format!("TCP Flags: {}", tcp_flags(flow).join(", "))
        }
        "ICMPv4" | "ICMPv6" => format!("{} {}", flow.protocol, icmp(flow)),
        other => one_line(other),
    }];
    if flow.r#type == "policy-verdict" && !matches!(flow.drop_reason.as_str(), "" | "policy" | "policy-deny")
    {
        parts.push(one_line(&flow.drop_reason));
    }
    if flow.r#type == "trace"
        && let Some(service) = service(flow)
    {
        parts.push(format!("called {service}"));
    }
    parts.extend(flow.backend_notes.iter().map(|note| one_line(note)));
    parts.join("; ")
}

/// Names of the flags that are set.
pub(super) fn tcp_flags(flow: &Flow) -> Vec<&'static str> {
    TCP_FLAGS.into_iter().filter(|(bit, _)| flow.tcp_flags & bit != 0).map(|(_, name)| name).collect()
}

fn icmp(flow: &Flow) -> String {
    let name = match (flow.protocol.as_str(), flow.icmp_type) {
        ("ICMPv4", 0) | ("ICMPv6", 129) => "EchoReply",
        ("ICMPv4", 8) | ("ICMPv6", 128) => "EchoRequest",
        ("ICMPv4", 3) | ("ICMPv6", 1) => "DestinationUnreachable",
        ("ICMPv4", 11) | ("ICMPv6", 3) => "TimeExceeded",
        ("ICMPv6", 2) => "PacketTooBig",
        (_, kind) => return format!("type {kind}, code {}", flow.icmp_code),
    };
    name.into()
}

/// Which of the types, in particular.
fn what(flow: &Flow) -> String {
    match flow.r#type.as_str() {
        "policy-verdict" if flow.policy.is_empty() => "policy-verdict:none".into(),
        "policy-verdict" => format!("policy-verdict:{}", one_line(&flow.policy)),
        "drop" => one_line(&flow.drop_reason),
        "call" => service(flow).map_or_else(|| "call".into(), |service| format!("call {service}")),
        "trace" => one_line(&flow.observation_point),
        other => one_line(other),
    }
}

fn verdict(flow: &Flow, style: Style) -> String {
    let (word, tone) = match (flow.r#type.as_str(), flow.verdict.as_str()) {
        ("policy-verdict", "FORWARDED") => ("ALLOWED".into(), Tone::Good),
        ("policy-verdict", "DROPPED") => ("DENIED".into(), Tone::Bad),
        (_, "DROPPED") => ("DROPPED".into(), Tone::Bad),
        (_, "AUDIT") => ("AUDITED".into(), Tone::Doubtful),
        (_, other) => (one_line(other), Tone::Good),
    };
    style.paint(tone, &word)
}

fn service(flow: &Flow) -> Option<String> {
    let service = flow.service.as_ref()?;
    let frontend = match (service.ip.as_str(), service.port) {
        ("", _) => None,
        (ip, port) => Some(address(ip, port)),
    };
    match (service.name.is_empty(), frontend) {
        (true, frontend) => frontend,
        (false, None) => Some(one_line(&format!("{}/{}", service.namespace, service.name))),
        (false, Some(frontend)) => {
            Some(one_line(&format!("{}/{} at {frontend}", service.namespace, service.name)))
        }
    }
}

fn source(flow: &Flow) -> String {
    if flow.process_id == 0 {
        return end(flow.source.as_ref(), flow);
    }
    // A socket that is not bound has no address yet.
    format!(
        "{}/{} process {}[{}]",
        one_line(&flow.cluster_name),
        one_line(&flow.node_name),
        one_line(&flow.process_name),
        flow.process_id
    )
}

fn node(flow: &Flow) -> String {
    one_line(&format!("{}/{}", flow.cluster_name, flow.node_name))
}

/// `cluster/namespace/pod:port (ID:identity)`, as far as it is known.
fn end(end: Option<&FlowEnd>, flow: &Flow) -> String {
    let nobody = FlowEnd::default();
    let end = end.unwrap_or(&nobody);
    let cluster = if end.cluster_name.is_empty() { String::new() } else { format!("{}/", end.cluster_name) };
    let has_ports = matches!(flow.protocol.as_str(), "TCP" | "UDP" | "SCTP") && end.port != 0;
    let port = if has_ports { end.port } else { 0 };
    let place = match (end.pod_name.as_str(), end.node_name.as_str(), end.ip.as_str()) {
        ("", "", "") => return if flow.process_id != 0 { "no backend".into() } else { "?".into() },
        ("", "", ip) => format!("{cluster}{}", address(ip, port)),
        ("", node, _) => named(&format!("{cluster}{node}"), port),
        (pod, _, _) => named(&format!("{cluster}{}/{pod}", end.namespace), port),
    };
    let place = one_line(&place);
    match end.identity {
        0 => place,
        id if id >= FIRST_USER => format!("{place} (ID:{id})"),
        id => {
            let name = RESERVED.into_iter().find(|(reserved, _)| *reserved == id).map(|(_, name)| name);
            name.map_or_else(|| format!("{place} (ID:{id})"), |name| format!("{place} ({name})"))
        }
    }
}

fn named(name: &str, port: u32) -> String {
    if port == 0 { name.to_owned() } else { format!("{name}:{port}") }
}

fn address(ip: &str, port: u32) -> String {
    match port {
        0 => ip.to_owned(),
        port if ip.contains(':') => format!("[{ip}]:{port}"),
        port => format!("{ip}:{port}"),
    }
}

fn time(nanoseconds: i64, zone: &TimeZone) -> String {
    let time = Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or(Timestamp::UNIX_EPOCH);
    time.to_zoned(zone.clone()).strftime("%b %e %H:%M:%S%.3f").to_string()
}
