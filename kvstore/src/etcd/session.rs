use std::error::Error as _;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Channel, Client, ConnectOptions, DeleteOptions, Error as EtcdError, GetOptions, LeaseGrantOptions,
    PutOptions, ResponseHeader, SortOrder, SortTarget, Txn, TxnOp, WatchOptions,
};
use rand::seq::SliceRandom;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::diagnose;
use super::watch::WatchStream;
use super::{Credentials, EtcdConfig, KeyRange, SessionError, tls};
use crate::key::HEARTBEAT;

/// The longest reply that is read. A page of 256 records of ordinary size is far below.
const MAX_REPLY: usize = 64 << 20;

/// What etcd says about what a user may not do.
const PERMISSION_DENIED: &str = "permission denied";

/// What etcd says when its users and roles have changed between a request's arrival and its turn. It has done nothing then
/// (`ErrGRPCAuthOldRevision` of etcd's rpctypes).
const RIGHTS_CHANGED: &str = "revision of auth store is old";
/// How often such a request is made again, and the time between.
const REPEATS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Deadlines of a session.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// For TCP and TLS with one endpoint.
    pub connect_timeout: Duration,
    /// For each call.
    pub call_timeout: Duration,
    /// Between HTTP/2 pings, also when idle. etcd takes no more than one in 5 s.
    pub keep_alive_interval: Duration,
    /// For the answer to a ping.
    pub keep_alive_timeout: Duration,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            call_timeout: Duration::from_secs(10),
            keep_alive_interval: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(10),
        }
    }
}

/// A connection to one etcd. Cheap to clone; all clones end together.
#[derive(Clone)]
pub struct Session {
    pub(super) client: Client,
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: String,
    cluster_id: u64,
    revision: i64,
    version: Option<String>,
    call_timeout: Duration,
    /// Why the session ended, once it did.
    end: watch::Sender<Option<SessionError>>,
}

/// A key with its value and where it stands in etcd's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// Key.
    pub key: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
    /// Revision of the last write.
    pub mod_revision: i64,
    /// Lease that it hangs on; 0 for none.
    pub lease: i64,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// In order of their keys.
    pub kvs: Vec<KeyValue>,
    /// There are more behind the last one.
    pub more: bool,
    /// etcd's revision when it answered.
    pub revision: i64,
}

/// A write of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteOp {
    /// Creates or overwrites.
    Put {
        /// Key.
        key: String,
        /// Value.
        value: Vec<u8>,
        /// Lease to hang it on; 0 for none.
        lease: i64,
    },
    /// Deletes; a missing key is fine.
    Delete {
        /// Key.
        key: String,
    },
}

impl Session {
    /// [`Self::open`] with the certificates as they are now.
    ///
    /// # Errors
    /// A file that cannot be read, or that of the last endpoint.
    pub async fn connect(config: &EtcdConfig, options: SessionOptions) -> Result<Self, SessionError> {
        Self::open(&Credentials::load(config.clone())?, options).await
    }

