//! The publisher against a real etcd.
#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

mod support;

use std::time::Duration;

use clustermesh_kvstore::digest::{Digest, DigestRecord, SourceTime, Timed};
use clustermesh_kvstore::key::HEARTBEAT;
use clustermesh_kvstore::publisher::{Origin, OwnedPrefix, Publisher, PublisherSpec};
use clustermesh_kvstore::reflector::{Connection, ConnectionOptions};
use support::{DEADLINE, Etcd, eventually};
use tokio::time::timeout;

const CANARY: &str = "synced/a";

fn spec() -> PublisherSpec {
    let owned = vec![
        OwnedPrefix { canary: Some(CANARY.into()), ..OwnedPrefix::new("data/a/") },
        OwnedPrefix::new("config/a"),
    ];
    PublisherSpec { owned, heartbeat: None, ..PublisherSpec::default() }
}

fn publish(etcd: &Etcd, spec: PublisherSpec, keys: &[(&str, &str)]) -> Publisher {
    let (connection, _) = Connection::spawn(etcd.config(), ConnectionOptions::default());
    let publisher = Publisher::spawn(connection, spec);
    for (key, value) in keys {
        publisher.set((*key).to_owned(), Some(value.as_bytes().into()));
    }
    publisher.initial_done("data/a/");
    publisher.initial_done("config/a");
    publisher
}

async fn flushed(publisher: &Publisher) {
    let flushed = timeout(DEADLINE, publisher.flushed()).await;
    assert!(flushed.is_ok(), "not flushed: {:?}", *publisher.status().borrow());
}

/// Keys and values under a prefix.
async fn keys(etcd: &Etcd, prefix: &str) -> Vec<(String, String)> {
    etcd.keys(prefix).await.into_iter().map(|(key, value, _)| (key, value)).collect()
}

fn pair(key: &str, value: &str) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

#[tokio::test]
async fn publishes_with_leases_and_canaries_and_deletes_what_is_not_its() {
    let etcd = Etcd::start().await;
    etcd.put("data/a/old", "of an earlier run").await;
    etcd.put("data/ab/1", "not ours").await;
    let publisher = publish(&etcd, spec(), &[("data/a/1", "x"), ("data/a/2", "y"), ("config/a", "c")]);
    flushed(&publisher).await;
    assert_eq!(keys(&etcd, "data/a/").await, [pair("data/a/1", "x"), pair("data/a/2", "y")]);
    assert_eq!(keys(&etcd, "data/ab/").await.len(), 1);
    for key in ["data/a/1", "config/a", CANARY] {
        let (_, _, lease) = &etcd.keys(key).await[0];
        assert_ne!(*lease, 0, "{key} has no lease");
    }
    publisher.set("data/a/1".into(), None);
    publisher.set("data/a/2".into(), Some((*b"z").into()));
    flushed(&publisher).await;
    assert_eq!(keys(&etcd, "data/a/").await, [pair("data/a/2", "z")]);
    let status = publisher.status().borrow().clone();
    assert_eq!(status.pending, 0);
    assert!(status.synced.values().all(|synced| *synced), "{status:?}");
    publisher.shutdown().await;
    assert_eq!(keys(&etcd, "data/a/").await.len(), 1, "keys outlive their publisher");
}

#[tokio::test]
async fn nothing_is_deleted_and_no_canary_written_before_the_state_is_complete() {
    let etcd = Etcd::start().await;
    etcd.put("data/a/old", "of an earlier run").await;
    let (connection, _) = Connection::spawn(etcd.config(), ConnectionOptions::default());
    let publisher = Publisher::spawn(connection, spec());
    publisher.set("data/a/1".into(), Some((*b"x").into()));
    eventually("the key is written", || async { !etcd.keys("data/a/1").await.is_empty() }).await;
    assert_eq!(keys(&etcd, "data/a/").await.len(), 2);
    assert!(keys(&etcd, CANARY).await.is_empty());
    publisher.initial_done("data/a/");
    publisher.initial_done("config/a");
    flushed(&publisher).await;
    assert_eq!(keys(&etcd, "data/a/").await, [pair("data/a/1", "x")]);
    assert_eq!(keys(&etcd, CANARY).await.len(), 1);
}

