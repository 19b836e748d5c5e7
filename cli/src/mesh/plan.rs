//! May these two clusters be connected? Facts in, a list of checks out; no I/O.
//!
//! Every rule is a function that looks at the [`Facts`] alone. A rule that lacks a fact (because the
//! one that should tell it did not answer) is [`Outcome::Skipped`]: whatever hid the fact has failed
//! its own check, so a plan with a skipped check is never clear.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clustermesh_agent_api::v1::{ProbePeerResponse, StatusResponse};
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use ipnet::IpNet;
use serde::Serialize;

/// Everything that `connect` has to know about both clusters.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) source: Side,
    pub(crate) destination: Side,
}

/// One of the two clusters.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    /// Name and ID according to its context.
    pub(crate) cluster: ClusterName,
    pub(crate) id: u32,
    /// The directory that its agents read.
    pub(crate) config_dir: PathBuf,
    /// What its agents say.
    pub(crate) agents: Vec<AgentFacts>,
    /// What one of its agents found when it tried the *other* side's etcd; `None` if none could be asked or it was
    /// of no use.
    pub(crate) probe: Option<Probe>,
    /// What it has configured for the other side already.
    pub(crate) entry: EntryState,
    /// By which addresses it knows, or is to know, the other side's pods.
    pub(crate) virtual_cidrs: VirtualCidrs,
    /// Pod CIDRs of all clusters that it knows, by the ID of the cluster, as it knows them; an agent that could not be asked
    /// has none.
    pub(crate) known_cidrs: Vec<(u32, IpNet)>,
}

/// One agent's answer, or why there is none.
#[derive(Clone, Debug)]
pub(crate) struct AgentFacts {
    pub(crate) node: String,
    pub(crate) status: Result<StatusResponse, String>,
}

/// One attempt to read the other side's etcd.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) node: String,
    pub(crate) result: Result<ProbePeerResponse, String>,
}

/// What stands in a side's directory for the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EntryState {
    /// Nothing.
    Absent,
    /// Exactly what would be written.
    Same,
    /// Something else, that would be replaced.
    Different,
    /// Something that must not be replaced, and why.
    Foreign(String),
}

/// The checks in the order in which they are shown.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct Plan {
    pub(crate) checks: Vec<Check>,
}

/// One check and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// Which one, for programs.
    pub(crate) check: CheckId,
    pub(crate) outcome: Outcome,
    /// What was found, in one line.
    pub(crate) message: String,
    /// What to do about it; empty if there is nothing to do.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) hint: &'static str,
}

/// What is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CheckId {
    ContextsDiffer,
    AgentsAnswer,
    ConfigurationMatches,
    NamesDiffer,
    IdsDiffer,
    IdsInRange,
    MaxConnectedClusters,
    NoClash,
    EtcdReachable,
    PodCidrs,
    Versions,
    Entries,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    Pass,
    /// Does not prevent the connection.
    Warn,
    Fail,
    /// Cannot be told, because of another check that failed.
    Skipped,
}

/// Runs all checks.
pub(crate) fn plan(facts: &Facts) -> Plan {
    let Facts { source, destination } = facts;
    let checks = vec![
        contexts_differ(source, destination),
        agents_answer(source),
        agents_answer(destination),
        configuration_matches(source, destination),
        configuration_matches(destination, source),
        names_differ(source, destination),
        ids_differ(source, destination),
        ids_in_range(source, destination),
        max_connected_clusters(source, destination),
        no_clash(source, destination),
        no_clash(destination, source),
        etcd_reachable(source, destination),
        etcd_reachable(destination, source),
        pod_cidrs(source, destination),
        versions(source, destination),
        entries(source, destination),
    ];
    Plan { checks }
}

impl Plan {
    /// Nothing speaks against writing.
    pub(crate) fn is_clear(&self) -> bool {
        self.checks.iter().all(|check| matches!(check.outcome, Outcome::Pass | Outcome::Warn))
    }

    /// The checks that failed.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.outcome == Outcome::Fail)
    }
}

impl Facts {
    /// Both sides have what would be written.
    pub(crate) fn already_connected(&self) -> bool {
        self.source.entry == EntryState::Same && self.destination.entry == EntryState::Same
    }
}

impl Side {
    fn statuses(&self) -> impl Iterator<Item = (&str, &StatusResponse)> {
        self.agents.iter().filter_map(|a| Some((a.node.as_str(), a.status.as_ref().ok()?)))
    }

    /// Pod CIDRs of the other side's nodes, as far as they are known and are any.
    pub(crate) fn pod_cidrs_of_peer(&self) -> Vec<IpNet> {
        let told = self.reached().into_iter().flat_map(|etcd| &etcd.pod_cidrs);
        told.filter_map(|text| text.parse().ok()).collect()
    }

