//! More flags for the agents of a cluster, kept in files: any, and those about encryption.

use std::path::Path;

use anyhow::{Context as _, bail};
use tokio::time::Instant;

use super::Lab;
use super::args::{AgentFlagsArgs, WaitArgs};
use super::change::lock;
use super::layout::Layout;
use super::state::{ClusterState, write_atomically};
use super::system::{Process, SystemProcess};

pub(crate) async fn set(lab: Option<&str>, args: &AgentFlagsArgs) -> anyhow::Result<()> {
    let (lab, name, _lock) = lock(lab, &args.cluster)?;
    restart_with(&lab, &name, &lab.layout.agent_flags(&name), &args.flags, &args.wait).await
}

/// Writes flags to a file and starts the cluster's agents with them, one after the other. If one does not start, the file
/// is as it was, and so is that agent.
pub(super) async fn restart_with(
    lab: &Lab,
    name: &str,
    file: &Path,
    flags: &[String],
    wait: &WaitArgs,
) -> anyhow::Result<()> {
    let before = read(file)?;
    write_atomically(file, flags.join("\n").as_bytes(), 0o644)?;
    let state = ClusterState::load(&lab.layout, name)?;
    let cluster = lab.cluster(name)?;
    for node in &cluster.nodes {
        let agent = SystemProcess::new(&lab.layout, cluster, Process::Agent(node.name.clone()))?;
        agent.stop().await?;
        let until = || Instant::now() + wait.wait_timeout.duration();
        if let Err(error) = agent.start(&state, until()).await {
            write_atomically(file, before.join("\n").as_bytes(), 0o644)?;
            agent.stop().await?;
            agent
                .start(&state, until())
                .await
                .context("the agent does not start without the flags either")?;
            return Err(
                error.context(format!("the agent of {name}/{} keeps the flags that it had", node.name))
            );
        }
    }
    Ok(())
}

/// All of them.
///
/// # Errors
/// A file cannot be read.
pub(super) fn all(layout: &Layout, cluster: &str) -> anyhow::Result<Vec<String>> {
    let mut flags = read(&layout.encryption(cluster))?;
    flags.extend(read(&layout.agent_flags(cluster))?);
    Ok(flags)
}

fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    }
}