#[tokio::test]
async fn a_restart_of_the_publisher_writes_nothing() {
    let etcd = Etcd::start().await;
    let desired = [("data/a/1", "x"), ("data/a/2", "y"), ("config/a", "c")];
    let publisher = publish(&etcd, spec(), &desired);
    flushed(&publisher).await;
    publisher.shutdown().await;
    let revision = etcd.session().await.revision();
    let publisher = publish(&etcd, spec(), &desired);
    flushed(&publisher).await;
    assert_eq!(etcd.session().await.revision(), revision);
    let status = publisher.status().borrow().clone();
    assert_eq!((status.written, status.deleted), (0, 0));
}

#[tokio::test]
async fn what_others_change_is_put_right() {
    let etcd = Etcd::start().await;
    let publisher = publish(&etcd, spec(), &[("data/a/1", "x"), ("data/a/2", "y")]);
    flushed(&publisher).await;
    let before = keys(&etcd, "data/a/").await;
    etcd.put("data/a/1", "changed").await;
    etcd.delete("data/a/2").await;
    etcd.put("data/a/3", "added").await;
    etcd.delete(CANARY).await;
    eventually("all is as it was", || async {
        keys(&etcd, "data/a/").await == before && !keys(&etcd, CANARY).await.is_empty()
    })
    .await;
    assert!(publisher.status().borrow().repaired >= 2);
}

