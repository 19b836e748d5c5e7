//! Sessions with a real etcd: TLS, and what the errors say.
#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

mod support;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_kvstore::etcd::{
    EtcdConfig, KeyRange, Session, SessionError, SessionOptions, TlsVersion, WriteOp,
};
use clustermesh_kvstore::key::HEARTBEAT;
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use support::{DEADLINE, Etcd, Pki};
use tokio::time::timeout;

async fn error(config: &EtcdConfig) -> String {
    let options = SessionOptions { connect_timeout: Duration::from_secs(2), ..SessionOptions::default() };
    Session::connect(config, options).await.expect_err("a session").to_string()
}

fn assert_says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
}

#[tokio::test]
async fn reads_and_writes_over_tls() {
    let etcd = Etcd::start_tls().await;
    let session = etcd.session().await;
    let put = |key: &str| WriteOp::Put { key: key.into(), value: b"x".to_vec(), lease: 0 };
    session.txn(vec![put("a/1"), put("a/2"), put("a/3"), put("ab/1")]).await.unwrap();
    let range = KeyRange::of("a/");
    let first = session.list_page(&range, None, 2, 0).await.unwrap();
    assert!(first.more);
    let last = first.kvs.last().unwrap().key.clone();
    session.txn(vec![WriteOp::Delete { key: "a/3".into() }]).await.unwrap();
    // As of the first page, though the key is gone since.
    let second = session.list_page(&range, Some(&last), 2, first.revision).await.unwrap();
    assert!(!second.more);
    assert_eq!(second.kvs[0].key, b"a/3");
    assert_eq!(session.get("a/3").await.unwrap(), None);
    session.ping().await.unwrap();
    assert!(session.version().unwrap().starts_with('3'));
}

#[tokio::test]
async fn tls_errors_say_who_refuses_whom() {
    let etcd = Etcd::start_tls().await;
    let good = etcd.config();

    let missing = etcd.dir().join("no-such-ca.crt");
    let no_ca = EtcdConfig { trusted_ca_file: Some(missing.clone()), ..good.clone() };
    assert_says(&error(&no_ca).await, &[&missing.display().to_string(), "cannot be read"]);

    let dir = tempfile::tempdir().unwrap();
    let other = Pki::new(dir.path());
    let wrong_ca = EtcdConfig { trusted_ca_file: Some(other.ca.clone()), ..good.clone() };
    assert_says(&error(&wrong_ca).await, &["TLS", "trusted-ca-file", &good.endpoints[0]]);

    let none = EtcdConfig { cert_file: None, key_file: None, ..good.clone() };
    assert_says(&error(&none).await, &["TLS", "client certificate", "cert-file"]);

    let foreign = EtcdConfig {
        cert_file: Some(other.client.0.clone()),
        key_file: Some(other.client.1.clone()),
        ..good.clone()
    };
    assert_says(&error(&foreign).await, &["TLS", "client certificate"]);

    let mixed = EtcdConfig { key_file: Some(other.client.1.clone()), ..good.clone() };
    assert_says(&error(&mixed).await, &["does not go with"]);
}

#[tokio::test]
async fn servers_without_tls_1_3_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::new(dir.path());
    let chain = CertificateDer::pem_file_iter(&pki.server.0).unwrap().map(Result::unwrap).collect();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(&pki.server.1).unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let server = Arc::new(server);
    // Ends with the test's process.
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut tls = rustls::ServerConnection::new(server.clone()).unwrap();
            let _refused = tls.complete_io(&mut stream);
        }
    });
    let config = EtcdConfig {
        endpoints: vec![endpoint],
        trusted_ca_file: Some(pki.ca.clone()),
        cert_file: None,
        key_file: None,
        username: None,
        password: None,
        tls_min_version: TlsVersion::default(),
        virtual_pod_cidrs: VirtualCidrs::default(),
    };
    assert_says(&error(&config).await, &["TLS 1.3", "tls-min-version"]);
    // The handshake comes to its end; behind it is no etcd.
    let older = EtcdConfig { tls_min_version: TlsVersion::Tls12, ..config };
    let error = error(&older).await;
    assert!(!error.contains("TLS 1.3"), "{error}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_told() {
    let etcd = Etcd::start_tls_also_on("127.0.0.2").await;
    let port = etcd.config().endpoints[0].rsplit_once(':').unwrap().1.to_owned();
    let endpoints = vec![format!("https://127.0.0.2:{port}")];
    assert_says(&error(&EtcdConfig { endpoints, ..etcd.config() }).await, &["TLS", "another name"]);
    let endpoints = vec![format!("https://nowhere.invalid:{port}")];
    assert_says(&error(&EtcdConfig { endpoints, ..etcd.config() }).await, &["cannot be resolved"]);
}

