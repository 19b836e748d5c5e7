//! The CLI's server.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::pin::Pin;

use clustermesh_agent_api::v1;
use clustermesh_agent_api::v1::agent_server::{Agent, AgentServer};
use futures::{Stream, stream};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::observe::Flows;
use super::{Gone, ServeError, Source, probe};
use crate::engine::{DumpError, Row};

/// Listens on `socket` (in place of one that a dead agent left) and serves until `stop`.
///
/// # Errors
/// At once if the socket cannot be had; the future that is given back tells how serving ended.
pub async fn serve(
    source: Source,
    socket: &Path,
    stop: CancellationToken,
) -> Result<impl Future<Output = Result<(), ServeError>> + use<>, ServeError> {
    let listener = listen(socket).await?;
    let path = socket.to_path_buf();
    Ok(async move {
        let served = tonic::transport::Server::builder()
            .add_service(AgentServer::new(Service { source }))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled())
            .await;
        // It may be gone already.
        let _ = std::fs::remove_file(path);
        served.map_err(|error| ServeError::Ended("gRPC", error.to_string()))
    })
}

async fn listen(socket: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Socket { path: socket.into(), source };
    if UnixStream::connect(socket).await.is_ok() {
        return Err(ServeError::SocketInUse(socket.into()));
    }
    if let Some(parent) = socket.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    // Bound under a name that nobody knows, and given its own only once none but us may connect.
    let unnamed = socket.with_extension("tmp");
    let _ = std::fs::remove_file(&unnamed);
    let listener = UnixListener::bind(&unnamed).map_err(failed)?;
    std::fs::set_permissions(&unnamed, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&unnamed, socket).map_err(failed)?;
    Ok(listener)
}

struct Service {
    source: Source,
}

#[tonic::async_trait]
impl Agent for Service {
    type DumpTableStream = Pin<Box<dyn Stream<Item = Result<v1::DumpTableRow, Status>> + Send>>;

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(self.source.status(request.into_inner().with_refused).await?))
    }

    async fn dump_table(
        &self,
        request: Request<v1::DumpTableRequest>,
    ) -> Result<Response<Self::DumpTableStream>, Status> {
        let rows = self.source.dump(request.into_inner().table).await?.map_err(|error| match error {
            DumpError::Unknown(_) => Status::invalid_argument(error.to_string()),
            DumpError::Unreadable(_) => Status::internal(error.to_string()),
        })?;
        Ok(Response::new(Box::pin(stream::iter(rows.into_iter().map(|row| Ok(message(row)))))))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        Ok(Response::new(self.source.explain(request.into_inner()).await?))
    }

    async fn check_policy(
        &self,
        request: Request<v1::CheckPolicyRequest>,
    ) -> Result<Response<v1::CheckPolicyResponse>, Status> {
        Ok(Response::new(self.source.check_policy(request.into_inner()).await?))
    }

    type ObserveStream = Flows;

    async fn observe(
        &self,
        request: Request<v1::ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        Ok(Response::new(self.source.observe(request.into_inner())?))
    }

    async fn rotate_key(
        &self,
        _: Request<v1::RotateKeyRequest>,
    ) -> Result<Response<v1::RotateKeyResponse>, Status> {
        Ok(Response::new(self.source.rotate_key().await?))
    }

    async fn probe_peer(
        &self,
        request: Request<v1::ProbePeerRequest>,
    ) -> Result<Response<v1::ProbePeerResponse>, Status> {
        Ok(Response::new(probe::probe(request.into_inner(), self.source.max()).await))
    }
}

impl From<Gone> for Status {
    fn from(gone: Gone) -> Self {
        Self::unavailable(gone.to_string())
    }
}

pub(super) fn message(row: Row) -> v1::DumpTableRow {
    let columns = row.into_iter().map(|(name, value)| v1::Column { name: name.to_owned(), value });
    v1::DumpTableRow { columns: columns.collect() }
}
