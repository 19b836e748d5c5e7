//! Reflectors against a real etcd.
#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

mod support;

use std::collections::BTreeMap;

use clustermesh_kvstore::digest::{Digest, record_hash};
use clustermesh_kvstore::etcd::WriteOp;
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions, ReflectorEvent, ReflectorSpec};
use support::{Etcd, eventually, next, quick};
use tokio::sync::mpsc;

fn spec(canary: Option<&str>) -> ReflectorSpec {
    // Small pages, so that lists have several.
    ReflectorSpec { page_size: 2, ..ReflectorSpec::new("data/a/", canary.map(str::to_owned)) }
}

/// What a consumer knows, and what it was told in which order.
#[derive(Default)]
struct Consumer {
    state: BTreeMap<String, String>,
    deletes: usize,
    losses: usize,
}

impl Consumer {
    async fn until_synced(&mut self, events: &mut mpsc::Receiver<ReflectorEvent>) {
        while !self.take(next(events).await) {}
    }

    /// Whether it was `Synced`.
    fn take(&mut self, event: ReflectorEvent) -> bool {
        match event {
            ReflectorEvent::Upsert { suffix, value, .. } => {
                self.state.insert(suffix, String::from_utf8(value).unwrap());
            }
            ReflectorEvent::Delete { suffix, .. } => {
                self.deletes += 1;
                self.state.remove(&suffix);
            }
            ReflectorEvent::Lost { .. } => self.losses += 1,
            ReflectorEvent::Synced { .. } => return true,
            ReflectorEvent::Progress { .. } | ReflectorEvent::Relisting => {}
        }
        false
    }

    fn keys(&self) -> Vec<&str> {
        self.state.keys().map(String::as_str).collect()
    }
}

#[tokio::test]
async fn lists_and_watches_its_prefix_only() {
    let etcd = Etcd::start().await;
    for key in ["data/a/1", "data/a/2", "data/a/3", "data/ab/1", "data/a"] {
        etcd.put(key, "x").await;
    }
    let (connection, _) = Connection::spawn(etcd.config(), ConnectionOptions::default());
    let mut events = connection.reflect(spec(None));
    let mut one_key = connection.reflect(ReflectorSpec::new("data/a", None));
    let mut consumer = Consumer::default();
    consumer.until_synced(&mut events).await;
    assert_eq!(consumer.keys(), ["1", "2", "3"]);

    etcd.put("data/ab/2", "x").await;
    let revision = etcd.put("data/a/4", "y").await;
    let value = b"y".to_vec();
    assert_eq!(next(&mut events).await, ReflectorEvent::Upsert { suffix: "4".into(), value, revision });
    let revision = etcd.delete("data/a/1").await;
    assert_eq!(next(&mut events).await, ReflectorEvent::Delete { suffix: "1".into(), revision });

    let mut consumer = Consumer::default();
    consumer.until_synced(&mut one_key).await;
    assert_eq!(consumer.keys(), [""]);
}

#[tokio::test]
async fn resumes_after_a_restart_of_etcd() {
    let mut etcd = Etcd::start().await;
    etcd.put("data/a/1", "x").await;
    let (connection, mut status) = Connection::spawn(etcd.config(), ConnectionOptions::default());
    let mut events = connection.reflect(spec(None));
    let mut consumer = Consumer::default();
    consumer.until_synced(&mut events).await;

    etcd.kill();
    assert!(matches!(next(&mut events).await, ReflectorEvent::Lost { .. }));
    status.wait_for(|status| status.last_error.is_some()).await.unwrap();
    etcd.run().await;
    assert!(matches!(next(&mut events).await, ReflectorEvent::Synced { .. }), "nothing is told twice");
    etcd.put("data/a/2", "y").await;
    assert!(matches!(next(&mut events).await, ReflectorEvent::Upsert { suffix, .. } if suffix == "2"));
    assert!(status.borrow().connected && status.borrow().reconnects > 0);
}

#[tokio::test]
async fn a_re_created_etcd_deletes_nothing_before_its_canary() {
    let mut etcd = Etcd::start().await;
    for key in ["data/a/1", "data/a/2", "data/a/3", "synced/a"] {
        etcd.put(key, "x").await;
    }
    let (connection, mut status) = Connection::spawn(etcd.config(), quick());
    let mut events = connection.reflect(spec(Some("synced/a")));
    let mut consumer = Consumer::default();
    consumer.until_synced(&mut events).await;
    let first_id = status.borrow().etcd_cluster_id;

    etcd.kill();
    etcd.forget();
    etcd.run().await;
    status.wait_for(|status| status.connected && status.etcd_cluster_id != first_id).await.unwrap();
    // Half filled: a list now would miss keys. The sign of life shows that the reflector waits.
    etcd.put("data/a/2", "y").await;
    loop {
        match events.recv().await.unwrap() {
            ReflectorEvent::Progress { .. } => break,
            event => assert!(matches!(event, ReflectorEvent::Lost { .. }), "{event:?}"),
        }
    }
    etcd.put("data/a/4", "y").await;
    etcd.put("synced/a", "y").await;
    consumer.until_synced(&mut events).await;
    assert_eq!(consumer.keys(), ["2", "4"]);
    assert_eq!(consumer.deletes, 2);
}

