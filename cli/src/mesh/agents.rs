//! Asking agents: every call has a deadline, and a failure is one line that says what to look at.

use std::error::Error;
use std::time::Duration;

use clustermesh_agent_api::Client;
use clustermesh_agent_api::v1::{
    CheckPolicyRequest, CheckPolicyResponse, DumpTableRequest, DumpTableRow, ExplainRequest, ExplainResponse,
    ObserveRequest, ObserveResponse, ProbePeerRequest, ProbePeerResponse, RotateKeyRequest, StatusRequest,
    StatusResponse,
};
use futures::future::join_all;
use ipnet::IpNet;
use tokio::time::{Instant, sleep, timeout};

use super::terminal::one_line;
use crate::context::{Agent, Context};

/// An agent answers from memory; one that takes longer is stuck.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an agent may try another cluster's etcd.
const PROBE: Duration = Duration::from_secs(10);
/// How long an exporter may take to let in a cluster that its users file lists since a moment.
const ADMISSION: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(50);
/// Lists of all clusters' records, of which an agent reads several at a time.
const LISTS: Duration = Duration::from_secs(120);
/// New devices and all their peers come first.
const ROTATION: Duration = Duration::from_secs(60);
/// A table may have a million rows.
const DUMP: Duration = Duration::from_secs(60);

/// The status of all agents of `context`, asked at the same time, in the context's order.
pub(crate) async fn statuses(context: &Context) -> Vec<Result<StatusResponse, String>> {
    join_all(context.agents.iter().map(|agent| status(agent, false))).await
}

/// The same with the keys that were refused lately.
pub(crate) async fn statuses_with_refused(context: &Context) -> Vec<Result<StatusResponse, String>> {
    join_all(context.agents.iter().map(|agent| status(agent, true))).await
}

/// Lets `agent`, one of `context`, try the etcd of `peer` without storing anything. With a peer that has
/// just been told to let the cluster in, a refusal is tried again for a while.
pub(crate) async fn probe(
    agent: &Agent,
    context: &Context,
    peer: &Context,
) -> Result<ProbePeerResponse, String> {
    let request = ProbePeerRequest {
        cluster_name: peer.cluster.to_string(),
        etcd_config: context.access_to(peer).to_yaml(),
        timeout_ms: u32::try_from(PROBE.as_millis()).unwrap_or(u32::MAX),
    };
    // The agent keeps to the timeout; ours is for an agent that does not.
    let mut client = client(agent).await?;
    let give_up = Instant::now() + if peer.users.is_some() { ADMISSION } else { Duration::ZERO };
    loop {
        let response = within(PROBE + ANSWER, client.probe_peer(request.clone())).await?;
        match response.error.is_empty() {
            true => return Ok(response),
            false if response.not_permitted && Instant::now() < give_up => sleep(AGAIN).await,
            false => return Err(one_line(&response.error)),
        }
    }
}

/// Why something is as it is, as `agent` sees it.
pub(crate) async fn explain(agent: &Agent, kind: &str, name: &str) -> Result<ExplainResponse, String> {
    let mut client = client(agent).await?;
    // It reads the etcds of other clusters, each with a limit of its own; a pod is searched for in lists.
    within(
        if kind == "endpoint" { LISTS } else { PROBE },
        client.explain(ExplainRequest { kind: kind.into(), name: name.into() }),
    )
    .await
}

/// What the policy of this text would do to what remote clusters tell `agent`; `clusters` empty: of all.
pub(crate) async fn check_policy(
    agent: &Agent,
    policy: &str,
    clusters: &[String],
) -> Result<CheckPolicyResponse, String> {
    let mut client = client(agent).await?;
    let request = CheckPolicyRequest { policy: policy.into(), clusters: clusters.to_vec() };
    within(LISTS, client.check_policy(request)).await
}

/// All rows of one table of `agent`.
pub(crate) async fn dump(agent: &Agent, table: &str) -> Result<Vec<DumpTableRow>, String> {
    let mut client = client(agent).await?;
    let mut stream = within(ANSWER, client.dump_table(DumpTableRequest { table: table.into() })).await?;
    within(DUMP, async {
        let mut rows = Vec::new();
        while let Some(row) = stream.message().await? {
            rows.push(row);
        }
        Ok(tonic::Response::new(rows))
    })
    .await
}

/// Pod CIDRs of all clusters that `agent` knows, with the IDs of the clusters.
pub(crate) async fn known_cidrs(agent: &Agent) -> Result<Vec<(u32, IpNet)>, String> {
    let rows = dump(agent, "prefix").await?;
    let column = |row: &DumpTableRow, name| {
        row.columns.iter().find(|column| column.name == name).map(|column| column.value.clone())
    };
    let known = |row| Some((column(row, "cluster")?.parse().ok()?, column(row, "prefix")?.parse().ok()?));
    Ok(rows.iter().filter_map(known).collect())
}

/// Flows of `agent`, one after the other; each may take as long as it likes.
pub(crate) async fn observe(
    agent: &Agent,
    request: ObserveRequest,
) -> Result<tonic::Streaming<ObserveResponse>, String> {
    let mut client = client(agent).await?;
    within(ANSWER, client.observe(request)).await
}

/// Has the key of `agent`'s node replaced, and returns the new one's public part.
pub(crate) async fn rotate_key(agent: &Agent) -> Result<Vec<String>, String> {
    let mut client = client(agent).await?;
    let new = within(ROTATION, client.rotate_key(RotateKeyRequest {})).await?;
    // A version that had WireGuard only says one.
    Ok(if new.public_keys.is_empty() { vec![new.public_key] } else { new.public_keys })
}

/// What an agent says when it cannot do something.
pub(crate) fn failure(status: &tonic::Status) -> String {
    one_line(match status.message() {
        "" => status.code().description(),
        message => message,
    })
}

async fn status(agent: &Agent, with_refused: bool) -> Result<StatusResponse, String> {
    let mut client = client(agent).await?;
    within(ANSWER, client.status(StatusRequest { with_refused })).await
}

async fn client(agent: &Agent) -> Result<Client, String> {
    let socket = agent.socket.display();
    match timeout(ANSWER, clustermesh_agent_api::connect(&agent.socket)).await {
        Ok(Ok(client)) => Ok(client),
        Ok(Err(error)) => Err(format!("cannot reach its agent at {socket}: {}", root_cause(&error))),
        Err(_) => Err(format!("its agent at {socket} does not answer within {} s", ANSWER.as_secs())),
    }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failure(&status)),
        Err(_) => Err(format!("its agent does not answer within {} s", limit.as_secs())),
    }
}

/// tonic says "transport error"; what happened stands at the end of the chain.
fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    one_line(&cause.to_string())
}
