//! What an exporter states, compared with what the agent holds.

use clustermesh_agent_api::v1::KindStatus;
use clustermesh_kvstore::digest::SourceTime;
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::publisher::{Origin, OwnedPrefix, Publisher, PublisherSpec};
use clustermesh_kvstore::record::{IpRecord, Record as _};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions};

use crate::support::{Agent, Cluster, eventually};

async fn ip_kind(agent: &Agent) -> KindStatus {
    let status = agent.status().await;
    let kinds = status.remotes.first().map(|beta| &*beta.kinds).unwrap_or_default();
    kinds.iter().find(|kind| kind.kind == "ip").cloned().unwrap_or_default()
}

async fn verdict(agent: &Agent) -> String {
    ip_kind(agent).await.digest.unwrap().verdict
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_is_compared_with_what_is_stated_refused_records_included() {
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.publish_all().await;
    beta.publish_all().await;
    let agent = Agent::start(&alpha).await;
    agent.connect(&beta);
    eventually("beta's addresses", async || ip_kind(&agent).await.synced).await;
    // beta states nothing, so it is counted.
    eventually("counted", async || verdict(&agent).await == "in-sync").await;

    let name = "beta".parse().unwrap();
    let prefix = data_prefix(Kind::Ip, &name, Layout::State);
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("etcd.yaml");
    std::fs::write(&config, beta.yaml()).unwrap();
    let (connection, _) = Connection::spawn(config, ConnectionOptions::default());
    let owned = vec![OwnedPrefix::of_kind(Kind::Ip, &name, Layout::State)];
    let spec = PublisherSpec { owned, heartbeat: None, ..PublisherSpec::default() };
    let exporter = Publisher::spawn(connection, spec);
    let set = |record: &IpRecord, value: Vec<u8>| {
        exporter.set_from(
            prefix.clone() + &record.suffix(),
            Some(value.into()),
            Origin::Event(SourceTime::now()),
        );
    };
    for pod in 1..=2 {
        set(&beta.ip(pod), beta.ip(pod).encode());
    }
    // Two that no agent takes: one new, and one in place of an address that is held.
    set(&beta.ip(7), b"{}".to_vec());
    exporter.initial_done(&prefix);
    eventually("stated, and the same", async || {
        let digest = ip_kind(&agent).await.digest.unwrap();
        digest.verdict == "in-sync" && !digest.stated.is_empty()
    })
    .await;
    set(&beta.ip(2), b"nonsense".to_vec());
    set(&beta.ip(3), beta.ip(3).encode());
    eventually("a trace", async || ip_kind(&agent).await.propagation.is_some_and(|times| times.count > 0))
        .await;
    // A verdict is a moment old: what is held may have changed since.
    eventually("the same again", async || {
        let digest = ip_kind(&agent).await.digest.unwrap();
        digest.verdict == "in-sync" && digest.held == digest.stated
    })
    .await;
    let kind = ip_kind(&agent).await;
    let digest = kind.digest.unwrap();
    assert_eq!((digest.source_mismatches, digest.state_mismatches), (0, 0));
    assert!(kind.propagation.unwrap().p99_seconds < 60.0);
    exporter.shutdown().await;
    agent.stop().await;
}
