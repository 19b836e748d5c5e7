//! The whole server with a real etcd on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

#[path = "../../kvstore/tests/support/member.rs"]
mod member;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use clustermesh_apiserver::args::ExportArgs;
use clustermesh_apiserver::server::{RunError, Server};
use clustermesh_apiserver::status::Status;
use clustermesh_kvstore::digest::{DigestRecord, SourceTime};
use clustermesh_kvstore::etcd::{EtcdConfig, KeyRange, KeyValue, Session, SessionOptions, WriteOp};
use clustermesh_kvstore::key::{Kind, Layout, data_prefix, digest_key};
use member::{free_ports, member, start};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manifests_become_keys_and_follow_their_files() {
    let bed = TestBed::start().await;
    bed.copy_manifests("shop");
    let server = bed.serve().await;
    server.ready().await;

    let golden = std::fs::read_to_string(testdata("shop.keys")).unwrap();
    assert_eq!(as_text(&bed.data().await), golden);
    for canary in [
        "cilium/state/nodes/v1",
        "cilium/state/services/v1",
        "cilium/state/serviceexports/v1",
        "cilium/state/identities/v1",
        "cilium/state/ip/v1",
        "clustermesh/local/services/v1",
    ] {
        let canary = format!("cilium/synced/alpha/{canary}");
        assert!(bed.session().get(&canary).await.unwrap().is_some(), "{canary}");
    }
    assert!(bed.session().get("cilium/.heartbeat").await.unwrap().is_some());
    let config = bed.session().get("cilium/cluster-config/alpha").await.unwrap().unwrap();
    assert_eq!(
        String::from_utf8(config.value).unwrap(),
        r#"{"id":1,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":false}}"#
    );

    // A change of a file is a change of keys, soon.
    let services = std::fs::read_to_string(testdata("shop/services.yaml")).unwrap();
    let cart = "clustermesh/local/services/v1/alpha/shop/cart";
    let changed = Instant::now();
    bed.replace("services.yaml", &services.replace("affinity: local", "affinity: remote"));
    eventually("the new affinity", async || bed.value(cart).await.contains(r#""affinity":"remote""#)).await;
    let took = changed.elapsed();
    println!("from the file to etcd: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");

    // In place, and slowly, is fine too.
    std::fs::write(bed.manifests.path().join("services.yaml"), services).unwrap();
    eventually("the old affinity", async || bed.value(cart).await.contains(r#""affinity":"local""#)).await;

    // What stands there is stated a moment later, with the times of its changes.
    eventually("the digests", async || bed.misstated().await.is_empty()).await;
    let key = "clustermesh/local/digests/v1/alpha/localservices";
    let changes = async || DigestRecord::decode(bed.value(key).await.as_bytes()).unwrap().recent;
    eventually("the times", async || !changes().await.is_empty()).await;
    let took = changes().await[0].at.seconds_until(SourceTime::now());
    assert!((0.0..60.0).contains(&took), "{took} s");

    // A broken file changes nothing but the count of broken files.
    let before = bed.data().await;
    bed.replace("services.yaml", "kind: Service\n  oops: [");
    eventually("the complaint", async || server.status.progress().broken_inputs == 1).await;
    assert_eq!(bed.data().await, before);
    server.ready().await;

    // A file that is gone takes its objects along.
    std::fs::remove_file(bed.manifests.path().join("services.yaml")).unwrap();
    eventually("no service", async || !bed.data().await.keys().any(|key| key.contains("/services/"))).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_identities_and_writes_nothing() {
    let bed = TestBed::start().await;
    bed.copy_manifests("shop");
    // Labels of cart-3, with a number that no hash would give.
    let golden = std::fs::read_to_string(testdata("shop.keys")).unwrap();
    let labels = golden.lines().find(|line| line.contains("serviceaccount=default;")).unwrap();
    let adopted = "cilium/state/identities/v1/id/70000";
    bed.put(adopted, labels).await;
    // What somebody left behind.
    let stale = "cilium/state/ip/v1/default/10.1.0.99";
    bed.put(
        stale,
        r#"{"IP":"10.1.0.99","Mask":null,"HostIP":"172.18.0.2","ID":70000,"Key":0,"Metadata":""}"#,
    )
    .await;

    let server = bed.serve().await;
    server.ready().await;
    let first = bed.data().await;
    assert!(bed.value("cilium/state/ip/v1/default/10.1.0.13").await.contains(r#""ID":70000,"#));
    assert_eq!(bed.value(adopted).await, labels);
    assert!(!first.contains_key(stale));
    server.stop().await;

    let server = bed.serve().await;
    server.ready().await;
    assert_eq!(bed.data().await, first, "keys, values or revisions differ");
    server.stop().await;

    // With a broken file at the start, nothing that an earlier run has written goes.
    bed.replace("services.yaml", "kind: [");
    let server = bed.serve().await;
    eventually("the complaint", async || {
        let progress = server.status.progress().clone();
        progress.source_synced && progress.broken_inputs == 1
    })
    .await;
    assert!(server.get("/readyz").await.contains("503"), "{}", server.get("/readyz").await);
    assert_eq!(bed.data().await, first);
    bed.copy_manifests("shop");
    server.ready().await;
    assert_eq!(bed.data().await, first);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_cluster_is_synced_and_http_tells() {
    let bed = TestBed::start().await;
    let server = bed.serve().await;
    server.ready().await;
    assert!(bed.data().await.is_empty());
    assert!(server.get("/healthz").await.starts_with("HTTP/1.0 200"));
    assert!(server.get("/readyz").await.starts_with("HTTP/1.0 200"));
    let metrics = server.get("/metrics").await;
    for line in [
        "clustermesh_apiserver_objects{kind=\"Pod\"} 0",
        "clustermesh_apiserver_keys{kind=\"localservices\"} 0",
        "clustermesh_apiserver_etcd_connected 1",
        "clustermesh_apiserver_publisher_pending 0",
        "clustermesh_apiserver_ready 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    // An open connection does not hold up the stop.
    let _scraper = TcpStream::connect(server.http).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_come_later() {
    let mut bed = TestBed::without_etcd();
    bed.copy_manifests("shop");
    let server = bed.serve().await;
    eventually("the reason", async || {
        server.status.unready().is_some_and(|reason| reason.contains("cannot reach etcd"))
    })
    .await;
    bed.start_etcd().await;
    server.ready().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_comes_back_empty_gets_everything_again() {
    let mut bed = TestBed::start().await;
    bed.copy_manifests("shop");
    let server = bed.serve().await;
    server.ready().await;
    bed.etcd = None;
    std::fs::remove_dir_all(bed.state.path().join("etcd")).unwrap();
    // What changes meanwhile arrives too.
    std::fs::remove_file(bed.manifests.path().join("slices.json")).unwrap();
    bed.start_etcd().await;
    let golden = std::fs::read_to_string(testdata("shop.keys")).unwrap();
    let canary = "cilium/synced/alpha/cilium/state/services/v1";
    eventually("the canary", async || !bed.value(canary).await.is_empty()).await;
    let restored = as_text(&bed.data().await);
    let without_ledger = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.contains("ledger")).map(str::to_owned).collect()
    };
    assert_eq!(without_ledger(&restored), without_ledger(&golden));
    let ledger = "clustermesh/local/services/v1/alpha/shop/ledger";
    eventually("no backends", async || bed.value(ledger).await.contains(r#""backends":[]"#)).await;
    server.stop().await;
}

#[test]
fn what_the_operator_got_wrong_is_one_line_and_exit_2() {
    let state = tempfile::tempdir().unwrap();
    let manifests = state.path().to_str().unwrap();
    let good = state.path().join("good.yml~");
    std::fs::write(&good, "endpoints: [http://127.0.0.1:1]\n").unwrap();
    let tls = state.path().join("tls.yml~");
    std::fs::write(&tls, "endpoints: ['https://127.0.0.1:1']\ntrusted-ca-file: /nonexistent/ca.crt\n")
        .unwrap();
    let bad = state.path().join("bad.yml~");
    std::fs::write(&bad, "endpoints: []\n").unwrap();

    for (id, source, etcd, expected) in [
        ("256", manifests, &good, "cluster ID 256 is out of range"),
        ("1", "/nonexistent", &good, "cannot read the manifests in /nonexistent"),
        ("1", manifests, &bad, "`endpoints` is empty"),
        ("1", manifests, &state.path().join("none"), "cannot be read"),
        ("1", manifests, &tls, "`trusted-ca-file` /nonexistent/ca.crt cannot be read"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_clustermesh-apiserver"))
            .args(["--cluster-name", "alpha", "--cluster-id", id])
            .args(["--source", &format!("manifests:{source}"), "--etcd-config"])
            .arg(etcd)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

/// A directory of manifests and an etcd.
struct TestBed {
    manifests: TempDir,
    state: TempDir,
    port: u16,
    etcd: Option<Etcd>,
    session: Option<Session>,
}

impl TestBed {
    async fn start() -> Self {
        let mut bed = Self::without_etcd();
        bed.start_etcd().await;
        bed
    }

    fn without_etcd() -> Self {
        let (manifests, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        Self { manifests, state, port: free_ports().0, etcd: None, session: None }
    }

    async fn start_etcd(&mut self) {
        self.etcd = Some(Etcd::start(&self.state.path().join("etcd"), self.port));
        let config = EtcdConfig::parse(&self.etcd_yaml()).unwrap();
        let deadline = Instant::now() + DEADLINE;
        self.session = loop {
            match Session::connect(&config, SessionOptions::default()).await {
                Ok(session) => break Some(session),
                Err(error) if Instant::now() > deadline => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
    }

    fn etcd_yaml(&self) -> String {
        format!("endpoints: ['http://127.0.0.1:{}']\n", self.port)
    }

    async fn serve(&self) -> Running {
        let config = self.state.path().join("etcd.yml");
        std::fs::write(&config, self.etcd_yaml()).unwrap();
        let source = format!("manifests:{}", self.manifests.path().display());
        let args = ExportArgs::parse_from([
            "clustermesh-apiserver",
            "--cluster-name=alpha",
            "--cluster-id=1",
            "--http-addr=127.0.0.1:0",
            &format!("--source={source}"),
            &format!("--etcd-config={}", config.display()),
        ]);
        let server = Server::start(&args).await.unwrap();
        let (status, http, stop) = (server.status(), server.http_addr().unwrap(), CancellationToken::new());
        let task = tokio::spawn(server.run(stop.clone()));
        Running { status, http, stop, task }
    }

    fn copy_manifests(&self, name: &str) {
        for entry in std::fs::read_dir(testdata(name)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            self.replace(name, &std::fs::read_to_string(&path).unwrap());
        }
    }

    /// Writes elsewhere and renames, as tools that know better do.
    fn replace(&self, name: &str, text: &str) {
        let temporary = self.manifests.path().join(".new");
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, self.manifests.path().join(name)).unwrap();
    }

    fn session(&self) -> &Session {
        self.session.as_ref().expect("etcd was started")
    }

    async fn put(&self, key: &str, value: &str) {
        let op = WriteOp::Put { key: key.into(), value: value.into(), lease: 0 };
        self.session().txn(vec![op]).await.unwrap();
    }

    async fn value(&self, key: &str) -> String {
        let value = self.session().get(key).await.unwrap().map(|kv| kv.value);
        String::from_utf8(value.unwrap_or_default()).unwrap()
    }

    /// All keys but canaries, heartbeat, cluster configuration and digests, with their revisions.
    async fn data(&self) -> BTreeMap<String, KeyValue> {
        let mut data = BTreeMap::new();
        for prefix in ["cilium/state/", "clustermesh/"] {
            let page = self.session().list_page(&KeyRange::of(prefix), None, 10_000, 0).await.unwrap();
            data.extend(page.kvs.into_iter().map(|kv| (String::from_utf8(kv.key.clone()).unwrap(), kv)));
        }
        data.retain(|key, _| !key.contains("/digests/"));
        data
    }

    /// The kinds whose stated digest is not that of what stands there.
    async fn misstated(&self) -> Vec<Kind> {
        let (data, alpha) = (self.data().await, "alpha".parse().unwrap());
        let mut misstated = Vec::new();
        for kind in Kind::ALL {
            let prefix = data_prefix(kind, &alpha, Layout::State);
            let kvs = data.iter().filter_map(|(key, kv)| Some((key.strip_prefix(&prefix)?, &*kv.value)));
            let stated = self.session().get(&digest_key(kind, &alpha, Layout::State)).await.unwrap();
            let stated = stated.map(|kv| DigestRecord::decode(&kv.value).unwrap().digest);
            if stated != Some(kvs.collect()) {
                misstated.push(kind);
            }
        }
        misstated
    }
}

/// A server that runs.
struct Running {
    status: Arc<Status>,
    http: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

impl Running {
    async fn ready(&self) {
        eventually("ready", async || self.status.unready().is_none()).await;
    }

    async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.unwrap().unwrap().unwrap();
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.http).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

/// An etcd with a state of its own, ended when dropped.
struct Etcd(Child);

impl Etcd {
    fn start(state: &Path, port: u16) -> Self {
        let client = format!("http://127.0.0.1:{port}");
        Self(start(&mut member("m", state, &client, free_ports().1)))
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn as_text(data: &BTreeMap<String, KeyValue>) -> String {
    data.iter().fold(String::new(), |text, (key, kv)| {
        text + key + "\n" + std::str::from_utf8(&kv.value).unwrap() + "\n"
    })
}
