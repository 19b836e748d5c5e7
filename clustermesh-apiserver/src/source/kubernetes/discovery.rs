use std::collections::BTreeMap;
use std::time::Duration;

use axum::http::Request;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroup, APIResourceList};
use kube::{Client, Error};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::kinds::{CILIUM, KINDS, Resource};
use super::lists::Heard;
use super::{Told, follow, trouble};
use crate::objects::ObjectKind;

/// While the server does not answer.
const RETRY: Duration = Duration::from_secs(1);
/// A kind that is missing this many times in a row is gone: a server that starts does not know all at once.
const MISSES: u32 = 2;

/// Follows those of Cilium's kinds that the cluster has, for good.
pub(super) async fn follow(client: Client, look: Duration, out: mpsc::Sender<Told>) {
    let mut kinds: Vec<Kind> =
        KINDS.iter().filter(|resource| resource.group == CILIUM).map(Kind::new).collect();
    while !out.is_closed() {
        let wait = match versions(&client).await {
            Ok(versions) => {
                for kind in &mut kinds {
                    if kind.found(versions.get(&kind.resource.kind), &client, &out).await.is_err() {
                        return;
                    }
                }
                look
            }
            Err(error) => {
                let text = format!("cannot ask for {CILIUM}: {}", explain(&error));
                for kind in kinds.iter().filter(|kind| kind.state.is_none()) {
                    let trouble = Heard::Trouble(Some(text.clone()));
                    if out.send((kind.resource.kind, trouble)).await.is_err() {
                        return;
                    }
                }
                RETRY
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// One of Cilium's kinds.
struct Kind {
    resource: &'static Resource,
    /// `None` as long as nobody knows.
    state: Option<State>,
}

enum State {
    Absent,
    Present { version: String, task: JoinHandle<()>, misses: u32 },
}

impl Kind {
    const fn new(resource: &'static Resource) -> Self {
        Self { resource, state: None }
    }

    /// The server says that it has the kind in this version, or not at all.
    async fn found(
        &mut self,
        version: Option<&String>,
        client: &Client,
        out: &mpsc::Sender<Told>,
    ) -> Result<(), mpsc::error::SendError<Told>> {
        let kind = self.resource.kind;
        match (&mut self.state, version) {
            (Some(State::Present { version: known, misses, .. }), Some(version)) if known == version => {
                *misses = 0;
                return Ok(());
            }
            (Some(State::Absent), None) => return Ok(()),
            (Some(State::Present { misses, .. }), None) if *misses + 1 < MISSES => {
                *misses += 1;
                return Ok(());
            }
            _ => {}
        }
        if let Some(State::Present { task, .. }) = self.state.take() {
            task.abort();
            // Whatever it says now comes before what we say.
            let _ = task.await;
        }
        let Some(version) = version else {
            self.state = Some(State::Absent);
            return out.send((kind, Heard::Absent)).await;
        };
        tracing::info!("reading {kind} objects ({CILIUM}/{version})");
        let api = self.resource.api(version);
        let task = tokio::spawn(follow::follow(client.clone(), kind, api, out.clone()));
        self.state = Some(State::Present { version: version.clone(), task, misses: 0 });
        out.send((kind, Heard::Trouble(None))).await
    }
}

/// The version of each of Cilium's kinds that the server has, the one that it prefers.
async fn versions(client: &Client) -> Result<BTreeMap<ObjectKind, String>, Error> {
    let mut found = BTreeMap::new();
    let Some(group) = get::<APIGroup>(client, format!("/apis/{CILIUM}")).await? else { return Ok(found) };
    for served in group.versions {
        let path = format!("/apis/{}", served.group_version);
        let Some(list) = get::<APIResourceList>(client, path).await? else { continue };
        for resource in KINDS.iter().filter(|resource| resource.group == CILIUM) {
            if list.resources.iter().any(|served| served.name == resource.plural) {
                found.entry(resource.kind).or_insert_with(|| served.version.clone());
            }
        }
    }
    Ok(found)
}

async fn get<T: serde::de::DeserializeOwned>(client: &Client, path: String) -> Result<Option<T>, Error> {
    let request = Request::get(path).body(Vec::new()).map_err(Error::HttpError)?;
    match client.request(request).await {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

fn explain(error: &Error) -> String {
    match error {
        Error::Api(status) if status.code == 403 => {
            "the API server does not let us discover it: bind us to the role system:discovery".to_owned()
        }
        error => trouble::reason(ObjectKind::CiliumNode, error),
    }
}
