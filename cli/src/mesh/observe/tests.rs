use std::time::Instant as StdInstant;

use clap::Parser;
use clustermesh_agent_api::v1::{EndFilter, Flow, FlowEnd, FlowService, LostFlows};
use proptest::prelude::*;
use serde_json::json;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    observe: ObserveArgs,
}

fn parse(flags: &[&str]) -> Result<ObserveArgs, String> {
    let words = std::iter::once("observe").chain(flags.iter().copied());
    Command::try_parse_from(words).map(|command| command.observe).map_err(|error| error.to_string())
}

/// 2026-11-26 15:00:00.123 UTC.
const TIME: i64 = 1_795_705_200_123_000_000;

fn client() -> FlowEnd {
    FlowEnd {
        ip: "10.1.0.9".into(),
        port: 43210,
        identity: 65792,
        cluster_name: "alpha".into(),
        namespace: "shop".into(),
        pod_name: "client-1".into(),
        labels: vec!["k8s:app=client".into()],
        ..FlowEnd::default()
    }
}

fn orders() -> FlowEnd {
    FlowEnd {
        ip: "10.2.0.8".into(),
        port: 8080,
        identity: 131_075,
        cluster_name: "beta".into(),
        namespace: "shop".into(),
        pod_name: "orders-2".into(),
        ..FlowEnd::default()
    }
}

fn denied() -> Flow {
    Flow {
        time_ns: TIME,
        node_name: "node1".into(),
        cluster_name: "beta".into(),
        r#type: "policy-verdict".into(),
        verdict: "DROPPED".into(),
        drop_reason: "policy".into(),
        drop_reason_code: 133,
        direction: "INGRESS".into(),
        observation_point: "from-overlay".into(),
        source: Some(client()),
        destination: Some(orders()),
        protocol: "TCP".into(),
        tcp_flags: 2,
        interface_index: 4,
        length: 74,
        ..Flow::default()
    }
}

fn call() -> Flow {
    let service =
        FlowService { namespace: "shop".into(), name: "orders".into(), ip: "10.96.0.5".into(), port: 80 };
    Flow {
        r#type: "call".into(),
        verdict: "TRANSLATED".into(),
        direction: "EGRESS".into(),
        drop_reason: String::new(),
        drop_reason_code: 0,
        source: Some(FlowEnd { cluster_name: "beta".into(), ..FlowEnd::default() }),
        service: Some(service),
        backend_notes: vec!["standby".into()],
        process_id: 4711,
        process_name: "curl".into(),
        socket_cookie: 77,
        interface_index: 0,
        tcp_flags: 0,
        ..denied()
    }
}

fn shown(flow: &Flow) -> String {
    text::line(flow, &TimeZone::UTC, Style::Plain, false)
}

#[test]
fn lines_are_like_hubbles() {
    let head =
        "Nov 26 15:00:00.123: alpha/shop/client-1:43210 (ID:65792) -> beta/shop/orders-2:8080 (ID:131075)";
    assert_eq!(shown(&denied()), format!("{head} policy-verdict:none INGRESS DENIED (TCP Flags: SYN)"));
    let allowed = Flow {
        verdict: "FORWARDED".into(),
        drop_reason: String::new(),
        policy: "cnp/shop/orders rule 0 ingress allow 0".into(),
        ..denied()
    };
    assert_eq!(
        shown(&allowed),
        format!(
            "{head} policy-verdict:cnp/shop/orders rule 0 ingress allow 0 INGRESS ALLOWED (TCP Flags: SYN)"
        )
    );
    let unknown = Flow { drop_reason: "unknown-identity".into(), ..denied() };
    assert_eq!(
        shown(&unknown),
        format!("{head} policy-verdict:none INGRESS DENIED (TCP Flags: SYN; unknown-identity)")
    );
    let trace = Flow {
        r#type: "trace".into(),
        verdict: "FORWARDED".into(),
        observation_point: "to-overlay".into(),
        tcp_flags: 18,
        service: Some(FlowService {
            namespace: "shop".into(),
            name: "orders".into(),
            ..FlowService::default()
        }),
        ..allowed
    };
    assert_eq!(
        shown(&trace),
        format!("{head} to-overlay FORWARDED (TCP Flags: SYN, ACK; called shop/orders)")
    );
    assert_eq!(
        shown(&call()),
        "Nov 26 15:00:00.123: beta/node1 process curl[4711] -> beta/shop/orders-2:8080 (ID:131075) \
         call shop/orders at 10.96.0.5:80 TRANSLATED (TCP; standby)"
    );
    let refused = Flow {
        r#type: "drop".into(),
        verdict: "DROPPED".into(),
        drop_reason: "lb-no-backend".into(),
        destination: Some(FlowEnd::default()),
        backend_notes: Vec::new(),
        ..call()
    };
    assert_eq!(
        shown(&refused),
        "Nov 26 15:00:00.123: beta/node1 process curl[4711] -> no backend lb-no-backend DROPPED (TCP)"
    );
    let world = FlowEnd { ip: "2001:db8::1".into(), port: 53, identity: 2, ..FlowEnd::default() };
    let spoofed = Flow {
        r#type: "drop".into(),
        drop_reason: "invalid-source-ip".into(),
        source: Some(world),
        protocol: "UDP".into(),
        ..denied()
    };
    assert_eq!(
        text::line(&spoofed, &TimeZone::UTC, Style::Rich, true),
        "Nov 26 15:00:00.123 [beta/node1]: [2001:db8::1]:53 (world) -> beta/shop/orders-2:8080 (ID:131075) \
         invalid-source-ip \x1b[31mDROPPED\x1b[0m (UDP)"
    );
}

