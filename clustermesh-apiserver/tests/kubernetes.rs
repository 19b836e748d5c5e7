//! The source with an API server that is not one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clustermesh_apiserver::export::{Cluster as Exported, Exporter, KeyChange, Rules};
use clustermesh_apiserver::identity::Allocator;
use clustermesh_apiserver::objects::ObjectKind;
use clustermesh_apiserver::source::SourceEvent;
use clustermesh_apiserver::source::kubernetes::{self, KINDS};
use clustermesh_kvstore::cluster::{ClusterId, MaxConnectedClusters};
use fake_kube::{Cluster, Gone, Load, Server};
use serde_json::{Value, json};
use tokio::sync::mpsc;

const DEADLINE: Duration = Duration::from_secs(30);
/// How often the tests' sources ask which of Cilium's kinds there are.
const LOOK: Duration = Duration::from_millis(20);

/// Byte for byte what Cilium's exporter wrote about the cluster that these are the objects of.
#[tokio::test]
async fn cilium_objects_become_what_cilium_writes() {
    for streams in [true, false] {
        let cluster = Cluster::new();
        cluster.install_cilium();
        cluster.faults(|faults| faults.no_streams = !streams);
        for list in ["namespaces", "nodes", "pods", "ciliumidentities", "ciliumendpoints", "ciliumnodes"] {
            cluster.apply(&recorded(list));
        }
        for object in manifest("cilium/alpha.yaml") {
            cluster.apply(&object);
        }
        let bed = Bed::synced(&cluster).await;
        let expected = std::fs::read_to_string(testdata("cilium/state.keys")).unwrap();
        similar(&bed.text("cilium/state/"), &expected);
        let streamed = cluster.requests().iter().any(|request| request.contains("limit="));
        assert_eq!(streamed, !streams);
    }
}

/// Slices say the same as the endpoints that they are made of.
#[tokio::test]
async fn endpoint_slices_stand_in_for_endpoints() {
    let cluster = Cluster::new();
    cluster.install_cilium();
    for list in ["namespaces", "ciliumidentities", "ciliumnodes"] {
        cluster.apply(&recorded(list));
    }
    let core = |endpoint: &Value| {
        let status = &endpoint["status"];
        json!({
            "name": endpoint["metadata"]["name"], "id": status["identity"]["id"],
            "networking": status["networking"], "encryption": status["encryption"],
        })
    };
    let endpoints: Vec<Value> =
        recorded("ciliumendpoints")["items"].as_array().unwrap().iter().map(core).collect();
    cluster.apply(&json!({
        "apiVersion": "cilium.io/v2alpha1", "kind": "CiliumEndpointSlice", "metadata": {"name": "ces-1"},
        "namespace": "shop", "endpoints": endpoints,
    }));
    let bed = Bed::synced(&cluster).await;
    let expected = std::fs::read_to_string(testdata("cilium/state.keys")).unwrap();
    let lines: Vec<&str> = expected.lines().collect();
    let ips = lines.chunks(2).filter(|pair| pair[0].contains("/ip/"));
    let expected: String = ips.map(|pair| format!("{}\n{}\n", pair[0], pair[1])).collect();
    similar(&bed.text("cilium/state/ip/"), &expected);
}

/// Without Cilium, an API server is a cluster like manifests are.
#[tokio::test]
async fn a_plain_cluster_is_exported_as_its_manifests_are() {
    let cluster = Cluster::new();
    let mut exporter = exporter();
    for list in ["namespaces", "nodes", "pods", "services", "endpointslices"] {
        let list = recorded(list);
        let objects = clustermesh_apiserver::source::manifests::parse(&list.to_string()).unwrap();
        let upserts = objects.into_iter().map(clustermesh_apiserver::objects::Change::Upsert);
        exporter.apply(upserts.collect(), Instant::now());
        cluster.apply(&list);
    }
    let bed = Bed::synced(&cluster).await;
    assert!(bed.text("cilium/state/services/").contains("shop/orders"));
    assert!(bed.text("cilium/state/ip/").contains("10.1.0.10"));
    similar(&bed.text(""), &text(&keys(&exporter), ""));
}

