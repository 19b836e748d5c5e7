//! The authority that has issued a lab's certificates is replaced while everything runs.

use super::steps::Stage;
use super::{agents, etcd};
use crate::lab::Lab;
use crate::pace;
use crate::scenario::{ProcessRef, Rotated, Rotation, Step};
use anyhow::Context as _;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(200);
/// Certificates and configuration are read again each 5 s.
const TAKEN_UP: Duration = Duration::from_secs(30);
/// A client that is refused tries for so long.
const REFUSED: &str = "2s";
/// What is written again by its writer itself, also if nothing happens.
const RESTLESS: [&str; 2] = ["/digests/", "cilium/.heartbeat"];

/// How everything was.
pub(super) struct Before {
    /// By cluster: its own certificate for the own etcd, and the authority then.
    access: BTreeMap<String, etcd::Access>,
    /// By cluster: key, and the revisions of its begin and its last write.
    keys: BTreeMap<String, BTreeMap<String, (i64, i64)>>,
    /// By agent and cluster that it follows.
    peers: BTreeMap<(String, String), Peer>,
}

#[derive(Clone, Debug, PartialEq)]
struct Peer {
    certificate_ends: i64,
    lists: BTreeMap<String, u64>,
}

/// Does one step of the rotation.
pub(super) fn carry_out(stage: &mut Stage<'_>, rotation: Rotation) -> anyhow::Result<Option<String>> {
    let lab = stage.lab()?;
    let clusters = clusters(lab)?;
    let directory = lab.folder().join("pki");
    if rotation == Rotation::Begin {
        stage.before_rotation = Some(Before::now(stage, lab, &clusters, &directory)?);
    }
    let mut arguments = vec!["ca", "rotate", "--dir", directory.to_str().context("not UTF-8")?];
    match rotation {
        Rotation::Begin => {}
        Rotation::Reissue => arguments.push("--reissue"),
        Rotation::Finish => arguments.push("--finish"),
    }
    lab.clustermesh(&arguments)?;
    if rotation != Rotation::Reissue {
        // It reads the authorities for clients at its start only.
        for cluster in &clusters {
            let process = ProcessRef { cluster: cluster.clone(), process: "etcd".into(), empty: false };
            stage.step(&Step::Restart(process))?;
        }
    }
    for (from, to) in lab.connections()? {
        let (from, to) = (lab.context(&from), lab.context(&to));
        lab.clustermesh(&["connect", "--context", &from, "--destination-context", &to, "--wait"])?;
    }
    if rotation != Rotation::Reissue {
        return Ok(None);
    }
    let begin = Instant::now();
    let before = stage.before_rotation.as_ref().context("`rotate: begin` comes first")?;
    stage.options.interrupt.retry_until(begin + pace::slowed(TAKEN_UP), PAUSE, || {
        for ((agent, cluster), peer) in peers(lab, &clusters)? {
            let old = before.peers.get(&(agent.clone(), cluster.clone()));
            let fresh = old.is_some_and(|old| old.certificate_ends != peer.certificate_ends);
            anyhow::ensure!(fresh, "{agent} still comes to {cluster} with its old certificate");
        }
        Ok(())
    })?;
    Ok(Some(format!("agents have their new certificates after {:.1} s", begin.elapsed().as_secs_f64())))
}

