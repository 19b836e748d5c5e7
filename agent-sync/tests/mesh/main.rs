//! An agent with tables in memory, against real etcds on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

mod digests;
mod explain;
#[path = "../../../kvstore/tests/support/member.rs"]
mod member;
mod policy;
mod support;

use std::time::Duration;

use clustermesh_agent_api::v1;
use support::{Agent, Cluster, eventually};
use tokio::time::{Instant, sleep};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remotes_are_added_followed_and_removed_while_running() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.waits_for_groups(&[("1", "2")]).await;

    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    eventually("beta is ready", || async { agent.status().await.remotes.iter().all(|peer| peer.ready) })
        .await;
    let status = agent.status().await;
    assert!(status.ready);
    assert_eq!(status.remotes.len(), 1);
    assert_eq!((status.remotes[0].cluster_id, status.pending_changes), (2, 0));
    let prefixes: Vec<_> = agent.dump("prefix").await.into_iter().map(|row| row["prefix"].clone()).collect();
    assert_eq!(prefixes, ["10.1.0.0/24", "10.2.0.0/24"]);

    // A pod of beta goes, and later the whole cluster.
    beta.publish(&beta.service(&[2])).await;
    agent.waits_for_groups(&[("1", "2"), ("2", "1")]).await;
    beta.delete(&beta.ip(1)).await;
    eventually("three addresses are left", || async { agent.dump("ipcache").await.len() == 3 }).await;
    agent.disconnect(&beta);
    agent.waits_for_groups(&[("1", "2")]).await;
    eventually("nothing of beta is left", || async {
        let (ips, backends) = (agent.dump("ipcache").await, agent.dump("backend").await);
        let nodes = agent.dump("node").await;
        ips.iter().chain(&backends).chain(&nodes).all(|row| row["cluster"] == "1")
    })
    .await;
    assert!(agent.status().await.remotes.is_empty());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_comes_back_empty_changes_nothing_before_its_canaries() {
    let (alpha, mut beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    let before = agent.dump("slot").await;

    beta.lose();
    eventually("beta is lost", || async { !agent.status().await.remotes[0].connected }).await;
    beta.run().await;
    eventually("beta is back", || async { agent.status().await.remotes[0].connected }).await;
    // Everything but one backend and the canaries is there again.
    beta.publish_config().await;
    beta.publish(&beta.node()).await;
    beta.publish(&beta.service(&[2])).await;
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_millis(500) {
        assert_eq!(agent.dump("slot").await, before, "changed without a canary");
        assert_eq!(agent.dump("ipcache").await.len(), 4);
        sleep(Duration::from_millis(10)).await;
    }
    beta.publish_canaries().await;
    agent.waits_for_groups(&[("1", "2"), ("2", "1")]).await;
    eventually("its addresses are gone", || async { agent.dump("ipcache").await.len() == 2 }).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_went_wrong_before_a_cluster_was_accepted_is_no_error_of_it() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    let error = async || agent.status().await.remotes.into_iter().next().map(|peer| peer.last_error);
    eventually("beta lacks its config", async || error().await.is_some_and(|e| e.contains("no config")))
        .await;
    beta.publish_all().await;
    eventually("beta is ready", async || agent.status().await.remotes[0].ready).await;
    assert_eq!(error().await.as_deref(), Some(""));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_id_has_one_holder_and_bad_records_are_counted() {
    let (alpha, beta, twin) =
        tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 1), Cluster::start("gamma", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    twin.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    agent.connect(&twin);
    agent.waits_for_groups(&[("1", "2"), ("2", "2")]).await;
    eventually("beta is refused", || async {
        let status = agent.status().await;
        let beta = status.remotes.iter().find(|peer| peer.name == "beta");
        beta.is_some_and(|beta| !beta.config_retrieved && beta.last_error.contains("this cluster's own"))
    })
    .await;

    // gamma claims an identity of alpha, and a record that is none.
    let mut stolen = twin.ip(1);
    stolen.identity = alpha.ip(1).identity;
    twin.publish(&stolen).await;
    twin.put("cilium/state/ip/v1/default/10.2.0.9".into(), b"{".to_vec()).await;
    eventually("both are counted", || async {
        let status = agent.status().await;
        let gamma = status.remotes.iter().find(|peer| peer.name == "gamma").unwrap();
        let ip = gamma.kinds.iter().find(|kind| kind.kind == "ip").unwrap();
        ip.refused == 2 && ip.refused_by_reason.contains_key("identity_out_of_range")
    })
    .await;
    // The last good value stays.
    let rows = agent.dump("ipcache").await;
    let row = rows.iter().find(|row| row["address"] == twin.pod(1).to_string()).unwrap();
    assert_eq!(row["identity"], twin.ip(1).identity.to_string());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_is_probed_before_it_is_stored() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    let probe = async |cluster_name: &str, etcd_config: String| {
        let request =
            v1::ProbePeerRequest { cluster_name: cluster_name.into(), etcd_config, timeout_ms: 2000 };
        agent.client().await.probe_peer(request).await.unwrap().into_inner()
    };
    let answer = probe("beta", beta.yaml()).await;
    assert_eq!((answer.error.as_str(), answer.cluster_id), ("", 2));
    assert_eq!(answer.pod_cidrs, ["10.2.0.0/24"]);
    assert!(probe("gamma", beta.yaml()).await.error.contains("not that of cluster gamma"));
    assert!(!probe("beta", "endpoints: [http://127.0.0.1:1]".into()).await.error.is_empty());
    assert!(!probe("beta", "endpoints: 7".into()).await.error.is_empty());
    agent.stop().await;
}
