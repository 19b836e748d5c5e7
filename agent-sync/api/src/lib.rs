//! The agent's gRPC API and how to reach an agent over its unix socket.
#![forbid(unsafe_code)]

use std::path::Path;

use tonic::transport::{Channel, Endpoint, Uri};

/// Generated messages, client and server of `clustermesh.agent.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, rust_2018_idioms)]
pub mod v1 {
    tonic::include_proto!("clustermesh.agent.v1");
}

/// A client of one agent.
pub type Client = v1::agent_client::AgentClient<Channel>;

/// Longest answer in bytes: a status with all keys that hundreds of hostile clusters had refused.
const MAX_ANSWER: usize = 64 << 20;

/// Connects to the agent that listens on `socket`.
///
/// # Errors
/// If nothing listens there, or it does not answer within five seconds.
pub async fn connect(socket: &Path) -> Result<Client, tonic::transport::Error> {
    let path = socket.to_path_buf();
    // The URI is never resolved: the connector below goes to the socket whatever it says.
    let channel = Endpoint::from_static("http://agent.invalid")
        .connect_timeout(std::time::Duration::from_secs(5))
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await?;
    Ok(v1::agent_client::AgentClient::new(channel).max_decoding_message_size(MAX_ANSWER))
}
