//! Real etcds on loopback, an agent in this process, and the records of small clusters.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use agent_sync::agent::{self, AgentError, Options};
use agent_sync::peers::OwnCluster;
use clustermesh_agent_api::v1;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, Identity, MaxConnectedClusters, NamespacedName};
use clustermesh_kvstore::etcd::{EtcdConfig, Session, SessionOptions, WriteOp};
use clustermesh_kvstore::import_policy::PolicySource;
use clustermesh_kvstore::key::{Kind, Layout, canary_key, cluster_config_key, data_prefix};
use clustermesh_kvstore::record::{
    Affinity, BackendState, Balancing, ClusterConfig, External, IpRecord, LocalBackend, LocalService, Node,
    NodeAddress, NodeAddressKind, Port, PortMap, Protocol, Record, Service,
};
use ebpf_global_svc::MapSizes;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::member::{free_ports, member, start};

/// The longest any condition may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// One cluster's etcd; killed when dropped.
pub(crate) struct Cluster {
    pub(crate) name: ClusterName,
    id: u32,
    dir: TempDir,
    port: u16,
    peer_port: u16,
    token: u32,
    child: Option<Child>,
}

impl Cluster {
    pub(crate) async fn start(name: &str, id: u32) -> Self {
        let dir = tempfile::Builder::new().prefix("cm-agent-etcd-").tempdir().unwrap();
        let (port, peer_port) = free_ports();
        let name = name.parse().unwrap();
        let mut cluster = Self { name, id, dir, port, peer_port, token: 0, child: None };
        cluster.run().await;
        cluster
    }

    pub(crate) fn yaml(&self) -> String {
        format!("endpoints:\n- http://127.0.0.1:{}\n", self.port)
    }

    /// Starts its etcd (again), with the data it has.
    pub(crate) async fn run(&mut self) {
        let client = format!("http://127.0.0.1:{}", self.port);
        let mut command = member("m", &self.dir.path().join("data"), &client, self.peer_port);
        command.args(["--initial-cluster-token", &format!("{}-{}", self.peer_port, self.token)]);
        self.child = Some(start(&mut command));
        eventually("etcd answers", || async { self.try_session().await.is_some() }).await;
    }

    /// Kills its etcd; the next one starts without data and under another cluster ID.
    pub(crate) fn lose(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.dir.path().join("data")).unwrap();
        self.token += 1;
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    async fn try_session(&self) -> Option<Session> {
        let config = EtcdConfig::parse(&self.yaml()).unwrap();
        Session::connect(&config, SessionOptions::default()).await.ok()
    }

    pub(crate) async fn put(&self, key: String, value: Vec<u8>) {
        let session = self.try_session().await.expect("etcd runs");
        session.txn(vec![WriteOp::Put { key, value, lease: 0 }]).await.unwrap();
    }

    pub(crate) async fn delete<R: Record>(&self, record: &R) {
        let session = self.try_session().await.expect("etcd runs");
        session.txn(vec![WriteOp::Delete { key: self.key(record) }]).await.unwrap();
    }

    pub(crate) async fn publish<R: Record>(&self, record: &R) {
        self.put(self.key(record), record.encode()).await;
    }

    fn key<R: Record>(&self, record: &R) -> String {
        data_prefix(R::KIND, &self.name, Layout::State) + &record.suffix()
    }

    /// Says who it is, and that canaries are to be waited for.
    pub(crate) async fn publish_config(&self) {
        let config = ClusterConfig { id: self.id, synced_canaries: true, ..ClusterConfig::default() };
        self.put(cluster_config_key(&self.name), config.encode()).await;
    }

    pub(crate) async fn publish_canaries(&self) {
        for kind in Kind::ALL {
            self.put(canary_key(kind, &self.name, Layout::State), b"now".to_vec()).await;
        }
    }

    /// A node, two pods, and the global service `shop/orders` with them as backends.
    pub(crate) async fn publish_all(&self) {
        self.publish_config().await;
        self.publish_records().await;
        self.publish_canaries().await;
    }

    pub(crate) async fn publish_records(&self) {
        self.publish(&self.node()).await;
        for pod in 1..=2 {
            self.publish(&self.ip(pod)).await;
        }
        self.publish(&self.local_service(&[1, 2])).await;
        self.publish(&self.service(&[1, 2])).await;
    }

    pub(crate) fn node(&self) -> Node {
        let ip = format!("192.0.2.{}", self.id).parse().unwrap();
        Node {
            name: "n1".into(),
            cluster: self.name.to_string(),
            cluster_id: self.id,
            addresses: vec![NodeAddress { kind: NodeAddressKind::InternalIp, ip }],
            ipv4_alloc_cidr: Some(format!("10.{}.0.0/24", self.id).parse().unwrap()),
            ..Node::default()
        }
    }

    pub(crate) fn pod(&self, number: u8) -> IpAddr {
        format!("10.{}.0.{number}", self.id).parse().unwrap()
    }

    pub(crate) fn ip(&self, pod: u8) -> IpRecord {
        IpRecord {
            prefix: self.pod(pod).into(),
            host: true,
            host_ip: Some(format!("192.0.2.{}", self.id).parse().unwrap()),
            identity: Identity(self.id << 16 | 300),
            key: 0,
            metadata: String::new(),
            namespace: "shop".into(),
            pod_name: format!("orders-{pod}"),
            service_account: String::new(),
            named_ports: Vec::new(),
        }
    }

