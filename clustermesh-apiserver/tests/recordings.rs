//! The source against the very bytes that a real API server (1.36) sent: a list in pages, and a watch that
//! begins with what there is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Response, StatusCode, Uri};
use clustermesh_apiserver::export::{Cluster, Exporter, KeyChange, Rules};
use clustermesh_apiserver::identity::Allocator;
use clustermesh_apiserver::objects::Change;
use clustermesh_apiserver::source::{SourceEvent, kubernetes, manifests};
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

const DEADLINE: Duration = Duration::from_secs(30);
/// What is recorded, beside services and pods, as a whole.
const WHOLE: [&str; 3] = ["namespaces", "nodes", "endpointslices"];

/// The server gave one pod of two, and a token for the rest. The token is its own word for where to go on.
#[tokio::test]
async fn a_list_in_pages_is_one_list() {
    let mut bed = Bed::start(false).await;
    bed.until("synced", |bed| bed.synced).await;
    let first: Value = serde_json::from_str(&recorded("list-pods-page1.json")).unwrap();
    let token = first["metadata"]["continue"].as_str().unwrap();
    let asked = bed.server.requests();
    let is_list = |request: &&String| request.contains("/pods?") && !request.contains("watch=");
    let pods: Vec<&String> = asked.iter().filter(is_list).collect();
    assert!(pods[0].contains("limit=") && !pods[0].contains("continue="), "{pods:?}");
    assert!(pods[1].contains(&format!("continue={token}")), "{pods:?}");
    bed.is_as_if_listed(&json_of("list-services.json"));
    assert!(bed.keys.contains_key("cilium/state/ip/v1/default/10.1.0.10"), "{:?}", bed.keys.keys());
}

