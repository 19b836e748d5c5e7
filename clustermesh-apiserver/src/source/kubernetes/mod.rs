//! An API server as a cluster: Kubernetes' objects, and Cilium's where it runs.
//!
//! `connect` knows how to reach it; `kinds` says what is read; `follow` lists and watches one kind;
//! `discovery` finds out which of Cilium's kinds there are; `raw` is an object that is yet to be read; `lists`
//! makes one story of what the watches tell, without I/O.

mod connect;
mod discovery;
mod follow;
mod kinds;
mod lists;
mod raw;
mod trouble;

use std::time::Duration;

use kube::Client;
use tokio::sync::mpsc;

pub use super::wire::{ReadError, read};
pub use connect::{ConnectError, connect};
pub use kinds::{KINDS, Resource};

use self::lists::{Heard, Lists};
use super::SourceEvent;
use crate::objects::ObjectKind;

/// How often to ask which of Cilium's kinds there are: it may be installed or removed at any time.
pub const LOOK: Duration = Duration::from_secs(10);

/// Follows a cluster until the receiver is dropped. Whatever fails is tried again; every `look` the
/// cluster is asked which of Cilium's kinds it has.
pub fn watch(client: Client, look: Duration) -> mpsc::Receiver<SourceEvent> {
    let (out, events) = mpsc::channel(16);
    let (tell, heard) = mpsc::channel(CHUNK);
    let always = |resource: &&Resource| resource.group != kinds::CILIUM && resource.kind != ObjectKind::Pod;
    for resource in KINDS.iter().filter(always) {
        start(resource, &client, &tell);
    }
    tokio::spawn(discovery::follow(client.clone(), look, tell.clone()));
    let read_pods = move || {
        KINDS
            .iter()
            .filter(|resource| resource.kind == ObjectKind::Pod)
            .for_each(|pods| start(pods, &client, &tell));
    };
    tokio::spawn(assemble(heard, out, read_pods));
    events
}

fn start(resource: &Resource, client: &Client, tell: &mpsc::Sender<Told>) {
    let api = resource.api(resource.version);
    tokio::spawn(follow::follow(client.clone(), resource.kind, api, tell.clone()));
}

/// What one watch says, and about which kind.
type Told = (ObjectKind, Heard);

/// Objects that are handed on together at most, but for the first state.
const CHUNK: usize = 1024;

/// Calls `read_pods` once, when pods have to be read: see [`Lists`].
async fn assemble(mut heard: mpsc::Receiver<Told>, out: mpsc::Sender<SourceEvent>, read_pods: impl FnOnce()) {
    let mut lists = Lists::default();
    let mut read_pods = Some(read_pods);
    let mut batch = Vec::with_capacity(CHUNK);
    loop {
        tokio::select! {
            count = heard.recv_many(&mut batch, CHUNK) => if count == 0 { return },
            // Nobody listens any more: with `heard` the watches end too.
            () = out.closed() => return,
        }
        for (kind, what) in batch.drain(..) {
            lists.hear(kind, what);
        }
        if lists.wants_pods()
            && let Some(read_pods) = read_pods.take()
        {
            read_pods();
        }
        for event in lists.take() {
            // One at a time: what is wrong with one kind is wrong with most.
            match &event {
                SourceEvent::Trouble(Some(trouble)) => tracing::warn!("{trouble}; trying again"),
                SourceEvent::Trouble(None) => tracing::info!("the API server can be read again"),
                _ => {}
            }
            if out.send(event).await.is_err() {
                return;
            }
        }
    }
}
