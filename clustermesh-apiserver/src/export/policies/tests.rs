use std::time::{Duration, Instant};

use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::Record as _;

use super::*;
use crate::export::KeyChange;
use crate::fixtures::{objects, upserts};
use crate::identity::Allocator;
use crate::objects::Change;

const KEY: &str = "clustermesh/local/policies/v1/alpha/cnp/shop/web";

const POLICY: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {namespace: shop, name: web}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: cart}}]
";

fn exporter(policy_default_local_cluster: bool) -> Exporter {
    let max = MaxConnectedClusters::C255;
    let cluster = Cluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let allocator = Allocator::new(cluster.id, max, Duration::from_secs(600));
    Exporter::new(cluster, allocator, Rules { policy_default_local_cluster, ..Rules::default() })
}

fn record_of(exporter: &Exporter) -> LocalPolicy {
    let (_, value) = exporter.published().find(|(key, _)| key == KEY).unwrap();
    LocalPolicy::decode("cnp/shop/web", value).unwrap()
}

/// Which clusters the only selector of another end names.
fn peer_clusters(exporter: &Exporter) -> Vec<Requirement> {
    let mut rule = record_of(exporter).rules.remove(0);
    let selector = selectors(&mut rule).next().unwrap();
    selector.0.iter().filter(|it| it.key == CLUSTER_LABEL).cloned().collect()
}

#[test]
fn a_policy_comes_changes_and_goes_with_its_object() {
    let now = Instant::now();
    let mut exporter = exporter(true);
    let changes = exporter.apply(upserts(POLICY), now);
    assert_eq!(changes.iter().map(|change| change.key.as_str()).collect::<Vec<_>>(), [KEY]);
    assert!(Kind::LocalPolicies.is_private());
    assert!(exporter.apply(upserts(POLICY), now).is_empty());
    let changes = exporter.apply(upserts(&POLICY.replace("cart", "till")), now);
    assert!(matches!(&changes[..], [KeyChange { value: Some(_), .. }]));
    assert_eq!(exporter.published_count(Kind::LocalPolicies), 1);
    let gone = exporter.apply(vec![Change::Delete(objects(POLICY)[0].key())], now);
    assert_eq!(gone, [KeyChange { key: KEY.to_owned(), value: None }]);
}

#[test]
fn policies_of_different_kinds_do_not_meet() {
    let mut exporter = exporter(true);
    let clusterwide = POLICY.replace("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy");
    let network = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                   metadata: {namespace: shop, name: web}\nspec: {podSelector: {}}\n";
    let text = format!("{POLICY}---{}---\n{network}", clusterwide.replace("namespace: shop, ", ""));
    exporter.apply(upserts(&text), Instant::now());
    let keys: Vec<_> =
        exporter.published().map(|(key, _)| key.rsplit("alpha/").next().unwrap().to_owned()).collect();
    assert_eq!(keys, ["ccnp//web", "cnp/shop/web", "knp/shop/web"]);
}

#[test]
fn subjects_are_of_the_own_cluster_whatever_they_say() {
    let own = Requirement::is("k8s", CLUSTER_LABEL, "alpha");
    for default_local in [true, false] {
        for labels in ["app: web", "'k8s:io.cilium.k8s.policy.cluster': alpha"] {
            let mut exporter = exporter(default_local);
            exporter.apply(upserts(&POLICY.replace("app: web", labels)), Instant::now());
            let subject = &record_of(&exporter).rules[0].subject;
            assert_eq!(subject.0.iter().filter(|it| **it == own).count(), 1, "{subject:?}");
        }
    }
}

#[test]
fn other_ends_are_of_the_own_cluster_or_of_any() {
    let own = Requirement::is("k8s", CLUSTER_LABEL, "alpha");
    let beta = |source| Requirement::is(source, CLUSTER_LABEL, "beta");
    let exists = Requirement {
        source: "k8s".into(),
        key: CLUSTER_LABEL.into(),
        operator: clustermesh_kvstore::record::Operator::Exists,
        values: std::collections::BTreeSet::new(),
    };
    for (selector, with_default, without) in [
        ("{matchLabels: {app: cart}}", vec![own.clone()], vec![]),
        ("{matchLabels: {io.cilium.k8s.policy.cluster: beta}}", vec![beta("")], vec![beta("")]),
        ("{matchLabels: {'k8s:io.cilium.k8s.policy.cluster': beta}}", vec![beta("k8s")], vec![beta("k8s")]),
        (
            "{matchExpressions: [{key: 'k8s:io.cilium.k8s.policy.cluster', operator: Exists}]}",
            vec![exists.clone()],
            vec![exists],
        ),
    ] {
        let text = POLICY.replace("{matchLabels: {app: cart}}", selector);
        for (default_local, expected) in [(true, &with_default), (false, &without)] {
            let mut exporter = exporter(default_local);
            exporter.apply(upserts(&text), Instant::now());
            assert_eq!(&peer_clusters(&exporter), expected, "{selector} {default_local}");
        }
    }
}

#[test]
fn what_is_not_understood_is_told_once_and_counted_as_long_as_it_is_there() {
    let now = Instant::now();
    let mut exporter = exporter(true);
    let flawed = POLICY.replace("[{matchLabels: {app: cart}}]", "[]\n  - fromEntities: [kube-apiserver]");
    exporter.apply(upserts(&flawed), now);
    let problems = exporter.take_problems();
    assert_eq!(
        problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "policy cnp/shop/web: spec.ingress[1].fromEntities \"kube-apiserver\": there is no such entity here; \
          the entry is left out, so that it allows nothing"
        ]
    );
    assert_eq!((exporter.flawed_policies(), exporter.policy_gaps()[&GapReason::Entity]), (1, 1));
    // What it says otherwise is exported: nobody may come in.
    let section = record_of(&exporter).rules.remove(0).ingress.unwrap();
    assert!(section.default_deny && section.allow.is_empty());

    exporter.apply(upserts(&flawed.replace("app: web", "app: till")), now);
    assert!(exporter.take_problems().is_empty());
    exporter.apply(upserts(POLICY), now);
    assert_eq!((exporter.flawed_policies(), exporter.policy_gaps()[&GapReason::Entity]), (0, 0));
}

#[test]
fn a_policy_that_is_refused_has_no_record() {
    let now = Instant::now();
    let mut exporter = exporter(true);
    exporter.apply(upserts(POLICY), now);
    let refused = POLICY.replace("endpointSelector", "nodeSelector");
    assert_eq!(exporter.apply(upserts(&refused), now), [KeyChange { key: KEY.to_owned(), value: None }]);
    assert_eq!(exporter.policy_gaps()[&GapReason::NodeSelector], 1);
    exporter.apply(vec![Change::Delete(objects(&refused)[0].key())], now);
    assert_eq!(exporter.flawed_policies(), 0);
}
