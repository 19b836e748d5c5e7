use clustermesh_agent_api::v1::{KindStatus, LocalCounts};

use super::*;

fn peer(name: &str, ready: bool) -> Peer {
    Peer {
        name: name.into(),
        cluster_id: 2,
        connected: true,
        config_retrieved: true,
        ready,
        ..Default::default()
    }
}

fn agent(node: &str, remotes: Vec<Peer>) -> AgentReport {
    let global = remotes.len() as u64;
    let status = StatusResponse {
        ready: true,
        own: Some(peer("alpha", true)),
        remotes,
        local: Some(LocalCounts { global_services: global, ..Default::default() }),
        ..Default::default()
    };
    AgentReport { node: node.into(), error: None, status: Some(status) }
}

fn none() -> BTreeSet<ClusterName> {
    BTreeSet::new()
}

fn texts(found: &Connectivity) -> Vec<String> {
    found.errors.iter().map(|error| format!("{} {error}", error.node)).collect()
}

#[test]
fn all_connected() {
    let found = Connectivity::of(&["n1", "n2"].map(|node| agent(node, vec![peer("beta", true)])), none());
    assert_eq!((found.total, found.not_ready), (2, 0));
    assert_eq!(found.connected.to_string(), "[min:1 / avg:1.0 / max:1]");
    assert_eq!(found.clusters["beta"], Counts { id: 2, configured: 2, connected: 2 });
    assert!(found.errors.is_empty());
}

#[test]
fn an_agent_that_lacks_a_cluster_is_not_ready() {
    let found = Connectivity::of(&[agent("n1", vec![peer("beta", true)]), agent("n2", vec![])], none());
    assert_eq!(found.not_ready, 1);
    assert_eq!(found.connected, Spread { min: 0, avg: 0.5, max: 1 });
    assert_eq!(found.clusters["beta"], Counts { id: 2, configured: 1, connected: 1 });
    assert_eq!(texts(&found), ["n2 is not connected to cluster beta: it has not read the configuration yet"]);
}

/// Right after `connect`, before any agent has read the new entry.
#[test]
fn a_cluster_that_no_agent_has_seen_yet_is_waited_for() {
    let found = Connectivity::of(&[agent("n1", vec![])], ["beta".parse().unwrap()].into());
    assert_eq!(found.not_ready, 1);
    assert_eq!(found.clusters["beta"], Counts::default());
    assert_eq!(texts(&found), ["n1 is not connected to cluster beta: it has not read the configuration yet"]);
}

#[test]
fn an_agent_that_does_not_answer_counts() {
    let silent = AgentReport { node: "n2".into(), error: Some("connection refused".into()), status: None };
    let found = Connectivity::of(&[agent("n1", vec![peer("beta", true)]), silent], none());
    assert_eq!((found.total, found.not_ready), (2, 1));
    assert_eq!(texts(&found), ["n2 connection refused"]);
    assert_eq!(found.global_services, Spread { min: 1, avg: 1.0, max: 1 }, "of those that answer");
}

#[test]
fn an_agent_that_is_not_ready_itself_says_why() {
    let mut unsynced = agent("n1", vec![]);
    let mut own = peer("alpha", false);
    own.connected = false;
    own.last_error = "connection\nrefused".into();
    unsynced.status.as_mut().unwrap().ready = false;
    unsynced.status.as_mut().unwrap().own = Some(own);
    let mut broken = agent("n2", vec![]);
    broken.status.as_mut().unwrap().ready = false;
    broken.status.as_mut().unwrap().datapath_error = "cm_ipcache is full".into();
    assert_eq!(
        texts(&Connectivity::of(&[unsynced, broken], none())),
        ["n1 its own cluster is not synced: connection refused", "n2 its datapath fails: cm_ipcache is full"]
    );
}

#[test]
fn reasons_follow_the_order_in_which_a_connection_comes_up() {
    let mut remote = peer("beta", false);
    assert_eq!(why_not_ready(&remote), "not ready");
    remote.kinds = [("ip", false), ("nodes", true), ("services", false)]
        .map(|(kind, synced)| KindStatus { kind: kind.into(), synced, ..Default::default() })
        .into();
    // An old error says nothing about what it waits for now.
    remote.last_error = "connection refused".into();
    assert_eq!(why_not_ready(&remote), "synchronization in progress for ip, services");
    remote.config_retrieved = false;
    remote.last_error.clear();
    assert_eq!(why_not_ready(&remote), "its cluster configuration was not read yet");
    remote.connected = false;
    assert_eq!(why_not_ready(&remote), "not connected to its etcd");
    remote.last_error = "certificate signed by unknown authority".into();
    assert_eq!(why_not_ready(&remote), "certificate signed by unknown authority");
}