/// Fails unless old certificates are refused on both sides, and everything else is as it was.
pub(super) fn unnoticed(stage: &Stage<'_>, rotated: &Rotated) -> anyhow::Result<Option<String>> {
    let lab = stage.lab()?;
    let before = stage.before_rotation.as_ref().context("nothing was rotated")?;
    let clusters = clusters(lab)?;
    for cluster in &clusters {
        let new = etcd::Access::admin(lab, cluster)?;
        let old = before.access.get(cluster).with_context(|| format!("{cluster} is new"))?.clone();
        let client = etcd::Access { trusted_ca_file: new.trusted_ca_file.clone(), ..old.clone() };
        let server = etcd::Access { trusted_ca_file: old.trusted_ca_file.clone(), ..new.clone() };
        anyhow::ensure!(is_let_in(stage, lab, cluster, &new)?, "{cluster} refuses its own exporter");
        anyhow::ensure!(!is_let_in(stage, lab, cluster, &client)?, "{cluster} takes an old certificate");
        anyhow::ensure!(!is_let_in(stage, lab, cluster, &server)?, "{cluster} shows an old certificate");
    }
    let deadline = Instant::now() + rotated.within.0;
    let (mut lists, mut kept) = (0, 0);
    stage.options.interrupt.retry_until(deadline, PAUSE, || {
        (lists, kept) = (0, 0);
        for cluster in &clusters {
            let status = agents::status(lab, cluster)?;
            for agent in agents::each(&status) {
                healthy(&agent["status"]).with_context(|| format!("{cluster}/{}", agent["node"]))?;
            }
            kept += unchanged(&before.keys[cluster], &keys(stage, lab, cluster)?, &rotated.but_for)
                .with_context(|| format!("in the etcd of {cluster}"))?;
        }
        for ((agent, cluster), peer) in peers(lab, &clusters)? {
            let then = &before.peers.get(&(agent.clone(), cluster.clone())).context("it is new")?.lists;
            anyhow::ensure!(
                *then == peer.lists,
                "{agent} has listed {cluster} again: {then:?}, now {:?}",
                peer.lists
            );
            lists += then.values().sum::<u64>();
        }
        Ok(())
    })?;
    Ok(Some(format!("{kept} keys are as they were; {lists} lists, none of them new")))
}

impl Before {
    fn now(
        stage: &Stage<'_>,
        lab: &Lab,
        clusters: &BTreeSet<String>,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let mut before =
            Self { access: BTreeMap::new(), keys: BTreeMap::new(), peers: peers(lab, clusters)? };
        // Goes with the lab.
        let folder = lab.folder().join("before-rotation");
        for cluster in clusters {
            let now = etcd::Access::admin(lab, cluster)?;
            let keep = |file: &str| keep(Path::new(file), directory, &folder);
            let old = etcd::Access {
                trusted_ca_file: keep(&now.trusted_ca_file)?,
                cert_file: keep(&now.cert_file)?,
                key_file: keep(&now.key_file)?,
                ..now
            };
            anyhow::ensure!(is_let_in(stage, lab, cluster, &old)?, "{cluster} refuses its own exporter");
            before.access.insert(cluster.clone(), old);
            before.keys.insert(cluster.clone(), keys(stage, lab, cluster)?);
        }
        Ok(before)
    }
}

/// Copies a file of `directory`; gives where it is.
fn keep(file: &Path, directory: &Path, folder: &Path) -> anyhow::Result<String> {
    let within = file.strip_prefix(directory).with_context(|| format!("{} is elsewhere", file.display()))?;
    let copy: PathBuf = folder.join(within);
    if let Some(parent) = copy.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::copy(file, &copy).with_context(|| format!("cannot copy {}", file.display()))?;
    Ok(copy.display().to_string())
}

fn clusters(lab: &Lab) -> anyhow::Result<BTreeSet<String>> {
    Ok(lab.connections()?.into_iter().flat_map(|(from, to)| [from, to]).collect())
}

/// Whether both sides of a connection to the cluster's etcd take each other for who they are.
fn is_let_in(stage: &Stage<'_>, lab: &Lab, cluster: &str, access: &etcd::Access) -> anyhow::Result<bool> {
    let mut command = etcd::etcdctl(lab, cluster, access)?;
    command.args(["--dial-timeout", REFUSED, "--command-timeout", REFUSED, "get", "cilium/.heartbeat"]);
    Ok(stage.run(command, pace::slowed(Duration::from_secs(10)))?.status.success())
}

