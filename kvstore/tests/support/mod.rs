//! A real etcd on loopback, with its own data and a free port.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of this module")]

mod member;

use std::future::Future;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use clustermesh_kvstore::etcd::{EtcdConfig, KeyRange, Session, SessionOptions, TlsVersion, WriteOp};
use clustermesh_kvstore::reflector::core::Timing;
use clustermesh_kvstore::reflector::{ConnectionOptions, ReflectorEvent};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use member::{free_ports, member, start};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

/// The longest any condition may take.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Certificates of an etcd and its clients.
pub struct Pki {
    pub ca: PathBuf,
    pub server: (PathBuf, PathBuf),
    pub client: (PathBuf, PathBuf),
}

impl Pki {
    /// Makes a CA with a server's and a client's certificate in `dir`.
    pub fn new(dir: &Path) -> Self {
        use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_cert = ca.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let leaf = |name: &str, names: &[&str]| {
            let key = KeyPair::generate().unwrap();
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut params = CertificateParams::new(names).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let cert = params.signed_by(&key, &issuer).unwrap();
            (write(&format!("{name}.crt"), cert.pem()), write(&format!("{name}.key"), key.serialize_pem()))
        };
        Self {
            server: leaf("server", &["127.0.0.1", "localhost"]),
            client: leaf("remote", &["remote"]),
            ca: write("ca.crt", ca_cert.pem()),
        }
    }
}

/// A running etcd; killed when dropped.
pub struct Etcd {
    child: Option<Child>,
    dir: TempDir,
    also: Option<String>,
    port: u16,
    peer: u16,
    incarnation: u32,
    pki: Option<Pki>,
}

impl Etcd {
    /// Starts one without TLS and waits until it answers.
    pub async fn start() -> Self {
        let mut etcd = Self::prepare(None);
        etcd.run().await;
        etcd
    }

    /// Starts one that wants client certificates.
    pub async fn start_tls() -> Self {
        let mut etcd = Self::prepare(Some(()));
        etcd.run().await;
        etcd
    }

    /// As [`Self::start_tls`], with clients of another authority accepted and trusted, too.
    pub async fn start_tls_trusting(other: &Pki) -> Self {
        let mut etcd = Self::prepare(Some(()));
        let ca = &etcd.pki().ca;
        let both = [std::fs::read(ca).unwrap(), std::fs::read(&other.ca).unwrap()].concat();
        std::fs::write(ca, both).unwrap();
        etcd.run().await;
        etcd
    }

    /// As [`Self::start_tls`], on another loopback address, too, which its certificate does not name.
    pub async fn start_tls_also_on(address: &str) -> Self {
        let mut etcd = Self::prepare(Some(()));
        etcd.also = Some(address.to_owned());
        etcd.run().await;
        etcd
    }

    fn prepare(tls: Option<()>) -> Self {
        let dir = tempfile::Builder::new().prefix("cm-kv-etcd-").tempdir().unwrap();
        let pki = tls.map(|()| Pki::new(dir.path()));
        let (port, peer) = free_ports();
        Self { child: None, dir, also: None, port, peer, incarnation: 0, pki }
    }

