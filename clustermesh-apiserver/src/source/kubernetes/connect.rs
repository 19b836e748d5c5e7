use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::{Request, Uri};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy;
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ConfigExt as _};
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config, Error};
use tower::retry::RetryLayer;
use tower::util::MapRequestLayer;
use tower::{BoxError, ServiceBuilder};

/// A client of the API server that a kubeconfig names; without one, of that which a pod finds around it.
/// Whether it answers is left open.
///
/// # Errors
/// What the operator said makes no client.
pub async fn connect(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Client, ConnectError> {
    let mut config = match kubeconfig {
        Some(path) => {
            let failed = |error| ConnectError::Kubeconfig { path: path.to_owned(), error };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let options =
                KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
            Config::from_custom_kubeconfig(file, &options).await.map_err(failed)?
        }
        None => Config::incluster()?,
    };
    config.connect_timeout = Some(CONNECT);
    // A watch says something at least as often as it ends; see `follow`.
    config.read_timeout = Some(Duration::from_secs(u64::from(super::follow::WATCH_SECONDS)) + CONNECT);
    let server = config.cluster_url.clone();
    client(config).map_err(|error| ConnectError::Client { server, error: Box::new(error) })
}

const CONNECT: Duration = Duration::from_secs(10);
/// What is read of a connection at once, at most: each kind has one of its own, and by default each of them
/// would take 400 KiB to read its first state, and keep them.
const READ: usize = 32 << 10;

/// What the library builds by default, but for [`READ`], and without its own spans around requests.
fn client(config: Config) -> Result<Client, Error> {
    if let Some(proxy) = config.proxy_url {
        return Err(Error::ProxyProtocolUnsupported { proxy_url: Box::new(proxy) });
    }
    let mut connector = TimeoutConnector::new(config.rustls_https_connector()?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(config.reset_reader_on_write);
    let http = legacy::Client::builder(TokioExecutor::new()).http1_max_buf_size(READ).build(connector);
    let service = ServiceBuilder::new()
        .layer(MapRequestLayer::new(newest))
        .layer(config.base_uri_layer())
        .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// A watch that begins with what there is asks for any state ("0"), however old. A server that lags
/// behind would show us the past, and what is younger would seem to be gone: ask for the newest.
fn newest(mut request: Request<Body>) -> Request<Body> {
    let newer = request.uri().query().and_then(|query| {
        let mut parts: Vec<&str> = query.split('&').collect();
        let any = parts.iter().position(|part| *part == "resourceVersion=0")?;
        parts.contains(&"sendInitialEvents=true").then(|| {
            parts.remove(any);
            format!("{}?{}", request.uri().path(), parts.join("&"))
        })
    });
    if let Some(newer) = newer {
        let mut parts = request.uri().clone().into_parts();
        // Parts of what was an URI a line ago.
        parts.path_and_query = newer.parse().ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// The operator's: there is no way to an API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig.
    #[error("cannot use the kubeconfig {}: {}", path.display(), first_line(error))]
    Kubeconfig {
        /// `--kubeconfig`.
        path: PathBuf,
        /// What is wrong.
        error: KubeconfigError,
    },
    /// Not in a pod.
    #[error(
        "there is no API server around here ({0}): run as a pod with a service account, or say --kubeconfig"
    )]
    Cluster(#[from] InClusterError),
    /// Credentials or certificates.
    #[error("cannot talk to the API server {server}: {error}")]
    Client {
        /// Where it should be.
        server: Uri,
        /// What is wrong.
        error: Box<Error>,
    },
}

/// What follows shows the place in the file, over several lines.
fn first_line(error: &KubeconfigError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(uri: &str) -> String {
        let request = Request::get(uri).body(Body::empty()).unwrap();
        newest(request).uri().to_string()
    }

    #[test]
    fn a_first_state_is_the_newest() {
        assert_eq!(
            asked("https://a/api/v1/pods?watch=true&sendInitialEvents=true&resourceVersion=0"),
            "https://a/api/v1/pods?watch=true&sendInitialEvents=true"
        );
        for as_it_is in ["https://a/api/v1/pods?watch=true&resourceVersion=0", "/api/v1/pods?limit=500"] {
            assert_eq!(asked(as_it_is), as_it_is);
        }
    }
}
