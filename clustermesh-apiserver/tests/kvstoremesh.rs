//! The whole mirror between real etcds on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

#[path = "../../kvstore/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser as _;
use clustermesh_apiserver::args::KvstoremeshArgs;
use clustermesh_apiserver::kvstoremesh::server::{Kvstoremesh, RunError};
use clustermesh_apiserver::kvstoremesh::status::Status;
use clustermesh_kvstore::etcd::KeyRange;
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions, ReflectorEvent, ReflectorSpec};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use support::{Etcd, eventually, next};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const IP: &str = "cilium/state/ip/v1/default/10.1.0.10";
const DIGESTS: &str = "cilium/cache/digests/";
const MIRRORED_IP: &str = "cilium/cache/ip/v1/alpha/10.1.0.10";
const CONFIG: &str = "cilium/cluster-config/alpha";
const REMOVAL_GRACE: Duration = Duration::from_secs(2);
const CANARIES: &str = "cilium/synced/";

/// A cluster `alpha` as Cilium's exporter wrote it, and the etcd of `beta`, which mirrors it.
struct Bed {
    source: Etcd,
    local: Etcd,
    dir: TempDir,
}

struct Running {
    status: Arc<Status>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

impl Bed {
    async fn start() -> Self {
        let bed = Self {
            source: Etcd::start().await,
            local: Etcd::start().await,
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(bed.remotes()).unwrap();
        std::fs::write(bed.dir.path().join("local"), bed.local.config().to_yaml()).unwrap();
        bed.fill().await;
        bed.configure();
        bed
    }

    fn remotes(&self) -> PathBuf {
        self.dir.path().join("remotes")
    }

    fn configure(&self) {
        std::fs::write(self.remotes().join("alpha"), self.source.config().to_yaml()).unwrap();
    }

    fn remove(&self) {
        std::fs::remove_file(self.remotes().join("alpha")).unwrap();
    }

    async fn fill(&self) {
        for (key, value) in dump(include_str!("../../kvstore/testdata/state-1.17.tsv")) {
            self.source.put(&key, &value).await;
        }
    }

    fn policy(&self, text: &str) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.dir.path().join("policy")).unwrap();
    }

    async fn mirror(&self) -> Running {
        if !self.dir.path().join("policy").exists() {
            self.policy("");
        }
        let kvstoremesh = Kvstoremesh::start(&self.args()).await.unwrap();
        let (status, stop) = (kvstoremesh.status(), CancellationToken::new());
        let task = tokio::spawn(kvstoremesh.run(stop.clone()));
        Running { status, stop, task }
    }

    fn args(&self) -> KvstoremeshArgs {
        KvstoremeshArgs::parse_from([
            "kvstoremesh",
            "--cluster-name=beta",
            "--cluster-id=2",
            &format!("--removal-grace={}s", REMOVAL_GRACE.as_secs()),
            "--relist-interval=1s",
            &format!("--clustermesh-config={}", self.remotes().display()),
            &format!("--import-policy={}", self.dir.path().join("policy").display()),
            &format!("--kvstore-opt=etcd.config={}", self.dir.path().join("local").display()),
            &format!("--status-socket={}", self.socket().display()),
        ])
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("mirror.sock")
    }

    /// What the mirror says on its socket.
    async fn status(&self) -> serde_json::Value {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        stream.write_all(b"GET /status HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200"), "{head}");
        serde_json::from_str(body).unwrap()
    }

    /// All keys with their revisions.
    async fn revisions(&self) -> BTreeMap<String, i64> {
        let page = self.local.session().await.list_page(&KeyRange::of("cilium/"), None, 0, 0).await.unwrap();
        let keys = page.kvs.into_iter().map(|kv| (String::from_utf8(kv.key).unwrap(), kv.mod_revision));
        keys.filter(|(key, _)| !key.starts_with(DIGESTS)).collect()
    }

    /// All that happens to the keys, from now on.
    fn watch(&self) -> mpsc::Receiver<ReflectorEvent> {
        let (connection, _) = Connection::spawn(self.local.config(), ConnectionOptions::default());
        connection.reflect(ReflectorSpec::new("cilium/", None))
    }

    async fn has(&self, key: &str) -> bool {
        !self.local.keys(key).await.is_empty()
    }
}

