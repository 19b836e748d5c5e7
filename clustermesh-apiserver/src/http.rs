//! `/metrics`, `/healthz`, `/readyz`, and `/status` of those who have one.
//!
//! On a TCP port for probes and scrapers, on a unix socket for the command line.

use std::fmt::Debug;
use std::future::IntoFuture as _;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::serve::Listener;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

/// For answers that are under way when the server stops.
const LINGER: Duration = Duration::from_secs(1);

/// What the pages are about.
pub trait Subject: Collector {
    /// Why it is not ready; `None` once it is.
    fn unready(&self) -> Option<String>;

    /// All that it knows of itself, as JSON; `None` if it has no such page.
    fn report(&self) -> Option<String> {
        None
    }
}

/// Serves the pages until `stop`, if there is a listener.
pub(crate) async fn serve<L, S>(
    listener: Option<L>,
    subject: Arc<S>,
    stop: CancellationToken,
) -> io::Result<()>
where
    L: Listener<Addr: Debug>,
    S: Subject,
{
    let Some(listener) = listener else { return Ok(()) };
    let serving =
        axum::serve(listener, router(subject)).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        result = serving.into_future() => result,
        // Scrapers keep their connections open; a stop does not wait for them.
        () = async { stop.cancelled().await; tokio::time::sleep(LINGER).await } => Ok(()),
    }
}

/// A socket at `path` to which only this user may connect, in place of one that a dead process left.
pub(crate) fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody else is listening there"));
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // Bound under a name that nobody knows, and given its own only once none but us may connect.
    let unnamed = path.with_extension("tmp");
    let _ = std::fs::remove_file(&unnamed);
    let listener = UnixListener::bind(&unnamed)?;
    std::fs::set_permissions(&unnamed, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&unnamed, path)?;
    Ok(listener)
}

/// The pages about a server.
pub fn router<S: Subject>(subject: Arc<S>) -> Router {
    Router::new()
        .route("/metrics", get(metrics::<S>))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz::<S>))
        .route("/status", get(status::<S>))
        .with_state(subject)
}

async fn readyz<S: Subject>(State(subject): State<Arc<S>>) -> (StatusCode, String) {
    match subject.unready() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn status<S: Subject>(State(subject): State<Arc<S>>) -> impl IntoResponse {
    match subject.report() {
        Some(report) => ([(header::CONTENT_TYPE, "application/json")], report).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn metrics<S: Subject>(State(subject): State<Arc<S>>) -> impl IntoResponse {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Shared(subject)));
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => {
            let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, open_metrics)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[derive(Debug)]
struct Shared<S>(Arc<S>);

impl<S: Subject> Collector for Shared<S> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        self.0.encode(encoder)
    }
}
