//! Encryption between the nodes of a lab: flags of a cluster's agents, kept in a file.

use anyhow::bail;
use tokio::time::Instant;

use super::args::{Between, EncryptArgs, With};
use super::change::lock;
use super::layout::Layout;
use super::state::{ClusterState, write_atomically};
use super::system::{Process, SystemProcess};
use crate::error::usage;

pub(crate) async fn encrypt(lab: Option<&str>, args: &EncryptArgs) -> anyhow::Result<()> {
    if args.strict && args.between == Between::Off {
        return Err(usage("--strict makes sense with `clusters` or `nodes` only"));
    }
    let (lab, name, _lock) = lock(lab, &args.cluster)?;
    let between = match args.between {
        Between::Off => None,
        Between::Clusters => Some("--encrypt=clusters"),
        Between::Nodes => Some("--encrypt=nodes"),
    };
    let mut flags: Vec<_> = between.into_iter().chain(args.strict.then_some("--encryption-strict")).collect();
    if between.is_some() {
        for (with, flag) in [(With::Wireguard, "--enable-wireguard"), (With::Ipsec, "--enable-ipsec")] {
            flags.extend(args.with.contains(&with).then_some(flag));
        }
    }
    write_atomically(&lab.layout.encryption(&name), flags.join("\n").as_bytes(), 0o644)?;
    let state = ClusterState::load(&lab.layout, &name)?;
    let cluster = lab.cluster(&name)?;
    let until = Instant::now() + args.wait.wait_timeout.duration();
    for node in &cluster.nodes {
        let agent = SystemProcess::new(&lab.layout, cluster, Process::Agent(node.name.clone()))?;
        agent.stop().await?;
        agent.start(&state, until).await?;
    }
    Ok(())
}

/// The flags of the cluster's agents.
///
/// # Errors
/// The file cannot be read.
pub(super) fn flags(layout: &Layout, cluster: &str) -> anyhow::Result<Vec<String>> {
    let path = layout.encryption(cluster);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    }
}
