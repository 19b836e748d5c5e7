//! Certificates that are replaced while a connection is used.
#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use clustermesh_kvstore::publisher::{OwnedPrefix, Publisher, PublisherSpec};
use clustermesh_kvstore::reflector::{
    Connection, ConnectionOptions, ConnectionStatus, ReflectorEvent, ReflectorSpec,
};
use support::{DEADLINE, Etcd, Pki, next, quick};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// Follows until the key has the value; whatever else comes must be an ordinary change.
async fn until(
    events: &mut mpsc::Receiver<ReflectorEvent>,
    state: &mut BTreeMap<String, String>,
    key: &str,
    value: &str,
) {
    while state.get(key).is_none_or(|now| now != value) {
        match next(events).await {
            ReflectorEvent::Upsert { suffix, value, .. } => {
                state.insert(suffix, String::from_utf8(value).unwrap());
            }
            // After a resumed watch, too: it says that nothing is missing.
            ReflectorEvent::Synced { .. } => {}
            other => panic!("{other:?} while certificates were replaced"),
        }
    }
}

async fn renewed(status: &mut watch::Receiver<ConnectionStatus>, times: u64) {
    let seen = timeout(DEADLINE, status.wait_for(|status| status.reconnects >= times)).await;
    assert_eq!(seen.expect("a new session in time").unwrap().reconnects, times);
}

fn replace(path: &Path, by: &Path) {
    std::fs::copy(by, path).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_follow_new_certificates_and_authorities_without_losing_anything() {
    let dir = tempfile::tempdir().unwrap();
    let new = Pki::new(dir.path());
    let etcd = Etcd::start_tls_trusting(&new).await;
    let old = etcd.pki();
    let renewal = Duration::from_millis(50);
    let (connection, mut status) = Connection::spawn(etcd.config(), ConnectionOptions { renewal, ..quick() });
    assert_eq!(
        status
            .wait_for(|status| status.connected)
            .await
            .unwrap()
            .certificate_expires
            .map(|end| end.to_string()),
        Some("4096-01-01T00:00:00Z".to_owned())
    );
    let publisher = Publisher::spawn(
        connection.clone(),
        PublisherSpec {
            owned: vec![OwnedPrefix { prefix: "data/own/".into(), canary: None, digest: None }],
            ..PublisherSpec::default()
        },
    );
    publisher.initial_done("data/own/");
    let mut events = connection.reflect(ReflectorSpec::new("data/".to_owned(), None));
    let mut state = BTreeMap::new();
    let writer = etcd.session().await;
    let put = async |value: &str| {
        let put = |key: &str| clustermesh_kvstore::etcd::WriteOp::Put {
            key: key.into(),
            value: value.into(),
            lease: 0,
        };
        writer.txn(vec![put("data/other")]).await.unwrap();
        publisher.set("data/own/key".into(), Some(value.as_bytes().into()));
    };
    let mut both_say = async |value: &str| {
        put(value).await;
        until(&mut events, &mut state, "other", value).await;
        until(&mut events, &mut state, "own/key", value).await;
    };
    both_say("at first").await;

    // A key without its certificate does not work; the session that there is does.
    replace(&old.client.1, &new.client.1);
    both_say("half a pair").await;
    replace(&old.client.0, &new.client.0);
    both_say("a new pair").await;
    renewed(&mut status, 1).await;
    both_say("a new session").await;

    // The server takes up its own files at the next handshake, which the clients' new trust brings about.
    replace(&old.server.1, &new.server.1);
    replace(&old.server.0, &new.server.0);
    replace(&old.ca, &new.ca);
    both_say("a new authority").await;
    renewed(&mut status, 2).await;
    both_say("a session under it").await;

    std::fs::write(&old.ca, "no certificate").unwrap();
    both_say("a broken file").await;
    assert_eq!(status.borrow().reconnects, 2);
}
