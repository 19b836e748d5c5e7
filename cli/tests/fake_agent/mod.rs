//! An agent with canned answers on a real socket, and clusters that consist of such agents.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use clustermesh_agent_api::v1::agent_server::{Agent, AgentServer};
use clustermesh_agent_api::v1::observe_response::What;
use clustermesh_agent_api::v1::{
    CheckPolicyRequest, CheckPolicyResponse, CheckedChange, CheckedCluster, CheckedKind, CheckedRecord,
    Column, DumpTableRequest, DumpTableRow, ExplainRequest, ExplainResponse, ExplainedAddress, ExplainedPart,
    Flow, KindStatus, LocalCounts, LostFlows, ObserveRequest, ObserveResponse, Peer, ProbePeerRequest,
    ProbePeerResponse, RefusedKey, RotateKeyRequest, RotateKeyResponse, StatusRequest, StatusResponse,
    TableFill,
};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// Two clusters, alpha and beta, in a directory of their own.
pub(crate) struct Mesh {
    pub(crate) runtime: Runtime,
    pub(crate) root: tempfile::TempDir,
}

/// What one agent answers. Remotes are those whose entries stand in its directory.
#[derive(Clone)]
pub(crate) struct Answers {
    pub(crate) status: StatusResponse,
    pub(crate) probe: ProbePeerResponse,
    /// Remotes are listed, but never get ready.
    pub(crate) stuck: Option<String>,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { runtime, root: tempfile::tempdir().unwrap() }
    }

    /// alpha with ID 1 and beta with ID 2, each with one agent; the answers can still be changed.
    pub(crate) fn of_two() -> (Self, Arc<Mutex<Answers>>, Arc<Mutex<Answers>>) {
        let mesh = Self::new();
        let alpha = mesh.cluster("alpha", 1, Answers::of("alpha", 1, 2));
        let beta = mesh.cluster("beta", 2, Answers::of("beta", 2, 1));
        (mesh, alpha, beta)
    }

    /// Starts a cluster in `run/labs/test/NAME` with one node, and writes its context.
    pub(crate) fn cluster(&self, name: &str, id: u32, answers: Answers) -> Arc<Mutex<Answers>> {
        let dir = self.dir(name);
        std::fs::create_dir_all(dir.join("clustermesh")).unwrap();
        for file in ["ca.crt", "remote.crt", "remote.key"] {
            std::fs::write(dir.join(file), format!("SECRET {file} of {name}")).unwrap();
        }
        let context = format!(
            "cluster: {{name: {name}, id: {id}}}\n\
             etcd: {{endpoints: [\"https://{name}:2379\"], trusted-ca-file: ca.crt, cert-file: remote.crt, key-file: remote.key}}\n\
             clustermeshConfig: clustermesh\n\
             agents: [{{node: {name}-1, socket: agent.sock}}]\n"
        );
        std::fs::write(dir.join("context.yaml"), context).unwrap();
        let answers = Arc::new(Mutex::new(answers));
        let agent = FakeAgent { config_dir: dir.join("clustermesh"), answers: answers.clone() };
        // Listening when this returns: the socket is bound here, not in the task.
        let listener = {
            let _entered = self.runtime.enter();
            tokio::net::UnixListener::bind(dir.join("agent.sock")).unwrap()
        };
        self.runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(AgentServer::new(agent))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        answers
    }

    pub(crate) fn dir(&self, cluster: &str) -> PathBuf {
        self.root.path().join("labs/test").join(cluster)
    }

    /// Names of the files in the directory that a cluster's agents watch, sorted.
    pub(crate) fn entries(&self, cluster: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir(cluster).join("clustermesh")).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.root.path(), args)
    }

    /// Runs into a pipe that nobody reads.
    pub(crate) fn run_unread(&self, args: &[&str]) -> Ran {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Ran::from(command(self.root.path(), args).stdout(writer).stderr(Stdio::piped()))
    }
}

fn command(run_dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clustermesh"));
    command.args(args).env("CLUSTERMESH_RUN_DIR", run_dir);
    command
}

/// What the program printed and how it ended.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn of(run_dir: &Path, args: &[&str]) -> Self {
        Self::from(&mut command(run_dir, args))
    }

    fn from(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let ran = Self {
            code: status.code().unwrap(),
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
        };
        assert!(!ran.stdout.contains("SECRET") && !ran.stderr.contains("SECRET"), "{}", ran.stdout);
        ran
    }

    /// Ended well, with nothing on standard error.
    pub(crate) fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{}", self.stdout);
        self.stdout
    }

    /// Ended with `code` and exactly one line on standard error, which is returned without its prefix.
    pub(crate) fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        let line = self.stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("{}", self.stderr));
        assert_eq!(line.lines().count(), 1, "{}", self.stderr);
        line.trim_end()
    }
}

