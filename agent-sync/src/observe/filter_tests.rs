use std::sync::Arc;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::labels::Labels;
use ebpf_global_svc::abi::{EVENT_POLICY, Event, read_event};
use jiff::Timestamp;
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> NamespacedName {
    let (namespace, name) = text.split_once('/').unwrap();
    NamespacedName { namespace: namespace.into(), name: name.into() }
}

/// A denied SYN from beta's client to alpha's orders.
fn denied() -> Flow {
    let event = Event {
        kind: event_kind::DROP,
        reason: reason::POLICY,
        flags: EVENT_POLICY,
        family: 4,
        proto: 6,
        ..read_event(&[0; 128]).unwrap()
    };
    let end = |ip: &str, port, identity, cluster: &str, labels: &str| End {
        ip: Some(ip.parse().unwrap()),
        port,
        identity,
        cluster: Some(cluster.parse().unwrap()),
        labels: Some(Arc::new(Labels::parse(labels).unwrap())),
        node: None,
        is_known: true,
    };
    Flow {
        time: Timestamp::UNIX_EPOCH,
        event,
        source: end(
            "10.2.0.9",
            43210,
            131_081,
            "beta",
            "k8s:app=client;k8s:io.kubernetes.pod.namespace=shop;",
        ),
        destination: end("10.1.0.7", 8080, 65_793, "alpha", "k8s:app=orders;k8s:tier=back;"),
        service: None,
        rule: None,
    }
}

type Change = fn(&mut v1::FlowFilter);

fn end(change: impl FnOnce(&mut v1::EndFilter)) -> Option<v1::EndFilter> {
    let mut end = v1::EndFilter::default();
    change(&mut end);
    Some(end)
}

#[test]
fn each_field_of_a_filter_counts() {
    let flow = denied();
    let (client, orders) = (name("shop/client-1"), name("shop/orders-0"));
    let cases: &[(&str, Change, bool)] = &[
        ("nothing is asked for", |_| {}, true),
        ("type", |f| f.types = vec!["policy-verdict".into()], true),
        ("another type", |f| f.types = vec!["drop".into(), "trace".into()], false),
        ("verdict", |f| f.verdicts = vec!["dropped".into()], true),
        ("another verdict", |f| f.verdicts = vec!["FORWARDED".into()], false),
        ("reason", |f| f.reasons = vec!["policy".into()], true),
        ("another reason", |f| f.reasons = vec!["policy-deny".into()], false),
        ("protocol", |f| f.protocols = vec!["udp".into(), "TCP".into()], true),
        ("another protocol", |f| f.protocols = vec!["udp".into()], false),
        ("service", |f| f.services = vec!["shop/".into()], false),
        ("from identity", |f| f.from = end(|e| e.identities = vec![131_081]), true),
        ("to that identity", |f| f.to = end(|e| e.identities = vec![131_081]), false),
        ("either identity", |f| f.either = end(|e| e.identities = vec![65_793]), true),
        ("from pod", |f| f.from = end(|e| e.pods = vec!["shop/client-1".into()]), true),
        ("from namespace", |f| f.from = end(|e| e.pods = vec!["shop/".into()]), true),
        ("from pods so called", |f| f.from = end(|e| e.pods = vec!["client".into()]), true),
        ("from another pod", |f| f.from = end(|e| e.pods = vec!["shop/orders-0".into()]), false),
        ("to range", |f| f.to = end(|e| e.ips = vec!["10.1.0.0/16".into()]), true),
        ("to address", |f| f.to = end(|e| e.ips = vec!["10.1.0.7".into()]), true),
        (
            "to another range",
            |f| f.to = end(|e| e.ips = vec!["10.3.0.0/16".into(), "fd00::/8".into()]),
            false,
        ),
        ("to label", |f| f.to = end(|e| e.labels = vec!["app=orders".into()]), true),
        ("to key", |f| f.to = end(|e| e.labels = vec!["k8s:tier".into()]), true),
        ("to another label", |f| f.to = end(|e| e.labels = vec!["app=client".into()]), false),
        ("to another source", |f| f.to = end(|e| e.labels = vec!["reserved:tier".into()]), false),
        ("from cluster", |f| f.from = end(|e| e.clusters = vec!["beta".into()]), true),
        ("from another cluster", |f| f.from = end(|e| e.clusters = vec!["alpha".into()]), false),
        ("port of either", |f| f.either = end(|e| e.ports = vec![8080]), true),
        ("no port of either", |f| f.either = end(|e| e.ports = vec![80]), false),
        (
            "either, but not one and the other",
            |f| {
                f.either = end(|e| {
                    e.ports = vec![8080];
                    e.clusters = vec!["beta".into()];
                });
            },
            false,
        ),
    ];
    for (what, change, matches) in cases {
        let mut filter = v1::FlowFilter::default();
        change(&mut filter);
        let filter = FlowFilter::parse(filter).unwrap();
        assert_eq!(filter.is_match(&flow, Some([Some(&client), Some(&orders)])), *matches, "{what}");
        assert!(!matches || filter.may_match(&flow), "{what}");
    }
}

