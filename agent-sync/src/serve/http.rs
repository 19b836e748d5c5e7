//! `/healthz`, `/readyz` and `/metrics`.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{ServeError, Source, metrics};

/// Listens on `address` and serves until `stop`.
///
/// # Errors
/// At once if the address cannot be had; the future that is given back tells how serving ended.
pub async fn serve(
    source: Source,
    address: SocketAddr,
    stop: CancellationToken,
) -> Result<impl Future<Output = Result<(), ServeError>>, ServeError> {
    let listener =
        TcpListener::bind(address).await.map_err(|source| ServeError::Address { address, source })?;
    let router = Router::new()
        .route("/healthz", get(health))
        .route("/readyz", get(readiness))
        .route("/metrics", get(scrape))
        .with_state(source);
    Ok(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
        served.map_err(|error| ServeError::Ended("HTTP", error.to_string()))
    })
}

/// The engine answers.
async fn health(State(source): State<Source>) -> Response {
    match source.overview().await {
        Ok(_) => "ok\n".into_response(),
        Err(gone) => (StatusCode::SERVICE_UNAVAILABLE, format!("{gone}\n")).into_response(),
    }
}

/// The own cluster is synced and installed. Remotes do not count: they must not take a node down.
async fn readiness(State(source): State<Source>) -> Response {
    match source.overview().await {
        Ok(overview) if overview.ready => "ready\n".into_response(),
        Ok(overview) => {
            let reason = overview.error.unwrap_or_else(|| "the own cluster is not synced yet".into());
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response()
        }
        Err(gone) => (StatusCode::SERVICE_UNAVAILABLE, format!("{gone}\n")).into_response(),
    }
}

async fn scrape(State(source): State<Source>) -> Response {
    let Ok(status) = source.status(false).await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let counted = match source.counted().await {
        Ok(counted) => counted,
        // Half of the metrics would look like a datapath that does nothing.
        Err(error) => return (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    };
    match metrics::encode(&status, counted.as_ref()) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