#[tokio::test]
async fn compaction_while_away_ends_in_a_new_list() {
    let mut etcd = Etcd::start().await;
    for key in ["data/a/1", "data/a/2"] {
        etcd.put(key, "x").await;
    }
    let config = etcd.config();
    let (connection, mut status) = Connection::spawn(config, ConnectionOptions::default());
    let mut events = connection.reflect(spec(None));
    let mut consumer = Consumer::default();
    consumer.until_synced(&mut events).await;

    // Moves on and compacts where the reflector cannot see it: at another port, with the same data.
    etcd.kill();
    status.wait_for(|status| !status.connected).await.unwrap();
    let port = etcd.move_to_another_port();
    etcd.run().await;
    etcd.delete("data/a/1").await;
    let revision = etcd.put("data/a/3", "y").await;
    etcd.ctl(&["compact", &revision.to_string()]);
    etcd.kill();
    etcd.move_to(port);
    etcd.run().await;
    while consumer.keys() != ["2", "3"] {
        let event = next(&mut events).await;
        consumer.take(event);
    }
    consumer.until_synced(&mut events).await;
    assert_eq!(consumer.deletes, 1);
}

#[tokio::test]
async fn a_silent_etcd_is_noticed() {
    let etcd = Etcd::start().await;
    etcd.put("data/a/1", "x").await;
    let (connection, _) = Connection::spawn(etcd.config(), quick());
    let mut events = connection.reflect(spec(None));
    let mut consumer = Consumer::default();
    consumer.until_synced(&mut events).await;
    etcd.signal("-STOP");
    let event = next(&mut events).await;
    etcd.signal("-CONT");
    assert!(matches!(&event, ReflectorEvent::Lost { reason } if reason.contains("silent")), "{event:?}");
    consumer.until_synced(&mut events).await;
    assert_eq!((consumer.keys(), consumer.deletes), (vec!["1"], 0));
}

#[tokio::test]
async fn a_slow_consumer_loses_nothing_and_the_others_go_on() {
    let etcd = Etcd::start().await;
    let options = ConnectionOptions { channel: 1, ..ConnectionOptions::default() };
    let (connection, _) = Connection::spawn(etcd.config(), options);
    let mut slow = connection.reflect(spec(None));
    let mut other = connection.reflect(ReflectorSpec::new("data/b/", None));
    Consumer::default().until_synced(&mut other).await;
    for number in 0..50 {
        etcd.put(&format!("data/a/{number:02}"), "x").await;
    }
    etcd.put("data/b/1", "x").await;
    assert!(matches!(next(&mut other).await, ReflectorEvent::Upsert { .. }));
    let mut consumer = Consumer::default();
    while consumer.state.len() < 50 {
        let event = next(&mut slow).await;
        consumer.take(event);
    }
}

#[tokio::test]
async fn the_connection_ends_with_its_last_user() {
    let etcd = Etcd::start().await;
    let (connection, status) = Connection::spawn(etcd.config(), ConnectionOptions::default());
    let events = connection.reflect(spec(None));
    connection.session().await;
    drop(connection);
    drop(events);
    // The task drops its end of the status.
    eventually("the connection's task ends", || async { status.has_changed().is_err() }).await;
}

#[tokio::test]
async fn a_census_sums_all_pages_of_one_revision() {
    let etcd = Etcd::start().await;
    let session = etcd.session().await;
    let mut expected = Digest::default();
    let mut revision = 0;
    for chunk in 0..12 {
        let put = |n: i32| {
            let (suffix, value) = (format!("{chunk:02}-{n:03}"), n.to_string().into_bytes());
            expected.add(record_hash(&suffix, &value));
            WriteOp::Put { key: format!("data/a/{suffix}"), value, lease: 0 }
        };
        let ops: Vec<_> = (0..100).map(put).collect();
        revision = session.txn(ops).await.unwrap();
    }
    let (connection, _) = Connection::spawn(etcd.config(), ConnectionOptions::default());
    assert_eq!(connection.census("data/a/").await, (revision, expected));
    etcd.put("data/ab/1", "x").await;
    assert_eq!(connection.census("data/a/").await, (revision + 1, expected));
}
