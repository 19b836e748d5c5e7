//! The sum of what agents say; plain code. Serialises to the JSON of `status -o json`.
//!
//! Names of fields are the agent API's. Nothing in there is a secret: agents never tell keys or
//! certificates.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use clustermesh_agent_api::v1::{Peer, StatusResponse};
use clustermesh_kvstore::cluster::ClusterName;
use serde::Serialize;

use crate::context::Context;
use crate::mesh::entry;
use crate::mesh::mirror::Mirror;
use crate::mesh::terminal::one_line;

/// All clusters that were asked for.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) clusters: Vec<ClusterReport>,
}

/// One cluster.
#[derive(Debug, Serialize)]
pub(crate) struct ClusterReport {
    pub(crate) name: String,
    pub(crate) id: u32,
    pub(crate) connectivity: Connectivity,
    pub(crate) agents: Vec<AgentReport>,
    /// What the mirror says that they follow; none if there is none, or it cannot be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kvstoremesh: Option<MirrorReport>,
}

/// A mirror's answer, or why there is none.
#[derive(Debug, Serialize)]
pub(crate) struct MirrorReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<Mirror>,
}

/// One agent's answer, or why there is none.
#[derive(Debug, Serialize)]
pub(crate) struct AgentReport {
    pub(crate) node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<StatusResponse>,
}

/// How far the nodes of a cluster are connected.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Connectivity {
    /// Nodes.
    pub(crate) total: usize,
    /// Nodes that are not connected to all clusters, or not ready themselves.
    pub(crate) not_ready: usize,
    /// Ready remote clusters per node.
    pub(crate) connected: Spread,
    /// Global services per node.
    pub(crate) global_services: Spread,
    /// By remote cluster.
    pub(crate) clusters: BTreeMap<String, Counts>,
    pub(crate) errors: Vec<AgentError>,
}

/// Smallest, mean and largest value over nodes.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: u64,
    pub(crate) avg: f64,
    pub(crate) max: u64,
}

/// Nodes for which a remote cluster is configured, and those that are connected and synced.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counts {
    pub(crate) id: u32,
    pub(crate) configured: usize,
    pub(crate) connected: usize,
}

/// One thing that is wrong at one node.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct AgentError {
    pub(crate) node: String,
    /// The remote cluster; `None` if it is about the node itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cluster: Option<String>,
    pub(crate) error: String,
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cluster {
            Some(cluster) => write!(f, "is not connected to cluster {cluster}: {}", self.error),
            None => f.write_str(&self.error),
        }
    }
}

impl Report {
    /// One line for each agent or mirror that could not be asked.
    pub(crate) fn unreachable(&self) -> Vec<String> {
        let agents = self.clusters.iter().flat_map(|c| c.agents.iter().map(move |a| (c, a)));
        let agents =
            agents.filter_map(|(c, a)| Some(format!("{}/{}: {}", c.name, a.node, a.error.as_ref()?)));
        let mirrors =
            self.clusters.iter().filter_map(|c| Some((&c.name, c.kvstoremesh.as_ref()?.error.as_ref()?)));
        agents.chain(mirrors.map(|(name, error)| format!("{name}: {error}"))).collect()
    }
}

impl ClusterReport {
    /// Sums up `statuses`, which are in the order of the context's agents.
    pub(crate) fn new(context: &Context, statuses: Vec<Result<StatusResponse, String>>) -> Self {
        let agents: Vec<_> = context
            .agents
            .iter()
            .zip(statuses)
            .map(|(agent, status)| {
                let (status, error) = match status {
                    Ok(status) => (Some(status), None),
                    Err(error) => (None, Some(error)),
                };
                AgentReport { node: agent.node.clone(), error, status }
            })
            .collect();
        Self {
            name: context.cluster.to_string(),
            id: context.id,
            connectivity: Connectivity::of(&agents, entry::peers(context)),
            agents,
            kvstoremesh: None,
        }
    }

    /// With what its mirror answered.
    pub(crate) fn with_mirror(self, answer: Option<Result<Mirror, String>>) -> Self {
        let report = |answer| match answer {
            Ok(status) => MirrorReport { error: None, status: Some(status) },
            Err(error) => MirrorReport { error: Some(error), status: None },
        };
        Self { kvstoremesh: answer.map(report), ..self }
    }
}

