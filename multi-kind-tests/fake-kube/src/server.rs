use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, Uri};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::answer::{failure, group, json_text, list, resources};
use crate::cluster::Cluster;
use crate::watch::watch;

/// Serves a cluster until it is dropped.
pub struct Server {
    addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens at `addr`; port 0 is a free one.
    ///
    /// # Errors
    /// The address is taken, or not one of this host.
    pub async fn start(cluster: Cluster, addr: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        let router = Router::new().fallback(answer).with_state(cluster);
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { addr, task })
    }

    /// Where it listens.
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// A kubeconfig with one context, `fake`.
    pub fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: fake\n\
             clusters: [{{name: fake, cluster: {{server: 'http://{}'}}}}]\n\
             users: [{{name: fake, user: {{}}}}]\n\
             contexts: [{{name: fake, context: {{cluster: fake, user: fake}}}}]\n",
            self.addr
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(cluster): State<Cluster>, uri: Uri) -> Response<Body> {
    cluster.state().requests.push(uri.to_string());
    let query = query(&uri);
    let parts: Vec<&str> = uri.path().trim_matches('/').split('/').collect();
    let (api_version, plural) = match parts[..] {
        ["api", version] => (version.to_owned(), None),
        ["api", version, plural] => (version.to_owned(), Some(plural)),
        ["apis", name] => {
            let found = group(&cluster.state(), name);
            return found.map_or_else(not_found, |group| json_text(group.to_string()));
        }
        ["apis", group, version] => (format!("{group}/{version}"), None),
        ["apis", group, version, plural] => (format!("{group}/{version}"), Some(plural)),
        _ => return not_found(),
    };
    if let Some(code) = cluster.state().faults.broken {
        return failure(code, "InternalError", "on request");
    }
    let Some(plural) = plural else {
        let found = resources(&cluster.state(), &api_version);
        return found.map_or_else(not_found, |list| json_text(list.to_string()));
    };
    let mut changes = cluster.changes();
    while cluster.state().faults.held.contains(plural) {
        if changes.changed().await.is_err() {
            break;
        }
    }
    let mut state = cluster.state();
    if state.faults.forbidden.contains(plural) {
        return failure(403, "Forbidden", &format!("{plural} is forbidden: User \"fake\" cannot list it"));
    }
    if state.resources.get(plural).is_none_or(|served| served.api_version() != api_version) {
        return not_found();
    }
    if query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
        drop(state);
        return watch(&cluster, plural, &query);
    }
    list(&mut state, plural, &query)
}

fn not_found() -> Response<Body> {
    failure(404, "NotFound", "the server could not find the requested resource")
}

/// Nothing that we are asked, or that we hand out to be asked for, needs decoding.
fn query(uri: &Uri) -> BTreeMap<String, String> {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