    pub fn pki(&self) -> &Pki {
        self.pki.as_ref().expect("started with TLS")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn config(&self) -> EtcdConfig {
        let scheme = if self.pki.is_some() { "https" } else { "http" };
        let pki = self.pki.as_ref();
        EtcdConfig {
            endpoints: vec![format!("{scheme}://127.0.0.1:{}", self.port)],
            trusted_ca_file: pki.map(|pki| pki.ca.clone()),
            cert_file: pki.map(|pki| pki.client.0.clone()),
            key_file: pki.map(|pki| pki.client.1.clone()),
            username: None,
            password: None,
            tls_min_version: TlsVersion::default(),
            virtual_pod_cidrs: VirtualCidrs::default(),
        }
    }

    /// Starts it (again), with the data it has.
    pub async fn run(&mut self) {
        let client = &self.config().endpoints[0];
        let also = self.also.iter().map(|address| format!(",https://{address}:{}", self.port));
        let listen = client.clone() + &also.collect::<String>();
        let log = std::fs::File::create(self.dir.path().join("etcd.log")).unwrap();
        let mut command = member("m", &self.data(), client, self.peer);
        command
            .args(["--listen-client-urls", &listen])
            // A new token makes a new cluster ID.
            .args(["--initial-cluster-token", &format!("{}-{}", self.peer, self.incarnation)])
            .stderr(log);
        if let Some(pki) = &self.pki {
            command
                .args(["--client-cert-auth", "--trusted-ca-file"])
                .arg(&pki.ca)
                .arg("--cert-file")
                .arg(&pki.server.0)
                .arg("--key-file")
                .arg(&pki.server.1);
        }
        self.child = Some(start(&mut command));
        let started = Instant::now();
        loop {
            match Session::connect(&self.config(), SessionOptions::default()).await {
                Ok(_) => return,
                Err(error) if started.elapsed() > DEADLINE => {
                    let mut log = String::new();
                    let path = self.dir.path().join("etcd.log");
                    std::fs::File::open(path).unwrap().read_to_string(&mut log).unwrap();
                    panic!("etcd does not answer: {error}\n{log}");
                }
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Makes the next [`Self::run`] one without data and with another cluster ID.
    pub fn forget(&mut self) {
        std::fs::remove_dir_all(self.data()).unwrap();
        self.incarnation += 1;
    }

    /// Lets the next [`Self::run`] listen elsewhere; gives the port it had.
    pub fn move_to_another_port(&mut self) -> u16 {
        std::mem::replace(&mut self.port, free_ports().0)
    }

    pub fn move_to(&mut self, port: u16) {
        self.port = port;
    }

    /// Stops or continues the process.
    pub fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().expect("it runs").id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    pub async fn session(&self) -> Session {
        Session::connect(&self.config(), SessionOptions::default()).await.unwrap()
    }

    pub async fn put(&self, key: &str, value: &str) -> i64 {
        let (key, value) = (key.to_owned(), value.as_bytes().to_vec());
        self.session().await.txn(vec![WriteOp::Put { key, value, lease: 0 }]).await.unwrap()
    }

    pub async fn delete(&self, key: &str) -> i64 {
        self.session().await.txn(vec![WriteOp::Delete { key: key.to_owned() }]).await.unwrap()
    }

    /// All keys of a range with their values and leases.
    pub async fn keys(&self, prefix: &str) -> Vec<(String, String, i64)> {
        let page = self.session().await.list_page(&KeyRange::of(prefix), None, 0, 0).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        page.kvs.into_iter().map(|kv| (text(kv.key), text(kv.value), kv.lease)).collect()
    }

    /// Runs etcdctl, for what the session cannot do.
    pub fn ctl(&self, arguments: &[&str]) {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(&self.config().endpoints[0]).args(arguments);
        let output = command.output().expect("these tests need `etcdctl` in PATH");
        assert!(output.status.success(), "etcdctl {arguments:?}: {output:?}");
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Short waits, so that tests of silence do not take half a minute.
pub fn quick() -> ConnectionOptions {
    ConnectionOptions {
        timing: Timing {
            idle: Duration::from_millis(500),
            answer: Duration::from_millis(1000),
            ..Timing::default()
        },
        ..ConnectionOptions::default()
    }
}

/// The next event but signs of life.
pub async fn next(events: &mut mpsc::Receiver<ReflectorEvent>) -> ReflectorEvent {
    loop {
        let event = timeout(DEADLINE, events.recv()).await.expect("an event in time").expect("a reflector");
        if !matches!(event, ReflectorEvent::Progress { .. }) {
            return event;
        }
    }
}

/// Waits until `condition` holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        sleep(Duration::from_millis(20)).await;
    }
}