impl Answers {
    pub(crate) fn of(name: &str, id: u32, peer_id: u32) -> Self {
        let own = Peer {
            name: name.into(),
            cluster_id: id,
            connected: true,
            config_retrieved: true,
            ready: true,
            ..Default::default()
        };
        Self {
            status: StatusResponse {
                version: "0.1.0".into(),
                cluster_name: name.into(),
                cluster_id: id,
                node_name: format!("{name}-1"),
                max_connected_clusters: 255,
                datapath: "memory".into(),
                ready: true,
                own: Some(own),
                local: Some(LocalCounts { services: 5, global_services: 2, ..Default::default() }),
                tables: vec![TableFill { name: "cm_ipcache".into(), entries: 128, max_entries: 512 }],
                resident_bytes: 20 << 20,
                uptime_seconds: 192,
                ..Default::default()
            },
            probe: ProbePeerResponse {
                cluster_id: peer_id,
                max_connected_clusters: 255,
                pod_cidrs: vec![format!("10.{peer_id}.0.0/24")],
                etcd_version: "3.4.30".into(),
                round_trip_us: 900,
                ..Default::default()
            },
            stuck: None,
        }
    }
}

struct FakeAgent {
    config_dir: PathBuf,
    answers: Arc<Mutex<Answers>>,
}

impl FakeAgent {
    fn remotes(&self, stuck: Option<&str>, peer_id: u32) -> Vec<Peer> {
        let entries = std::fs::read_dir(&self.config_dir).unwrap();
        let mut remotes: Vec<Peer> = entries
            .map(|entry| entry.unwrap())
            .filter(|entry| {
                std::fs::read_to_string(entry.path()).is_ok_and(|text| text.contains("endpoints:"))
            })
            .map(|entry| Peer {
                name: entry.file_name().into_string().unwrap(),
                cluster_id: peer_id,
                connected: stuck.is_none(),
                config_retrieved: stuck.is_none(),
                ready: stuck.is_none(),
                kinds: vec![KindStatus {
                    kind: "ip".into(),
                    synced: stuck.is_none(),
                    records: 7,
                    refused: 3,
                    refused_by_reason: [("bad_identity".to_string(), 3)].into(),
                    last_refused: "10.9.9.9: identity 99 is not beta's".into(),
                    newest_refused: vec![RefusedKey {
                        key: "10.9.9.9".into(),
                        reason: "bad_identity".into(),
                        detail: "identity 99 is not beta's".into(),
                        audited: false,
                    }],
                    ..Default::default()
                }],
                last_error: stuck.unwrap_or_default().into(),
                last_error_age_ms: 1500,
                last_event_age_ms: 400,
                ..Default::default()
            })
            .collect();
        remotes.sort_by(|a, b| a.name.cmp(&b.name));
        remotes
    }
}