#[tokio::test]
async fn keys_of_a_revoked_lease_get_another() {
    let etcd = Etcd::start().await;
    let publisher = publish(&etcd, spec(), &[("data/a/1", "x")]);
    flushed(&publisher).await;
    let lease = etcd.keys("data/a/1").await[0].2;
    etcd.ctl(&["lease", "revoke", &format!("{lease:x}")]);
    eventually("the keys are back", || async {
        etcd.keys("data/a/1").await.first().is_some_and(|(_, _, other)| *other != lease && *other != 0)
            && !etcd.keys(CANARY).await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_re_created_etcd_is_filled_again_and_its_canary_comes_last() {
    let mut etcd = Etcd::start().await;
    let desired: Vec<_> = (0..300).map(|number| format!("data/a/{number}")).collect();
    let desired: Vec<_> = desired.iter().map(|key| (key.as_str(), "x")).collect();
    let publisher = publish(&etcd, spec(), &desired);
    flushed(&publisher).await;
    etcd.kill();
    etcd.forget();
    etcd.run().await;
    eventually("the canary is back", || async { !keys(&etcd, CANARY).await.is_empty() }).await;
    let session = etcd.session().await;
    let canary = session.get(CANARY).await.unwrap().unwrap().mod_revision;
    let range = clustermesh_kvstore::etcd::KeyRange::of("data/a/");
    let page = session.list_page(&range, None, 0, 0).await.unwrap();
    assert_eq!(page.kvs.len(), 300);
    assert!(page.kvs.iter().all(|kv| kv.mod_revision < canary));
}

#[tokio::test]
async fn etcd_may_be_down_at_first_and_one_bad_key_holds_nobody_back() {
    let mut etcd = Etcd::start().await;
    etcd.kill();
    let large = "x".repeat(2 << 20);
    let publisher = publish(&etcd, spec(), &[("data/a/1", "x"), ("data/a/2", &large), ("config/a", "c")]);
    etcd.run().await;
    eventually("the others are written", || async {
        !etcd.keys("data/a/1").await.is_empty() && !etcd.keys("config/a").await.is_empty()
    })
    .await;
    let mut status = publisher.status();
    let told = status.wait_for(|status| status.last_error.contains("refuses") && status.pending == 1);
    assert!(timeout(DEADLINE, told).await.is_ok(), "{:?}", *publisher.status().borrow());
    publisher.set("data/a/2".into(), Some((*b"small").into()));
    flushed(&publisher).await;
}

#[tokio::test]
async fn many_keys_go_on_several_leases() {
    let etcd = Etcd::start().await;
    let desired: Vec<_> = (0..2_500).map(|number| format!("data/a/{number}")).collect();
    let desired: Vec<_> = desired.iter().map(|key| (key.as_str(), "x")).collect();
    let publisher = publish(&etcd, spec(), &desired);
    flushed(&publisher).await;
    let mut by_lease = std::collections::BTreeMap::new();
    for (_, _, lease) in etcd.keys("data/a/").await {
        *by_lease.entry(lease).or_insert(0) += 1;
    }
    assert!(by_lease.values().all(|keys| *keys <= 1000), "{by_lease:?}");
    assert_eq!(by_lease.values().sum::<i32>(), 2_500);
}

#[tokio::test]
async fn the_heart_beats() {
    let etcd = Etcd::start().await;
    let spec = PublisherSpec { heartbeat: Some(Duration::from_secs(1)), ..spec() };
    let publisher = publish(&etcd, spec, &[]);
    flushed(&publisher).await;
    eventually("the first beat", || async { !etcd.keys(HEARTBEAT).await.is_empty() }).await;
    let (_, first, lease) = etcd.keys(HEARTBEAT).await.remove(0);
    assert_ne!(lease, 0);
    assert_eq!(first.len(), "2026-11-20T20:41:35Z".len());
    eventually("the next beat", || async { etcd.keys(HEARTBEAT).await[0].1 != first }).await;
}

#[tokio::test]
async fn the_digest_of_what_stands_is_stated_with_the_times_of_its_changes() {
    let etcd = Etcd::start().await;
    let digest = Some("digests/a/data".to_owned());
    let with_digest = || {
        let mut spec = spec();
        spec.owned[0].digest = digest.clone();
        spec
    };
    let stated = async |etcd: &Etcd| {
        let keys = etcd.keys("digests/a/data").await;
        keys.first().and_then(|(_, value, _)| DigestRecord::decode(value.as_bytes()).ok())
    };
    let publisher = publish(&etcd, with_digest(), &[("data/a/1", "x"), ("data/a/2", "y")]);
    let whole: Digest = [("1", b"x".as_slice()), ("2", b"y")].into_iter().collect();
    eventually("the digest is stated", || async { stated(&etcd).await.is_some() }).await;
    assert_eq!(stated(&etcd).await.unwrap().digest, whole);

    let at = SourceTime::now();
    publisher.set_from("data/a/2".into(), None, Origin::Event(at));
    let rest: Digest = [("1", b"x".as_slice())].into_iter().collect();
    eventually("the change is stated", || async { stated(&etcd).await.unwrap().digest == rest }).await;
    let record = stated(&etcd).await.unwrap();
    assert_eq!(record.recent, [Timed { revision: record.revision, at }]);

    etcd.put("digests/a/data", "nonsense").await;
    eventually("it is put right", || async {
        etcd.keys("digests/a/data").await[0].1.as_bytes() == record.encode()
    })
    .await;

    // A restart has nothing else to say.
    publisher.shutdown().await;
    let revision = etcd.session().await.revision();
    let publisher = publish(&etcd, with_digest(), &[("data/a/1", "x")]);
    flushed(&publisher).await;
    publisher.set_from("data/a/1".into(), Some((*b"z").into()), Origin::Event(at));
    let changed: Digest = [("1", b"z".as_slice())].into_iter().collect();
    eventually("the next change is stated", || async { stated(&etcd).await.unwrap().digest == changed })
        .await;
    assert_eq!(etcd.session().await.revision(), revision + 2, "one write, one statement");
}
