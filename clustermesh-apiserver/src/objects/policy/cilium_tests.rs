//! Cilium's policies, and what they mean.

use serde_json::{Value, json};

use super::network_tests::{is, read, rules};
use super::{Effect, GapReason};

/// A policy of namespace `shop` that selects `app: web`, or a clusterwide one.
fn policy(clusterwide: bool, body: &str) -> String {
    let (kind, metadata) = match clusterwide {
        true => ("CiliumClusterwideNetworkPolicy", "name: p"),
        false => ("CiliumNetworkPolicy", "namespace: shop, name: p"),
    };
    format!(
        "apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{{metadata}}}\n\
         spec: {{endpointSelector: {{matchLabels: {{app: web}}}}, {body}}}\n"
    )
}

const NAMESPACE: &str = "io.kubernetes.pod.namespace";

fn shop() -> Value {
    is("k8s", NAMESPACE, "shop")
}

fn any_namespace() -> Value {
    json!({ "source": "k8s", "key": NAMESPACE, "operator": "exists" })
}

/// Without a source in the record: any.
fn any(key: &str, value: &str) -> Value {
    json!({ "key": key, "operator": "in", "values": [value] })
}

fn ports(protocol: u8, first: u16, last: u16) -> Value {
    json!({ "ports": { "protocol": protocol, "first": first, "last": last } })
}

#[test]
fn who_a_policy_is_about() {
    let subject = |selector: &str, clusterwide| {
        let text = policy(clusterwide, "ingress: [{}]").replace("{matchLabels: {app: web}}", selector);
        let policy = read(&text).unwrap();
        assert_eq!(policy.gaps, []);
        rules(&policy)[0]["subject"].clone()
    };
    let web = "{matchLabels: {app: web}}";
    assert_eq!(subject(web, false), json!([any("app", "web"), shop()]));
    assert_eq!(subject(web, true), json!([any("app", "web")]));
    assert_eq!(subject("{}", false), json!([shop()]));
    assert_eq!(subject("{}", true), json!([]));
    let prefixes = "{matchLabels: {'any:a': '1', 'k8s:b': '2'}}";
    assert_eq!(subject(prefixes, true), json!([any("a", "1"), is("k8s", "b", "2")]));
    // No policy reaches beyond its namespace.
    let elsewhere = format!("{{matchLabels: {{'k8s:{NAMESPACE}': bank}}}}");
    assert_eq!(subject(&elsewhere, false), json!([shop()]));
    assert_eq!(subject(&elsewhere, true), json!([is("k8s", NAMESPACE, "bank")]));
    let expression =
        format!("{{matchExpressions: [{{key: '{NAMESPACE}', operator: NotIn, values: [kube-system]}}]}}");
    assert_eq!(
        subject(&expression, true),
        json!([{ "key": NAMESPACE, "operator": "notIn", "values": ["kube-system"] }])
    );
}

#[test]
fn which_directions_deny_by_default() {
    let deny = json!({ "defaultDeny": true });
    let no = Value::Null;
    let all = json!([{ "peers": [{ "entity": "all" }] }]);
    for (body, ingress, egress) in [
        ("ingress: [{}]", deny.clone(), no.clone()),
        ("egress: [{}]", no.clone(), deny.clone()),
        ("ingress: [{}], egress: [{}]", deny.clone(), deny.clone()),
        ("ingressDeny: [{}]", deny.clone(), no.clone()),
        ("ingress: [], egress: [{}]", no.clone(), deny.clone()),
        ("enableDefaultDeny: {ingress: true}", deny.clone(), no.clone()),
        ("enableDefaultDeny: {egress: true}, ingress: [{}]", deny.clone(), deny.clone()),
        (
            "enableDefaultDeny: {ingress: false}, ingress: [{fromEntities: [all]}]",
            json!({ "defaultDeny": false, "allow": all }),
            no.clone(),
        ),
        ("egressDeny: [{toEntities: [all]}]", no.clone(), json!({ "defaultDeny": true, "deny": all })),
    ] {
        let policy = read(&policy(false, body)).unwrap();
        let rules = rules(&policy);
        assert_eq!((&rules[0]["ingress"], &rules[0]["egress"]), (&ingress, &egress), "{body}");
        assert_eq!(policy.gaps, [], "{body}");
    }
    for body in ["ingress: []", "description: nothing", "enableDefaultDeny: {ingress: false}, ingress: [{}]"]
    {
        assert_eq!(read(&policy(false, body)).unwrap().rules, [], "{body}");
    }
}