    fn reached(&self) -> Option<&ProbePeerResponse> {
        self.probe.as_ref()?.result.as_ref().ok()
    }

    fn answers(&self) -> bool {
        self.statuses().next().is_some()
    }
}

fn pass(check: CheckId, message: impl Into<String>) -> Check {
    Check { check, outcome: Outcome::Pass, message: message.into(), hint: "" }
}

fn warn(check: CheckId, message: impl Into<String>, hint: &'static str) -> Check {
    Check { check, outcome: Outcome::Warn, message: message.into(), hint }
}

fn fail(check: CheckId, message: impl Into<String>, hint: &'static str) -> Check {
    Check { check, outcome: Outcome::Fail, message: message.into(), hint }
}

fn skipped(check: CheckId, message: impl Into<String>) -> Check {
    Check { check, outcome: Outcome::Skipped, message: message.into(), hint: "" }
}

fn contexts_differ(a: &Side, b: &Side) -> Check {
    let check = CheckId::ContextsDiffer;
    if a.config_dir == b.config_dir {
        return fail(
            check,
            format!("both contexts configure their agents in {}", a.config_dir.display()),
            "give two different clusters, each with a clustermeshConfig directory of its own",
        );
    }
    pass(check, "the contexts are different clusters")
}

/// An agent that is down reads the new configuration when it starts, so one that answers is enough.
fn agents_answer(side: &Side) -> Check {
    let check = CheckId::AgentsAnswer;
    let silent: Vec<_> = side
        .agents
        .iter()
        .filter_map(|a| Some(format!("{}: {}", a.node, a.status.as_ref().err()?)))
        .collect();
    let (cluster, all) = (&side.cluster, side.agents.len());
    if silent.is_empty() && all > 0 {
        return pass(check, format!("{cluster}: {}", count(all, "agent answers", "agents answer")));
    }
    let message =
        format!("{cluster}: {} of {all} agents do not answer ({})", silent.len(), silent.join("; "));
    if side.answers() {
        return warn(check, message, "they connect as soon as they run again");
    }
    fail(check, message, "start the agents, or correct the sockets in context.yaml")
}

/// The context, the agents and the cluster's own etcd (read by the other side) have to mean one cluster.
fn configuration_matches(side: &Side, other: &Side) -> Check {
    let check = CheckId::ConfigurationMatches;
    let cluster = &side.cluster;
    let mut sources: Vec<(String, &str, u32)> = side
        .statuses()
        .map(|(node, s)| (format!("the agent of {node}"), s.cluster_name.as_str(), s.cluster_id))
        .collect();
    if let Some(etcd) = other.reached() {
        sources.push(("its etcd".into(), cluster.as_str(), etcd.cluster_id));
    }
    if !side.answers() {
        return skipped(check, format!("{cluster}: no agent says which cluster it belongs to"));
    }
    match sources.iter().find(|(_, name, id)| *name != cluster.as_str() || *id != side.id) {
        Some((source, name, id)) => fail(
            check,
            format!(
                "{cluster}: the context says {cluster} with ID {}, but {source} says {name} with ID {id}",
                side.id
            ),
            "correct cluster.name and cluster.id in context.yaml, or the agent's --cluster-name and --cluster-id",
        ),
        None => pass(check, format!("{cluster}: context, agents and etcd agree on name and ID {}", side.id)),
    }
}

fn names_differ(a: &Side, b: &Side) -> Check {
    let check = CheckId::NamesDiffer;
    if a.cluster == b.cluster {
        return fail(
            check,
            format!("both clusters are named {}", a.cluster),
            "give one of them another --cluster-name; names are unique in a mesh",
        );
    }
    pass(check, format!("names differ: {} and {}", a.cluster, b.cluster))
}

fn ids_differ(a: &Side, b: &Side) -> Check {
    let check = CheckId::IdsDiffer;
    if a.id == b.id {
        return fail(
            check,
            format!("{} and {} both have the cluster ID {}", a.cluster, b.cluster, a.id),
            "give one of them another --cluster-id; IDs are unique in a mesh",
        );
    }
    pass(check, format!("cluster IDs differ: {} and {}", a.id, b.id))
}

fn ids_in_range(a: &Side, b: &Side) -> Check {
    let check = CheckId::IdsInRange;
    let Some(limit) = widths(a, b)
        .into_iter()
        .filter_map(|max| MaxConnectedClusters::try_from(max).ok())
        .min_by_key(|max| max.get())
    else {
        return skipped(check, "no agent says how many clusters the mesh may have");
    };
    match [a, b].into_iter().find(|side| ClusterId::new(side.id, limit).is_err()) {
        Some(side) => fail(
            check,
            format!("{} has the cluster ID {}, which is not in 1..={limit}", side.cluster, side.id),
            "choose an ID in the range that max-connected-clusters allows",
        ),
        None => pass(check, format!("cluster IDs are in 1..={limit}")),
    }
}