impl Connectivity {
    /// `configured`: the remote clusters that stand in the agents' directory.
    fn of(agents: &[AgentReport], configured: BTreeSet<ClusterName>) -> Self {
        let answers = || agents.iter().filter_map(|agent| agent.status.as_ref());
        let mut clusters: BTreeMap<String, Counts> =
            configured.into_iter().map(|name| (name.to_string(), Counts::default())).collect();
        for peer in answers().flat_map(|status| &status.remotes) {
            let counts = clusters.entry(peer.name.clone()).or_default();
            counts.id = counts.id.max(peer.cluster_id);
            counts.configured += 1;
            counts.connected += usize::from(peer.ready);
        }
        // What one agent knows all have to know, since they read the same directory; and what stands there
        // counts even if no agent has seen it yet, or waiting would end before it began.
        let expected: BTreeSet<&str> = clusters.keys().map(String::as_str).collect();
        let errors: Vec<_> = agents.iter().flat_map(|agent| errors_of(agent, &expected)).collect();
        let faulty: BTreeSet<_> = errors.iter().map(|error| error.node.as_str()).collect();
        let ready_remotes = |agent: &AgentReport| {
            let remotes = agent.status.iter().flat_map(|status| &status.remotes);
            remotes.filter(|peer| peer.ready).count() as u64
        };
        Self {
            total: agents.len(),
            not_ready: faulty.len(),
            connected: Spread::of(agents.iter().map(ready_remotes)),
            global_services: Spread::of(
                answers().map(|status| status.local.as_ref().map_or(0, |local| local.global_services)),
            ),
            clusters,
            errors,
        }
    }
}

impl Spread {
    fn of(values: impl Iterator<Item = u64>) -> Self {
        let (mut min, mut max, mut sum, mut n) = (u64::MAX, 0, 0, 0);
        for value in values {
            (min, max, sum, n) = (min.min(value), max.max(value), sum + value, n + 1);
        }
        if n == 0 {
            return Self::default();
        }
        #[allow(clippy::cast_precision_loss)] // Shown with one decimal.
        Self { min, max, avg: sum as f64 / f64::from(n) }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[min:{} / avg:{:.1} / max:{}]", self.min, self.avg, self.max)
    }
}

fn errors_of(agent: &AgentReport, expected: &BTreeSet<&str>) -> Vec<AgentError> {
    let error = |cluster: Option<&str>, error: String| AgentError {
        node: agent.node.clone(),
        cluster: cluster.map(Into::into),
        error,
    };
    let Some(status) = &agent.status else {
        return vec![error(None, agent.error.clone().unwrap_or_default())];
    };
    let mut errors: Vec<_> = why_agent_not_ready(status).map(|why| error(None, why)).into_iter().collect();
    for name in expected {
        match status.remotes.iter().find(|peer| peer.name == *name) {
            None => errors.push(error(Some(name), "it has not read the configuration yet".into())),
            Some(peer) if !peer.ready => errors.push(error(Some(name), why_not_ready(peer))),
            Some(_) => {}
        }
    }
    errors
}

/// Why an agent is not ready itself, whatever it is connected to; `None` if it is.
pub(crate) fn why_agent_not_ready(status: &StatusResponse) -> Option<String> {
    if status.ready {
        return None;
    }
    Some(match &status.own {
        Some(own) if !own.ready => format!("its own cluster is not synced: {}", why_not_ready(own)),
        _ if !status.datapath_error.is_empty() => {
            format!("its datapath fails: {}", one_line(&status.datapath_error))
        }
        _ => format!("its datapath is not up to date: {} changes pending", status.pending_changes),
    })
}

/// Why a peer is not ready, in the order in which a connection comes up.
pub(crate) fn why_not_ready(peer: &Peer) -> String {
    let or_last_error = |otherwise: &str| match peer.last_error.as_str() {
        "" => otherwise.to_string(),
        error => one_line(error),
    };
    if !peer.connected {
        return or_last_error("not connected to its etcd");
    }
    if !peer.config_retrieved {
        return or_last_error("its cluster configuration was not read yet");
    }
    let syncing: Vec<_> =
        peer.kinds.iter().filter(|kind| !kind.synced).map(|kind| kind.kind.as_str()).collect();
    if syncing.is_empty() {
        return or_last_error("not ready");
    }
    format!("synchronization in progress for {}", syncing.join(", "))
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