#[test]
fn who_may_be_at_the_other_end() {
    let labels = |requirements: Value| json!([{ "labels": requirements }]);
    let of_namespace = "io.cilium.k8s.namespace.labels.team";
    for (peers, clusterwide, expected) in [
        ("Endpoints: [{}]", false, labels(json!([shop()]))),
        ("Endpoints: [{}]", true, labels(json!([any_namespace()]))),
        ("Endpoints: [{matchLabels: {app: a}}]", false, labels(json!([any("app", "a"), shop()]))),
        ("Endpoints: [{matchLabels: {app: a}}]", true, labels(json!([any("app", "a"), any_namespace()]))),
        ("Endpoints: [{matchLabels: {'k8s:app': a}}]", false, labels(json!([is("k8s", "app", "a"), shop()]))),
        (
            "Endpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': bank}}]",
            false,
            labels(json!([is("k8s", NAMESPACE, "bank")])),
        ),
        (
            "Endpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: Exists}]}]",
            false,
            labels(json!([{ "key": NAMESPACE, "operator": "exists" }])),
        ),
        (
            "Endpoints: [{matchLabels: {io.cilium.k8s.namespace.labels.team: a}}]",
            false,
            labels(json!([any(of_namespace, "a")])),
        ),
        (
            "Endpoints: [{matchLabels: {io.cilium.k8s.policy.cluster: beta}}]",
            false,
            labels(json!([any("io.cilium.k8s.policy.cluster", "beta"), shop()])),
        ),
        ("Endpoints: [{matchLabels: {'reserved:host': ''}}]", false, json!([{ "entity": "host" }])),
        (
            "Entities: [all, world, cluster, host, remote-node]",
            false,
            json!([
                { "entity": "all" }, { "entity": "world" }, { "entity": "cluster" }, { "entity": "host" },
                { "entity": "remote-node" },
            ]),
        ),
        ("Entities: [none, host]", false, json!([{ "entity": "host" }])),
        (
            "CIDR: [192.0.2.1/24, 192.0.2.7, '2001:db8::/32']",
            false,
            json!([
                { "cidr": { "net": "192.0.2.0/24" } }, { "cidr": { "net": "192.0.2.7/32" } },
                { "cidr": { "net": "2001:db8::/32" } },
            ]),
        ),
        (
            "CIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]",
            false,
            json!([{ "cidr": { "net": "10.0.0.0/8", "except": ["10.1.0.0/16"] } }]),
        ),
    ] {
        for (direction, prefix) in [("ingress", "from"), ("egress", "to")] {
            for (section, list) in [(direction.to_owned(), "allow"), (format!("{direction}Deny"), "deny")] {
                let body = format!("{section}: [{{{prefix}{peers}}}]");
                let policy = read(&policy(clusterwide, &body)).unwrap();
                assert_eq!(policy.gaps, [], "{body}");
                let section = &rules(&policy)[0][direction];
                assert_eq!(section[list], json!([{ "peers": expected }]), "{body}");
                assert_eq!(section["defaultDeny"], true, "{body}");
            }
        }
    }
}

/// A list that is there and empty, and the entity without members, mean nobody, also for some ports.
#[test]
fn nobody_is_not_everybody() {
    for entry in
        ["fromEndpoints: []", "fromEntities: []", "fromEntities: [none]", "fromCIDR: []", "fromCIDRSet: []"]
    {
        for ports in ["", ", toPorts: [{ports: [{port: '80'}]}]"] {
            let policy = read(&policy(false, &format!("ingress: [{{{entry}{ports}}}]"))).unwrap();
            assert_eq!(rules(&policy)[0]["ingress"], json!({ "defaultDeny": true }), "{entry}{ports}");
        }
    }
}

