//! Manifests as Kubernetes' documentation has them, and what they mean.

use serde_json::{Value, json};

use crate::objects::Object;
use crate::objects::policy::{Gap, Policy};
use crate::source::manifests::parse;

/// What a manifest says, or what is wrong with it.
pub(super) fn read(text: &str) -> Result<Policy, String> {
    match parse(text).map_err(|error| error.to_string())?.remove(0) {
        Object::Policy(policy) => Ok(std::sync::Arc::unwrap_or_clone(policy)),
        other => panic!("{other:?}"),
    }
}

pub(super) fn rules(policy: &Policy) -> Value {
    serde_json::to_value(&policy.rules).unwrap()
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{namespace: shop, name: p}}\nspec: {spec}\n"
    )
}

pub(super) fn is(source: &str, key: &str, value: &str) -> Value {
    json!({ "source": source, "key": key, "operator": "in", "values": [value] })
}

fn k8s(key: &str, value: &str) -> Value {
    is("k8s", key, value)
}

fn shop() -> Value {
    k8s("io.kubernetes.pod.namespace", "shop")
}

fn tcp(first: u16, last: u16) -> Value {
    json!({ "ports": { "protocol": 6, "first": first, "last": last } })
}

/// The first example of "Network Policies" in Kubernetes' documentation.
#[test]
fn the_example_of_the_documentation() {
    let text = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: test-network-policy
  namespace: default
spec:
  podSelector:
    matchLabels:
      role: db
  policyTypes:
  - Ingress
  - Egress
  ingress:
  - from:
    - ipBlock:
        cidr: 172.17.0.0/16
        except:
        - 172.17.1.0/24
    - namespaceSelector:
        matchLabels:
          project: myproject
    - podSelector:
        matchLabels:
          role: frontend
    ports:
    - protocol: TCP
      port: 6379
  egress:
  - to:
    - ipBlock:
        cidr: 10.0.0.0/24
    ports:
    - protocol: TCP
      port: 5978
";
    let policy = read(text).unwrap();
    let namespace = k8s("io.kubernetes.pod.namespace", "default");
    assert_eq!(policy.name.to_string(), "knp/default/test-network-policy");
    assert_eq!(
        rules(&policy),
        json!([{
            "subject": [k8s("role", "db"), namespace],
            "ingress": { "defaultDeny": true, "allow": [{
                "peers": [
                    { "cidr": { "net": "172.17.0.0/16", "except": ["172.17.1.0/24"] } },
                    { "labels": [k8s("io.cilium.k8s.namespace.labels.project", "myproject")] },
                    { "labels": [k8s("role", "frontend"), namespace] },
                ],
                "ports": [tcp(6379, 6379)],
            }] },
            "egress": { "defaultDeny": true, "allow": [{
                "peers": [{ "cidr": { "net": "10.0.0.0/24" } }],
                "ports": [tcp(5978, 5978)],
            }] },
        }])
    );
    assert_eq!(policy.gaps, []);
}

