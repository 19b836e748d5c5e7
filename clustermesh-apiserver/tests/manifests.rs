//! The source with a real directory.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use clustermesh_apiserver::objects::Change;
use clustermesh_apiserver::source::SourceEvent;
use clustermesh_apiserver::source::manifests::watch;
use tokio::sync::mpsc;

const DEADLINE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn files_come_change_and_go() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("a.yaml"), &["a"]);
    fs::create_dir(dir.path().join("sub")).unwrap();
    write(&dir.path().join("sub/b.json"), &[]);
    write(&dir.path().join(".hidden.yaml"), &["hidden"]);
    write(&dir.path().join("readme.txt"), &["text"]);
    let mut seen = Seen::of(dir.path()).await;
    assert_eq!(seen.names, names(&["a"]));

    write(&dir.path().join("sub/b.yml"), &["b"]);
    seen.until(&["a", "b"]).await;
    fs::create_dir(dir.path().join("later")).unwrap();
    write(&dir.path().join("later/c.yaml"), &["c", "d"]);
    seen.until(&["a", "b", "c", "d"]).await;
    fs::rename(dir.path().join("later"), dir.path().join("renamed")).unwrap();
    write(&dir.path().join("renamed/c.yaml"), &["c"]);
    seen.until(&["a", "b", "c"]).await;
    fs::remove_dir_all(dir.path().join("renamed")).unwrap();
    seen.until(&["a", "b"]).await;
    fs::remove_file(dir.path().join("a.yaml")).unwrap();
    seen.until(&["b"]).await;
}

/// Of a policy that makes no sense the last good state stands: its pods are not open meanwhile.
#[tokio::test]
async fn policies_are_objects_like_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.yaml");
    let policies = |cidr: &str| {
        format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{namespace: shop, name: a}}\n\
             spec: {{endpointSelector: {{}}, ingress: [{{fromCIDR: [{cidr}]}}]}}\n---\n\
             apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{namespace: shop, name: b}}\n\
             spec: {{podSelector: {{}}}}\n---\n\
             apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {{name: c}}\n\
             spec: {{endpointSelector: {{}}, egress: [{{}}]}}\n"
        )
    };
    fs::write(&path, policies("10.0.0.0/8")).unwrap();
    let mut seen = Seen::of(dir.path()).await;
    assert_eq!(seen.names, names(&["a", "b", "c"]));
    fs::write(&path, policies("10.0.0.0/88")).unwrap();
    while seen.next().await != SourceEvent::Broken(1) {}
    assert_eq!((seen.deleted, &seen.names), (0, &names(&["a", "b", "c"])));
    fs::remove_file(&path).unwrap();
    seen.until(&[]).await;
}

#[tokio::test]
async fn a_file_that_is_saved_by_moving_the_old_one_away_never_vanishes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.yaml");
    write(&path, &["a"]);
    let mut seen = Seen::of(dir.path()).await;
    fs::rename(&path, dir.path().join("a.yaml~")).unwrap();
    write(&path, &["a", "b"]);
    seen.until(&["a", "b"]).await;
    assert_eq!(seen.deleted, 0);
}

/// As Kubernetes updates a mounted ConfigMap: files are links into `..data`, which is a link itself.
#[tokio::test]
async fn links_may_be_swapped() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (version, content) in [("..v1", &["a"][..]), ("..v2", &["a", "b"])] {
        fs::create_dir(path(version)).unwrap();
        write(&path(version).join("a.yaml"), content);
    }
    symlink("..v1", path("..data")).unwrap();
    symlink("..data/a.yaml", path("a.yaml")).unwrap();
    // A link back up must not make us run in circles.
    symlink(".", path("loop")).unwrap();
    let mut seen = Seen::of(dir.path()).await;
    assert_eq!(seen.names, names(&["a"]));
    symlink("..v2", path("..new")).unwrap();
    fs::rename(path("..new"), path("..data")).unwrap();
    seen.until(&["a", "b"]).await;
    assert_eq!(seen.deleted, 0);
}

#[tokio::test]
async fn a_directory_that_is_away_keeps_its_last_state() {
    let parent = tempfile::tempdir().unwrap();
    let (dir, away) = (parent.path().join("dir"), parent.path().join("away"));
    fs::create_dir(&dir).unwrap();
    write(&dir.join("a.yaml"), &["a"]);
    let mut seen = Seen::of(&dir).await;
    fs::rename(&dir, &away).unwrap();
    fs::create_dir(parent.path().join("new")).unwrap();
    write(&parent.path().join("new/a.yaml"), &["a", "b"]);
    fs::rename(parent.path().join("new"), &dir).unwrap();
    seen.until(&["a", "b"]).await;
    // And the new one is watched like the first.
    let changed = Instant::now();
    write(&dir.join("a.yaml"), &["b"]);
    seen.until(&["b"]).await;
    println!("from the file to the change: {:?}", changed.elapsed());
    assert_eq!(seen.deleted, 1);
}

/// What the events add up to.
struct Seen {
    events: mpsc::Receiver<SourceEvent>,
    names: BTreeSet<String>,
    deleted: usize,
}

impl Seen {
    /// Up to the end of the first full state.
    async fn of(dir: &Path) -> Self {
        let mut seen = Self { events: watch(dir.into()).unwrap(), names: BTreeSet::new(), deleted: 0 };
        while seen.next().await != SourceEvent::Synced {}
        seen
    }

    async fn until(&mut self, wanted: &[&str]) {
        while self.names != names(wanted) {
            self.next().await;
        }
    }

    async fn next(&mut self) -> SourceEvent {
        let event = tokio::time::timeout(DEADLINE, self.events.recv()).await;
        let event = event.unwrap_or_else(|_| panic!("nothing more came; have {:?}", self.names)).unwrap();
        if let SourceEvent::Changes(changes) = &event {
            for change in changes {
                match change {
                    Change::Upsert(object) => {
                        self.names.insert(object.key().name.name);
                    }
                    Change::Delete(key) => {
                        self.deleted += 1;
                        assert!(self.names.remove(&key.name.name), "{key}");
                    }
                }
            }
        }
        event
    }
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// A file of namespaces.
fn write(path: &Path, names: &[&str]) {
    let text = names.iter().fold(String::new(), |text, name| {
        text + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: " + name + "}\n"
    });
    fs::write(path, text).unwrap();
}