#[test]
fn foreign_names_cannot_drive_the_terminal() {
    let evil = "\x1b[2Jx\n";
    let end =
        FlowEnd { pod_name: evil.into(), namespace: evil.into(), cluster_name: evil.into(), ..client() };
    let flow = Flow {
        source: Some(end.clone()),
        destination: Some(end),
        policy: evil.into(),
        node_name: evil.into(),
        process_name: evil.into(),
        ..denied()
    };
    for flow in [flow.clone(), Flow { process_id: 1, r#type: "call".into(), ..flow }] {
        let line = text::line(&flow, &TimeZone::UTC, Style::Plain, true);
        assert!(!line.contains(['\x1b', '\n']), "{line:?}");
    }
}

#[test]
fn json_is_like_hubbles() {
    let told = |flow| ObserveResponse { what: Some(What::Flow(flow)) };
    let ours = Flow {
        r#type: "drop".into(),
        drop_reason: "unknown-identity".into(),
        drop_reason_code: 250,
        ..denied()
    };
    let line = json::line(&told(ours));
    assert_eq!(line["flow"].get("drop_reason_desc"), None, "Cilium has no such reason");
    assert_eq!(line["flow"]["event_type"], json!({"type": 1, "sub_type": 250, "name": "drop"}));
    assert_eq!(
        json::line(&told(denied())),
        json!({
            "flow": {
                "time": "2026-11-26T15:00:00.123Z",
                "verdict": "DROPPED",
                "drop_reason": 133,
                "drop_reason_desc": "POLICY_DENIED",
                "drop_reason_name": "policy",
                "IP": {"source": "10.1.0.9", "destination": "10.2.0.8", "ipVersion": "IPv4"},
                "l4": {"TCP": {"source_port": 43210, "destination_port": 8080, "flags": {"SYN": true}}},
                "source": {
                    "identity": 65792, "cluster_name": "alpha", "namespace": "shop", "labels": ["k8s:app=client"],
                    "pod_name": "client-1",
                },
                "destination": {
                    "identity": 131_075, "cluster_name": "beta", "namespace": "shop", "pod_name": "orders-2",
                },
                "Type": "L3_L4",
                "node_name": "beta/node1",
                "event_type": {"type": 5, "sub_type": 0, "name": "policy-verdict"},
                "traffic_direction": "INGRESS",
                "interface": {"index": 4},
                "is_reply": false,
                "Summary": "TCP Flags: SYN",
            },
            "node_name": "beta/node1",
            "time": "2026-11-26T15:00:00.123Z",
        })
    );
    let object = json::line(&told(call()));
    let of_call = [
        ("/flow/process", json!({"pid": 4711, "name": "curl"})),
        ("/flow/destination_service", json!({"name": "orders", "namespace": "shop"})),
        ("/flow/frontend", json!({"ip": "10.96.0.5", "port": 80})),
        ("/flow/event_type/type", json!(7)),
        ("/flow/backend_notes", json!(["standby"])),
    ];
    for (at, expected) in of_call {
        assert_eq!(object.pointer(at), Some(&expected), "{at} of {object}");
    }
    let lost = LostFlows { source: "kernel".into(), count: 7, time_ns: TIME };
    assert_eq!(
        json::line(&ObserveResponse { what: Some(What::Lost(lost)) }),
        json!({
            "lost_events": {"source": "PERF_EVENT_RING_BUFFER", "num_events_lost": "7"},
            "time": "2026-11-26T15:00:00.123Z",
        })
    );
}

#[test]
fn a_table_has_a_row_for_each() {
    let rows = [denied(), call()].map(|flow| ObserveResponse { what: Some(What::Flow(flow)) });
    let table = text::table(&rows, &TimeZone::UTC, Style::Plain);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with("TIMESTAMP            NODE"), "{table}");
    assert!(lines[1].contains("policy-verdict:none") && lines[1].ends_with("TCP Flags: SYN"), "{table}");
    assert_eq!(text::table(&[], &TimeZone::UTC, Style::Plain), "no flows");
}

