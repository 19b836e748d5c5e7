use std::pin::pin;
use std::time::Duration;

use clustermesh_kvstore::cluster::NamespacedName;
use futures::StreamExt;
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;

use super::Told;
use super::lists::{Heard, Item};
use super::read::{self, Read, Wire};
use super::trouble::{explain, is_lost, is_refused_stream};
use crate::objects::{
    ClusterwideResource, EndpointResource, IdentityResource, NamespacedResource, NodeResource, ObjectKind,
    SliceResource,
};

/// A watch ends after this time and goes on with another one: how long a connection that died silently
/// stays unnoticed.
pub(super) const WATCH_SECONDS: u32 = 60;

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A watch that has not failed for this long works, though it may have nothing to say.
const CALM: Duration = Duration::from_secs(15);

/// Tells of all objects of a kind, for good.
pub(super) async fn follow(client: Client, kind: ObjectKind, api: ApiResource, out: mpsc::Sender<Told>) {
    let teller = Teller { kind, out, delay: RETRY_MIN, complained: None };
    match kind {
        ObjectKind::Namespace => teller.follow::<read::Namespace>(client, &api).await,
        ObjectKind::Node => teller.follow::<read::Node>(client, &api).await,
        ObjectKind::Pod => teller.follow::<read::Pod>(client, &api).await,
        ObjectKind::Service => teller.follow::<read::Service>(client, &api).await,
        ObjectKind::EndpointSlice => teller.follow::<read::EndpointSlice>(client, &api).await,
        ObjectKind::CiliumIdentity => teller.follow::<IdentityResource>(client, &api).await,
        ObjectKind::CiliumEndpoint => teller.follow::<EndpointResource>(client, &api).await,
        ObjectKind::CiliumEndpointSlice => teller.follow::<SliceResource>(client, &api).await,
        ObjectKind::CiliumNode => teller.follow::<NodeResource>(client, &api).await,
        ObjectKind::NetworkPolicy => teller.follow::<read::NetworkPolicy>(client, &api).await,
        ObjectKind::CiliumNetworkPolicy => teller.follow::<NamespacedResource>(client, &api).await,
        ObjectKind::CiliumClusterwideNetworkPolicy => {
            teller.follow::<ClusterwideResource>(client, &api).await
        }
    }
}

struct Teller {
    kind: ObjectKind,
    out: mpsc::Sender<Told>,
    delay: Duration,
    /// What was said of the trouble that there is.
    complained: Option<String>,
}

/// Nobody listens any more.
struct Closed;

impl Teller {
    async fn follow<W: Wire>(mut self, client: Client, api: &ApiResource) {
        let api: Api<Read<W>> = Api::all_with(client, api);
        let mut streaming = true;
        while let Ok(refused) = self.watch(&api, streaming).await {
            streaming &= !refused;
        }
    }

    /// One watcher, until it has to begin anew; returns whether the server refuses to stream lists.
    async fn watch<W: Wire>(&mut self, api: &Api<Read<W>>, streaming: bool) -> Result<bool, Closed> {
        let config = watcher::Config::default().timeout(WATCH_SECONDS);
        let config = if streaming { config.streaming_lists() } else { config };
        let mut events = pin!(watcher(api.clone(), config));
        loop {
            let next = match self.complained {
                Some(_) => tokio::time::timeout(CALM, events.next()).await,
                None => Ok(events.next().await),
            };
            let Ok(next) = next else {
                self.recovered().await?;
                continue;
            };
            let Some(event) = next else { return Ok(false) };
            match event {
                Ok(event) => self.tell(event).await?,
                // Also later: another server may answer than the one that could.
                Err(error) if streaming && is_refused_stream(&error) => {
                    tracing::debug!(kind = %self.kind, %error, "lists instead of a stream");
                    return Ok(true);
                }
                Err(error) => {
                    self.complain(&error).await?;
                    tokio::time::sleep(self.delay).await;
                    self.delay = (self.delay * 2).min(RETRY_MAX);
                    if is_lost(&error) {
                        return Ok(false);
                    }
                }
            }
        }
    }

    async fn tell<W: Wire>(&mut self, event: Event<Read<W>>) -> Result<(), Closed> {
        let heard = match event {
            // Said before the server is asked: no sign of life yet.
            Event::Init => return self.send(Heard::Begin).await,
            Event::InitApply(Read(object)) | Event::Apply(Read(object)) => {
                Heard::Object(Item { name: name(&object), object: object.into_object() })
            }
            Event::InitDone => Heard::End,
            Event::Delete(Read(object)) => Heard::Gone(name(&object)),
        };
        self.recovered().await?;
        self.send(heard).await
    }

    async fn recovered(&mut self) -> Result<(), Closed> {
        self.delay = RETRY_MIN;
        match self.complained.take() {
            Some(_) => self.send(Heard::Trouble(None)).await,
            None => Ok(()),
        }
    }

    async fn complain(&mut self, error: &watcher::Error) -> Result<(), Closed> {
        // That a watch ends, or that its place is too old, is part of its life.
        if matches!(error, watcher::Error::WatchFailed(_) | watcher::Error::WatchError(_)) || is_lost(error) {
            tracing::debug!(kind = %self.kind, %error, "the watch ended");
            return Ok(());
        }
        let text = explain(self.kind, error);
        if self.complained.as_ref() != Some(&text) {
            self.complained = Some(text.clone());
            self.send(Heard::Trouble(Some(text))).await?;
        }
        Ok(())
    }

    async fn send(&self, heard: Heard) -> Result<(), Closed> {
        self.out.send((self.kind, heard)).await.map_err(|_| Closed)
    }
}

fn name<W: Wire>(object: &W) -> NamespacedName {
    let meta = object.meta();
    NamespacedName {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}