/// The edits that a real server told of: not ready, annotated, labelled, a pod and a service deleted.
#[tokio::test]
async fn a_recorded_watch_ends_where_the_server_was() {
    let cluster = Cluster::new();
    for list in ["namespaces", "nodes", "pods", "services", "endpointslices"] {
        cluster.apply(&recorded(list));
    }
    let mut bed = Bed::synced(&cluster).await;
    let mut slices = BTreeMap::new();
    for line in std::fs::read_to_string(testdata("kubernetes/watch-endpointslices.jsonl")).unwrap().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let name = event["object"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        match event["type"].as_str().unwrap() {
            "DELETED" => {
                slices.remove(&name);
                cluster.delete("endpointslices", "shop", &name);
            }
            "BOOKMARK" => cluster.bookmark(),
            _ => {
                slices.insert(name, event["object"].clone());
                cluster.apply(&event["object"]);
            }
        }
    }
    bed.converge(&cluster).await;
    let left = slices.values().filter(|slice| slice["metadata"]["namespace"] == "shop").count();
    assert!(left < 3, "{slices:?}");
}

/// Whatever happens to watches, lists and connections: in the end the keys are those of the objects, and
/// what was there all the time never went.
#[tokio::test]
async fn faults_pass_without_a_trace() {
    for seed in 0..12 {
        let mut random = Random(seed + 1);
        let cluster = Cluster::new();
        cluster.install_cilium();
        let load =
            Load { nodes: 3, identities: 4, endpoints: 30, services: 3, backends: 4, cilium: seed % 2 == 0 };
        load.apply(&cluster);
        cluster.faults(|faults| {
            faults.no_streams = random.below(2) == 0;
            faults.gone = if random.below(2) == 0 { Gone::Status } else { Gone::Event };
        });
        let mut bed = Bed::synced(&cluster).await;
        // Objects below 10 stay, with their keys.
        let steady: BTreeSet<String> = bed.keys.keys().filter(|key| is_steady(key)).cloned().collect();
        assert!(steady.len() > 10, "{steady:?}");
        for _ in 0..60 {
            let index = 10 + random.below(30);
            match random.below(12) {
                0 => cluster.expire(),
                1 => cluster.cut(),
                2 => cluster.bookmark(),
                3 => {
                    cluster.cut();
                    cluster.expire();
                }
                4 => cluster.faults(|faults| faults.held = ["pods".to_owned()].into()),
                5 => cluster.faults(|faults| faults.held.clear()),
                6 => cluster.faults(|faults| faults.no_streams = !faults.no_streams),
                7 => cluster.delete("pods", "bench", &format!("pod-{index}")),
                8 => cluster.delete("ciliumendpoints", "bench", &format!("pod-{index}")),
                9 => cluster.apply(&load.slice(random.below(3), random.below(5))),
                _ if load.cilium => cluster.apply(&load.endpoint(index, random.below(16))),
                _ => cluster.apply(&load.pod(index)),
            }
            if random.below(3) == 0 {
                bed.settle(Duration::from_millis(u64::try_from(random.below(30)).unwrap())).await;
            }
        }
        cluster.faults(|faults| faults.held.clear());
        bed.converge(&cluster).await;
        let lost: Vec<&String> = bed.deleted.iter().filter(|key| steady.contains(*key)).collect();
        assert!(lost.is_empty(), "seed {seed}: {lost:?} were deleted");
    }
}

#[tokio::test]
async fn nothing_is_told_before_every_kind_is_listed() {
    let cluster = Cluster::new();
    for list in ["namespaces", "nodes", "pods", "services", "endpointslices"] {
        cluster.apply(&recorded(list));
    }
    cluster.faults(|faults| faults.held = ["endpointslices".to_owned()].into());
    let mut bed = Bed::start(&cluster).await;
    eventually("the other kinds", async || {
        let requests = cluster.requests();
        ["pods", "services", "nodes", "namespaces"]
            .iter()
            .all(|kind| requests.iter().any(|request| request.contains(&format!("/{kind}?"))))
    })
    .await;
    bed.settle(Duration::from_millis(50)).await;
    assert!(bed.keys.is_empty() && !bed.is_synced);
    cluster.faults(|faults| faults.held.clear());
    bed.until_synced().await;
    bed.converge(&cluster).await;
}

