//! Why something is as it is: the engine's view, and beside it what stands in each cluster's etcd now.

use std::net::IpAddr;
use std::time::Duration;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::{ClusterName, Identity, NamespacedName};
use clustermesh_kvstore::etcd::KeyValue;
use clustermesh_kvstore::import_policy::{PeerPolicy, admit};
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use futures::future::join_all;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic::Status;

use super::{Gone, Source, grpc};
use crate::engine::{Part, Query, Subject};
use crate::peers::PeerView;

/// An etcd that does not answer by then is told to be silent.
const READ: Duration = Duration::from_secs(2);
/// Longest part of a value that is shown, in characters.
const SHOWN: usize = 4096;

impl Source {
    pub(super) async fn explain(&self, request: v1::ExplainRequest) -> Result<v1::ExplainResponse, Status> {
        if request.kind == "endpoint" {
            let pod = namespaced(&request.name).map_err(Status::invalid_argument)?;
            return self.explain_endpoint(request, pod).await;
        }
        let subject = subject(&request).map_err(Status::invalid_argument)?;
        let (reply, answer) = oneshot::channel();
        self.queries.send(Query::Explain(subject.clone(), reply)).await.map_err(|_| Gone)?;
        let explanation =
            answer.await.map_err(|_| Gone)?.map_err(|error| Status::internal(error.to_string()))?;
        let views = self.directory.snapshot();
        let parts =
            explanation.parts.iter().map(|(name, part)| self.part(&subject, name, part, views.get(name)));
        let mut clusters = join_all(parts).await;
        clusters.sort_by_key(|part| part.cluster != self.own.name.as_str());
        let installed = explanation.installed.into_iter().map(|(table, rows)| v1::InstalledRows {
            table: table.into(),
            rows: rows.into_iter().map(grpc::message).collect(),
        });
        Ok(v1::ExplainResponse {
            kind: request.kind,
            name: request.name,
            verdict: explanation.verdict,
            clusters,
            installed: installed.collect(),
        })
    }

    async fn part(
        &self,
        subject: &Subject,
        name: &ClusterName,
        part: &Part,
        view: Option<&PeerView>,
    ) -> v1::ExplainedPart {
        let is_own = *name == self.own.name;
        let kind = subject.kind(part.private);
        let cached = view.is_some_and(|view| view.state.borrow().cached);
        let layout = if cached { Layout::Cache } else { Layout::State };
        let mut why = part.why.clone();
        let suffix = match (subject, view.map(|view| &view.virtual_cidrs)) {
            (Subject::Ip(ip), Some(virtual_cidrs)) if !virtual_cidrs.is_empty() => {
                why.extend(known_as(virtual_cidrs, *ip));
                virtual_cidrs.real(*ip).to_string()
            }
            _ => subject.suffix(),
        };
        let key = data_prefix(kind, name, layout) + &suffix;
        let connected = view.is_some_and(|view| view.connection.borrow().connected);
        let mut found = None;
        if !connected {
            why.push("its etcd is not connected: what was last heard of it counts".into());
        } else if let Some(view) = view {
            match read(view, &key).await {
                Ok(Some(read)) => found = Some(read),
                Ok(None) if part.held => why.push(format!("it is gone from its etcd: there is no key {key}")),
                Ok(None) => why.push(format!("it has no record of it: there is no key {key}")),
                Err(error) => why.push(format!("its etcd cannot be read: {error}")),
            }
        }
        let mut refused = false;
        if let (Some(found), Some(id)) = (&found, part.id) {
            let rules = match view {
                Some(view) if !is_own => view.rules(self.policy.borrow().file.rules_for(name)),
                _ => Default::default(),
            };
            let peer = PeerPolicy { name: name.clone(), id, max: self.max(), is_own, rules };
            refused = judge(&peer, kind, &suffix, &found.value, part.held, &mut why);
        }
        let outcome = outcome(refused, part.chosen, part.held);
        let value =
            found.as_ref().map(|found| String::from_utf8_lossy(&found.value).chars().take(SHOWN).collect());
        v1::ExplainedPart {
            cluster: name.to_string(),
            cluster_id: part.id.map_or(0, |id| id.get().into()),
            outcome: outcome.into(),
            why,
            revision: found.map_or(0, |found| found.mod_revision),
            key,
            value: value.unwrap_or_default(),
            connected,
            synced: part.synced,
            addresses: Vec::new(),
        }
    }
}

/// What an address stands for in a cluster whose pods are known by virtual ones.
fn known_as(virtual_cidrs: &VirtualCidrs, ip: IpAddr) -> Option<String> {
    let real = virtual_cidrs.real(ip);
    if real != ip {
        return Some(format!("a virtual address: the pod itself has {real}"));
    }
    let known = virtual_cidrs.known_by(ip).filter(|known| *known != ip)?;
    Some(format!("its pod of this address is known here as {known}"))
}

/// What became of a record, in a word.
pub(super) fn outcome(refused: bool, chosen: bool, held: bool) -> &'static str {
    match (refused, chosen, held) {
        (_, true, _) => "chosen",
        (true, ..) => "refused",
        (_, _, true) => "not-chosen",
        (_, _, false) => "absent",
    }
}

/// Whether the import policy refuses a record as it stands in etcd, with what there is to say of that.
pub(super) fn judge(
    peer: &PeerPolicy,
    kind: Kind,
    suffix: &str,
    value: &[u8],
    held: bool,
    why: &mut Vec<String>,
) -> bool {
    match admit(kind, suffix, value, peer) {
        Err(refusal) => {
            why.push(format!("refused by the import policy: {refusal}"));
            true
        }
        Ok(_) => {
            if !held {
                why.push("it is in etcd, but not taken in yet, or over the quota".into());
            }
            false
        }
    }
}

pub(super) async fn read(view: &PeerView, key: &str) -> Result<Option<KeyValue>, String> {
    let reading = async {
        let session = view.etcd.session().await;
        session.get(key).await.map_err(|error| error.to_string())
    };
    timeout(READ, reading).await.unwrap_or_else(|_| Err(format!("no answer within {READ:?}")))
}

fn subject(request: &v1::ExplainRequest) -> Result<Subject, String> {
    let name = request.name.as_str();
    match request.kind.as_str() {
        "service" => namespaced(name).map(Subject::Service),
        "ip" => name.parse().map(Subject::Ip).map_err(|_| format!("{name:?} is no address")),
        "identity" => {
            let id = name.parse().map_err(|_| format!("{name:?} is no identity: write its number"))?;
            Ok(Subject::Identity(Identity(id)))
        }
        other => Err(format!("there is nothing of kind {other:?}: write service, endpoint, ip or identity")),
    }
}

fn namespaced(name: &str) -> Result<NamespacedName, String> {
    match name.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(NamespacedName { namespace: namespace.into(), name: name.into() })
        }
        _ => Err(format!("{name:?} is no name of a service or pod: write namespace/name")),
    }
}
