//! The operator's import policy, changed while the agent runs.

use std::time::Duration;

use clustermesh_agent_api::v1::{CheckPolicyRequest, CheckedCluster, KindStatus, StatusResponse};
use tokio::time::{Instant, sleep};

use crate::support::{Agent, Cluster, eventually};

fn kind<'a>(status: &'a StatusResponse, kind: &str) -> &'a KindStatus {
    status.remotes[0].kinds.iter().find(|view| view.kind == kind).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tightened_policy_removes_and_a_loosened_one_admits() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;

    agent.allow("clusters: {beta: {services: {deny: ['shop/*']}, pod-cidrs: [10.2.0.0/24]}}");
    agent.waits_for_groups(&[("1", "2")]).await;
    let status = agent.status().await;
    let services = kind(&status, "services");
    assert_eq!((services.records, services.refused_by_reason["service_not_allowed"]), (0, 1));
    assert_eq!(
        (services.newest_refused[0].key.as_str(), services.newest_refused[0].audited),
        ("shop/orders", false)
    );
    assert_eq!(agent.dump("ipcache").await.len(), 4, "only what is refused goes");

    // Whatever is valid under both stays while the cluster is told again.
    agent.allow("clusters: {beta: {mode: audit, services: {deny: ['shop/*']}}}");
    let watched = Instant::now();
    while agent.groups().await.len() < 2 {
        assert_eq!(agent.dump("ipcache").await.len(), 4);
        assert!(watched.elapsed() < crate::support::DEADLINE, "not admitted");
        sleep(Duration::from_millis(5)).await;
    }
    let status = agent.status().await;
    assert_eq!(kind(&status, "services").audited_by_reason["service_not_allowed"], 1);

    // A mistake in the file changes nothing, and shows.
    agent.allow("clusters: {beta: {service: {}}}");
    eventually("the mistake shows", async || {
        agent.status().await.import_policy_error.contains("did you mean services?")
    })
    .await;
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    agent.allow("");
    eventually("it is over", async || agent.status().await.import_policy_error.is_empty()).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_becomes_forbidden_takes_the_one_before_with_it() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.allow("clusters: {beta: {max-backends: 2, quotas: {ip: 2}}}");
    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    beta.publish(&beta.ip(3)).await;
    beta.publish(&beta.service(&[1, 2, 3])).await;
    agent.waits_for_groups(&[("1", "2")]).await;
    eventually("the third address is refused", async || {
        kind(&agent.status().await, "ip").refused_by_reason.contains_key("quota_exceeded")
    })
    .await;
    assert_eq!(agent.dump("ipcache").await.len(), 4);
    beta.publish(&beta.service(&[3])).await;
    agent.waits_for_groups(&[("1", "2"), ("2", "1")]).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_names_a_node_of_its_own_cluster_or_none() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    let tunnel = async |pod: u8| {
        let rows = agent.dump("ipcache").await;
        let row = rows.into_iter().find(|row| row["address"] == beta.pod(pod).to_string());
        row.map(|row| row["tunnel_endpoint"].clone())
    };
    eventually("it is known", async || tunnel(1).await.as_deref() == Some("192.0.2.2")).await;
    // It names a node of alpha.
    let mut stray = beta.ip(1);
    stray.host_ip = alpha.ip(1).host_ip;
    beta.publish(&stray).await;
    eventually("its prefix decides", async || tunnel(1).await.as_deref() == Some("0.0.0.0")).await;
    assert_eq!(kind(&agent.status().await, "ip").misplaced, 1);

    // Its node goes, and comes back.
    beta.delete(&beta.node()).await;
    eventually("no node of beta", async || tunnel(2).await.as_deref() == Some("0.0.0.0")).await;
    beta.publish(&beta.node()).await;
    eventually("it is back", async || tunnel(2).await.as_deref() == Some("192.0.2.2")).await;

    // Beyond its own nodes' prefixes there is nothing of it.
    agent.allow("clusters: {beta: {pod-cidrs: nodes}}");
    beta.delete(&beta.node()).await;
    eventually("none is left", async || tunnel(2).await.is_none() && agent.groups().await.len() == 1).await;
    beta.publish(&beta.node()).await;
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_holder_of_a_prefix_keeps_it_until_it_lets_go() {
    let clusters =
        tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2), Cluster::start("gamma", 3));
    let (alpha, beta, gamma) = clusters;
    alpha.publish_all().await;
    beta.publish_all().await;
    gamma.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    // gamma claims beta's prefix, and backends in it.
    let mut node = gamma.node();
    node.ipv4_alloc_cidr = beta.node().ipv4_alloc_cidr;
    gamma.publish(&node).await;
    let mut service = gamma.service(&[]);
    service.backends = beta.service(&[7, 8]).backends;
    gamma.publish(&service).await;
    agent.connect(&gamma);
    eventually("the conflict shows", async || {
        let status = agent.status().await;
        let shown: Vec<_> = status
            .conflicts
            .iter()
            .map(|c| (c.cluster.as_str(), c.claim.as_str(), c.holder.as_str()))
            .collect();
        let claims = ["10.2.0.0/24", "10.2.0.7", "10.2.0.8"];
        shown == claims.map(|claim| ("gamma", claim, "beta")) && status.backend_conflicts == 2
    })
    .await;
    assert!(!agent.groups().await.contains_key("3"));

    agent.disconnect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("3", "2")]).await;
    assert!(agent.status().await.conflicts.is_empty());
    let holder = agent.dump("prefix").await.into_iter().find(|row| row["prefix"] == "10.2.0.0/24");
    assert_eq!(holder.unwrap()["cluster"], "3");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_policy_is_tried_without_being_in_force() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.allow("clusters: {beta: {services: {deny: ['shop/*']}}}");
    agent.connect(&beta);
    eventually("beta is known", async || {
        let status = agent.status().await;
        status.remotes.first().is_some_and(|beta| beta.ready && beta.kinds.iter().any(|k| k.refused == 1))
    })
    .await;
    let check = async |policy: &str, clusters: &[&str]| {
        let clusters = clusters.iter().map(|name| (*name).to_owned()).collect();
        agent.client().await.check_policy(CheckPolicyRequest { policy: policy.into(), clusters }).await
    };
    let changes = |cluster: &CheckedCluster| -> Vec<(String, String, String, u64)> {
        let kinds = cluster.kinds.iter();
        kinds
            .flat_map(|kind| kind.changes.iter().map(move |change| (kind, change)))
            .map(|(kind, c)| (kind.kind.clone(), c.change.clone(), c.reason.clone(), c.count))
            .collect()
    };
    let is = |kind: &str, change: &str, reason: &str, count| {
        (kind.to_owned(), change.to_owned(), reason.to_owned(), count)
    };
    let told = check("clusters: {beta: {pod-cidrs: [10.2.0.1/32, 10.2.0.0/24], quotas: {ip: 1}}}", &[]).await;
    let told = told.unwrap().into_inner();
    let [beta_told] = &told.clusters[..] else { panic!("{told:?}") };
    assert_eq!(
        changes(beta_told),
        [is("ip", "refused", "quota_exceeded", 1), is("services", "admitted", "service_not_allowed", 1)]
    );
    let ip = beta_told.kinds.iter().find(|kind| kind.kind == "ip").unwrap();
    assert_eq!((ip.records, ip.let_in, ip.would_let_in), (2, 2, 1));
    assert_eq!(ip.changes[0].samples[0].key, "10.2.0.2");
    // It was not in force for a moment.
    let status = agent.status().await;
    assert_eq!((kind(&status, "ip").refused, kind(&status, "services").refused), (0, 1));
    assert_eq!(agent.dump("ipcache").await.len(), 4);

    let error = check("clusters: {beta: {pods: any}}", &[]).await.unwrap_err();
    assert!(error.message().contains("line 1"), "{error}");
    let error = check("", &["gamma"]).await.unwrap_err();
    assert!(error.message().contains("no remote cluster of alpha"), "{error}");
    drop(beta);
    eventually("beta is away", async || !agent.status().await.remotes[0].connected).await;
    let told = check("", &["beta"]).await.unwrap().into_inner();
    assert_eq!(told.clusters[0].error, "its etcd is not connected");
    agent.stop().await;
}