#[test]
fn for_which_ports() {
    let all = [6, 17, 132];
    let everywhere = |first, last| all.map(|protocol| ports(protocol, first, last)).to_vec();
    let icmp = |v6: bool, kind: u8| json!({ "icmp": { "v6": v6, "type": kind } });
    for (entry, expected) in [
        ("toPorts: [{ports: [{port: '80', protocol: TCP}]}]", vec![ports(6, 80, 80)]),
        ("toPorts: [{ports: [{port: '53', protocol: udp}]}]", vec![ports(17, 53, 53)]),
        ("toPorts: [{ports: [{port: '80', protocol: SCTP}]}]", vec![ports(132, 80, 80)]),
        ("toPorts: [{ports: [{port: '80', protocol: ANY}]}]", everywhere(80, 80)),
        ("toPorts: [{ports: [{port: '80'}]}]", everywhere(80, 80)),
        ("toPorts: [{ports: [{port: '0', protocol: TCP}]}]", vec![ports(6, 0, 65535)]),
        ("toPorts: [{ports: [{port: '80', endPort: 90, protocol: TCP}]}]", vec![ports(6, 80, 90)]),
        (
            "toPorts: [{ports: [{port: '1', protocol: TCP}]}, {ports: [{port: '2', protocol: UDP}], rules: {}}]",
            vec![ports(6, 1, 1), ports(17, 2, 2)],
        ),
        ("icmps: [{fields: [{type: 8}]}]", vec![icmp(false, 8)]),
        ("icmps: [{fields: [{type: '8', family: IPv4}]}]", vec![icmp(false, 8)]),
        (
            "icmps: [{fields: [{type: EchoRequest, family: IPv6}, {type: EchoReply}]}]",
            vec![icmp(true, 128), icmp(false, 0)],
        ),
    ] {
        for (body, list) in
            [(format!("egress: [{{{entry}}}]"), "allow"), (format!("egressDeny: [{{{entry}}}]"), "deny")]
        {
            let policy = read(&policy(false, &body)).unwrap();
            assert_eq!(policy.gaps, [], "{body}");
            let expected = json!([{ "peers": [{ "entity": "all" }], "ports": expected }]);
            assert_eq!(rules(&policy)[0]["egress"][list], expected, "{body}");
        }
    }
}