fn max_connected_clusters(a: &Side, b: &Side) -> Check {
    let check = CheckId::MaxConnectedClusters;
    let widths = widths(a, b);
    let mut all = widths.iter();
    match (all.next(), all.next()) {
        (None, _) => skipped(check, "no agent says its max-connected-clusters"),
        (Some(max), None) => pass(check, format!("max-connected-clusters is {max} on both sides")),
        (Some(_), Some(_)) => {
            let found: Vec<_> = [a, b]
                .iter()
                .flat_map(|side| {
                    side.statuses()
                        .map(|(node, s)| format!("{}/{node}: {}", side.cluster, s.max_connected_clusters))
                })
                .chain([(a, b), (b, a)].iter().filter_map(|(from, to)| {
                    let max = from.reached()?.max_connected_clusters;
                    (max != 0).then(|| format!("etcd of {}: {max}", to.cluster))
                }))
                .collect();
            fail(
                check,
                format!("max-connected-clusters differs ({})", found.join(", ")),
                "it splits identities into cluster and number, and has to be the same in all clusters of a mesh",
            )
        }
    }
}

/// All values of max-connected-clusters that agents or exporters of either side use.
fn widths(a: &Side, b: &Side) -> BTreeSet<u32> {
    let agents = [a, b].into_iter().flat_map(Side::statuses).map(|(_, s)| s.max_connected_clusters);
    let exporters = [a, b].into_iter().filter_map(Side::reached).map(|etcd| etcd.max_connected_clusters);
    // 0: an old exporter, which does not say.
    agents.chain(exporters).filter(|max| *max != 0).collect()
}

/// A peer that `side` has already, with the name or the ID of `other` but not both, is another cluster.
fn no_clash(side: &Side, other: &Side) -> Check {
    let check = CheckId::NoClash;
    let cluster = &side.cluster;
    if !side.answers() {
        return skipped(check, format!("{cluster}: no agent says which clusters it is connected to"));
    }
    for (_, status) in side.statuses() {
        for peer in &status.remotes {
            let same_name = peer.name == other.cluster.as_str();
            // 0: its configuration was not read yet.
            if peer.cluster_id == 0 {
                continue;
            }
            let same_id = peer.cluster_id == other.id;
            if same_name && !same_id {
                return fail(
                    check,
                    format!(
                        "{cluster} is connected to another cluster named {}, with ID {}",
                        peer.name, peer.cluster_id
                    ),
                    "disconnect that cluster first, or rename one of the two",
                );
            }
            if same_id && !same_name {
                return fail(
                    check,
                    format!(
                        "{cluster} is connected to {}, which has the cluster ID {} too",
                        peer.name, other.id
                    ),
                    "disconnect that cluster first, or give one of the two another ID",
                );
            }
        }
    }
    pass(
        check,
        format!("{cluster}: no connected cluster has the name {} or the ID {}", other.cluster, other.id),
    )
}

fn etcd_reachable(from: &Side, to: &Side) -> Check {
    let check = CheckId::EtcdReachable;
    let Some(probe) = &from.probe else {
        let why = match from.cluster == to.cluster || from.id == to.id {
            true => "not tried, two clusters of one name or ID cannot be connected",
            false => "no agent can try the etcd",
        };
        return skipped(check, format!("{} -> {}: {why}", from.cluster, to.cluster));
    };
    let path = format!("{}/{} -> etcd of {}", from.cluster, probe.node, to.cluster);
    match &probe.result {
        Ok(etcd) => {
            let version = if etcd.etcd_version.is_empty() { "etcd" } else { &etcd.etcd_version };
            let millis = etcd.round_trip_us / 1000;
            let tenth = etcd.round_trip_us % 1000 / 100;
            pass(check, format!("{path}: reachable (version {version}, {millis}.{tenth} ms)"))
        }
        Err(error) => fail(
            check,
            format!("{path}: {error}"),
            "check etcd.endpoints and the certificates in context.yaml, and that TCP to the endpoint is open",
        ),
    }
}

