//! `clustermesh disconnect`: remove both sides' entries.

use anyhow::Context as _;
use clap::Args;
use clustermesh_kvstore::cluster::ClusterName;

use super::entry::{self, FileSystem};
use super::plan::Outcome;
use super::terminal::{Style, print};
use super::{Wait, wait};
use crate::context::{self, Context};
use crate::error::usage;

/// Disconnect two clusters.
///
/// Each side forgets the other: services lose the other side's backends, connections to them end. If
/// the other side is gone, only this one is changed. Clusters that are not connected stay so.
#[derive(Debug, Args)]
pub(crate) struct DisconnectArgs {
    /// One cluster: a directory with a context.yaml, or a cluster of a running lab ([LAB/]CLUSTER).
    #[arg(long)]
    context: String,
    /// The other cluster. If it has no context any more, its name.
    #[arg(long)]
    destination_context: String,
    /// Leave the other cluster's configuration alone.
    #[arg(long)]
    one_sided: bool,
    /// Wait until no agent lists the other cluster any more.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    wait_duration: Wait,
}

/// A cluster that forgets a peer.
struct Forgetting<'a> {
    context: &'a Context,
    peer: ClusterName,
}

impl DisconnectArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If a file cannot be removed, or agents do not follow in time.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let style = Style::of_stdout();
        let source = context::resolve(&self.context)?;
        let destination = context::resolve(&self.destination_context).and_then(|context| {
            anyhow::ensure!(
                context.clustermesh_config.is_dir(),
                "{} is not there any more",
                context.clustermesh_config.display()
            );
            Ok(context)
        });
        let peer = match &destination {
            Ok(context) => context.cluster.clone(),
            Err(error) => context::cluster_of(&self.destination_context)
                .ok_or_else(|| usage(format!("--destination-context names no cluster: {error}")))?,
        };
        if peer == source.cluster {
            return Err(usage(format!("{peer} cannot be disconnected from itself: give two clusters")));
        }

        let mut sides = vec![Forgetting { context: &source, peer: peer.clone() }];
        match &destination {
            Ok(_) if self.one_sided => {}
            Ok(context) => sides.push(Forgetting { context, peer: source.cluster.clone() }),
            Err(_) if self.one_sided => {}
            Err(error) => {
                let warn = style.mark(Outcome::Warn);
                print(&format!("{warn} Only {} is changed: {error}", source.cluster))?;
            }
        }
        let mut removed = false;
        for (n, Forgetting { context, peer }) in sides.iter().enumerate() {
            let result = entry::remove(&FileSystem, &context.clustermesh_config, peer);
            removed |= if n == 0 {
                result?
            } else {
                result.with_context(|| {
                    format!("{} is disconnected, but {} is not", source.cluster, context.cluster)
                })?
            };
        }
        let arrow = if sides.len() == 2 { "<x>" } else { "x>" };
        let pass = style.mark(Outcome::Pass);
        print(&if removed {
            format!("{pass} Disconnected cluster {} {arrow} {peer}!", source.cluster)
        } else {
            format!("{pass} {} and {peer} are not connected: nothing to do", source.cluster)
        })?;
        if self.wait {
            wait_until_forgotten(&sides, self.wait_duration).await?;
            print(&format!("{pass} No agent lists the other cluster any more"))?;
        }
        Ok(())
    }
}

async fn wait_until_forgotten(sides: &[Forgetting<'_>], limit: Wait) -> anyhow::Result<()> {
    let contexts: Vec<_> = sides.iter().map(|side| side.context).collect();
    wait::until(limit.0, &contexts, "the clusters are disconnected", |statuses| {
        wait::pending(statuses, |context, status| {
            let side = sides.iter().find(|side| side.context.dir == context.dir)?;
            let listed = status.remotes.iter().any(|remote| remote.name == side.peer.as_str());
            listed.then(|| format!("still lists {}", side.peer))
        })
    })
    .await
}