/// What is not understood allows nothing, and the rest of the policy stands.
#[test]
fn entries_that_are_not_understood_are_left_out() {
    for (direction, entry, field, reason) in [
        ("egress", "toFQDNs: [{matchName: a.example}]", "toFQDNs", GapReason::Fqdns),
        ("egress", "toServices: [{k8sService: {serviceName: a}}]", "toServices", GapReason::Services),
        ("egress", "toNodes: [{}]", "toNodes", GapReason::Nodes),
        ("ingress", "fromNodes: [{}]", "fromNodes", GapReason::Nodes),
        ("egress", "toGroups: [{aws: {}}]", "toGroups", GapReason::Groups),
        ("ingress", "fromRequires: [{}]", "fromRequires", GapReason::Unknown),
        ("ingress", "fromSomewhere: [{}], fromEntities: [all]", "fromSomewhere", GapReason::Unknown),
        ("ingress", "toEntities: [all]", "toEntities", GapReason::Unknown),
        (
            "ingress",
            "fromEntities: [host, kube-apiserver]",
            "fromEntities \"kube-apiserver\"",
            GapReason::Entity,
        ),
        ("ingress", "fromEntities: [health]", "fromEntities \"health\"", GapReason::Entity),
        (
            "ingress",
            "fromEndpoints: [{matchLabels: {'reserved:init': ''}}]",
            "fromEndpoints[0]",
            GapReason::Selector,
        ),
        (
            "ingress",
            "fromEndpoints: [{matchLabels: {'cidr:x': ''}}]",
            "fromEndpoints[0] \"cidr:x\"",
            GapReason::Selector,
        ),
        ("ingress", "fromCIDRSet: [{cidrGroupRef: a}]", "fromCIDRSet[0]", GapReason::Unknown),
        ("ingress", "fromEntities: [all], fromCIDR: [10.0.0.0/8]", "", GapReason::Combination),
        (
            "ingress",
            "authentication: {mode: required}, fromEntities: [all]",
            "authentication",
            GapReason::Authentication,
        ),
        ("ingress", "toPorts: [{ports: [{port: http}]}]", "toPorts[0].ports[0]", GapReason::NamedPort),
        (
            "ingress",
            "toPorts: [{ports: [{port: '90', endPort: 80}]}]",
            "toPorts[0].ports[0]",
            GapReason::Ports,
        ),
        ("ingress", "toPorts: [{ports: [{port: '70000'}]}]", "toPorts[0].ports[0]", GapReason::Ports),
        ("ingress", "toPorts: [{}]", "toPorts[0].ports", GapReason::Ports),
        ("ingress", "icmps: [{fields: []}]", "icmps", GapReason::Ports),
        (
            "ingress",
            "toPorts: [{ports: [{port: '80'}]}, {ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET}]}}]",
            "toPorts[1].rules",
            GapReason::Layer7,
        ),
        (
            "egress",
            "toPorts: [{ports: [{port: '443'}], serverNames: [a]}]",
            "toPorts[0].serverNames",
            GapReason::Layer7,
        ),
        (
            "egress",
            "toPorts: [{ports: [{port: '443'}], listener: {name: a}}]",
            "toPorts[0].listener",
            GapReason::Layer7,
        ),
        (
            "ingress",
            "toPorts: [{ports: [{port: '80'}]}], icmps: [{fields: [{type: 8}]}]",
            "icmps",
            GapReason::Combination,
        ),
    ] {
        let text = policy(
            false,
            &format!("{direction}: [{{{entry}}}, {{toPorts: [{{ports: [{{port: '1', protocol: TCP}}]}}]}}]"),
        );
        let policy = read(&text).unwrap();
        let [gap] = &policy.gaps[..] else { panic!("{entry}: {:?}", policy.gaps) };
        let separator = if field.is_empty() { "" } else { "." };
        assert_eq!(gap.field, format!("spec.{direction}[0]{separator}{field}"));
        assert_eq!((gap.reason, gap.effect), (reason, Effect::LeftOut), "{entry}");
        let section = &rules(&policy)[0][direction];
        let rest = json!([{ "peers": [{ "entity": "all" }], "ports": [ports(6, 1, 1)] }]);
        assert_eq!((&section["defaultDeny"], &section["allow"]), (&json!(true), &rest), "{entry}");
    }
}

/// What is denied for some of what it says is denied for all of it.
#[test]
fn denials_may_be_wider_than_they_say() {
    let host = json!([{ "entity": "host" }]);
    for (entry, expected) in [
        (
            "fromEntities: [host], toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]",
            json!([{ "peers": host, "ports": [ports(6, 80, 80)] }]),
        ),
        ("fromEntities: [host], toPorts: [{ports: [{port: http}]}]", json!([{ "peers": host }])),
        ("fromEntities: [host], toPorts: [{ports: [{port: '9', endPort: 8}]}]", json!([{ "peers": host }])),
        ("fromEntities: [host], authentication: {mode: required}", json!([{ "peers": host }])),
    ] {
        let policy = read(&policy(false, &format!("ingressDeny: [{{{entry}}}]"))).unwrap();
        assert!(matches!(&policy.gaps[..], [gap] if gap.effect == Effect::Widened), "{:?}", policy.gaps);
        assert_eq!(rules(&policy)[0]["ingress"]["deny"], expected, "{entry}");
    }
}