fn pod_cidrs(a: &Side, b: &Side) -> Check {
    let check = CheckId::PodCidrs;
    let (Some(etcd_of_b), Some(etcd_of_a)) = (a.reached(), b.reached()) else {
        return skipped(check, "pod CIDRs are not known, an etcd was not reached");
    };
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    for (side, etcd, cidrs) in [(a, etcd_of_a, &mut of_a), (b, etcd_of_b, &mut of_b)] {
        for text in &etcd.pod_cidrs {
            match text.parse::<IpNet>() {
                Ok(net) => cidrs.push(net),
                Err(_) => {
                    return fail(
                        check,
                        format!("{}: a node has the pod CIDR {text:?}, which is none", side.cluster),
                        "correct the node's spec.podCIDRs",
                    );
                }
            }
        }
        if cidrs.is_empty() {
            return warn(
                check,
                format!("{}: no node has a pod CIDR, so an overlap cannot be seen", side.cluster),
                "pods need addresses that no other cluster of the mesh uses",
            );
        }
    }
    for (reader, own, peer, foreign) in [(a, &of_a, b, &of_b), (b, &of_b, a, &of_a)] {
        for net in foreign {
            let Some(known_by) = reader.virtual_cidrs.prefix_known_by(*net) else {
                return fail(
                    check,
                    format!(
                        "{} knows pods of {} by virtual addresses ({}), among which {net} is not",
                        reader.cluster, peer.cluster, reader.virtual_cidrs
                    ),
                    "correct virtual-pod-cidrs in its entry for the other cluster",
                );
            };
            if let Some(taken) = own.iter().find(|own| overlaps(own, &known_by)) {
                let seen = if known_by == *net {
                    String::new()
                } else {
                    format!(", which {} knows as {known_by}", reader.cluster)
                };
                return fail(
                    check,
                    format!(
                        "pod CIDRs overlap: {net} of {}{seen} and {taken} of {}",
                        peer.cluster, reader.cluster
                    ),
                    "connect with --virtual-pod-cidrs, or give one of the clusters other pod CIDRs",
                );
            }
            let third = |(id, held): &&(u32, IpNet)| ![a.id, b.id].contains(id) && overlaps(held, &known_by);
            if let Some((id, held)) = reader.known_cidrs.iter().find(third) {
                return fail(
                    check,
                    format!(
                        "pod CIDRs overlap: {known_by} of {} and {held} of the cluster with ID {id}, which {} is connected to",
                        peer.cluster, reader.cluster
                    ),
                    "connect with --virtual-pod-cidrs, or give one of the clusters other pod CIDRs",
                );
            }
        }
    }
    let known: Vec<_> = [(a, b), (b, a)]
        .into_iter()
        .filter(|(reader, _)| !reader.virtual_cidrs.is_empty())
        .map(|(reader, peer)| {
            format!("{} knows pods of {} by {}", reader.cluster, peer.cluster, reader.virtual_cidrs)
        })
        .collect();
    match known.is_empty() {
        false => pass(check, format!("pod CIDRs do not get into each other's way: {}", known.join("; "))),
        true => pass(
            check,
            format!(
                "pod CIDRs do not overlap ({} of {}, {} of {})",
                of_a.len(),
                a.cluster,
                of_b.len(),
                b.cluster
            ),
        ),
    }
}

/// Networks overlap if and only if one contains the other.
fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

fn versions(a: &Side, b: &Side) -> Check {
    let check = CheckId::Versions;
    let all: BTreeSet<&str> =
        [a, b].into_iter().flat_map(Side::statuses).map(|(_, s)| s.version.as_str()).collect();
    let minors: BTreeSet<_> = all.iter().map(|version| minor(version)).collect();
    let found = all.into_iter().collect::<Vec<_>>().join(", ");
    match minors.len() {
        0 => skipped(check, "no agent says its version"),
        1 => pass(check, format!("agents have the same minor version ({found})")),
        _ => warn(
            check,
            format!("agents have different minor versions ({found})"),
            "one minor version of skew works; upgrade the older ones",
        ),
    }
}

/// `1.2` of `1.2.3-rc1`.
fn minor(version: &str) -> (&str, &str) {
    let mut parts = version.split('.');
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

fn entries(a: &Side, b: &Side) -> Check {
    let check = CheckId::Entries;
    for side in [a, b] {
        if let EntryState::Foreign(why) = &side.entry {
            return fail(
                check,
                format!("{}: {why}", side.cluster),
                "this directory is filled by something else; configure the remote cluster there",
            );
        }
    }
    let with = |state| [a, b].into_iter().filter(|side| side.entry == state).collect::<Vec<_>>();
    if let [side, ..] = with(EntryState::Different)[..] {
        return warn(
            check,
            format!("{} has another configuration for its peer, which is replaced", side.cluster),
            "",
        );
    }
    match with(EntryState::Same)[..] {
        [] => pass(check, "not connected yet"),
        [side] => {
            pass(check, format!("only {} has its half of the connection; the other is added", side.cluster))
        }
        _ => pass(check, format!("{} and {} are already connected", a.cluster, b.cluster)),
    }
}

fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
