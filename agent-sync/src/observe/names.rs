//! What pods are called.
//!
//! Edge. The engine keeps no names: with millions of addresses they would be most of its memory. Those of pods that
//! somebody looks at are read from their cluster's etcd, one key each, and kept for a short time: another pod may get
//! the address.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clustermesh_kvstore::cluster::{ClusterName, NamespacedName};
use clustermesh_kvstore::key::{Kind, Layout, data_prefix};
use clustermesh_kvstore::record::{IpRecord, Record as _};
use futures::stream::{self, StreamExt as _};
use tokio::time::{Instant, timeout};

use super::flow::{End, Flow};
use crate::peers::{Directory, PeerView};

/// How long a name is believed.
const KEEP: Duration = Duration::from_secs(30);
/// How long nobody asks again for one that could not be read.
const PAUSE: Duration = Duration::from_secs(5);
/// Longest wait for the names of a batch. What comes later is there for the next one.
const WAIT: Duration = Duration::from_millis(500);
/// Names that are kept.
const ROOM: usize = 8192;
/// Keys that are read at the same time.
const ABREAST: usize = 16;

type Place = (ClusterName, IpAddr);

/// Names of pods, shared by all observers. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct PodNames {
    own: ClusterName,
    directory: Directory,
    kept: Arc<Mutex<HashMap<Place, Kept>>>,
}

#[derive(Clone, Debug)]
struct Kept {
    name: Option<NamespacedName>,
    until: Instant,
}

impl PodNames {
    pub(crate) fn new(own: ClusterName, directory: Directory) -> Self {
        Self { own, directory, kept: Arc::default() }
    }

    /// Names of source and destination of each flow, as far as they can be had within [`WAIT`].
    pub(crate) async fn of(&self, flows: &[Arc<Flow>]) -> Vec<[Option<NamespacedName>; 2]> {
        let ends = |flow: &Flow| [place(&flow.source), place(&flow.destination)];
        let now = Instant::now();
        let missing: BTreeSet<Place> = {
            let kept = self.lock();
            let places = flows.iter().flat_map(|flow| ends(flow)).flatten();
            places.filter(|place| kept.get(place).is_none_or(|kept| kept.until <= now)).collect()
        };
        if !missing.is_empty() {
            let views = self.directory.snapshot();
            let reads = missing.into_iter().filter_map(|place| {
                let view = views.get(&place.0)?;
                Some(async {
                    let name = self.read(view, &place).await;
                    self.keep(place, name);
                })
            });
            // One that takes longer is given up.
            let _ = timeout(WAIT, stream::iter(reads).buffer_unordered(ABREAST).collect::<Vec<()>>()).await;
        }
        let kept = self.lock();
        let name = |place: Option<Place>| kept.get(&place?)?.name.clone();
        flows.iter().map(|flow| ends(flow).map(name)).collect()
    }

    /// None if there is no such record, or it names no pod, or the etcd does not answer.
    async fn read(&self, view: &PeerView, (cluster, ip): &Place) -> Option<NamespacedName> {
        let layout = if view.state.borrow().cached { Layout::Cache } else { Layout::State };
        let kinds: &[Kind] = if *cluster == self.own { &[Kind::Ip, Kind::LocalIp] } else { &[Kind::Ip] };
        let suffix = view.virtual_cidrs.real(*ip).to_string();
        for kind in kinds {
            let session = view.etcd.session().await;
            let found = session.get(&(data_prefix(*kind, cluster, layout) + &suffix)).await.ok().flatten();
            let record = found.and_then(|found| IpRecord::decode(&suffix, &found.value).ok());
            if let Some(record) = record {
                let name = NamespacedName { namespace: record.namespace, name: record.pod_name };
                return (!name.name.is_empty()).then_some(name);
            }
        }
        None
    }

    fn keep(&self, place: Place, name: Option<NamespacedName>) {
        let now = Instant::now();
        let mut kept = self.lock();
        if kept.len() >= ROOM {
            kept.retain(|_, kept| kept.until > now);
            if kept.len() >= ROOM {
                kept.clear();
            }
        }
        let until = now + if name.is_some() { KEEP } else { PAUSE };
        kept.insert(place, Kept { name, until });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Place, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where its name stands; none if it has none.
fn place(end: &End) -> Option<Place> {
    let is_pod = end.is_known && end.node.is_none();
    is_pod.then(|| Some((end.cluster.clone()?, end.ip?)))?
}