#[test]
fn a_policy_is_refused_if_it_cannot_deny_what_it_should() {
    for body in [
        "egressDeny: [{toServices: [{}]}]",
        "egressDeny: [{toNodes: [{}]}]",
        "ingressDeny: [{fromEntities: [kube-apiserver]}]",
        "ingressDeny: [{fromEndpoints: [{matchLabels: {'reserved:health': ''}}]}]",
        "ingressDeny: [{fromEntities: [all], fromCIDR: [10.0.0.0/8]}]",
        "somethingNew: true",
    ] {
        let policy = read(&policy(false, &format!("ingress: [{{fromEntities: [all]}}], {body}"))).unwrap();
        assert!(matches!(&policy.gaps[..], [gap] if gap.effect == Effect::Refused), "{:?}", policy.gaps);
        assert_eq!(policy.rules, [], "{body}");
    }
    let node = policy(true, "ingress: [{}]").replace("endpointSelector", "nodeSelector");
    let refused = read(&node).unwrap();
    assert_eq!(refused.rules, []);
    assert_eq!(
        refused.gaps[0].to_string(),
        "spec.nodeSelector: policies of nodes are not enforced; the policy is refused and does nothing"
    );
    let init = policy(true, "ingress: [{}]").replace("app: web", "'reserved:init': ''");
    assert!(matches!(&read(&init).unwrap().gaps[..], [gap] if gap.reason == GapReason::Selector));
}

#[test]
fn several_rules_in_one_object() {
    let text = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {namespace: shop, name: p}
spec:
  endpointSelector: {}
  ingress: [{fromEntities: [host]}]
specs:
- endpointSelector: {matchLabels: {app: web}}
  egress: [{toEntities: [world]}]
- endpointSelector: {}
  egress: [{toFQDNs: [{matchPattern: '*'}]}]
";
    let policy = read(text).unwrap();
    assert_eq!(policy.name.to_string(), "cnp/shop/p");
    assert_eq!(policy.gaps[0].field, "specs[1].egress[0].toFQDNs");
    let world = json!({ "defaultDeny": true, "allow": [{ "peers": [{ "entity": "world" }] }] });
    let host = json!({ "defaultDeny": true, "allow": [{ "peers": [{ "entity": "host" }] }] });
    assert_eq!(
        rules(&policy),
        json!([
            { "subject": [shop()], "ingress": host },
            { "subject": [any("app", "web"), shop()], "egress": world },
            { "subject": [shop()], "egress": { "defaultDeny": true } },
        ])
    );
}

#[test]
fn what_cilium_refuses_is_refused() {
    for (body, expected) in [
        ("ingress: [{fromCIDR: [10.0.0]}]", "spec.ingress[0].fromCIDR: \"10.0.0\" is not a range"),
        ("ingress: [{fromCIDRSet: [{cidr: 10.0.0.0/16, except: [10.9.0.0/24]}]}]", "is not in"),
        ("ingress: [{toPorts: [{ports: [{port: '80', protocol: ICMP}]}]}]", "none of TCP"),
        ("egress: [{icmps: [{fields: [{type: Nothing}]}]}]", "not a type of ICMP messages"),
        ("egress: [{icmps: [{fields: [{type: 8, family: IPX}]}]}]", "neither IPv4 nor IPv6"),
        ("egress: [{toEndpoints: [{matchLabels: {'k8s:': a}}]}]", "not the key of a label"),
        ("nodeSelector: {}", "use one of endpointSelector and nodeSelector"),
    ] {
        let error = read(&policy(false, body)).unwrap_err();
        assert!(
            error.contains("CiliumNetworkPolicy shop/p: ") && error.contains(expected),
            "{body}: {error}"
        );
    }
    let without =
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {namespace: shop, name: p}\n";
    assert!(read(without).unwrap_err().contains("spec: is missing"));
    let many = vec!["host"; 5000].join(", ");
    let error = read(&policy(false, &format!("ingress: [{{fromEntities: [{many}]}}]"))).unwrap_err();
    assert!(error.contains("5000 peers"), "{error}");
}
