//! Asking a cluster's kvstoremesh: its `/status` page, over a unix socket.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::terminal::one_line;

/// It answers from memory.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest answer, in bytes: the newest refused keys of hundreds of hostile clusters.
const MAX_ANSWER: u64 = 64 << 20;

/// What a mirror says of itself. Fields that another version does not have are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Mirror {
    pub(crate) version: String,
    pub(crate) ready: bool,
    /// Why not.
    pub(crate) not_ready: String,
    pub(crate) etcd_connected: bool,
    pub(crate) import_policy_error: String,
    /// Clusters that are configured no more and whose data goes.
    pub(crate) removing: u64,
    pub(crate) remotes: Vec<Mirrored>,
}

/// One remote cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Mirrored {
    pub(crate) name: String,
    pub(crate) connected: bool,
    /// Its cluster config.
    pub(crate) accepted: bool,
    /// All of it is in the local etcd.
    pub(crate) mirrored: bool,
    pub(crate) pending_keys: u64,
    pub(crate) error: String,
    pub(crate) kinds: Vec<MirroredKind>,
}

/// One kind of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MirroredKind {
    pub(crate) kind: String,
    pub(crate) records: u64,
    pub(crate) refused_by_reason: BTreeMap<String, u64>,
    pub(crate) audited_by_reason: BTreeMap<String, u64>,
    pub(crate) newest_refused: Vec<Refused>,
}

/// A key that was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Refused {
    pub(crate) key: String,
    pub(crate) reason: String,
    pub(crate) detail: String,
    pub(crate) audited: bool,
}

/// Asks the mirror that listens on `socket`; the refused keys only if they are wanted.
pub(crate) async fn ask(socket: &Path, with_refused: bool) -> Result<Mirror, String> {
    let place = socket.display();
    let body = match timeout(ANSWER, get(socket)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(format!("cannot reach its kvstoremesh at {place}: {error}")),
        Err(_) => {
            return Err(format!("its kvstoremesh at {place} does not answer within {} s", ANSWER.as_secs()));
        }
    };
    let (head, body) = body.split_once("\r\n\r\n").unwrap_or((&body, ""));
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("its kvstoremesh at {place} answers {}", one_line(status)));
    }
    let mut mirror: Mirror = serde_json::from_str(body)
        .map_err(|error| format!("its kvstoremesh at {place} answers with something else: {error}"))?;
    if !with_refused {
        let kinds = mirror.remotes.iter_mut().flat_map(|remote| &mut remote.kinds);
        kinds.for_each(|kind| kind.newest_refused.clear());
    }
    Ok(mirror)
}

/// One request and its answer, as HTTP/1.0 has it: the end of the stream is the end of the answer.
async fn get(socket: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(b"GET /status HTTP/1.0\r\nHost: kvstoremesh\r\n\r\n").await?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn answered(answer: &'static str) -> Result<Mirror, String> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("m.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 512];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /status HTTP/1.0\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let mirror = ask(&socket, false).await;
        server.await.unwrap();
        mirror
    }

    #[tokio::test]
    async fn an_answer_is_read_and_anything_else_is_told() {
        let good = "HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n\
            {\"ready\":true,\"news\":1,\"remotes\":[{\"name\":\"beta\",\"kinds\":[{\"kind\":\"ip\",\"records\":2,\
            \"refused_by_reason\":{\"bad_json\":1},\"newest_refused\":[{\"key\":\"x\"}]}]}]}";
        let mirror = answered(good).await.unwrap();
        assert!(mirror.ready && mirror.remotes[0].kinds[0].refused_by_reason["bad_json"] == 1);
        assert!(mirror.remotes[0].kinds[0].newest_refused.is_empty());
        assert!(answered("HTTP/1.0 404 Not Found\r\n\r\n").await.unwrap_err().contains("404"));
        assert!(answered("").await.unwrap_err().contains("answers"));
        let nobody = ask(Path::new("/nonexistent/m.sock"), false).await.unwrap_err();
        assert!(nobody.contains("cannot reach its kvstoremesh"), "{nobody}");
    }
}