#[tokio::test]
async fn cilium_may_come_and_go() {
    let cluster = Cluster::new();
    let load = Load { nodes: 2, identities: 2, endpoints: 4, services: 1, backends: 2, cilium: false };
    load.apply(&cluster);
    let mut bed = Bed::synced(&cluster).await;
    assert_eq!(bed.exporter.object_count(ObjectKind::CiliumNode), 0);
    Load { cilium: true, ..load }.apply(&cluster);
    bed.until("Cilium's objects", |bed| bed.exporter.object_count(ObjectKind::CiliumEndpoint) == 4).await;
    cluster.remove_cilium();
    bed.until("their end", |bed| bed.exporter.object_count(ObjectKind::CiliumEndpoint) == 0).await;
    Load { cilium: true, ..load }.apply(&cluster);
    bed.until("their return", |bed| bed.exporter.object_count(ObjectKind::CiliumEndpoint) == 4).await;
}

/// Where Cilium runs, pods are none of our business; once it has gone, nothing is drawn from that before the
/// pods are known.
#[tokio::test]
async fn pods_are_read_only_without_cilium() {
    let cluster = Cluster::new();
    let load = Load { nodes: 2, identities: 2, endpoints: 4, services: 1, backends: 2, cilium: true };
    load.apply(&cluster);
    let reads_pods = || cluster.requests().iter().any(|request| request.contains("/api/v1/pods?"));
    let mut bed = Bed::synced(&cluster).await;
    assert_eq!(bed.exporter.object_count(ObjectKind::CiliumEndpoint), 4);
    assert!(!reads_pods());

    cluster.faults(|faults| faults.held = ["pods".to_owned()].into());
    cluster.remove_cilium();
    eventually("a request for pods", async || reads_pods()).await;
    bed.settle(Duration::from_millis(50)).await;
    let left = ObjectKind::ALL.iter().filter(|kind| kind.as_str().starts_with("Cilium"));
    assert!(left.map(|kind| bed.exporter.object_count(*kind)).sum::<usize>() > 0);
    cluster.faults(|faults| faults.held.clear());
    bed.until("the pods", |bed| bed.exporter.object_count(ObjectKind::Pod) == 4).await;
    bed.until("Cilium's end", |bed| bed.exporter.object_count(ObjectKind::CiliumEndpoint) == 0).await;
}

const POLICIES: &str = "clustermesh/local/policies/v1/alpha/";

