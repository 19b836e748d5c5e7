//! Answers that go on.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use futures::StreamExt;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::answer::{failure, status};
use crate::cluster::{Cluster, Gone, State};

const EXPIRED: &str = "too old resource version";

/// A watch of one resource.
pub(crate) fn watch(cluster: &Cluster, plural: &str, query: &BTreeMap<String, String>) -> Response<Body> {
    let changes = cluster.changes();
    let mut state = cluster.state();
    let is_true = |name: &str| query.get(name).is_some_and(|value| value == "true");
    let with_state = is_true("sendInitialEvents");
    if with_state && state.faults.no_streams {
        let message = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the \
                       WatchList feature gate is enabled";
        return failure(422, "Invalid", message);
    }
    let from = query.get("resourceVersion").and_then(|revision| revision.parse().ok()).unwrap_or(0_u64);
    let mut lines = Vec::new();
    let mut expired = false;
    let position = if with_state || from == 0 {
        let objects = state.resources.get(plural).map(|served| &served.objects);
        for object in objects.into_iter().flat_map(BTreeMap::values) {
            lines.push(format!("{{\"type\":\"ADDED\",\"object\":{}}}\n", object.whole).into());
        }
        if with_state {
            lines.push(bookmark(&mut state, plural, true));
        }
        state.revision
    } else {
        expired = from < state.forgotten;
        from
    };
    if expired && state.faults.gone == Gone::Status {
        return failure(410, "Expired", EXPIRED);
    }
    let (out, receiver) = mpsc::channel(16);
    let watch = Watch {
        cluster: cluster.clone(),
        plural: plural.to_owned(),
        position,
        generation: state.generation,
        bookmarks: state.bookmarks,
        out,
    };
    drop(state);
    let timeout = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(300);
    tokio::spawn(async move {
        // Cut off after the time that was asked for, as a server does.
        let _ = tokio::time::timeout(Duration::from_secs(timeout), watch.run(lines, changes)).await;
    });
    let stream = ReceiverStream::new(receiver)
        .map(|line: Result<Arc<str>, io::Error>| line.map(|line| line.as_bytes().to_vec()));
    Response::new(Body::from_stream(stream))
}

struct Watch {
    cluster: Cluster,
    plural: String,
    position: u64,
    generation: u64,
    bookmarks: u64,
    out: mpsc::Sender<Result<Arc<str>, io::Error>>,
}

impl Watch {
    async fn run(mut self, lines: Vec<Arc<str>>, mut changes: tokio::sync::watch::Receiver<u64>) {
        let mut lines = lines;
        loop {
            for line in lines.drain(..) {
                if self.out.send(Ok(line)).await.is_err() {
                    return;
                }
            }
            changes.borrow_and_update();
            match self.next() {
                Next::Lines(more) => lines = more,
                Next::Last(line) => {
                    let _ = self.out.send(Ok(line)).await;
                    return;
                }
                Next::Cut => {
                    let _ = self.out.send(Err(io::ErrorKind::ConnectionReset.into())).await;
                    return;
                }
            }
            if lines.is_empty() {
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = self.out.closed() => return,
                }
            }
        }
    }

    fn next(&mut self) -> Next {
        let mut state = self.cluster.state();
        if state.generation != self.generation {
            return Next::Cut;
        }
        if state.faults.held.contains(&self.plural) {
            return Next::Lines(Vec::new());
        }
        if self.position < state.forgotten {
            let error = json!({ "type": "ERROR", "object": status(410, "Expired", EXPIRED) });
            return Next::Last(format!("{error}\n").into());
        }
        let first = state.history.partition_point(|event| event.revision <= self.position);
        let mine = state.history.range(first..).filter(|event| event.plural == self.plural);
        let mut lines: Vec<Arc<str>> = mine.map(|event| Arc::clone(&event.line)).collect();
        self.position = state.revision;
        if state.bookmarks != self.bookmarks {
            self.bookmarks = state.bookmarks;
            lines.push(bookmark(&mut state, &self.plural, false));
        }
        Next::Lines(lines)
    }
}

enum Next {
    Lines(Vec<Arc<str>>),
    Last(Arc<str>),
    Cut,
}

fn bookmark(state: &mut State, plural: &str, end_of_state: bool) -> Arc<str> {
    let (kind, api_version) = state
        .resources
        .get(plural)
        .map(|served| (served.kind.clone(), served.api_version()))
        .unwrap_or_default();
    let mut metadata = json!({ "resourceVersion": state.revision.to_string() });
    if end_of_state {
        metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    let object = json!({ "kind": kind, "apiVersion": api_version, "metadata": metadata });
    format!("{}\n", json!({ "type": "BOOKMARK", "object": object })).into()
}
