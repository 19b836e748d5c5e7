//! `lab up`: from a topology file to running clusters, or back to nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::args::UpArgs;
use super::layout::Layout;
use super::pods::Pods;
use super::state::{ClusterState, LabState, Lock, names};
use super::system::{self, SystemProcess, binary};
use super::topology::{Topology, TopologyFile, lab_name};
use super::{down, network, pki, read_manifest, requirements};
use crate::error::usage;
use crate::mesh;
use crate::output::print_line;

/// Starts a lab.
///
/// # Errors
/// Whatever failed; nothing of the lab is left then.
pub(crate) async fn up(args: &UpArgs) -> anyhow::Result<()> {
    let (topology, state) = read(args)?;
    let cgroups = requirements(&["ip", "etcd"])?;
    if state.mesh {
        for companion in ["clustermesh-apiserver", "clustermesh-agent"] {
            binary(companion)?;
        }
    }
    let layout = Layout::new(args.name.as_deref().unwrap_or(&state.topology.name), &cgroups);
    let clusters = desired_clusters(&layout, &topology, &args.file)?;

    let lock = Lock::acquire(&layout)?;
    if layout.dir().exists() {
        let state = LabState::load(&layout).map(|s| s.complete).unwrap_or_default();
        let hint = if state { "runs already" } else { "is half-made" };
        bail!(
            "lab {} {hint}; remove it with `clustermesh lab down {0}`, or give this one another --name",
            layout.lab()
        );
    }
    let started = Instant::now();
    print_line(format!("Starting lab {} ({} clusters)", layout.lab(), topology.clusters.len()));
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let result = tokio::select! {
        result = start(&layout, &topology, state, clusters, args.wait_timeout.duration()) => result,
        _ = interrupt.recv() => Err(Interrupted.into()),
        _ = terminate.recv() => Err(Interrupted.into()),
    };
    if let Err(error) = result {
        return Err(undo(&layout, lock, error).await);
    }
    print_line(format!(
        "Lab {} is up after {:.1} s; logs are in {}",
        layout.lab(),
        started.elapsed().as_secs_f32(),
        layout.logs().display()
    ));
    Ok(())
}

/// Ctrl-C or SIGTERM.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// Removes what was started, and says what to tell the caller.
async fn undo(layout: &Layout, lock: Lock, error: anyhow::Error) -> anyhow::Error {
    eprintln!("Removing what was started of lab {}", layout.lab());
    let logs = if error.is::<Interrupted>() { None } else { down::keep_logs(layout) };
    let logs = logs.map(|dir| format!(" (logs: {})", dir.display())).unwrap_or_default();
    let error = error.context(format!("lab {} did not start{logs}", layout.lab()));
    match down::remove(layout).await {
        Ok(_) => {
            lock.remove();
            error
        }
        Err(left) => anyhow::anyhow!("{error:#}; and it could not be removed: {left:#}"),
    }
}

fn read(args: &UpArgs) -> anyhow::Result<(Topology, LabState)> {
    let mut file = TopologyFile::read(&args.file)?;
    let at = |e: &dyn std::fmt::Display| usage(format!("{}: {e}", args.file.display()));
    let topology = Topology::check(&file).map_err(|mistakes| at(&mistakes))?;
    if let Some(name) = &args.name {
        lab_name(name).map_err(|e| usage(format!("--name: {e}")))?;
        file.name.clone_from(name);
    }
    let path = std::path::absolute(&args.file).context("cannot resolve the topology's path")?;
    let state = LabState {
        topology: file,
        file: path,
        created: Timestamp::now(),
        complete: false,
        mesh: !args.no_mesh,
    };
    Ok((topology, state))
}

/// Reads and checks all manifests, before anything is touched.
fn desired_clusters(layout: &Layout, topology: &Topology, file: &Path) -> anyhow::Result<Vec<ClusterState>> {
    let base = file.parent().unwrap_or(Path::new("."));
    let mut states = Vec::new();
    for cluster in &topology.clusters {
        let mut state = ClusterState {
            etcd_token: system::new_etcd_token(layout, cluster.name.as_str()),
            ..ClusterState::default()
        };
        for manifest in cluster.manifest_files(base)? {
            read_manifest(&mut state.objects, &manifest)?;
        }
        Pods { layout, cluster, images: &topology.images }
            .check(&state)
            .with_context(|| format!("cluster {}", cluster.name))?;
        states.push(state);
    }
    Ok(states)
}

async fn start(
    layout: &Layout,
    topology: &Topology,
    mut lab: LabState,
    states: Vec<ClusterState>,
    timeout: Duration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    let dir = layout.dir();
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    lab.save(layout)?;
    pki::make_authority(layout)?;
    network::create(layout, topology).await.map_err(|e| explain_leftovers(layout, e))?;
    let nodes: usize = topology.clusters.iter().map(|c| c.nodes.len()).sum();
    print_line(format!("  network: {nodes} nodes on {}", topology.underlay));
    let clusters = topology.clusters.iter().zip(states).map(|(cluster, state)| {
        let (pods, mesh) = (Pods { layout, cluster, images: &topology.images }, lab.mesh);
        async move {
            start_cluster(pods, state, mesh, deadline)
                .await
                .with_context(|| format!("cluster {}", cluster.name))
        }
    });
    futures::future::try_join_all(clusters).await?;
    if lab.mesh {
        let dirs: Vec<PathBuf> = topology.clusters.iter().map(|c| layout.cluster(c.name.as_str())).collect();
        let left = || deadline.saturating_duration_since(Instant::now());
        mesh::until_synced(&dirs, left()).await?;
        print_line("  agents: ready");
        for (a, b) in &topology.connect {
            mesh::connect(&layout.cluster(a.as_str()), &layout.cluster(b.as_str()), left()).await?;
        }
    }
    lab.complete = true;
    lab.save(layout)
}

async fn start_cluster(
    pods: Pods<'_>,
    mut state: ClusterState,
    mesh: bool,
    deadline: Instant,
) -> anyhow::Result<()> {
    let (layout, cluster) = (pods.layout, pods.cluster);
    system::prepare(layout, cluster)?;
    state.save(layout, cluster.name.as_str())?;
    let processes = SystemProcess::all(layout, cluster, mesh);
    let mut launched = Vec::new();
    for process in &processes {
        launched.push((process, process.launch(&state, deadline).await?));
    }
    let count = pods.reconcile(&mut state, deadline).await?;
    for (process, child) in &mut launched {
        process.wait_listening(child, deadline).await?;
    }
    print_line(format!(
        "  {}: {} processes and {count} pods on {} nodes",
        cluster.name,
        processes.len(),
        cluster.nodes.len()
    ));
    Ok(())
}

fn explain_leftovers(layout: &Layout, error: anyhow::Error) -> anyhow::Error {
    if error.to_string().contains("File exists") {
        let others = names().join(", ");
        return error.context(format!(
            "a network namespace of this name is left over or belongs to another lab ({others}); \
             `clustermesh lab down {}` removes leftovers",
            layout.lab()
        ));
    }
    error
}