    pub(crate) fn service(&self, pods: &[u8]) -> Service {
        Service {
            cluster: self.name.to_string(),
            name: orders(),
            frontends: BTreeMap::new(),
            backends: pods.iter().map(|pod| (self.pod(*pod), ports(8080))).collect(),
            hostnames: BTreeMap::new(),
            zones: BTreeMap::new(),
            labels: BTreeMap::new(),
            selector: BTreeMap::new(),
            include_external: true,
            shared: true,
            cluster_id: self.id,
        }
    }

    pub(crate) fn local_service(&self, pods: &[u8]) -> LocalService {
        let backend = |pod: &u8| LocalBackend {
            ip: self.pod(*pod),
            ports: ports(8080),
            state: BackendState::Active,
            node: None,
            zone: None,
            hostname: None,
        };
        LocalService {
            cluster: self.name.to_string(),
            name: orders(),
            cluster_id: self.id,
            global: true,
            shared: true,
            private: false,
            affinity: Affinity::None,
            failover: None,
            balancing: Balancing::default(),
            external: External::default(),
            headless: false,
            frontends: [("10.96.0.10".parse().unwrap(), ports(80))].into(),
            backends: pods.iter().map(backend).collect(),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill();
    }
}

fn orders() -> NamespacedName {
    NamespacedName { namespace: "shop".into(), name: "orders".into() }
}

fn ports(port: u16) -> PortMap {
    [("http".to_owned(), Port { protocol: Protocol::Tcp, port })].into()
}

/// An agent with tables in memory.
pub(crate) struct Agent {
    dir: TempDir,
    stop: CancellationToken,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Agent {
    pub(crate) async fn start(own: &Cluster) -> Self {
        let dir = tempfile::Builder::new().prefix("cm-agent-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("clustermesh")).unwrap();
        std::fs::write(dir.path().join("etcd.yaml"), own.yaml()).unwrap();
        std::fs::write(dir.path().join("policy.yaml"), "").unwrap();
        let max = MaxConnectedClusters::C255;
        let options = Options {
            sizes: MapSizes::default(),
            scan_interval: None,
            audit_policies: false,
            observe: agent_sync::observe::Limits::default(),
            relist_interval: Some(Duration::from_secs(1)),
            own: OwnCluster { name: own.name.clone(), id: ClusterId::new(own.id, max).unwrap(), max },
            node_name: "n1".into(),
            tunnels: Default::default(),
            etcd_config: dir.path().join("etcd.yaml"),
            clustermesh_config: dir.path().join("clustermesh"),
            import_policy: PolicySource { path: Some(dir.path().join("policy.yaml")), dry_run: false },
            kernel: None,
            grpc_socket: dir.path().join("agent.sock"),
            http_addr: None,
            liveness: None,
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn(agent::run(options, stop.clone()));
        let agent = Self { dir, stop, task };
        eventually("the agent listens", || async { agent.socket().exists() }).await;
        agent
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub(crate) fn connect(&self, remote: &Cluster) {
        // Complete before it has its name, as the CLI does it.
        let temporary = self.dir.path().join("remote.tmp");
        std::fs::write(&temporary, remote.yaml()).unwrap();
        std::fs::rename(temporary, self.config_file(&remote.name)).unwrap();
    }

    /// Replaces the import policy.
    pub(crate) fn allow(&self, policy: &str) {
        let temporary = self.dir.path().join("policy.tmp");
        std::fs::write(&temporary, policy).unwrap();
        std::fs::rename(temporary, self.dir.path().join("policy.yaml")).unwrap();
    }

    pub(crate) fn disconnect(&self, remote: &Cluster) {
        std::fs::remove_file(self.config_file(&remote.name)).unwrap();
    }

    fn config_file(&self, name: &ClusterName) -> PathBuf {
        self.dir.path().join("clustermesh").join(name.as_str())
    }

    pub(crate) async fn client(&self) -> clustermesh_agent_api::Client {
        clustermesh_agent_api::connect(&self.socket()).await.unwrap()
    }

    pub(crate) async fn status(&self) -> v1::StatusResponse {
        self.client().await.status(v1::StatusRequest { with_refused: true }).await.unwrap().into_inner()
    }

    pub(crate) async fn dump(&self, table: &str) -> Vec<BTreeMap<String, String>> {
        let request = v1::DumpTableRequest { table: table.into() };
        let mut rows = self.client().await.dump_table(request).await.unwrap().into_inner();
        let mut dump = Vec::new();
        while let Some(row) = rows.message().await.unwrap() {
            dump.push(row.columns.into_iter().map(|column| (column.name, column.value)).collect());
        }
        dump
    }

    /// Clusters behind the one frontend, with their counts.
    pub(crate) async fn groups(&self) -> BTreeMap<String, String> {
        let rows = self.dump("service").await.into_iter();
        rows.filter(|row| !row["cluster"].is_empty())
            .map(|row| (row["cluster"].clone(), row["count"].clone()))
            .collect()
    }

    pub(crate) async fn waits_for_groups(&self, wanted: &[(&str, &str)]) {
        let wanted: BTreeMap<String, String> =
            wanted.iter().map(|(cluster, count)| ((*cluster).to_owned(), (*count).to_owned())).collect();
        eventually(&format!("groups are {wanted:?}"), || async { self.groups().await == wanted }).await;
    }

    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
        assert!(!Path::new(&self.dir.path().join("agent.sock")).exists());
    }
}

/// Waits until `condition` holds.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        sleep(Duration::from_millis(10)).await;
    }
}
