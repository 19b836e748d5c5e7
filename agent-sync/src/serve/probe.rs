//! Tries an etcd from this node, as `clustermesh connect` asks before it stores anything.

use std::time::{Duration, Instant};

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::etcd::{EtcdConfig, KeyRange, Session, SessionError, SessionOptions};
use clustermesh_kvstore::key::{Kind, Layout, cluster_config_key, data_prefix};
use clustermesh_kvstore::record::{ClusterConfig, Node, Record as _};
use tokio::time::timeout;

/// If the caller does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Whatever the caller says.
const MAX_TIMEOUT: Duration = Duration::from_secs(60);
const PAGE: i64 = 256;

/// Reads the cluster config and the pod CIDRs of a cluster. What fails stands in the answer's `error`,
/// as one sentence that says what to do.
pub(super) async fn probe(request: v1::ProbePeerRequest, max: MaxConnectedClusters) -> v1::ProbePeerResponse {
    let limit = match request.timeout_ms {
        0 => DEFAULT_TIMEOUT,
        ms => Duration::from_millis(ms.into()).min(MAX_TIMEOUT),
    };
    let outcome = timeout(limit, try_probe(&request, max, limit)).await.unwrap_or_else(|_| {
        Err(text(format!(
            "{} did not answer within {limit:?}: check that its etcd is reachable from this node (address, port, firewall)",
            request.cluster_name
        )))
    });
    outcome.unwrap_or_else(|Failure { error, not_permitted }| v1::ProbePeerResponse {
        error,
        not_permitted,
        ..v1::ProbePeerResponse::default()
    })
}

/// Why a peer could not be read.
struct Failure {
    error: String,
    /// It may be soon, if its users are just being changed.
    not_permitted: bool,
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        let not_permitted = matches!(error, SessionError::PermissionDenied { .. });
        Self { error: error.to_string(), not_permitted }
    }
}

async fn try_probe(
    request: &v1::ProbePeerRequest,
    max: MaxConnectedClusters,
    limit: Duration,
) -> Result<v1::ProbePeerResponse, Failure> {
    let name: ClusterName = request.cluster_name.parse().map_err(text)?;
    let config = EtcdConfig::parse(&request.etcd_config).map_err(text)?;
    let options = SessionOptions { connect_timeout: limit, call_timeout: limit, ..SessionOptions::default() };
    let session = Session::connect(&config, options).await?;
    let asked = Instant::now();
    let found = session.get(&cluster_config_key(&name)).await?;
    let round_trip = asked.elapsed();
    let found = found.ok_or_else(|| {
        text(format!(
            "{} is an etcd, but not that of cluster {name}: check the cluster's name, and that its apiserver is running",
            session.endpoint()
        ))
    })?;
    let cluster = ClusterConfig::decode(&found.value)
        .map_err(|error| text(format!("the cluster config of {name} is broken: {error}")))?;
    ClusterId::new(cluster.id, max).map_err(|error| text(format!("cluster {name}: {error}")))?;
    let layout = if cluster.cached { Layout::Cache } else { Layout::State };
    let pod_cidrs = pod_cidrs(&session, &data_prefix(Kind::Nodes, &name, layout)).await?;
    Ok(v1::ProbePeerResponse {
        error: String::new(),
        cluster_id: cluster.id,
        max_connected_clusters: cluster.max_connected_clusters.unwrap_or(0),
        pod_cidrs,
        cached: cluster.cached,
        round_trip_us: u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX),
        etcd_version: session.version().unwrap_or_default().to_owned(),
        not_permitted: false,
    })
}

/// Pod CIDRs of all nodes; nodes that cannot be read have none.
async fn pod_cidrs(session: &Session, prefix: &str) -> Result<Vec<String>, Failure> {
    let range = KeyRange::of(prefix);
    let mut cidrs = Vec::new();
    let (mut after, mut revision): (Option<Vec<u8>>, i64) = (None, 0);
    loop {
        let page = session.list_page(&range, after.as_deref(), PAGE, revision).await?;
        for kv in &page.kvs {
            let node = range.suffix(&kv.key).and_then(|suffix| Node::decode(suffix, &kv.value).ok());
            cidrs.extend(node.iter().flat_map(Node::pod_cidrs).map(|cidr| cidr.to_string()));
        }
        match page.kvs.last() {
            Some(last) if page.more => (after, revision) = (Some(last.key.clone()), page.revision),
            _ => return Ok(cidrs),
        }
    }
}

fn text(error: impl std::fmt::Display) -> Failure {
    Failure { error: error.to_string(), not_permitted: false }
}