/// Default policies and other examples of the same page, and what each field can be.
#[test]
fn what_a_policy_means() {
    let nothing = json!({ "defaultDeny": true });
    let everything = json!({ "defaultDeny": true, "allow": [{ "peers": [{ "entity": "all" }] }] });
    let from = |peer: Value| json!({ "defaultDeny": true, "allow": [{ "peers": [peer] }] });
    let ports = |ports: Value| json!({ "defaultDeny": true, "allow": [{ "peers": [{ "entity": "all" }], "ports": ports }] });
    let exists = json!({ "source": "k8s", "key": "io.kubernetes.pod.namespace", "operator": "exists" });
    let label = |key: &str, value: &str| k8s(&format!("io.cilium.k8s.namespace.labels.{key}"), value);
    let no = Value::Null;
    for (spec, ingress, egress) in [
        ("{podSelector: {}, policyTypes: [Ingress]}", nothing.clone(), no.clone()),
        ("{podSelector: {}, ingress: [{}], policyTypes: [Ingress]}", everything.clone(), no.clone()),
        ("{podSelector: {}, policyTypes: [Egress]}", no.clone(), nothing.clone()),
        ("{podSelector: {}, egress: [{}], policyTypes: [Egress]}", no.clone(), everything.clone()),
        ("{podSelector: {}, policyTypes: [Ingress, Egress]}", nothing.clone(), nothing.clone()),
        // Without policyTypes.
        ("{podSelector: {}}", nothing.clone(), no.clone()),
        ("{podSelector: {}, egress: []}", nothing.clone(), no.clone()),
        ("{podSelector: {}, egress: [{}]}", nothing.clone(), everything.clone()),
        // Rules of a direction that it is not about.
        ("{podSelector: {}, ingress: [{}], policyTypes: [Egress]}", no.clone(), nothing.clone()),
        // Other ends.
        ("{ingress: [{from: []}]}", everything.clone(), no.clone()),
        ("{ingress: [{from: [{podSelector: {}}]}]}", from(json!({ "labels": [shop()] })), no.clone()),
        ("{ingress: [{from: [{namespaceSelector: {}}]}]}", from(json!({ "labels": [exists] })), no.clone()),
        (
            "{ingress: [{from: [{namespaceSelector: {matchLabels: {team: a}}, podSelector: {matchLabels: {app: b}}}]}]}",
            from(json!({ "labels": [k8s("app", "b"), label("team", "a")] })),
            no.clone(),
        ),
        (
            "{ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [b, a]}]}}]}]}",
            from(json!({ "labels": [{
                "source": "k8s", "key": "io.cilium.k8s.namespace.labels.ns", "operator": "notIn", "values": ["a", "b"],
            }] })),
            no.clone(),
        ),
        (
            "{ingress: [{from: [{podSelector: {matchLabels: {io.cilium.k8s.policy.cluster: beta}}}]}]}",
            from(json!({ "labels": [k8s("io.cilium.k8s.policy.cluster", "beta"), shop()] })),
            no.clone(),
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: '2001:db8::/32'}}]}]}",
            from(json!({ "cidr": { "net": "2001:db8::/32" } })),
            no.clone(),
        ),
        // Ports.
        ("{ingress: [{ports: []}]}", everything.clone(), no.clone()),
        ("{ingress: [{ports: [{port: 80}]}]}", ports(json!([tcp(80, 80)])), no.clone()),
        (
            "{ingress: [{ports: [{port: 32000, endPort: 32768}]}]}",
            ports(json!([tcp(32000, 32768)])),
            no.clone(),
        ),
        ("{ingress: [{ports: [{protocol: TCP}]}]}", ports(json!([tcp(0, 65535)])), no.clone()),
        (
            "{ingress: [{ports: [{protocol: UDP, port: 53}, {protocol: SCTP, port: 5000}]}]}",
            ports(json!([
                { "ports": { "protocol": 17, "first": 53, "last": 53 } },
                { "ports": { "protocol": 132, "first": 5000, "last": 5000 } },
            ])),
            no,
        ),
    ] {
        let policy = read(&policy(spec)).unwrap();
        assert_eq!(policy.gaps, [], "{spec}");
        let rules = rules(&policy);
        assert_eq!(rules[0]["subject"], json!([shop()]), "{spec}");
        assert_eq!((&rules[0]["ingress"], &rules[0]["egress"]), (&ingress, &egress), "{spec}");
    }
}

#[test]
fn a_named_port_allows_nothing() {
    let policy =
        read(&policy("{ingress: [{ports: [{port: 80}, {port: http}]}, {ports: [{port: 81}]}]}")).unwrap();
    let [Gap { field, .. }] = &policy.gaps[..] else { panic!("{:?}", policy.gaps) };
    assert_eq!(field, "spec.ingress[0].ports");
    let section = &rules(&policy)[0]["ingress"];
    assert_eq!(section["defaultDeny"], true);
    assert_eq!(section["allow"], json!([{ "peers": [{ "entity": "all" }], "ports": [tcp(81, 81)] }]));
}

#[test]
fn what_kubernetes_refuses_is_refused() {
    for (spec, expected) in [
        ("{policyTypes: [Both]}", "spec.policyTypes: \"Both\""),
        ("{ingress: [{from: [{}]}]}", "spec.ingress[0].from[0]: says nothing"),
        ("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}", "cannot be combined"),
        ("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/99}}]}]}", "not a range of addresses"),
        (
            "{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/16, except: [10.1.0.0/24]}}]}]}",
            "10.1.0.0/24 is not in",
        ),
        ("{ingress: [{ports: [{port: 80, protocol: ICMP}]}]}", "none of TCP, UDP, SCTP"),
        ("{podSelector: {matchExpressions: [{key: a, operator: In}]}}", "use In or NotIn with values"),
        ("{podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}", "\"Gt\""),
    ] {
        let error = read(&policy(spec)).unwrap_err();
        assert!(error.contains("NetworkPolicy shop/p") && error.contains(expected), "{spec}: {error}");
    }
}
