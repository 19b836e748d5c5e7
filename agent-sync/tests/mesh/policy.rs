//! The operator's import policy, changed while the agent runs.

use std::time::Duration;

use clustermesh_agent_api::v1::{KindStatus, StatusResponse};
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
        shown == [("gamma", "10.2.0.0/24", "beta")] && status.backend_conflicts == 2
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
