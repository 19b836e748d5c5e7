//! Where a pod is in each cluster's view. The engine knows addresses and no pods, so the records of its
//! addresses are searched for in the etcds.

use std::net::IpAddr;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::{ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::import_policy::PeerPolicy;
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::record::{IdentityRecord, IpRecord, Record as _};
use futures::stream::{self, StreamExt as _};
use serde::Deserialize;
use tokio::sync::oneshot;
use tonic::Status;

use super::explain::{outcome, read};
use super::listing::{self, ABREAST, Listed};
use super::{Gone, Source, grpc};
use crate::engine::{AddressPart, Query};
use crate::peers::PeerView;

/// Addresses of one cluster's pod that are shown. A pod has two at most; a cluster may claim more.
const MOST: usize = 8;
/// Labels that are shown.
const LABELS: usize = 64;

/// What a record says of its pod; all the rest of it may be nonsense.
#[derive(Deserialize)]
struct Owner {
    #[serde(rename = "K8sNamespace", default)]
    namespace: String,
    #[serde(rename = "K8sPodName", default)]
    pod: String,
}

/// Records of the pod in one etcd.
#[derive(Default)]
struct Found {
    records: Vec<(Kind, Listed)>,
    /// And so many more.
    more: usize,
    /// Kinds that could not be searched, and why.
    errors: Vec<String>,
}

impl Source {
    pub(super) async fn explain_endpoint(
        &self,
        request: v1::ExplainRequest,
        pod: NamespacedName,
    ) -> Result<v1::ExplainResponse, Status> {
        let _listing = self.desk.take()?;
        let views = self.directory.snapshot();
        let asked: Vec<_> = views.iter().map(|(name, view)| self.endpoint_part(&pod, name, view)).collect();
        let mut parts: Vec<_> = stream::iter(asked).buffer_unordered(ABREAST).collect().await;
        let mut clusters = Vec::new();
        let mut installed = Vec::new();
        parts.sort_by_key(|part| match part {
            Ok((part, _)) => (part.cluster != self.own.name.as_str(), part.cluster.clone()),
            Err(_) => (false, String::new()),
        });
        for part in parts {
            let (part, rows) = part?;
            clusters.push(part);
            installed.extend(rows);
        }
        let having: Vec<&str> = clusters
            .iter()
            .filter(|part| !part.addresses.is_empty())
            .map(|part| part.cluster.as_str())
            .collect();
        let verdict = match having[..] {
            [] => format!("no cluster has told of an address of pod {pod}"),
            [one] => format!("it is a pod of {one}"),
            _ => format!("{} have a pod of this name each", having.join(", ")),
        };
        Ok(v1::ExplainResponse {
            kind: request.kind,
            name: request.name,
            verdict: vec![verdict],
            clusters,
            installed,
        })
    }

    async fn endpoint_part(
        &self,
        pod: &NamespacedName,
        name: &ClusterName,
        view: &PeerView,
    ) -> Result<(v1::ExplainedPart, Vec<v1::InstalledRows>), Status> {
        let is_own = *name == self.own.name;
        let id = view.state.borrow().id;
        let mut part = v1::ExplainedPart {
            cluster: name.to_string(),
            cluster_id: id.map_or(0, |id| id.get().into()),
            connected: view.connection.borrow().connected,
            synced: true,
            ..v1::ExplainedPart::default()
        };
        let Some(id) = id else {
            part.why.push("its cluster configuration was not accepted yet".into());
            part.outcome = outcome(false, false, false).into();
            return Ok((part, Vec::new()));
        };
        let found = search(view, name, is_own, pod).await;
        let known_by = |ip: IpAddr| view.virtual_cidrs.known_by(ip);
        let ips: Vec<Option<IpAddr>> =
            found.records.iter().map(|(_, listed)| listed.suffix.parse().ok().and_then(known_by)).collect();
        let (reply, answer) = oneshot::channel();
        let known = ips.iter().flatten().copied().collect();
        self.queries.send(Query::Addresses(name.clone(), known, reply)).await.map_err(|_| Gone)?;
        let known = answer.await.map_err(|_| Gone)?.map_err(|error| Status::internal(error.to_string()))?;
        let mut known = known.into_iter();
        let mut installed = Vec::new();
        let rules = match is_own {
            true => Default::default(),
            false => view.rules(self.policy.borrow().file.rules_for(name)),
        };
        let peer = PeerPolicy { name: name.clone(), id, max: self.max(), is_own, rules };
        for ((kind, listed), ip) in found.records.into_iter().zip(ips) {
            let mut of_engine = ip.and_then(|_| known.next()).unwrap_or_default();
            if let Some(ip) = ip.filter(|ip| view.virtual_cidrs.real(*ip) != *ip) {
                of_engine.part.why.push(format!("known here by the virtual address {ip}"));
            }
            part.synced &= of_engine.part.synced;
            let (address, rows) = address(&peer, kind, listed, of_engine, view).await;
            part.addresses.push(address);
            for (table, rows) in rows.into_iter().filter(|(_, rows)| !rows.is_empty()) {
                let rows = rows.into_iter().map(grpc::message).collect();
                installed.push(v1::InstalledRows { table: table.into(), rows });
            }
        }
        let has = |outcome: &str| part.addresses.iter().any(|address| address.outcome == outcome);
        part.outcome = outcome(has("refused"), has("chosen"), has("not-chosen")).into();
        for error in &found.errors {
            part.why.push(format!("not all of its records could be searched: {error}"));
        }
        if found.more > 0 {
            part.why.push(format!("{} more addresses claim to be this pod's", found.more));
        }
        if part.addresses.is_empty() && found.errors.is_empty() {
            part.why.push(match is_own {
                true => {
                    "it has no record of such a pod: there is none, or it has no address yet, or it is in \
                         the network of its node"
                        .into()
                }
                false => {
                    "it has no record of such a pod: there is none, or it has no address yet, or it is in \
                          the network of its node, or its namespace is not global there"
                        .into()
                }
            });
        }
        Ok((part, installed))
    }
}

type Installed = Vec<(&'static str, Vec<crate::engine::Row>)>;

async fn address(
    peer: &PeerPolicy,
    kind: Kind,
    listed: Listed,
    of_engine: AddressPart,
    view: &PeerView,
) -> (v1::ExplainedAddress, Installed) {
    let Listed { suffix, value, revision } = listed;
    let AddressPart { part, node, installed } = of_engine;
    let layout = if view.state.borrow().cached { Layout::Cache } else { Layout::State };
    let mut why = part.why;
    let refused = super::explain::judge(peer, kind, &suffix, &value, part.held, &mut why);
    let record = IpRecord::decode(&suffix, &value).ok();
    let identity = record.as_ref().map(|record| record.identity);
    let labels = match identity.filter(|identity| !identity.is_reserved()) {
        Some(identity) => labels(view, peer, identity, kind == Kind::LocalIp, layout, &mut why).await,
        None => Vec::new(),
    };
    let node_ip = record.and_then(|record| record.host_ip);
    let address = v1::ExplainedAddress {
        key: data_prefix(kind, &peer.name, layout) + &suffix,
        address: suffix,
        outcome: outcome(refused, part.chosen, part.held).into(),
        why,
        revision,
        identity: identity.map_or(0, |identity| identity.0),
        labels,
        node: node.unwrap_or_default(),
        node_ip: node_ip.map_or_else(String::new, |ip| ip.to_string()),
        private: kind == Kind::LocalIp,
    };
    (address, installed)
}

/// What the cluster says that an identity means.
async fn labels(
    view: &PeerView,
    peer: &PeerPolicy,
    identity: Identity,
    private: bool,
    layout: Layout,
    why: &mut Vec<String>,
) -> Vec<String> {
    let kind = if private { Kind::LocalIdentities } else { Kind::Identities };
    let suffix = identity.to_string();
    match read(view, &(data_prefix(kind, &peer.name, layout) + &suffix)).await {
        Ok(Some(found)) => match IdentityRecord::decode(&suffix, &found.value) {
            Ok(record) => record
                .labels
                .iter()
                .take(LABELS)
                .map(|label| format!("{}:{}={}", label.source, label.key, label.value))
                .collect(),
            Err(error) => {
                why.push(format!("the record of identity {identity} cannot be read: {error}"));
                Vec::new()
            }
        },
        Ok(None) => {
            why.push(format!("there is no record of identity {identity} in etcd"));
            Vec::new()
        }
        Err(error) => {
            why.push(format!("the labels of identity {identity} are not known: {error}"));
            Vec::new()
        }
    }
}

async fn search(view: &PeerView, name: &ClusterName, is_own: bool, pod: &NamespacedName) -> Found {
    let kinds: &[Kind] = if is_own { &[Kind::Ip, Kind::LocalIp] } else { &[Kind::Ip] };
    let mut found = Found::default();
    for kind in kinds {
        let listed = listing::each(view, name, *kind, |listed| match is_of(&listed.value, pod) {
            true if found.records.len() < MOST => found.records.push((*kind, listed)),
            true => found.more += 1,
            false => {}
        });
        if let Err(error) = listed.await {
            found.errors.push(error);
        }
    }
    found
}

/// Whether a value names the pod. Nearly none does, and most are sorted out without being read.
fn is_of(value: &[u8], pod: &NamespacedName) -> bool {
    let name = pod.name.as_bytes();
    value.windows(name.len()).any(|part| part == name)
        && serde_json::from_slice::<Owner>(value)
            .is_ok_and(|owner| (&owner.namespace, &owner.pod) == (&pod.namespace, &pod.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_pod_s_by_its_names_alone() {
        let pod = NamespacedName { namespace: "shop".into(), name: "web-1".into() };
        for (value, is) in [
            (r#"{"IP":"10.2.0.1","K8sNamespace":"shop","K8sPodName":"web-1"}"#, true),
            (r#"{"IP":7,"K8sNamespace":"shop","K8sPodName":"web-1"}"#, true),
            (r#"{"IP":"10.2.0.1","K8sNamespace":"pay","K8sPodName":"web-1"}"#, false),
            (r#"{"IP":"10.2.0.1","K8sNamespace":"shop","K8sPodName":"web-10"}"#, false),
            (r#"{"K8sNamespace":"shop","Metadata":"web-1"}"#, false),
            ("web-1", false),
            ("", false),
        ] {
            assert_eq!(is_of(value.as_bytes(), &pod), is, "{value}");
        }
    }
}
