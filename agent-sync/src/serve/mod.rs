//! Answers about the agent: gRPC on a unix socket for the CLI, HTTP for probes and Prometheus.
//!
//! Edge. Reads only: the engine's overview, the peers' views, tables as they are installed, and etcds where
//! somebody asks for what the engine does not keep ([`listing`]).

mod encryption;
mod endpoint;
mod explain;
mod grpc;
mod http;
mod listing;
mod metrics;
mod observe;
mod policy;
mod probe;
mod status;

use std::net::SocketAddr;
use std::path::PathBuf;

use clustermesh_kvstore::cluster::MaxConnectedClusters;
use clustermesh_kvstore::import_policy::CurrentPolicy;
use tokio::sync::{mpsc, oneshot, watch};

use crate::engine::{Counted, DumpError, Fill, Overview, Query, Row};
use crate::liveness::Board;
use crate::peers::{Directory, OwnCluster};

pub use encryption::EncryptionView;
pub use grpc::serve as serve_grpc;
pub use http::serve as serve_http;
pub use listing::Desk;
pub use observe::ObserveDesk;

/// Where all answers come from. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Source {
    /// Who we are.
    pub own: OwnCluster,
    /// This node's name.
    pub node_name: String,
    /// `ebpf` or `memory`.
    pub datapath: &'static str,
    /// The engine.
    pub queries: mpsc::Sender<Query>,
    /// The clusters.
    pub directory: Directory,
    /// What they may say.
    pub policy: watch::Receiver<CurrentPolicy>,
    /// Their health.
    pub board: Board,
    /// Encryption between nodes.
    pub encryption: EncryptionView,
    /// Where lists of etcds are asked for.
    pub desk: Desk,
    /// Where flows are observed; none: there are none.
    pub observe: Option<ObserveDesk>,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another agent has the socket.
    #[error("another agent is listening on {}: stop it, or give this one another --grpc-socket", .0.display())]
    SocketInUse(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {}: {source}; correct --grpc-socket", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The address cannot be had.
    #[error("cannot listen on {address}: {source}; correct --http-addr")]
    Address {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A server ended.
    #[error("the {0} server ended: {1}")]
    Ended(&'static str, String),
}

/// The engine has ended; so does the agent.
#[derive(Debug, thiserror::Error)]
#[error("the agent is shutting down")]
struct Gone;

impl Source {
    async fn overview(&self) -> Result<Overview, Gone> {
        let (reply, answer) = oneshot::channel();
        self.queries.send(Query::Overview(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    async fn fills(&self) -> Result<Vec<Fill>, Gone> {
        let (reply, answer) = oneshot::channel();
        self.queries.send(Query::Fills(reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    async fn dump(&self, table: String) -> Result<Result<Vec<Row>, DumpError>, Gone> {
        let (reply, answer) = oneshot::channel();
        self.queries.send(Query::Dump(table, reply)).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    async fn counted(&self) -> anyhow::Result<Option<Counted>> {
        let (reply, answer) = oneshot::channel();
        self.queries.send(Query::Counted(reply)).await.map_err(|_| Gone)?;
        Ok(answer.await.map_err(|_| Gone)??)
    }

    fn max(&self) -> MaxConnectedClusters {
        self.own.max
    }
}