/// Nothing is told before the bookmark that ends the beginning; then each event of the record counts.
#[tokio::test]
async fn a_watch_that_begins_with_what_there_is() {
    let mut bed = Bed::start(true).await;
    let lines = recorded("watchlist-services.jsonl");
    let lines: Vec<&str> = lines.lines().collect();
    let end = lines.iter().position(|line| line.contains("k8s.io/initial-events-end")).unwrap();
    // Up to the bookmark, but not the bookmark: everything else has been told.
    bed.server.stream(&lines[..end]);
    bed.server.until_asked(&["services", "pods", "endpointslices", "nodes", "namespaces"]).await;
    bed.settle(Duration::from_millis(100)).await;
    assert!(!bed.synced && bed.keys.is_empty(), "{:?}", bed.keys.keys());

    bed.server.stream(&lines[end..=end]);
    bed.until("synced", |bed| bed.synced).await;
    bed.is_as_if_listed(&json_of("list-services.json"));
    let request = bed.server.requests().into_iter().find(|request| request.contains("/services?")).unwrap();
    for part in ["sendInitialEvents=true", "resourceVersionMatch=NotOlderThan", "allowWatchBookmarks=true"] {
        assert!(request.contains(part), "{request}");
    }

    bed.server.stream(&lines[end + 1..]);
    let left = after(&lines);
    assert_eq!(left.len(), 2, "the record ends without the headless service: {left:?}");
    let shared = "cilium/state/services/v1/alpha/shop/orders";
    assert!(bed.keys.contains_key("cilium/state/services/v1/alpha/shop/orders-headless"));
    bed.until("the headless service's end", |bed| {
        !bed.keys.contains_key("cilium/state/services/v1/alpha/shop/orders-headless")
    })
    .await;
    let items: Vec<Value> = left.into_values().collect();
    bed.is_as_if_listed(&json!({"apiVersion": "v1", "kind": "List", "items": items}));
    let orders = bed.keys.get(shared).map(|value| String::from_utf8_lossy(value).into_owned());
    assert!(orders.is_none_or(|orders| orders.contains(r#""shared":false"#)));
}

/// Services that are there after all events.
fn after(lines: &[&str]) -> BTreeMap<String, Value> {
    let mut services = BTreeMap::new();
    for line in lines {
        let event: Value = serde_json::from_str(line).unwrap();
        let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        match event["type"].as_str().unwrap() {
            "BOOKMARK" => {}
            "DELETED" => drop(services.remove(&name)),
            _ => drop(services.insert(name, event["object"].clone())),
        }
    }
    services
}

/// A source, and what an exporter makes of it.
struct Bed {
    server: Server,
    events: mpsc::Receiver<SourceEvent>,
    exporter: Exporter,
    keys: BTreeMap<String, Vec<u8>>,
    synced: bool,
}

impl Bed {
    /// `streams`: services come by a watch, all else in lists, as if the server did not know better.
    async fn start(streams: bool) -> Self {
        let server = Server::start(streams).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        let text = format!(
            "clusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]\nusers: [{{name: u, user: {{}}}}]\n\
             contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n",
            server.addr
        );
        std::fs::write(&path, text).unwrap();
        let client = kubernetes::connect(Some(&path), Some("x")).await.unwrap();
        let events = kubernetes::watch(client, kubernetes::LOOK);
        Self { server, events, exporter: exporter(), keys: BTreeMap::new(), synced: false }
    }

    fn take(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Changes(changes) => {
                for KeyChange { key, value } in self.exporter.apply(changes, Instant::now()) {
                    match value {
                        Some(value) => drop(self.keys.insert(key, value.to_vec())),
                        None => drop(self.keys.remove(&key)),
                    }
                }
            }
            SourceEvent::Synced => self.synced = true,
            SourceEvent::Broken(broken) => assert_eq!(broken, 0),
            SourceEvent::Trouble(trouble) => assert_eq!(trouble, None),
        }
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !holds(self) {
            let event = tokio::time::timeout_at(deadline, self.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}")).unwrap();
            self.take(event);
        }
    }

    /// Takes in whatever comes for a while.
    async fn settle(&mut self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while let Ok(Some(event)) = tokio::time::timeout_at(end, self.events.recv()).await {
            self.take(event);
        }
    }

    /// The keys are those of somebody who reads these services, and the recorded whole lists, as manifests.
    fn is_as_if_listed(&self, services: &Value) {
        let mut exporter = exporter();
        let mut lists: Vec<Value> =
            WHOLE.iter().chain(&["pods"]).map(|list| json_of(&format!("list-{list}.json"))).collect();
        lists.push(services.clone());
        let objects = lists.iter().flat_map(|list| manifests::parse(&list.to_string()).unwrap());
        exporter.apply(objects.map(Change::Upsert).collect(), Instant::now());
        let expected: BTreeMap<String, Vec<u8>> =
            exporter.published().map(|(key, value)| (key, value.to_vec())).collect();
        let text = |keys: &BTreeMap<String, Vec<u8>>| -> Vec<String> {
            keys.iter().map(|(key, value)| format!("{key} {}", String::from_utf8_lossy(value))).collect()
        };
        assert_eq!(text(&self.keys), text(&expected));
        for kind in ["nodes", "identities", "ip"] {
            let prefix = format!("cilium/state/{kind}/");
            assert!(expected.keys().any(|key| key.starts_with(&prefix)), "{kind}: {:?}", expected.keys());
        }
    }
}

fn exporter() -> Exporter {
    let max = MaxConnectedClusters::C255;
    let cluster = Cluster { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let allocator = Allocator::new(cluster.id, max, Duration::from_secs(600));
    Exporter::new(cluster, allocator, Rules { default_global: true, complete: true, ..Rules::default() })
}

/// Serves recorded bytes; what was not recorded is an empty list or a watch that says nothing.
struct Server {
    addr: std::net::SocketAddr,
    served: Arc<Served>,
    task: tokio::task::JoinHandle<()>,
}

struct Served {
    streams: bool,
    requests: watch::Sender<Vec<String>>,
    /// Lines of the watch of services, one after another.
    lines: mpsc::Sender<String>,
    watch: Mutex<Option<mpsc::Receiver<String>>>,
}

impl Server {
    async fn start(streams: bool) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (lines, watch) = mpsc::channel(64);
        let requests = watch::Sender::new(Vec::new());
        let served = Arc::new(Served { streams, requests, lines, watch: Mutex::new(Some(watch)) });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&served));
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Self { addr, served, task }
    }

    fn stream(&self, lines: &[&str]) {
        lines.iter().for_each(|line| self.served.lines.try_send(format!("{line}\n")).unwrap());
    }

    fn requests(&self) -> Vec<String> {
        self.served.requests.borrow().clone()
    }

    async fn until_asked(&self, kinds: &[&str]) {
        let mut requests = self.served.requests.subscribe();
        let all = requests.wait_for(|requests| {
            let asked = |kind: &&str| requests.iter().any(|request| request.contains(&format!("/{kind}?")));
            kinds.iter().all(asked)
        });
        drop(tokio::time::timeout(DEADLINE, all).await.expect("all kinds are asked for").unwrap());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(served): State<Arc<Served>>, uri: Uri) -> Response<Body> {
    served.requests.send_modify(|requests| requests.push(uri.to_string()));
    let query: BTreeSet<&str> = uri.query().unwrap_or_default().split('&').collect();
    let plural = uri.path().rsplit('/').next().unwrap_or_default();
    let is_watch = query.iter().any(|part| part.starts_with("watch="));
    match (plural, is_watch) {
        ("services", true) if served.streams => match served.watch.lock().unwrap().take() {
            Some(lines) => {
                let lines = ReceiverStream::new(lines).map(|line| Ok::<_, std::io::Error>(Bytes::from(line)));
                response(StatusCode::OK, Body::from_stream(lines))
            }
            None => silence(),
        },
        // An older server does not know the parameter and says so.
        (_, true) if query.contains("sendInitialEvents=true") => {
            let refusal = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Invalid",
                "message": "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
                "code": 422,
            });
            response(StatusCode::UNPROCESSABLE_ENTITY, Body::from(refusal.to_string()))
        }
        (_, true) => silence(),
        ("pods", false) if !served.streams => match query.iter().any(|part| part.starts_with("continue=")) {
            false => list(recorded("list-pods-page1.json")),
            true => list(second_page()),
        },
        ("services" | "pods", false) => list(recorded(&format!("list-{plural}.json"))),
        (plural, false) if WHOLE.contains(&plural) => list(recorded(&format!("list-{plural}.json"))),
        // Nobody had written any.
        ("networkpolicies", false) => list(
            r#"{"kind":"NetworkPolicyList","apiVersion":"networking.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[]}"#
                .to_owned(),
        ),
        // Which of Cilium's kinds there are.
        _ => response(StatusCode::NOT_FOUND, Body::from("404 page not found\n")),
    }
}

/// The rest of the list, in the words of the server's answer without pages.
fn second_page() -> String {
    let first = json_of("list-pods-page1.json");
    let mut whole = json_of("list-pods.json");
    let given = first["items"].as_array().unwrap().len();
    whole["items"].as_array_mut().unwrap().drain(..given);
    assert_eq!(json!(whole["items"].as_array().unwrap().len()), first["metadata"]["remainingItemCount"]);
    assert_eq!(whole["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    whole.to_string()
}

fn list(text: String) -> Response<Body> {
    response(StatusCode::OK, Body::from(text))
}

fn silence() -> Response<Body> {
    response(StatusCode::OK, Body::from_stream(futures::stream::pending::<std::io::Result<Bytes>>()))
}

fn response(status: StatusCode, body: Body) -> Response<Body> {
    Response::builder().status(status).header("content-type", "application/json").body(body).unwrap()
}

fn json_of(name: &str) -> Value {
    serde_json::from_str(&recorded(name)).unwrap()
}

fn recorded(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/kubernetes").join(name);
    std::fs::read_to_string(path).unwrap()
}