#[test]
fn what_cannot_match_is_not_wanted_of_the_programs() {
    let events = |change: Change| {
        let mut filter = v1::FlowFilter::default();
        change(&mut filter);
        FlowFilter::parse(filter).unwrap().events()
    };
    let of = |kinds: &[u8]| kinds.iter().fold(0_u32, |bits, kind| bits | 1 << kind);
    assert_eq!(events(|_| {}), 0b11111);
    assert_eq!(events(|f| f.verdicts = vec!["DROPPED".into()]), of(&[event_kind::DROP]));
    assert_eq!(
        events(|f| f.types = vec!["trace".into(), "call".into()]),
        of(&[event_kind::TRACE, event_kind::CALL])
    );
    let allowed = events(|f| {
        f.types = vec!["policy-verdict".into()];
        f.verdicts = vec!["FORWARDED".into(), "AUDIT".into()];
    });
    assert_eq!(allowed, of(&[event_kind::ALLOW, event_kind::AUDIT]));
    assert_eq!(events(|f| f.reasons = vec!["policy".into()]), of(&[event_kind::DROP, event_kind::AUDIT]));
}

#[test]
fn what_is_no_filter_says_how_to_write_one() {
    let error = |change: Change| {
        let mut filter = v1::FlowFilter::default();
        change(&mut filter);
        FlowFilter::parse(filter).unwrap_err().to_string()
    };
    assert_eq!(
        error(|f| f.types = vec!["drops".into()]),
        r#""drops" is no type; there are drop, policy-verdict, trace, call"#
    );
    assert!(
        error(|f| f.reasons = vec!["forwarded".into()]).contains("lb-no-backend, invalid-source-ip, policy")
    );
    assert!(error(|f| f.to = end(|e| e.ips = vec!["10.1".into()])).contains("write 10.1.0.7"));
    assert!(error(|f| f.to = end(|e| e.ports = vec![70_000])).contains("1 to 65535"));
    assert!(error(|f| f.from = end(|e| e.labels = vec!["=x".into()])).contains("key=value"));
    let endless: Change = |f| f.services = vec![String::new(); 1001];
    assert_eq!(error(endless), "the filter has more than 1000 values");
}

proptest! {
    /// Events of kinds that a filter does not want never match it.
    #[test]
    fn what_is_not_wanted_does_not_match(
        types in prop::collection::vec(prop::sample::select(Kind::ALL.map(Kind::as_str).to_vec()), 0..3),
        verdicts in prop::collection::vec(prop::sample::select(Verdict::ALL.map(Verdict::as_str).to_vec()), 0..3),
        with_reason: bool,
        kind in 0_u8..5,
        policy: bool,
    ) {
        let reasons = if with_reason { vec!["policy".into()] } else { Vec::new() };
        let filter = v1::FlowFilter {
            types: types.into_iter().map(Into::into).collect(),
            verdicts: verdicts.into_iter().map(Into::into).collect(),
            reasons,
            ..v1::FlowFilter::default()
        };
        let filter = FlowFilter::parse(filter).unwrap();
        let mut flow = denied();
        flow.event.kind = kind;
        // As the programs do it.
        let decided = matches!(kind, event_kind::AUDIT | event_kind::ALLOW) || kind == event_kind::DROP && policy;
        flow.event.flags = if decided { EVENT_POLICY } else { 0 };
        prop_assert!(!filter.may_match(&flow) || filter.events() >> kind & 1 == 1);
    }
}