#[tokio::test]
async fn unreachable_endpoints_say_why() {
    // Bound and dropped: nothing listens there now.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = EtcdConfig::parse(&format!("endpoints: [\"http://127.0.0.1:{port}\"]")).unwrap();
    assert_says(&error(&config).await, &["cannot reach etcd", "nothing listens", &port.to_string()]);

    // Something listens, but is not an etcd and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = mute.local_addr().unwrap().port();
    let config = EtcdConfig::parse(&format!("endpoints: [\"http://127.0.0.1:{port}\"]")).unwrap();
    assert_says(&error(&config).await, &["something answers there", &port.to_string()]);
}

#[tokio::test]
async fn one_good_endpoint_is_enough() {
    let etcd = Etcd::start().await;
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = etcd.config();
    config.endpoints.push(format!("http://{closed}"));
    // The order is random.
    for _ in 0..8 {
        Session::connect(&config, SessionOptions::default()).await.unwrap();
    }
}

#[tokio::test]
async fn another_etcd_at_the_same_address_ends_the_session() {
    let mut etcd = Etcd::start().await;
    let session = etcd.session().await;
    etcd.kill();
    etcd.forget();
    etcd.run().await;
    // The connection beneath may reconnect by itself; the ID gives the other etcd away.
    let ended = timeout(DEADLINE, async {
        loop {
            if let Err(error) = session.get("a").await {
                break error;
            }
        }
    });
    let error = ended.await.expect("the session ends");
    let gone = matches!(error, SessionError::ClusterIdChanged { .. } | SessionError::Lost(_));
    assert!(gone, "{error}");
    assert_eq!(session.get("a").await, Err(error), "it stays ended");
}

#[tokio::test]
async fn permissions_that_are_missing_are_named() {
    let etcd = Etcd::start().await;
    for arguments in [
        &["user", "add", "root:root"][..],
        &["role", "add", "root"],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "remote"],
        &["role", "grant-permission", "remote", "--prefix=true", "read", "cilium/state/"],
        &["role", "grant-permission", "remote", "--prefix=true", "read", HEARTBEAT],
        &["user", "add", "remote:secret"],
        &["user", "grant-role", "remote", "remote"],
        &["auth", "enable"],
    ] {
        etcd.ctl(arguments);
    }
    let good =
        EtcdConfig { username: Some("remote".into()), password: Some("secret".into()), ..etcd.config() };
    let session = Session::connect(&good, SessionOptions::default()).await.unwrap();
    assert!(session.list_page(&KeyRange::of("cilium/state/"), None, 1, 0).await.is_ok());
    let key = "clustermesh/local/services/v1/a/";
    let denied = session.list_page(&KeyRange::of(key), None, 1, 0).await.unwrap_err();
    assert_eq!(denied, SessionError::PermissionDenied { what: key.into() });
    session.ping().await.unwrap();
    let wrong = EtcdConfig { password: Some("wrong".into()), ..good.clone() };
    let refused = Session::connect(&wrong, SessionOptions::default()).await.unwrap_err();
    assert!(matches!(refused, SessionError::Unauthenticated { .. }), "{refused}");

    // Not a role of a mesh: some etcds let such a client in as far as their status.
    etcd.ctl(&["--user", "root:root", "role", "revoke-permission", "remote", "--prefix=true", HEARTBEAT]);
    match Session::connect(&good, SessionOptions::default()).await {
        Ok(session) => {
            assert!(session.cluster_id() != 0 && session.version().is_some());
            session.ping().await.unwrap();
        }
        Err(error) => assert_eq!(error, SessionError::PermissionDenied { what: HEARTBEAT.into() }),
    }
}