fn keys(stage: &Stage<'_>, lab: &Lab, cluster: &str) -> anyhow::Result<BTreeMap<String, (i64, i64)>> {
    let mut all = BTreeMap::new();
    for prefix in ["cilium/", "clustermesh/"] {
        let records = etcd::read(stage, lab, cluster, prefix)?;
        all.extend(records.into_iter().map(|record| (record.key, (record.created, record.modified))));
    }
    Ok(all)
}

/// How many keys have neither gone nor been written since, but for those that were to change.
fn unchanged(
    before: &BTreeMap<String, (i64, i64)>,
    after: &BTreeMap<String, (i64, i64)>,
    but_for: &[String],
) -> anyhow::Result<usize> {
    let changing = |key: &str| {
        RESTLESS.iter().any(|part| key.contains(part)) || but_for.iter().any(|part| key.contains(part))
    };
    let mut kept = 0;
    for (key, then) in before.iter().filter(|(key, _)| !changing(key)) {
        let now = after.get(key).with_context(|| format!("{key} is gone"))?;
        anyhow::ensure!(then == now, "{key} was written again: revisions {then:?}, now {now:?}");
        kept += 1;
    }
    anyhow::ensure!(kept > 0, "there was nothing to keep");
    Ok(kept)
}

fn healthy(status: &Value) -> anyhow::Result<()> {
    let flaw = agents::out_of_sync(status);
    anyhow::ensure!(flaw.is_none(), "{}", flaw.unwrap_or_default());
    let remotes = status["remotes"].as_array().context("no remote clusters")?;
    for remote in remotes {
        let (name, health) = (&remote["name"], &remote["liveness"]["health"]);
        anyhow::ensure!(remote["ready"] == true, "{name} is not ready");
        anyhow::ensure!(health == "healthy", "{name} is {health}");
    }
    Ok(())
}

/// What each agent says of each cluster that it follows, the own one among them.
fn peers(lab: &Lab, clusters: &BTreeSet<String>) -> anyhow::Result<BTreeMap<(String, String), Peer>> {
    let mut all = BTreeMap::new();
    for cluster in clusters {
        let status = agents::status(lab, cluster)?;
        for agent in agents::each(&status) {
            let name = format!("{cluster}/{}", agent["node"].as_str().unwrap_or_default());
            let remotes = agent["status"]["remotes"].as_array().into_iter().flatten();
            for peer in remotes.chain([&agent["status"]["own"]]) {
                let of = peer["name"].as_str().with_context(|| format!("{name} follows nobody"))?;
                all.insert((name.clone(), of.to_owned()), read_peer(peer)?);
            }
        }
    }
    Ok(all)
}

fn read_peer(peer: &Value) -> anyhow::Result<Peer> {
    let certificate_ends = peer["certificate_expires"].as_i64().context("no certificate_expires")?;
    let kinds = peer["kinds"].as_array().context("no kinds")?;
    let lists = kinds.iter().map(|kind| {
        let name = kind["kind"].as_str().context("a kind without a name")?;
        Ok((name.to_owned(), kind["lists"].as_u64().context("no lists")?))
    });
    Ok(Peer { certificate_ends, lists: lists.collect::<anyhow::Result<_>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_written_again_is_noticed_unless_it_was_to_change() {
        let keys = |all: &[(&str, i64, i64)]| -> BTreeMap<String, (i64, i64)> {
            all.iter().map(|(key, from, to)| ((*key).to_owned(), (*from, *to))).collect()
        };
        let before = keys(&[("a/x", 1, 1), ("a/churn", 1, 1), ("a/digests/x", 1, 1)]);
        let but_for = ["churn".to_owned()];
        let after = keys(&[("a/x", 1, 1), ("a/churn", 1, 9), ("a/digests/x", 1, 7), ("a/new", 9, 9)]);
        assert_eq!(unchanged(&before, &after, &but_for).expect("all kept"), 1);
        assert!(unchanged(&before, &after, &[]).is_err());
        assert!(unchanged(&before, &keys(&[("a/x", 8, 8)]), &but_for).is_err(), "deleted and written anew");
        assert!(unchanged(&before, &keys(&[]), &but_for).is_err());
    }
}
