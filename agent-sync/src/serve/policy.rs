//! Another import policy, tried on what stands in the etcds of remote clusters now.
//!
//! What the agent refused it does not keep, so all records are listed again, for this question alone; what
//! they would become is [`Trial`]'s to say. The engine is not asked and hears nothing of it.

use std::collections::BTreeSet;

use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::import_policy::{PeerPolicy, PolicyFile};
use clustermesh_kvstore::key::Kind;
use futures::stream::{self, StreamExt as _};
use tonic::Status;

use super::Source;
use super::listing::{self, ABREAST};
use crate::peers::PeerView;
use crate::trial::{Change, KindTrial, Trial};

impl Source {
    pub(super) async fn check_policy(
        &self,
        request: v1::CheckPolicyRequest,
    ) -> Result<v1::CheckPolicyResponse, Status> {
        let file = PolicyFile::parse(&request.policy)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let mut views = self.directory.snapshot();
        views.remove(&self.own.name);
        if !request.clusters.is_empty() {
            let wanted: BTreeSet<&str> = request.clusters.iter().map(String::as_str).collect();
            if let Some(unknown) =
                wanted.iter().find(|name| !views.keys().any(|known| known.as_str() == **name))
            {
                return Err(Status::invalid_argument(format!(
                    "{unknown:?} is no remote cluster of {}",
                    self.own.name
                )));
            }
            views.retain(|name, _| wanted.contains(name.as_str()));
        }
        let _listing = self.desk.take()?;
        let asked: Vec<_> = views.iter().map(|(name, view)| self.check_cluster(&file, name, view)).collect();
        let mut clusters: Vec<_> = stream::iter(asked).buffer_unordered(ABREAST).collect().await;
        clusters.sort_by(|a, b| a.cluster.cmp(&b.cluster));
        Ok(v1::CheckPolicyResponse { clusters })
    }

    async fn check_cluster(
        &self,
        file: &PolicyFile,
        name: &ClusterName,
        view: &PeerView,
    ) -> v1::CheckedCluster {
        let (id, cached) = {
            let state = view.state.borrow();
            (state.id, state.cached)
        };
        let mut checked =
            v1::CheckedCluster { cluster: name.to_string(), cached, ..v1::CheckedCluster::default() };
        let Some(id) = id else {
            checked.error = "its cluster configuration was not accepted yet".into();
            return checked;
        };
        let peer = |rules| PeerPolicy { name: name.clone(), id, max: self.max(), is_own: false, rules };
        let now = self.policy.borrow().file.rules_for(name);
        let mut trial = Trial::new(peer(view.rules(now)), peer(view.rules(file.rules_for(name))));
        for kind in Trial::KINDS {
            let look = |listed: listing::Listed| trial.look(kind, &listed.suffix, &listed.value);
            if let Err(error) = listing::each(view, name, kind, look).await {
                // Half of a list would say that the other half is not there.
                checked.error = error;
                return checked;
            }
        }
        checked.kinds = trial.finish().into_iter().map(checked_kind).collect();
        checked
    }
}

fn checked_kind((kind, trial): (Kind, KindTrial)) -> v1::CheckedKind {
    let changes = trial.changes.into_iter().map(|((change, reason), group)| {
        let record = |(key, detail)| v1::CheckedRecord { key, detail };
        // Those are known already, by `status --refused`.
        let samples = group.samples.into_iter().filter(|_| change != Change::StillRefused);
        v1::CheckedChange {
            change: change.to_string(),
            reason: reason.into(),
            count: group.count,
            samples: samples.map(record).collect(),
        }
    });
    v1::CheckedKind {
        kind: kind.to_string(),
        records: trial.records,
        let_in: trial.now,
        would_let_in: trial.then,
        changes: changes.collect(),
    }
}