impl Running {
    async fn ready(&self) {
        eventually("ready", async || self.status.unready().is_none()).await;
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

/// The first value of each key.
fn dump(text: &str) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (key, value) = line.split_once('\t').unwrap();
        keys.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    keys
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_mirrored_is_what_cilium_mirrors() {
    let bed = Bed::start().await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    let mut expected = dump(include_str!("../../kvstore/testdata/cache-1.17.tsv"));
    let mut mirrored = BTreeMap::new();
    for (key, value, lease) in bed.local.keys("cilium/").await {
        assert_ne!(lease, 0, "{key} has no lease");
        mirrored.insert(key, value);
    }
    // Ours alone; they come a moment later.
    mirrored.retain(|key, _| !key.starts_with(DIGESTS));
    // The time at which each was written.
    for keys in [&mut expected, &mut mirrored] {
        for (_, time) in keys.iter_mut().filter(|(key, _)| key.starts_with(CANARIES)) {
            assert_eq!(time.len(), "2026-11-20T20:42:09Z".len(), "{time}");
            time.clear();
        }
    }
    assert_eq!(mirrored, expected);
    mirror.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_touches_no_valid_key_and_deletes_what_vanished() {
    let mut bed = Bed::start().await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    mirror.stop().await;
    let first = bed.revisions().await;

    // Also if the cluster cannot be reached: nothing goes, and what stands is looked after.
    bed.source.kill();
    let mirror = bed.mirror().await;
    eventually("the cluster is missed", async || mirror.status.unready().is_some()).await;
    assert_eq!(bed.revisions().await, first);
    bed.source.run().await;
    mirror.ready().await;
    assert_eq!(bed.revisions().await, first);
    mirror.stop().await;

    bed.source.delete(IP).await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    let mut expected = first;
    assert!(expected.remove(MIRRORED_IP).is_some());
    assert_eq!(bed.revisions().await, expected);
    mirror.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_lost_everything_is_waited_for() {
    let mut bed = Bed::start().await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    let before = bed.revisions().await;
    bed.source.kill();
    bed.source.forget();
    bed.source.run().await;
    // Half filled: the config is there, the records are not.
    let all = dump(include_str!("../../kvstore/testdata/state-1.17.tsv"));
    let (canaries, data): (Vec<_>, Vec<_>) = all.into_iter().partition(|(key, _)| key.starts_with(CANARIES));
    for (key, value) in data.iter().filter(|(key, _)| key != IP) {
        bed.source.put(key, value).await;
    }
    assert_eq!(bed.revisions().await, before);
    for (key, value) in canaries {
        bed.source.put(&key, &value).await;
    }
    eventually("the record goes", async || !bed.has(MIRRORED_IP).await).await;
    let mut expected = before;
    expected.remove(MIRRORED_IP);
    assert_eq!(bed.revisions().await, expected);
    mirror.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_configured_no_more_is_removed_and_may_come_back() {
    let bed = Bed::start().await;
    bed.local.put("cilium/cluster-config/beta", r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#).await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    // What happens only in passing is watched: whoever looks now and then may miss it.
    let mut watched = bed.watch();
    while !matches!(next(&mut watched).await, ReflectorEvent::Synced { .. }) {}
    let removed = Instant::now();
    bed.remove();
    eventually("the config is gone", async || !bed.has(CONFIG).await).await;
    // Configured again at once: it waits for the end of the removal.
    bed.configure();
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let event = next(&mut watched).await;
        let (suffix, there) = match &event {
            ReflectorEvent::Upsert { suffix, .. } => (suffix, true),
            ReflectorEvent::Delete { suffix, .. } => (suffix, false),
            _ => continue,
        };
        let key = format!("cilium/{suffix}");
        if key == CONFIG || key == MIRRORED_IP {
            if key == MIRRORED_IP && !there {
                assert!(removed.elapsed() >= REMOVAL_GRACE, "removed without grace");
            }
            seen.push((key, there));
        }
    }
    seen[2..].sort();
    let expected = [(CONFIG, false), (MIRRORED_IP, false), (MIRRORED_IP, true), (CONFIG, true)];
    let mut expected = expected.map(|(key, there)| (key.to_owned(), there));
    expected[2..].sort();
    assert_eq!(seen, expected);
    let canary = "cilium/synced/alpha/cilium/cache/ip/v1";
    eventually("with its canaries", async || bed.has(canary).await).await;
    mirror.stop().await;

    // Unconfigured while nobody looked.
    bed.remove();
    let mirror = bed.mirror().await;
    eventually("only the own config is left", async || bed.revisions().await.len() == 1).await;
    assert!(bed.has("cilium/cluster-config/beta").await);
    mirror.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_changes_is_obeyed_also_without_the_cluster() {
    let mut bed = Bed::start().await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    let before = bed.revisions().await;
    bed.source.kill();
    bed.policy("clusters: {alpha: {pod-cidrs: [10.99.0.0/16]}}");
    eventually("the address goes", async || !bed.has(MIRRORED_IP).await).await;
    assert!(bed.has(CONFIG).await);
    let still = bed.revisions().await;
    assert!(still.iter().all(|(key, revision)| before.get(key) == Some(revision)), "{before:?}\n{still:?}");
    bed.policy("clusters: {alpha: {mode: audit, pod-cidrs: [10.99.0.0/16]}}");
    bed.source.run().await;
    eventually("it comes back", async || bed.has(MIRRORED_IP).await).await;
    // Whoever asks is told what breaks the rules, on the socket too.
    eventually("it is told", async || {
        let report = bed.status().await;
        let ip = report["remotes"][0]["kinds"].as_array().unwrap().iter().find(|kind| kind["kind"] == "ip");
        let ip = ip.unwrap().clone();
        ip["audited_by_reason"]["outside_pod_cidrs"].as_u64() > Some(0)
            && ip["newest_refused"][0]["audited"] == true
            && ip["records"].as_u64() > Some(0)
            && report["remotes"][0]["mirrored"] == true
    })
    .await;
    let report = bed.status().await;
    assert_eq!((&report["ready"], &report["remotes"][0]["name"]), (&true.into(), &"alpha".into()));
    let mode = std::fs::metadata(bed.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = Kvstoremesh::start(&bed.args()).await.err().unwrap().to_string();
    assert!(error.contains("--status-socket"), "{error}");
    mirror.stop().await;
    assert!(!bed.socket().exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_states_no_digests_is_counted() {
    let bed = Bed::start().await;
    let mirror = bed.mirror().await;
    mirror.ready().await;
    let metrics = || {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Shared(mirror.status.clone())));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    };
    for kind in ["nodes", "services", "identities", "ip"] {
        let line = format!(r#"clustermesh_digest_in_sync{{cluster="alpha",kind="{kind}"}} 1"#);
        eventually(&line, async || metrics().contains(&line)).await;
    }
    let found = metrics();
    assert!(
        !found
            .lines()
            .any(|line| line.starts_with("clustermesh_digest_mismatch_total") && !line.ends_with(" 0")),
        "{found}"
    );
    mirror.stop().await;
}

#[derive(Debug)]
struct Shared(Arc<Status>);

impl Collector for Shared {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        self.0.encode(encoder)
    }
}