#[test]
fn flags_become_a_filter() {
    let args = parse(&[
        "--drops",
        "--from-identity",
        "7",
        "--to-pod",
        "shop/orders",
        "--ip",
        "10.0.0.0/8",
        "--to-label",
        "app=x",
        "--port",
        "80",
        "--port",
        "81",
        "--protocol",
        "tcp",
        "--from-cluster",
        "beta",
        "-t",
        "policy-verdict",
    ])
    .unwrap();
    let request = args.request().unwrap();
    assert_eq!((request.last, request.since_ns, request.follow, request.sample), (20, 0, false, 1));
    let filter = request.filter.unwrap();
    assert_eq!(
        (filter.verdicts, filter.types),
        (vec!["DROPPED".to_owned()], vec!["policy-verdict".to_owned()])
    );
    assert_eq!(filter.protocols, ["tcp"]);
    let from = EndFilter { identities: vec![7], clusters: vec!["beta".into()], ..EndFilter::default() };
    assert_eq!(filter.from, Some(from));
    let to =
        EndFilter { pods: vec!["shop/orders".into()], labels: vec!["app=x".into()], ..EndFilter::default() };
    assert_eq!(filter.to, Some(to));
    let either = EndFilter { ips: vec!["10.0.0.0/8".into()], ports: vec![80, 81], ..EndFilter::default() };
    assert_eq!(filter.either, Some(either));
    assert_eq!(
        parse(&["--verdict", "audit"]).unwrap().request().unwrap().filter.unwrap().verdicts,
        ["AUDIT"]
    );
    assert_eq!(parse(&["--follow"]).unwrap().request().unwrap().last, 0);
    let since = parse(&["--since", "2026-11-26T15:00:00.123Z"]).unwrap().request().unwrap();
    assert_eq!((since.last, since.since_ns), (0, TIME));
    let ago = wall_now() - parse(&["--since", "5m"]).unwrap().request().unwrap().since_ns;
    assert!((240_000_000_000..360_000_000_000).contains(&ago), "{ago}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (flags, says) in [
        (&["--drops", "--verdict", "AUDIT"][..], "cannot be used with"),
        (&["--limit", "3"], "--follow"),
        (&["--since", "soon"], "write a duration such as"),
        (&["--since=-5m"], "write a duration such as"),
        (&["--type", "drops"], "policy-verdict"),
        (&["--follow", "--sample", "0"], "--sample"),
        (&["--port", "70000"], "--port"),
    ] {
        let error = parse(flags).unwrap_err();
        assert!(error.contains(says), "{flags:?}: {error}");
    }
    assert!(parse(&["--last", "0"]).unwrap().request().is_err());
}

fn at(time_ns: i64) -> ObserveResponse {
    ObserveResponse { what: Some(What::Flow(Flow { time_ns, ..Flow::default() })) }
}

proptest! {
    /// Whatever comes within the time that is waited for comes out in order, all of it, and once.
    #[test]
    fn flows_that_come_late_are_put_in_order(
        delays in prop::collection::vec((0_u64..250, 0_u64..40), 0..60),
    ) {
        let begin = StdInstant::now();
        let mut merge = Merge::new(HOLD, 0, None);
        // When each happened, and when it is heard of, in milliseconds.
        let mut happened = 0;
        let mut events: Vec<(u64, u64)> = delays.iter().map(|(delay, after)| {
            happened += after;
            (happened + delay, happened)
        }).collect();
        events.sort_unstable();
        let mut seen = Vec::new();
        for (heard, happened) in &events {
            let now = begin + Duration::from_millis(*heard);
            seen.extend(merge.ready(now, false));
            merge.push(at(i64::try_from(*happened).unwrap()), now);
        }
        seen.extend(merge.ready(begin, true));
        prop_assert_eq!(merge.wakes_at(), None);
        let times: Vec<i64> = seen.iter().map(merge::time).collect();
        prop_assert!(times.is_sorted(), "{:?}", times);
        prop_assert_eq!(times.len(), events.len());
    }
}

#[test]
fn of_what_is_remembered_only_the_last_are_shown() {
    let begin = StdInstant::now();
    let mut merge = Merge::new(HOLD, 100, Some(3));
    for time in [1, 5, 3, 2, 4, 150, 101] {
        merge.push(at(time), begin);
    }
    assert_eq!(merge.ready(begin, false).len(), 0);
    assert_eq!(merge.wakes_at(), Some(begin + HOLD));
    let times: Vec<i64> = merge.ready(begin + HOLD, false).iter().map(merge::time).collect();
    assert_eq!(times, [3, 4, 5, 101, 150]);
}
