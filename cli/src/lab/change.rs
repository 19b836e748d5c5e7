//! Commands that change a running lab: objects, processes, cables.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use tokio::time::Instant;

use super::args::{ProcessArgs, StartArgs, WaitArgs};
use super::objects::{ObjectRef, Objects};
use super::state::{ClusterState, Lock};
use super::system::{Process, SystemProcess, new_etcd_token};
use super::topology::manifest_files;
use super::{Lab, network, read_manifest, requirements};
use crate::error::usage;
use crate::output::print_line;
use crate::wait::until;

pub(crate) async fn apply(
    lab: Option<&str>,
    cluster: &str,
    files: &[PathBuf],
    wait: &WaitArgs,
) -> anyhow::Result<()> {
    let change = |objects: &mut Objects| {
        for file in files {
            for manifest in manifest_files(file)? {
                read_manifest(objects, &manifest)?;
            }
        }
        Ok(())
    };
    objects(lab, cluster, wait, change).await
}

pub(crate) async fn delete(
    lab: Option<&str>,
    cluster: &str,
    object: &ObjectRef,
    wait: &WaitArgs,
) -> anyhow::Result<()> {
    objects(lab, cluster, wait, |objects| objects.remove(object)).await
}

pub(crate) async fn annotate(
    lab: Option<&str>,
    cluster: &str,
    object: &ObjectRef,
    changes: &[String],
    wait: &WaitArgs,
) -> anyhow::Result<()> {
    let change = |objects: &mut Objects| {
        let annotations = objects.metadata_mut(object)?.annotations.get_or_insert_default();
        for change in changes {
            match (change.split_once('='), change.strip_suffix('-')) {
                (Some((key, value)), _) if !key.is_empty() => {
                    annotations.insert(key.to_owned(), value.to_owned());
                }
                (None, Some(key)) if !key.is_empty() => {
                    annotations.remove(key);
                }
                _ => {
                    return Err(usage(format!(
                        "{change:?}: write KEY=VALUE to set or KEY- to remove an annotation"
                    )));
                }
            }
        }
        Ok(())
    };
    objects(lab, cluster, wait, change).await
}

pub(crate) async fn scale(
    lab: Option<&str>,
    cluster: &str,
    object: &ObjectRef,
    replicas: u16,
    wait: &WaitArgs,
) -> anyhow::Result<()> {
    objects(lab, cluster, wait, |objects| objects.scale(object, replicas)).await
}

pub(crate) async fn kill(lab: Option<&str>, args: &ProcessArgs, signal: &str) -> anyhow::Result<()> {
    let signal = parse_signal(signal)?;
    let (lab, cluster, _lock) = lock(lab, &args.cluster)?;
    let process = SystemProcess::new(&lab.layout, lab.cluster(&cluster)?, args.process.clone())?;
    let cgroup = process.cgroup();
    if cgroup.signal(signal) == 0 {
        bail!("{} of cluster {cluster} does not run", args.process);
    }
    if signal == Signal::KILL {
        let ended = until(Instant::now() + Duration::from_secs(5), async || {
            Ok((!cgroup.is_populated()).then_some(()))
        });
        ended
            .await?
            .with_context(|| format!("the kernel does not end {} of cluster {cluster}", args.process))?;
    }
    Ok(())
}

pub(crate) async fn stop(lab: Option<&str>, args: &ProcessArgs) -> anyhow::Result<()> {
    let (lab, cluster, _lock) = lock(lab, &args.cluster)?;
    let process = SystemProcess::new(&lab.layout, lab.cluster(&cluster)?, args.process.clone())?;
    if !process.stop().await? {
        print_line(format!("{} of cluster {cluster} did not run", args.process));
    }
    Ok(())
}

pub(crate) async fn start(lab: Option<&str>, args: &StartArgs, stop_first: bool) -> anyhow::Result<()> {
    if args.fresh && args.process.process != Process::Etcd {
        return Err(usage(format!("--fresh is for etcd; {} keeps no data", args.process.process)));
    }
    let (lab, cluster, _lock) = lock(lab, &args.process.cluster)?;
    let process = SystemProcess::new(&lab.layout, lab.cluster(&cluster)?, args.process.process.clone())?;
    let mut state = ClusterState::load(&lab.layout, &cluster)?;
    if stop_first {
        process.stop().await?;
    }
    if args.fresh && !process.is_running() {
        let data = lab.layout.etcd_data(&cluster);
        match std::fs::remove_dir_all(&data) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                bail!("cannot remove {}: {e}", data.display())
            }
            _ => {}
        }
        state.etcd_token = new_etcd_token(&lab.layout, &cluster);
        state.save(&lab.layout, &cluster)?;
    }
    process.start(&state, Instant::now() + args.wait.wait_timeout.duration()).await
}

pub(crate) async fn set_link(lab: Option<&str>, target: &str, up: bool) -> anyhow::Result<()> {
    requirements(&["ip"])?;
    let (lab, cluster, node) = Lab::locate(lab, target)?;
    let _lock = Lock::acquire(&lab.layout)?;
    let cluster = lab.cluster(&cluster)?;
    let node = node.map(|name| cluster.node(name)).transpose()?;
    network::set_link(&lab.layout, cluster, node, up).await
}

/// Changes the objects of a cluster and brings the cluster in line with them; refuses what cannot be.
async fn objects(
    lab: Option<&str>,
    cluster: &str,
    wait: &WaitArgs,
    change: impl FnOnce(&mut Objects) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (lab, cluster, _lock) = lock(lab, cluster)?;
    let mut state = ClusterState::load(&lab.layout, &cluster)?;
    change(&mut state.objects)?;
    let pods = lab.pods(lab.cluster(&cluster)?);
    pods.check(&state)?;
    pods.reconcile(&mut state, Instant::now() + wait.wait_timeout.duration()).await?;
    Ok(())
}

pub(super) fn lock(lab: Option<&str>, cluster: &str) -> anyhow::Result<(Lab, String, Lock)> {
    requirements(&["ip"])?;
    let (lab, name, rest) = Lab::locate(lab, cluster)?;
    if let Some(rest) = rest {
        return Err(usage(format!("{cluster:?}: write CLUSTER or LAB/CLUSTER, without {rest:?}")));
    }
    let lock = Lock::acquire(&lab.layout)?;
    // It may have been removed while we waited for the lock.
    let lab = Lab::open(lab.layout.lab())?;
    Ok((lab, name, lock))
}

fn parse_signal(text: &str) -> anyhow::Result<Signal> {
    let name = text.to_ascii_uppercase();
    let signal = match name.strip_prefix("SIG").unwrap_or(&name) {
        "KILL" | "9" => Signal::KILL,
        "TERM" | "15" => Signal::TERM,
        "INT" | "2" => Signal::INT,
        "HUP" | "1" => Signal::HUP,
        "QUIT" | "3" => Signal::QUIT,
        "STOP" | "19" => Signal::STOP,
        "CONT" | "18" => Signal::CONT,
        "USR1" | "10" => Signal::USR1,
        "USR2" | "12" => Signal::USR2,
        _ => {
            return Err(usage(format!("{text:?}: use KILL, TERM, INT, HUP, QUIT, STOP, CONT, USR1 or USR2")));
        }
    };
    Ok(signal)
}