#[tonic::async_trait]
impl Agent for FakeAgent {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let answers = self.answers.lock().unwrap().clone();
        let mut remotes = self.remotes(answers.stuck.as_deref(), answers.probe.cluster_id);
        if !request.into_inner().with_refused {
            remotes.iter_mut().flat_map(|peer| &mut peer.kinds).for_each(|kind| kind.newest_refused.clear());
        }
        Ok(Response::new(StatusResponse { remotes, ..answers.status }))
    }

    type DumpTableStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<DumpTableRow, Status>> + Send>>;

    async fn dump_table(
        &self,
        request: Request<DumpTableRequest>,
    ) -> Result<Response<Self::DumpTableStream>, Status> {
        let table = request.into_inner().table;
        if table == "sockrev" {
            return Err(Status::unimplemented("the memory datapath has no sockets"));
        }
        let rows = (1..=2).map(move |n| {
            let columns = [("table", table.clone()), ("cluster_id", n.to_string())]
                .map(|(name, value)| Column { name: name.into(), value });
            Ok(DumpTableRow { columns: columns.into() })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(rows.collect::<Vec<_>>()))))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let ExplainRequest { kind, name } = request.into_inner();
        let part = |cluster: &str, outcome: &str, why: &str| ExplainedPart {
            cluster: cluster.into(),
            outcome: outcome.into(),
            why: vec![why.into()],
            key: format!("cilium/state/services/v1/{cluster}/{name}"),
            revision: 7,
            ..Default::default()
        };
        if kind == "endpoint" {
            let address = ExplainedAddress {
                address: "10.2.0.1".into(),
                outcome: "refused".into(),
                why: vec!["outside_pod_cidrs".into()],
                key: "cilium/state/ip/v1/default/10.2.0.1".into(),
                revision: 9,
                identity: 131_373,
                labels: vec!["k8s:app=orders".into()],
                node_ip: "192.0.2.9".into(),
                ..Default::default()
            };
            let beta = ExplainedPart {
                cluster: "beta".into(),
                outcome: "refused".into(),
                addresses: vec![address],
                ..Default::default()
            };
            return Ok(Response::new(ExplainResponse {
                kind,
                name,
                clusters: vec![beta],
                ..Default::default()
            }));
        }
        let clusters = vec![
            part("alpha", "chosen", "global true"),
            part("beta", "not-chosen", "not used: it is not shared"),
        ];
        Ok(Response::new(ExplainResponse { kind, name, clusters, ..Default::default() }))
    }

    async fn check_policy(
        &self,
        request: Request<CheckPolicyRequest>,
    ) -> Result<Response<CheckPolicyResponse>, Status> {
        let CheckPolicyRequest { policy, clusters } = request.into_inner();
        assert!(policy.contains("pod-cidrs"), "the agent gets the text: {policy}");
        let change = |change: &str, reason: &str, count| CheckedChange {
            change: change.into(),
            reason: reason.into(),
            count,
            samples: vec![CheckedRecord { key: "10.9.0.1".into(), detail: "10.9.0.1 is not in it".into() }],
        };
        let kind = CheckedKind {
            kind: "ip".into(),
            records: 9,
            let_in: 8,
            would_let_in: 7,
            changes: vec![
                change("refused", "outside_pod_cidrs", 2),
                change("admitted", "namespace_not_allowed", 1),
                CheckedChange { samples: Vec::new(), ..change("still-refused", "bad_json", 1) },
            ],
        };
        let beta = CheckedCluster { cluster: "beta".into(), kinds: vec![kind], ..Default::default() };
        let gamma = CheckedCluster {
            cluster: "gamma".into(),
            error: "its etcd is not connected".into(),
            ..Default::default()
        };
        let mut answer = vec![beta, gamma];
        answer.retain(|cluster| clusters.is_empty() || clusters.contains(&cluster.cluster));
        Ok(Response::new(CheckPolicyResponse { clusters: answer }))
    }

    async fn rotate_key(&self, _: Request<RotateKeyRequest>) -> Result<Response<RotateKeyResponse>, Status> {
        Err(Status::failed_precondition("this node does not encrypt, it has no key"))
    }

    async fn probe_peer(
        &self,
        request: Request<ProbePeerRequest>,
    ) -> Result<Response<ProbePeerResponse>, Status> {
        let request = request.into_inner();
        // The real agent reads these files: they have to be there, by absolute paths.
        let key =
            request.etcd_config.lines().find_map(|line| line.trim().strip_prefix("key-file: ")).unwrap();
        assert!(std::fs::read_to_string(key.trim_matches('"')).unwrap().contains(&request.cluster_name));
        Ok(Response::new(self.answers.lock().unwrap().probe.clone()))
    }

    type ObserveStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<ObserveResponse, Status>> + Send>>;

    /// Two flows, and one that is missing between them; alpha's are at odd times, beta's at even ones.
    async fn observe(
        &self,
        request: Request<ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let filter = request.get_ref().filter.clone().unwrap_or_default();
        if filter.reasons == ["nonsense"] {
            return Err(Status::invalid_argument("\"nonsense\" is no reason"));
        }
        let status = self.answers.lock().unwrap().status.clone();
        let flow = |second: i64| Flow {
            time_ns: (2 * second + i64::from(status.cluster_id)) * 1_000_000_000,
            cluster_name: status.cluster_name.clone(),
            node_name: status.node_name.clone(),
            r#type: "drop".into(),
            verdict: "DROPPED".into(),
            drop_reason: "invalid-source-ip".into(),
            ..Flow::default()
        };
        let lost = LostFlows { source: "agent".into(), count: 3, time_ns: flow(1).time_ns };
        let told = [What::Flow(flow(1)), What::Lost(lost), What::Flow(flow(2))];
        let told = tokio_stream::iter(told.map(|what| Ok(ObserveResponse { what: Some(what) })));
        // Whoever follows waits for more.
        Ok(Response::new(match request.get_ref().follow {
            true => Box::pin(futures::StreamExt::chain(told, futures::stream::pending())),
            false => Box::pin(told),
        }))
    }
}