    /// Connects to one of the endpoints, tried in random order, and pins the ID of the etcd that answers.
    ///
    /// # Errors
    /// That of the last endpoint.
    pub async fn open(credentials: &Credentials, options: SessionOptions) -> Result<Self, SessionError> {
        let mut endpoints = credentials.config().endpoints.clone();
        endpoints.shuffle(&mut rand::rng());
        let mut failure = SessionError::Unreachable { endpoints: String::new(), reason: "none given".into() };
        for endpoint in &endpoints {
            match Self::connect_to(endpoint, credentials, options).await {
                Ok(session) => return Ok(session),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn connect_to(
        endpoint: &str,
        credentials: &Credentials,
        options: SessionOptions,
    ) -> Result<Self, SessionError> {
        let config = credentials.config();
        let tls = match endpoint.starts_with("https://") {
            true => Some(Arc::new(credentials.tls()?)),
            false => None,
        };
        let mut connect = ConnectOptions::new().with_require_leader(true);
        if let (Some(user), Some(password)) = (&config.username, &config.password) {
            connect = connect.with_user(user.clone(), password.clone());
        }
        let dial = async {
            let channel = tls::channel(endpoint, tls.clone(), options).await?;
            let mut client = Client::from_channel(Channel::Tonic(channel), Some(connect)).await?;
            let (header, version) = greet(&mut client).await?;
            Ok::<_, EtcdError>((client, header, version))
        };
        let failure = match timeout(options.connect_timeout, dial).await {
            Ok(Ok((client, header, version))) => {
                let shared = Shared {
                    endpoint: endpoint.to_owned(),
                    cluster_id: header.cluster_id(),
                    revision: header.revision(),
                    version,
                    call_timeout: options.call_timeout,
                    end: watch::Sender::new(None),
                };
                return Ok(Self { client, shared: Arc::new(shared) });
            }
            Ok(Err(error)) => classify(HEARTBEAT, error),
            Err(_) => SessionError::Timeout { what: "connect".into(), after: options.connect_timeout },
        };
        if !matches!(failure, SessionError::Lost(_) | SessionError::Timeout { .. }) {
            return Err(failure);
        }
        // gRPC knows that it failed; ask again by hand why.
        let (address, wait) = (endpoint.to_owned(), options.connect_timeout);
        let diagnosis = tokio::task::spawn_blocking(move || diagnose::dial(&address, tls, wait)).await;
        Err(diagnosis.ok().flatten().unwrap_or_else(|| SessionError::Unreachable {
            endpoints: endpoint.to_owned(),
            reason: format!("{failure}; something answers there, but not as an etcd does"),
        }))
    }

    /// ID of the etcd cluster; all replies of this session come from it.
    pub fn cluster_id(&self) -> u64 {
        self.shared.cluster_id
    }

    /// etcd's revision when the session began.
    pub fn revision(&self) -> i64 {
        self.shared.revision
    }

    /// etcd's version, if it tells: 3.5.28 to 3.5.30 and 3.6 up to May 2026 tell only users with the role
    /// `root` (etcd-io/etcd#21663).
    pub fn version(&self) -> Option<&str> {
        self.shared.version.as_deref()
    }

    /// The endpoint that this session is with.
    pub fn endpoint(&self) -> &str {
        &self.shared.endpoint
    }

    /// Waits until the session ends.
    pub async fn ended(&self) -> SessionError {
        let mut end = self.shared.end.subscribe();
        let ended = end.wait_for(Option::is_some).await;
        // The sender lives as long as `self`.
        ended.ok().and_then(|end| end.clone()).unwrap_or_else(|| SessionError::Lost("session dropped".into()))
    }

    /// Ends the session for all who use it. Only the first reason counts.
    pub fn end(&self, reason: SessionError) {
        self.shared.end.send_if_modified(|end| {
            let first = end.is_none();
            end.get_or_insert(reason);
            first
        });
    }

    /// Reads one key.
    ///
    /// # Errors
    /// See [`SessionError`]; so in all calls below.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>, SessionError> {
        Ok(self.list_page(&KeyRange::Key(key.into()), None, 1, 0).await?.kvs.pop())
    }

    /// Reads up to `limit` keys of a range, behind the key `after`, as of `revision` (0: as of now).
    pub async fn list_page(
        &self,
        range: &KeyRange,
        after: Option<&[u8]>,
        limit: i64,
        revision: i64,
    ) -> Result<Page, SessionError> {
        let from = after.map_or_else(|| range.start().as_bytes().to_vec(), |after| [after, b"\0"].concat());
        let options = GetOptions::new()
            .with_range(range.end())
            .with_limit(limit)
            .with_revision(revision)
            .with_sort(SortTarget::Key, SortOrder::Ascend);
        let client = self.client.kv_client().max_decoding_message_size(MAX_REPLY);
        let get = || {
            let (mut client, from, options) = (client.clone(), from.clone(), options.clone());
            async move { client.get(from, Some(options)).await }
        };
        let mut reply = self.call(range.start(), settled(get), |reply| reply.header().cloned()).await?;
        let revision = reply.header().map_or(0, ResponseHeader::revision);
        let more = reply.more();
        let kvs = reply.take_kvs().into_iter().map(KeyValue::from).collect();
        Ok(Page { kvs, more, revision })
    }

    /// Does all writes at once. Gives the new revision.
    pub async fn txn(&self, ops: Vec<WriteOp>) -> Result<i64, SessionError> {
        let what = match ops.first() {
            Some(WriteOp::Put { key, .. } | WriteOp::Delete { key }) => key.clone(),
            None => return Ok(self.shared.revision),
        };
        let ops: Vec<_> = ops.into_iter().map(TxnOp::from).collect();
        let txn = Txn::new().and_then(ops);
        let call = || {
            let (mut client, txn) = (self.client.kv_client(), txn.clone());
            async move { client.txn(txn).await }
        };
        let reply = self.call(&what, settled(call), |reply| reply.header().cloned()).await?;
        Ok(reply.header().map_or(0, ResponseHeader::revision))
    }

    /// Deletes all keys of a range.
    pub async fn delete_range(&self, range: &KeyRange) -> Result<(), SessionError> {
        let options = DeleteOptions::new().with_range(range.end());
        let mut client = self.client.kv_client();
        let delete = client.delete(range.start(), Some(options));
        self.call(range.start(), delete, |reply| reply.header().cloned()).await.map(drop)
    }

    /// Watches a range from `revision` on. The first message is [`super::WatchMessage::Created`].
    pub async fn watch(&self, range: &KeyRange, revision: i64) -> Result<WatchStream, SessionError> {
        let options = WatchOptions::new().with_start_revision(revision).with_range(range.end());
        let mut client = self.client.watch_client().max_decoding_message_size(MAX_REPLY);
        let stream = self.call(range.start(), client.watch(range.start(), Some(options)), |_| None).await?;
        Ok(WatchStream::new(stream, self.clone(), range.start().to_owned(), self.shared.call_timeout))
    }

    /// Grants a lease. Gives its ID.
    pub async fn lease_grant(&self, ttl: Duration) -> Result<i64, SessionError> {
        let ttl = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let mut client = self.client.lease_client();
        let grant = client.grant(ttl, None::<LeaseGrantOptions>);
        let reply = self.call("a lease", grant, |reply| reply.header().cloned()).await?;
        Ok(reply.id())
    }

    /// Renews a lease.
    pub async fn lease_keep_alive(&self, id: i64) -> Result<(), SessionError> {
        let mut client = self.client.lease_client();
        self.call("a lease's renewal", client.keep_alive(id), |_| None).await.map(drop)
    }

    /// Finds out whether etcd answers and has a quorum. Its status would not tell: a member that has lost the
    /// others still gives that.
    pub async fn ping(&self) -> Result<(), SessionError> {
        let mut client = self.client.kv_client();
        let pong = client.get(HEARTBEAT, Some(GetOptions::new().with_keys_only()));
        match self.call(HEARTBEAT, pong, |reply| reply.header().cloned()).await {
            // It judges rights only once it knows that it is up to date.
            Err(SessionError::PermissionDenied { .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Compares the ID in a reply with the pinned one.
    pub(super) fn check_header(&self, header: &ResponseHeader) -> Result<(), SessionError> {
        let (was, now) = (self.shared.cluster_id, header.cluster_id());
        if now == was {
            return Ok(());
        }
        let error = SessionError::ClusterIdChanged { was, now };
        self.end(error.clone());
        Err(error)
    }

    /// Translates an error and ends the session if it cannot go on.
    pub(super) fn failed(&self, what: &str, error: EtcdError) -> SessionError {
        let error = classify(what, error);
        if error.is_fatal() {
            self.end(error.clone());
        }
        error
    }

    pub(super) async fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, EtcdError>>,
        header: impl Fn(&T) -> Option<ResponseHeader>,
    ) -> Result<T, SessionError> {
        if let Some(ended) = self.shared.end.borrow().clone() {
            return Err(ended);
        }
        let answer = tokio::select! {
            answer = timeout(self.shared.call_timeout, call) => answer,
            error = self.ended() => return Err(error),
        };
        match answer {
            Ok(Ok(reply)) => {
                header(&reply).map_or(Ok(()), |header| self.check_header(&header))?;
                Ok(reply)
            }
            Ok(Err(error)) => Err(self.failed(what, error)),
            Err(_) => {
                let error = SessionError::Timeout { what: what.to_owned(), after: self.shared.call_timeout };
                self.end(error.clone());
                Err(error)
            }
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({} {:x})", self.shared.endpoint, self.shared.cluster_id)
    }
}

impl From<etcd_client::KeyValue> for KeyValue {
    fn from(kv: etcd_client::KeyValue) -> Self {
        let (mod_revision, lease) = (kv.mod_revision(), kv.lease());
        let (key, value) = kv.into_key_value();
        Self { key, value, mod_revision, lease }
    }
}

impl From<WriteOp> for TxnOp {
    fn from(op: WriteOp) -> Self {
        match op {
            WriteOp::Put { key, value, lease } => {
                Self::put(key, value, Some(PutOptions::new().with_lease(lease)))
            }
            WriteOp::Delete { key } => Self::delete(key, None),
        }
    }
}

/// The first words with an etcd: which one it is, at which revision, and its version if it tells.
///
/// Asked for is the one key that every role of a mesh may read. etcd's status is no substitute: some refuse
/// it to all but root, whatever the method of authentication.
async fn greet(client: &mut Client) -> Result<(ResponseHeader, Option<String>), EtcdError> {
    let heartbeat = settled(|| {
        let mut client = client.clone();
        async move { client.get(HEARTBEAT, Some(GetOptions::new().with_keys_only())).await }
    });
    let heartbeat = heartbeat.await;
    let status = client.status().await;
    let version = status.as_ref().ok().map(|status| status.version().to_owned());
    let header = match heartbeat {
        Ok(reply) => reply.header().cloned(),
        // Another role than a mesh's.
        Err(denied) if is_denied(&denied) => status.map_err(|_| denied)?.header().cloned(),
        Err(error) => return Err(error),
    };
    header.map(|header| (header, version)).ok_or_else(|| {
        EtcdError::GRpcStatus(tonic::Status::data_loss("the reply has no header: that is not an etcd"))
    })
}

fn is_denied(error: &EtcdError) -> bool {
    says(error, PERMISSION_DENIED)
}

fn says(error: &EtcdError, text: &str) -> bool {
    matches!(error, EtcdError::GRpcStatus(status) if status.message().contains(text))
}

/// The answer of a call that is made again when etcd's users and roles have changed under it.
async fn settled<T, F: Future<Output = Result<T, EtcdError>>>(call: impl Fn() -> F) -> Result<T, EtcdError> {
    for _ in 0..REPEATS {
        match call().await {
            Err(error) if says(&error, RIGHTS_CHANGED) => sleep(PAUSE).await,
            other => return other,
        }
    }
    call().await
}

fn classify(what: &str, error: EtcdError) -> SessionError {
    let status = match error {
        EtcdError::GRpcStatus(status) => status,
        EtcdError::LeaseKeepAliveError(reason) if reason.contains("not found") => {
            return SessionError::LeaseNotFound;
        }
        EtcdError::TransportError(error) => return SessionError::Lost(diagnose::explain(&error)),
        other => return SessionError::Lost(other.to_string()),
    };
    let message = status.message().to_owned();
    // By its text where etcd has no code of its own; texts are those of etcd's rpctypes.
    if message.contains(PERMISSION_DENIED) {
        SessionError::PermissionDenied { what: what.to_owned() }
    } else if message.contains("required revision has been compacted") {
        SessionError::Compacted { revision: 0 }
    } else if message.contains("requested lease not found") {
        SessionError::LeaseNotFound
    } else if message.contains("authentication failed") || message.contains("invalid auth token") {
        SessionError::Unauthenticated { reason: message }
    } else if message.contains("larger than max") {
        // gRPC's own limit on the server's side, above that of etcd.
        SessionError::Refused(message)
    } else if status.source().is_some() {
        SessionError::Lost(diagnose::explain(&status))
    } else if message.contains("etcdserver:") {
        match message.contains("too large") || message.contains("too many operations") {
            true => SessionError::Refused(message),
            false => SessionError::Unavailable(message),
        }
    } else {
        SessionError::Lost(if message.is_empty() { status.code().to_string() } else { message })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// As often as it is called: etcd says so many times that rights have changed, then `last`.
    async fn calls(refusals: u32, last: &str) -> (u32, Result<(), SessionError>) {
        let called = Cell::new(0);
        let outcome = settled(|| {
            called.set(called.get() + 1);
            let said = match called.get() {
                n if n <= refusals => "etcdserver: revision of auth store is old",
                _ => last,
            };
            let refused = |said: &str| EtcdError::GRpcStatus(tonic::Status::invalid_argument(said));
            std::future::ready(if said.is_empty() { Ok(()) } else { Err(refused(said)) })
        });
        let outcome = outcome.await.map_err(|error| classify("key", error));
        (called.get(), outcome)
    }

    #[tokio::test(start_paused = true)]
    async fn what_rights_have_changed_under_is_asked_again_and_nothing_else_is() {
        assert_eq!(calls(0, "").await, (1, Ok(())));
        assert_eq!(calls(3, "").await, (4, Ok(())));
        let full = "etcdserver: mvcc: database space exceeded";
        assert_eq!(calls(1, full).await, (2, Err(SessionError::Unavailable(full.into()))));
        let (called, outcome) = calls(u32::MAX, "").await;
        assert!(called == REPEATS + 1 && matches!(outcome, Err(SessionError::Unavailable(_))), "{outcome:?}");
    }
}
