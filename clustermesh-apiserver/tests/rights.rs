//! What the clients of an etcd may do after `etcdinit`: a real etcd with TLS, and etcdctl as each of them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

#[path = "../../kvstore/tests/support/member.rs"]
mod member;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use clustermesh_apiserver::args::EtcdInitArgs;
use clustermesh_apiserver::etcdinit;
use clustermesh_apiserver::rights::users;
use clustermesh_kvstore::etcd::{EtcdConfig, Session, SessionOptions, TlsVersion};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use member::{free_ports, member, start};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);

/// One key for each thing that somebody may or may not read.
const KEYS: [&str; 15] = [
    "cilium/.heartbeat",
    "cilium/cluster-config/alpha",
    "cilium/cluster-config/gamma",
    "cilium/state/nodes/v1/alpha/n1",
    "cilium/state/identities/v1/id/65537",
    "cilium/state/noderegister/v1/vm",
    "cilium/synced/alpha/cilium/state/nodes/v1",
    "cilium/synced/gamma/cilium/cache/nodes/v1",
    "cilium/cache/nodes/v1/gamma/n1",
    "cilium/.initlock/1",
    "clustermesh/local/services/v1/alpha/shop/cart",
    "clustermesh/local/policies/v1/alpha/cnp/shop/cart",
    "clustermesh/announced/v1/alpha/n1",
    "clustermesh/announced/v1/beta/n1",
    "elsewhere",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_client_may_do_what_it_needs_and_nothing_else() {
    let mut etcd = Etcd::new();
    // What an interrupted run may have left behind.
    std::fs::create_dir_all(etcd.data().join("member/wal")).unwrap();
    etcd.init().await;
    etcd.start().await;
    for key in KEYS {
        etcd.ctl("admin-alpha", &["put", key, "x"]).unwrap();
    }
    // The users of other clusters come from the file.
    let file = etcd.dir.path().join("users.yaml");
    std::fs::write(&file, "users:\n- name: remote-beta\n  role: remote\n").unwrap();
    let (connection, _status) = Connection::spawn(etcd.config("admin-alpha"), ConnectionOptions::default());
    let following = tokio::spawn(users::follow(connection, file.clone(), "alpha".parse().unwrap()));
    eventually("user remote-beta", || etcd.readable("remote-beta").contains(&KEYS[0])).await;

    assert_same_rights_as_cilium(&etcd);
    for user in ["admin-alpha", "agent-alpha", "local-alpha", "remote", "remote-beta"] {
        let session = Session::connect(&etcd.config(user), SessionOptions::default()).await;
        session.unwrap_or_else(|error| panic!("{user}: {error}")).ping().await.unwrap();
    }

    let remote = [KEYS[0], KEYS[1], KEYS[3], KEYS[4], KEYS[5], KEYS[6]];
    let local = [KEYS[0], KEYS[1], KEYS[2], KEYS[6], KEYS[7], KEYS[8]];
    let agent = [&KEYS[..9], &KEYS[10..13]].concat();
    for (user, readable, writable) in [
        ("admin-alpha", &KEYS[..], &KEYS[..]),
        ("remote-beta", &remote, &[]),
        ("remote", &remote, &[]),
        ("local-alpha", &local, &[]),
        ("agent-alpha", &agent, &KEYS[12..13]),
        // Right CA, but nobody knows them; and another cluster's parts are nobody here.
        ("remote-gamma", &[], &[]),
        ("admin-beta", &[], &[]),
    ] {
        assert_eq!(etcd.readable(user), readable, "{user} reads");
        assert_eq!(etcd.writable(user), writable, "{user} writes");
        // Not by a range that begins in what it may read, either.
        if user != "admin-alpha" {
            for range in [&["get", "cilium/", "--prefix"][..], &["get", "", "--from-key"], &["user", "list"]]
            {
                let refused = etcd.ctl(user, range).unwrap_err();
                let who = ["permission denied", "user name not found"];
                assert!(who.iter().any(|text| refused.contains(text)), "{user} {range:?}: {refused}");
            }
            for change in [
                &["user", "add", "eve:eve"][..],
                &["user", "grant-role", user, "root"],
                &["role", "grant-permission", "remote", "readwrite", "cilium/state/"],
                &["auth", "disable"],
            ] {
                etcd.ctl(user, change).unwrap_err();
            }
        }
    }

    // A cluster that leaves the file loses its access.
    std::fs::write(&file, "users: []\n").unwrap();
    eventually("no user remote-beta", || etcd.readable("remote-beta").is_empty()).await;
    following.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_runs_is_corrected() {
    let mut etcd = Etcd::new();
    etcd.start().await;
    for arguments in [
        &["put", "cilium/state/nodes/v1/alpha/n1", "x"][..],
        &["role", "add", "remote"],
        &["role", "grant-permission", "remote", "--prefix=true", "readwrite", "cilium/state/"],
        &["role", "grant-permission", "remote", "--prefix=true", "read", "clustermesh/"],
        &["user", "add", "remote", "--no-password"],
        &["user", "add", "local-alpha:secret"],
        &["user", "grant-role", "local-alpha", "remote"],
    ] {
        etcd.ctl("admin-alpha", arguments).unwrap();
    }
    let config = etcd.dir.path().join("etcd.yaml");
    std::fs::write(&config, etcd.config("admin-alpha").to_yaml()).unwrap();
    let args = EtcdInitArgs::parse_from(
        ["etcdinit", "--cluster-name", "alpha", "--etcd-config"]
            .map(Into::into)
            .into_iter()
            .chain([config.clone().into_os_string()]),
    );
    // The second run finds authentication enabled and nothing to do.
    for _ in 0..2 {
        etcdinit::run(&args, CancellationToken::new()).await.unwrap();
        assert_eq!(etcd.readable("remote"), ["cilium/state/nodes/v1/alpha/n1"]);
        assert!(etcd.writable("remote").is_empty());
        assert!(etcd.readable("local-alpha").is_empty());
    }
    // Somebody else's certificate cannot repeat it, and is told so.
    std::fs::write(&config, etcd.config("remote").to_yaml()).unwrap();
    let error = etcdinit::run(&args, CancellationToken::new()).await.unwrap_err();
    assert!(error.to_string().contains("no access"), "{error}");
    std::fs::write(&config, "endpoints: [\"http://127.0.0.1:1\"]").unwrap();
    let error = etcdinit::run(&args, CancellationToken::new()).await.unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("has no TLS"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keeps_etcd_from_running_is_told() {
    let etcd = Etcd::new();
    let args = |more: &[&str]| {
        let base = ["etcdinit", "--cluster-name", "alpha", "--etcd-data-dir", etcd.data().to_str().unwrap()]
            .map(str::to_owned);
        EtcdInitArgs::parse_from(base.into_iter().chain(more.iter().map(|text| (*text).to_owned())))
    };
    let run = async |more: &[&str]| {
        etcdinit::run(&args(more), CancellationToken::new()).await.unwrap_err().to_string()
    };
    let error = run(&["--etcd-binary", "/nowhere/etcd"]).await;
    assert!(error.contains("/nowhere/etcd") && error.contains("is etcd installed"), "{error}");
    let error = run(&["--etcd-cluster-name", "a,b=c"]).await;
    assert!(error.contains("ended at once"), "{error}");
    let stop = CancellationToken::new();
    stop.cancel();
    let error = etcdinit::run(&args(&[]), stop).await.unwrap_err();
    assert!(error.to_string().contains("interrupted"), "{error}");
}

/// Compares what etcdctl prints with what it prints of an etcd of Cilium; ours has one user more.
fn assert_same_rights_as_cilium(etcd: &Etcd) {
    let cilium = include_str!("../testdata/cilium/etcd-roles.txt");
    let cilium: Vec<&str> =
        cilium.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    let admin = |arguments: &[&str]| etcd.ctl("admin-alpha", arguments).unwrap();
    let users = admin(&["user", "list"]);
    let mut ours = users.clone();
    ours += &users.lines().map(|user| admin(&["user", "get", user])).collect::<String>();
    ours += &admin(&["role", "list"]).lines().map(|role| admin(&["role", "get", role])).collect::<String>();
    let agent = "Role agent\nKV Read:\n\
        \t[cilium/.heartbeat, cilium/.heartbeau) (prefix cilium/.heartbeat)\n\
        \t[cilium/cache/, cilium/cache0) (prefix cilium/cache/)\n\
        \t[cilium/cluster-config/, cilium/cluster-config0) (prefix cilium/cluster-config/)\n\
        \t[cilium/state/, cilium/state0) (prefix cilium/state/)\n\
        \t[cilium/synced/, cilium/synced0) (prefix cilium/synced/)\n\
        \t[clustermesh/announced/v1/alpha/, clustermesh/announced/v1/alpha0) (prefix clustermesh/announced/v1/alpha/)\n\
        \t[clustermesh/local/, clustermesh/local0) (prefix clustermesh/local/)\n\
        KV Write:\n\
        \t[clustermesh/announced/v1/alpha/, clustermesh/announced/v1/alpha0) (prefix clustermesh/announced/v1/alpha/)\n";
    for more in ["User: agent-alpha\nRoles: agent\n", "agent-alpha\n", agent] {
        assert!(ours.contains(more), "{more} is not in\n{ours}");
        ours = ours.replacen(more, "", 1);
    }
    let ours: Vec<&str> = ours.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(ours, cilium);
}

/// An etcd with client certificates; killed when dropped.
struct Etcd {
    dir: TempDir,
    ca: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    port: u16,
    peer: u16,
    child: Option<Child>,
}

impl Etcd {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("cm-rights-").tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = dir.path().join("ca.crt");
        std::fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
        let (port, peer) = free_ports();
        Self { ca, issuer: Issuer::new(params, key), port, peer, child: None, dir }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    async fn init(&self) {
        let data = self.data();
        let flags =
            ["etcdinit", "--cluster-name", "alpha", "--etcd-cluster-name", "alpha", "--etcd-data-dir"];
        let args = EtcdInitArgs::parse_from(flags.into_iter().chain([data.to_str().unwrap()]));
        etcdinit::run(&args, CancellationToken::new()).await.unwrap();
    }

    async fn start(&mut self) {
        let client = format!("https://127.0.0.1:{}", self.port);
        let (cert, key) = self.certificate("server");
        let mut command = member("alpha", &self.data(), &client, self.peer);
        command
            .args(["--client-cert-auth", "--trusted-ca-file"])
            .arg(&self.ca)
            .arg("--cert-file")
            .arg(cert)
            .arg("--key-file")
            .arg(key);
        self.child = Some(start(&mut command));
        let started = Instant::now();
        while let Err(error) = Session::connect(&self.config("admin-alpha"), SessionOptions::default()).await
        {
            assert!(started.elapsed() < DEADLINE, "etcd does not answer: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Certificate and key for this CN; made when first asked for.
    fn certificate(&self, name: &str) -> (PathBuf, PathBuf) {
        let at = |suffix: &str| self.dir.path().join(format!("{name}{suffix}"));
        let (cert, key) = (at(".crt"), at(".key"));
        if !cert.exists() {
            let pair = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            std::fs::write(&key, pair.serialize_pem()).unwrap();
            std::fs::write(&cert, params.signed_by(&pair, &self.issuer).unwrap().pem()).unwrap();
        }
        (cert, key)
    }

    fn config(&self, user: &str) -> EtcdConfig {
        let (cert, key) = self.certificate(user);
        EtcdConfig {
            endpoints: vec![format!("https://127.0.0.1:{}", self.port)],
            trusted_ca_file: Some(self.ca.clone()),
            cert_file: Some(cert),
            key_file: Some(key),
            username: None,
            password: None,
            tls_min_version: TlsVersion::default(),
            virtual_pod_cidrs: VirtualCidrs::default(),
        }
    }

    /// Runs etcdctl as `user`; gives what it prints, or what it complains about.
    fn ctl(&self, user: &str, arguments: &[&str]) -> Result<String, String> {
        let (cert, key) = self.certificate(user);
        let path = |path: &Path| path.display().to_string();
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints=https://127.0.0.1:{}", self.port))
            .args(["--cacert", &path(&self.ca), "--cert", &path(&cert), "--key", &path(&key)])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("these tests need `etcdctl` in PATH");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    fn readable(&self, user: &str) -> Vec<&'static str> {
        let is_read = |key: &&&str| self.ctl(user, &["get", key]).is_ok_and(|text| text.starts_with(**key));
        KEYS.iter().filter(is_read).copied().collect()
    }

    fn writable(&self, user: &str) -> Vec<&'static str> {
        let is_written = |key: &&&str| {
            // In this order the key is there again.
            let deleted = self.ctl(user, &["del", key]).is_ok();
            let put = self.ctl(user, &["put", key, "x"]).is_ok();
            assert_eq!(put, deleted, "{user} {key}");
            put
        };
        KEYS.iter().filter(is_written).copied().collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
