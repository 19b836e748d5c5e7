use std::pin::pin;
use std::time::Duration;

use clustermesh_kvstore::cluster::NamespacedName;
use futures::StreamExt;
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use tokio::sync::mpsc;

use super::Told;
use super::lists::{Heard, Item};
use super::raw::Raw;
use super::trouble::{explain, is_lost, is_refused_stream};
use crate::objects::{ObjectKey, ObjectKind};
use crate::source::wire::ReadError;

/// A watch ends after this time and goes on with another one: how long a connection that died silently
/// stays unnoticed.
pub(super) const WATCH_SECONDS: u32 = 60;

const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A watch that has not failed for this long works, though it may have nothing to say.
const CALM: Duration = Duration::from_secs(15);

/// Tells of all objects of a kind, for good.
pub(super) async fn follow(client: Client, kind: ObjectKind, api: ApiResource, out: mpsc::Sender<Told>) {
    let mut teller = Teller { kind, out, delay: RETRY_MIN, complained: None };
    let api = Api::all_with(client, &api);
    let mut streaming = true;
    while let Ok(refused) = teller.watch(&api, streaming).await {
        streaming &= !refused;
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
    /// One watcher, until it has to begin anew; returns whether the server refuses to stream lists.
    async fn watch(&mut self, api: &Api<Raw>, streaming: bool) -> Result<bool, Closed> {
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

    async fn tell(&mut self, event: Event<Raw>) -> Result<(), Closed> {
        let heard = match event {
            // Said before the server is asked: no sign of life yet.
            Event::Init => return self.send(Heard::Begin).await,
            Event::InitApply(raw) | Event::Apply(raw) => {
                let (name, object) = (name(&raw), raw.object(self.kind));
                let object = object.map_err(|error| unreadable(self.kind, &name, &error));
                Heard::Object(Item { name, object })
            }
            Event::InitDone => Heard::End,
            Event::Delete(raw) => Heard::Gone(name(&raw)),
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

fn name(raw: &Raw) -> NamespacedName {
    let meta = raw.meta();
    NamespacedName {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
    }
}

/// What is wrong with an object, and with which.
fn unreadable(kind: ObjectKind, name: &NamespacedName, error: &ReadError) -> String {
    match error {
        ReadError::Json(error) => format!("{}: {error}", ObjectKey { kind, name: name.clone() }),
        ReadError::Object(error) => error.to_string(),
    }
}
