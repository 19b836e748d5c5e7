use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::{Request, Uri};
use kube::client::{Body, ClientBuilder};
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::util::MapRequestLayer;

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
    let builder = ClientBuilder::try_from(config)
        .map_err(|error| ConnectError::Client { server, error: Box::new(error) })?;
    Ok(builder.with_layer(&MapRequestLayer::new(newest)).build())
}

const CONNECT: Duration = Duration::from_secs(10);

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
        error: Box<kube::Error>,
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
