//! Why things are as they are, as the command line asks.

use clustermesh_agent_api::v1::{ExplainRequest, ExplainResponse, ExplainedAddress, ExplainedPart};
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::record::Record as _;

use crate::support::{Agent, Cluster, eventually};

async fn explain(agent: &Agent, kind: &str, name: &str) -> ExplainResponse {
    let request = ExplainRequest { kind: kind.into(), name: name.into() };
    agent.client().await.explain(request).await.unwrap().into_inner()
}

fn says(part: &ExplainedPart, text: &str) -> bool {
    part.why.iter().any(|sentence| sentence.contains(text))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_cluster_s_part_has_its_reason() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;

    let told = explain(&agent, "service", "shop/orders").await;
    let names: Vec<_> =
        told.clusters.iter().map(|part| (part.cluster.as_str(), part.outcome.as_str())).collect();
    assert_eq!(names, [("alpha", "chosen"), ("beta", "chosen")]);
    assert!(told.clusters.iter().all(|part| part.revision > 0), "{told:?}");
    assert!(says(&told.clusters[1], "shared true, 2 backends, 2 in use"), "{told:?}");
    let rows: Vec<_> = told.installed.iter().map(|table| (table.table.as_str(), table.rows.len())).collect();
    assert_eq!(rows, [("service", 2), ("slot", 4), ("backend", 4)]);

    let told = explain(&agent, "ip", &beta.pod(1).to_string()).await;
    assert!(told.verdict[0].contains("pod prefix 10.2.0.0/24 of beta"), "{told:?}");
    assert_eq!((told.clusters[0].outcome.as_str(), told.clusters[1].outcome.as_str()), ("absent", "chosen"));
    let told = explain(&agent, "identity", &beta.ip(1).identity.to_string()).await;
    assert!(says(&told.clusters[1], "2 addresses have it: 10.2.0.1, 10.2.0.2"), "{told:?}");

    let mut service = beta.service(&[1, 2]);
    service.shared = false;
    beta.publish(&service).await;
    agent.waits_for_groups(&[("1", "2")]).await;
    let told = explain(&agent, "service", "shop/orders").await;
    assert!(says(&told.clusters[1], "not used: it is not shared"), "{told:?}");

    agent.allow("clusters: {beta: {namespaces: {deny: [shop]}}}");
    eventually("it is refused", async || {
        let told = explain(&agent, "service", "shop/orders").await;
        told.clusters[1].outcome == "refused" && says(&told.clusters[1], "namespace_not_allowed")
    })
    .await;
    let told = explain(&agent, "service", "shop/nothing").await;
    assert!(told.verdict[0].contains("alpha has no service shop/nothing"), "{told:?}");
    assert!(says(&told.clusters[1], "it has no record of it"), "{told:?}");
    let request = ExplainRequest { kind: "service".into(), name: "orders".into() };
    let error = agent.client().await.explain(request).await.unwrap_err();
    assert!(error.message().contains("namespace/name"), "{error}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_found_by_its_name_in_every_cluster() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let identity = beta.ip(1).identity.to_string();
    let labels = b"k8s:app=orders;k8s:io.cilium.k8s.policy.cluster=beta;";
    beta.put(data_prefix(Kind::Identities, &beta.name, Layout::State) + &identity, labels.to_vec()).await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    let explain = async |name: &str| explain(&agent, "endpoint", name).await;
    let told = explain("shop/orders-1").await;
    assert_eq!(told.verdict, ["alpha, beta have a pod of this name each"]);
    let [ours, theirs] = &told.clusters[..] else { panic!("{told:?}") };
    assert_eq!((ours.outcome.as_str(), theirs.outcome.as_str()), ("chosen", "chosen"));
    let [address] = &theirs.addresses[..] else { panic!("{told:?}") };
    assert_eq!((address.address.as_str(), address.node.as_str()), ("10.2.0.1", "n1"));
    assert_eq!((address.identity.to_string(), address.node_ip.as_str()), (identity, "192.0.2.2"));
    assert_eq!(address.labels, ["k8s:app=orders", "k8s:io.cilium.k8s.policy.cluster=beta"]);
    assert!(address.revision > 0 && address.key == "cilium/state/ip/v1/default/10.2.0.1", "{told:?}");
    assert_eq!(told.installed.iter().filter(|table| table.table == "ipcache").count(), 2);
    let told = explain("shop/nobody").await;
    assert_eq!(told.verdict, ["no cluster has told of an address of pod shop/nobody"]);
    assert!(says(&told.clusters[1], "or its namespace is not global there"), "{told:?}");

    // What of a pod goes wrong, address by address.
    let of_beta = async |name: &str, wanted: &str, why: &str| {
        eventually(why, async || {
            let told = explain(name).await;
            let hit = |address: &ExplainedAddress| {
                address.outcome == wanted && address.why.iter().any(|sentence| sentence.contains(why))
            };
            told.clusters[1].addresses.iter().any(hit)
        })
        .await;
    };
    let mut stray = beta.ip(1);
    stray.host_ip = alpha.ip(1).host_ip;
    beta.publish(&stray).await;
    of_beta("shop/orders-1", "chosen", "the cluster has no such node").await;
    let mut thief = alpha.ip(1);
    thief.pod_name = "thief".into();
    beta.publish(&thief).await;
    of_beta("shop/thief", "refused", "identity_out_of_range").await;
    thief.identity = beta.ip(1).identity;
    beta.publish(&thief).await;
    of_beta("shop/thief", "not-chosen", "the address is alpha's").await;
    of_beta("shop/thief", "not-chosen", "alpha says that the same address is its own").await;

    // A namespace that alpha keeps to itself.
    alpha.delete(&alpha.ip(2)).await;
    let key = data_prefix(Kind::LocalIp, &alpha.name, Layout::State) + &alpha.ip(2).suffix();
    alpha.put(key, alpha.ip(2).encode()).await;
    eventually("it is private", async || {
        let told = explain("shop/orders-2").await;
        let address = told.clusters[0].addresses.first();
        address.is_some_and(|address| {
            let why = address.why.iter().any(|sentence| sentence.contains("its namespace is not global"));
            address.private && address.outcome == "chosen" && why
        })
    })
    .await;

    // An etcd that is gone cannot be searched.
    drop(beta);
    eventually("beta is away", async || !agent.status().await.remotes[0].connected).await;
    let told = explain("shop/orders-1").await;
    assert!(says(&told.clusters[1], "could be searched: its etcd is not connected"), "{told:?}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_in_use_are_counted_in_both_families_and_a_private_namespace_is_told() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    let mut local = alpha.local_service(&[1, 2]);
    let http = local.frontends[&"10.96.0.10".parse().unwrap()].clone();
    local.frontends.insert("fd00:96::10".parse().unwrap(), http.clone());
    alpha.publish_all().await;
    alpha.publish(&local).await;
    let mut remote = beta.service(&[1, 2]);
    let http = remote.backends.iter().next().unwrap().1.clone();
    remote.backends =
        [(beta.pod(1), http.clone()), (beta.pod(2), http.clone()), ("fd00:2::1".parse().unwrap(), http)]
            .into_iter()
            .collect();
    let mut node = beta.node();
    node.ipv6_alloc_cidr = Some("fd00:2::/64".parse().unwrap());
    beta.publish_all().await;
    beta.publish(&node).await;
    beta.publish(&remote).await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    eventually("beta is known", async || agent.status().await.remotes.iter().any(|peer| peer.ready)).await;
    eventually("both families are in use", async || {
        let told = explain(&agent, "service", "shop/orders").await;
        says(&told.clusters[1], "3 backends, 3 in use (2 IPv4, 1 IPv6)")
            && says(&told.clusters[0], "2 backends, 2 in use")
    })
    .await;
    local.global = false;
    local.private = true;
    alpha.publish(&local).await;
    eventually("its namespace is private", async || {
        let told = explain(&agent, "service", "shop/orders").await;
        says(&told.clusters[0], "its namespace is not global")
            && says(&told.clusters[1], "not used: the namespace is not global in this cluster")
    })
    .await;
    agent.stop().await;
}