/// Kubernetes' policies are always there; Cilium's may be unknown, come later, and be there without Cilium.
#[tokio::test]
async fn policies_come_change_and_go() {
    let cluster = Cluster::new();
    let load = Load { nodes: 2, identities: 2, endpoints: 4, services: 1, backends: 2, cilium: false };
    load.apply(&cluster);
    cluster.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": "db"}, "spec": {"podSelector": {}},
    }));
    let mut bed = Bed::synced(&cluster).await;
    assert!(bed.keys.contains_key(&format!("{POLICIES}knp/shop/db")));

    cluster.install_cilium_policies();
    let cilium = |name: &str, port: &str| {
        json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
            "metadata": {"namespace": "shop", "name": name, "managedFields": [{"manager": "kubectl"}]},
            "spec": {
                "endpointSelector": {"matchLabels": {"app": "web"}},
                "ingress": [{"toPorts": [{"ports": [{"port": port, "protocol": "TCP"}]}]}],
            },
        })
    };
    let clusterwide = json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy", "metadata": {"name": "all"},
        "spec": {"endpointSelector": {}, "ingress": [{"fromEntities": ["cluster"]}]},
    });
    cluster.apply(&cilium("web", "80"));
    cluster.apply(&clusterwide);
    bed.until("Cilium's policies", |bed| {
        bed.has_policy("cnp/shop/web", r#""first":80"#) && bed.has_policy("ccnp//all", "cluster")
    })
    .await;
    // They do not stand in for pods.
    assert_eq!(bed.exporter.object_count(ObjectKind::Pod), 4);
    assert!(bed.text("cilium/state/ip/").contains("10.1.0."));

    cluster.apply(&cilium("web", "81"));
    bed.until("the other port", |bed| bed.has_policy("cnp/shop/web", r#""first":81"#)).await;
    cluster.delete("networkpolicies", "shop", "db");
    bed.until("the end of one", |bed| !bed.has_policy("knp/shop/db", "")).await;
    cluster.cut();
    cluster.expire();
    cluster.apply(&cilium("till", "80"));
    bed.until("another one", |bed| bed.has_policy("cnp/shop/till", "")).await;
    bed.converge(&cluster).await;
    cluster.remove_cilium();
    bed.until("the end of Cilium's", |bed| bed.text(POLICIES).is_empty()).await;
    assert_eq!(bed.exporter.object_count(ObjectKind::Pod), 4);
}

#[tokio::test]
async fn who_may_not_read_is_told_what_to_do() {
    let cluster = Cluster::new();
    cluster.install_cilium();
    cluster.faults(|faults| faults.forbidden = ["ciliumendpoints".to_owned()].into());
    let mut bed = Bed::start(&cluster).await;
    bed.until("the complaint", |bed| bed.trouble.is_some()).await;
    let trouble = bed.trouble.clone().unwrap();
    assert!(
        trouble.contains("ciliumendpoints") && trouble.contains("deploy/kubernetes/rbac.yaml"),
        "{trouble}"
    );
    assert!(!bed.is_synced);
    cluster.faults(|faults| faults.forbidden.clear());
    bed.until("synced", |bed| bed.is_synced && bed.trouble.is_none()).await;
}

#[tokio::test]
async fn an_api_server_may_come_later() {
    let cluster = Cluster::new();
    let reserved = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = reserved.local_addr().unwrap();
    drop(reserved);
    let mut bed = Bed::at(addr).await;
    bed.until("the complaint", |bed| bed.trouble.is_some()).await;
    let trouble = bed.trouble.clone().unwrap();
    assert!(trouble.contains("the API server does not answer: "), "{trouble}");
    bed.server = Some(Server::start(cluster, addr).await.unwrap());
    bed.until("synced", |bed| bed.is_synced && bed.trouble.is_none()).await;
}

#[test]
fn what_the_operator_got_wrong_is_one_line_and_exit_2() {
    let state = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(state.path().join(name), text).unwrap();
        state.path().join(name).display().to_string()
    };
    let etcd = file("etcd.yaml", "endpoints: [http://127.0.0.1:1]\n");
    let good = file(
        "good",
        "clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {}}]\n\
         contexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n",
    );
    let broken = file("broken", "clusters: [");
    for (flags, expected) in [
        (vec!["--source=kubernetes"], "say --kubeconfig"),
        (vec!["--source=kubernetes", "--kubeconfig=/nonexistent"], "/nonexistent"),
        (vec!["--source=kubernetes", "--kubeconfig", &broken], "cannot use the kubeconfig"),
        (vec!["--source=kubernetes", "--kubeconfig", &good, "--context=nowhere"], "nowhere"),
        (vec!["--source=manifests:/tmp", "--kubeconfig", &good], "--kubeconfig is for --source kubernetes"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_clustermesh-apiserver"))
            .env_remove("KUBERNETES_SERVICE_HOST")
            .args(["clustermesh", "--cluster-name", "alpha", "--cluster-id", "1", "--etcd-config", &etcd])
            .args(&flags)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

/// The role that we ship allows what we read, and no more.
#[test]
fn the_role_allows_exactly_what_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/rbac.yaml");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap();
    let role = documents.iter().find(|document| document["kind"] == "ClusterRole").unwrap();
    let mut allowed = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        let texts = |field: &str| -> Vec<String> {
            rule[field].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(texts("verbs"), ["list", "watch"]);
        for group in texts("apiGroups") {
            allowed.extend(texts("resources").into_iter().map(|resource| (group.clone(), resource)));
        }
    }
    let read: BTreeSet<(String, String)> =
        KINDS.iter().map(|kind| (kind.group.to_owned(), kind.plural.to_owned())).collect();
    assert_eq!(allowed, read);
    let account = documents.iter().find(|document| document["kind"] == "ServiceAccount").unwrap();
    let binding = documents.iter().find(|document| document["kind"] == "ClusterRoleBinding").unwrap();
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    assert_eq!(binding["subjects"][0]["name"], account["metadata"]["name"]);
    assert_eq!(binding["subjects"][0]["namespace"], account["metadata"]["namespace"]);
}

/// A source, and what an exporter makes of it.
struct Bed {
    server: Option<Server>,
    events: mpsc::Receiver<SourceEvent>,
    exporter: Exporter,
    keys: BTreeMap<String, Vec<u8>>,
    deleted: Vec<String>,
    is_synced: bool,
    trouble: Option<String>,
}

impl Bed {
    async fn synced(cluster: &Cluster) -> Self {
        let mut bed = Self::start(cluster).await;
        bed.until_synced().await;
        bed
    }

    async fn start(cluster: &Cluster) -> Self {
        let server = Server::start(cluster.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let mut bed = Self::at(server.addr()).await;
        bed.server = Some(server);
        bed
    }

    async fn at(addr: std::net::SocketAddr) -> Self {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("kubeconfig");
        let text = format!(
            "clusters: [{{name: c, cluster: {{server: 'http://{addr}'}}}}]\nusers: [{{name: u, user: {{}}}}]\n\
             contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n"
        );
        std::fs::write(&path, text).unwrap();
        let client = kubernetes::connect(Some(&path), Some("x")).await.unwrap();
        Self {
            server: None,
            events: kubernetes::watch(client, LOOK),
            exporter: exporter(),
            keys: BTreeMap::new(),
            deleted: Vec::new(),
            is_synced: false,
            trouble: None,
        }
    }

    fn take(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Changes(changes) => {
                for KeyChange { key, value } in self.exporter.apply(changes, Instant::now()) {
                    match value {
                        Some(value) => drop(self.keys.insert(key, value.to_vec())),
                        None => {
                            assert!(self.keys.remove(&key).is_some(), "{key}");
                            self.deleted.push(key);
                        }
                    }
                }
            }
            SourceEvent::Synced => self.is_synced = true,
            SourceEvent::Broken(broken) => assert_eq!(broken, 0),
            SourceEvent::Trouble(trouble) => self.trouble = trouble,
        }
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !holds(self) {
            let event = tokio::time::timeout_at(deadline, self.events.recv()).await;
            let event = event.unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}")).unwrap();
            self.take(event);
        }
    }

    async fn until_synced(&mut self) {
        self.until("synced", |bed| bed.is_synced).await;
    }

    /// Takes in whatever comes for a while.
    async fn settle(&mut self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while let Ok(Some(event)) = tokio::time::timeout_at(end, self.events.recv()).await {
            self.take(event);
        }
    }

    /// Waits until the keys are those of somebody who sees the cluster for the first time.
    async fn converge(&mut self, cluster: &Cluster) {
        let fresh = Box::pin(Self::synced(cluster)).await;
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while self.keys != fresh.keys {
            let Ok(event) = tokio::time::timeout_at(deadline, self.events.recv()).await else {
                panic!("{}\nis not\n{}", self.text(""), fresh.text(""));
            };
            self.take(event.unwrap());
        }
    }

    /// Whether there is a record of this policy that says this.
    fn has_policy(&self, name: &str, what: &str) -> bool {
        self.text(&format!("{POLICIES}{name}")).contains(what)
            && self.keys.contains_key(&format!("{POLICIES}{name}"))
    }

    fn text(&self, prefix: &str) -> String {
        text(&self.keys, prefix)
    }
}

fn exporter() -> Exporter {
    let max = MaxConnectedClusters::C255;
    let cluster = Exported { name: "alpha".parse().unwrap(), id: ClusterId::new(1, max).unwrap() };
    let allocator = Allocator::new(cluster.id, max, Duration::from_secs(600));
    Exporter::new(cluster, allocator, Rules { default_global: true, complete: true, ..Rules::default() })
}

fn keys(exporter: &Exporter) -> BTreeMap<String, Vec<u8>> {
    exporter.published().map(|(key, value)| (key, value.to_vec())).collect()
}

fn text(keys: &BTreeMap<String, Vec<u8>>, prefix: &str) -> String {
    let wanted = keys.iter().filter(|(key, _)| key.starts_with(prefix));
    wanted.fold(String::new(), |text, (key, value)| {
        text + key + "\n" + std::str::from_utf8(value).unwrap() + "\n"
    })
}

/// About pods 0 to 9, nodes or identities.
fn is_steady(key: &str) -> bool {
    let last = key.rsplit('/').next().unwrap();
    key.contains("/nodes/")
        || key.contains("/identities/")
        || last.strip_prefix("10.1.0.").is_some_and(|n| n.parse::<u8>().unwrap() <= 10)
}

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn recorded(list: &str) -> Value {
    let path = testdata(&format!("kubernetes/list-{list}.json"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn manifest(name: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&std::fs::read_to_string(testdata(name)).unwrap()).unwrap()
}

fn similar(actual: &str, expected: &str) {
    for (actual, expected) in actual.lines().zip(expected.lines()) {
        assert_eq!(actual, expected);
    }
    assert_eq!(actual.lines().count(), expected.lines().count(), "{actual}");
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Small and the same everywhere (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % 1_000_003).unwrap() % end
    }
}
