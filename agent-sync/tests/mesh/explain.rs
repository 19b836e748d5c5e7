//! Why things are as they are, as the command line asks.

use clustermesh_agent_api::v1::{ExplainRequest, ExplainResponse, ExplainedPart};

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
