//! The way to an API server, and what it may say that others do not.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_apiserver::source::SourceEvent;
use clustermesh_apiserver::source::kubernetes;
use fake_kube::{Cluster, Server};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

const DEADLINE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

#[tokio::test]
async fn a_server_behind_tls_is_read_if_somebody_vouches_for_it() {
    let server = serve(&Cluster::new()).await;
    let (tls, authority) = tls_before(server.addr()).await;
    let state = tempfile::tempdir().unwrap();
    std::fs::write(state.path().join("ca.pem"), authority).unwrap();
    // As kubectl has it: a file is looked for beside the kubeconfig.
    let text = server.kubeconfig().replace(
        &format!("server: 'http://{}'", server.addr()),
        &format!("server: 'https://{tls}', certificate-authority: ca.pem"),
    );
    let path = state.path().join("kubeconfig");
    std::fs::write(&path, &text).unwrap();
    let mut events = watch(&path).await;
    until(&mut events, |event| *event == SourceEvent::Synced).await;

    std::fs::write(&path, text.replace(", certificate-authority: ca.pem", "")).unwrap();
    let mut events = watch(&path).await;
    let told = until(&mut events, |event| matches!(event, SourceEvent::Trouble(Some(_)))).await;
    let text = format!("{told:?}");
    assert!(text.contains("the API server does not answer: ") && text.contains("ertificate"), "{text}");
}

/// What is read of a connection at once is bounded, what an object may have is not.
#[tokio::test]
async fn objects_larger_than_what_is_read_at_once() {
    let cluster = Cluster::new();
    let long = "x".repeat(300_000);
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "annotations": {"long": long}},
    }));
    let server = serve(&cluster).await;
    let mut events = watch_server(&server).await;
    let told = until(&mut events, |event| *event == SourceEvent::Synced).await;
    assert!(matches!(&told[..], [SourceEvent::Changes(changes), _] if changes.len() == 1), "{told:?}");
}

/// An object that has not the form of its kind is no reason to lose sight of all others.
#[tokio::test]
async fn an_object_of_another_form_is_passed_over_until_it_is_mended() {
    for streams in [true, false] {
        let cluster = Cluster::new();
        cluster.faults(|faults| faults.no_streams = !streams);
        let good = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "odd", "namespace": "shop"},
            "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
        });
        let mut odd = good.clone();
        odd["spec"]["ports"] = json!("none");
        cluster.apply(&odd);
        cluster.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}));
        let server = serve(&cluster).await;
        let mut events = watch_server(&server).await;
        let told = until(&mut events, |event| *event == SourceEvent::Broken(1)).await;
        assert!(told.contains(&SourceEvent::Synced), "{told:?}");
        assert!(matches!(&told[..], [SourceEvent::Changes(changes), ..] if changes.len() == 1), "{told:?}");
        cluster.apply(&good);
        let told = until(&mut events, |event| *event == SourceEvent::Broken(0)).await;
        assert!(matches!(&told[..], [SourceEvent::Changes(changes), _] if changes.len() == 1), "{told:?}");
    }
}

async fn serve(cluster: &Cluster) -> Server {
    Server::start(cluster.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap()
}

async fn watch_server(server: &Server) -> mpsc::Receiver<SourceEvent> {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join("kubeconfig");
    std::fs::write(&path, server.kubeconfig()).unwrap();
    watch(&path).await
}

async fn watch(kubeconfig: &Path) -> mpsc::Receiver<SourceEvent> {
    let client = kubernetes::connect(Some(kubeconfig), None).await.unwrap();
    kubernetes::watch(client, LOOK)
}

/// All events up to the one that is waited for.
async fn until(
    events: &mut mpsc::Receiver<SourceEvent>,
    is_last: impl Fn(&SourceEvent) -> bool,
) -> Vec<SourceEvent> {
    let mut told = Vec::new();
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        let Ok(event) = tokio::time::timeout_at(deadline, events.recv()).await else {
            panic!("not within {DEADLINE:?}, only {told:?}");
        };
        told.push(event.unwrap());
        if told.last().is_some_and(&is_last) {
            return told;
        }
    }
}

/// Lets clients of TLS through to `server`: where, and the certificate of who vouches for it.
async fn tls_before(server: SocketAddr) -> (SocketAddr, String) {
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
    // Not the process's: the client has to see to that by itself.
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key.into())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(stream).await else { return };
                let Ok(mut plain) = TcpStream::connect(server).await else { return };
                // Until one of them hangs up.
                let _ = tokio::io::copy_bidirectional(&mut tls, &mut plain).await;
            });
        }
    });
    (addr, own.cert.pem())
}
