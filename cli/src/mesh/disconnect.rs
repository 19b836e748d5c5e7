//! `clustermesh disconnect`: remove both sides' entries.

use anyhow::Context as _;
use clap::Args;
use clustermesh_kvstore::cluster::ClusterName;
use serde::Serialize;

use super::entry::{self, FileSystem};
use super::plan::Outcome;
use super::terminal::{Style, print};
use super::{Output, Wait, users, wait};
use crate::context::{self, Context};
use crate::error::usage;

/// Disconnect two clusters.
///
/// Each side forgets the other: services lose the other side's backends, connections to them end. If
/// the other side is gone, only this one is changed. Clusters that are not connected stay so.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh disconnect --context alpha --destination-context beta --wait
  clustermesh disconnect --context alpha --destination-context gone --one-sided")]
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
    /// How to print the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// What was done.
#[derive(Serialize)]
struct Report<'a> {
    source: &'a str,
    destination: &'a str,
    result: Verdict,
    /// The clusters whose configuration was looked at.
    clusters: Vec<&'a str>,
}

/// How the command ended.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Disconnected,
    NotConnected,
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
                let mark = style.mark(Outcome::Warn);
                let warning = format!("{mark} Only {} is changed: {error}", source.cluster);
                match self.output {
                    Output::Text => print(&warning)?,
                    Output::Json => eprintln!("{warning}"),
                }
            }
        }
        let mut removed = false;
        for (n, Forgetting { context, peer }) in sides.iter().enumerate() {
            let result = entry::forget(&FileSystem, context, peer);
            // What a cluster may no longer read it does not use any more.
            let result = result.and_then(|removed| Ok(users::dismiss(context, peer)? || removed));
            removed |= if n == 0 {
                result?
            } else {
                result.with_context(|| {
                    format!("{} is disconnected, but {} is not", source.cluster, context.cluster)
                })?
            };
        }
        let verdict = if removed { Verdict::Disconnected } else { Verdict::NotConnected };
        self.show(&sides, verdict)?;
        if self.wait {
            wait_until_forgotten(&sides, self.wait_duration).await?;
            if self.output == Output::Text {
                let pass = style.mark(Outcome::Pass);
                print(&format!("{pass} No agent lists the other cluster any more"))?;
            }
        }
        Ok(())
    }

    /// The first side is the one of `--context`.
    fn show(&self, sides: &[Forgetting<'_>], verdict: Verdict) -> anyhow::Result<()> {
        let [Forgetting { context: source, peer }, ..] = sides else { return Ok(()) };
        let pass = Style::of_stdout().mark(Outcome::Pass);
        let arrow = if sides.len() == 2 { "<x>" } else { "x>" };
        print(&match (self.output, verdict) {
            (Output::Json, result) => serde_json::to_string_pretty(&Report {
                source: source.cluster.as_str(),
                destination: peer.as_str(),
                result,
                clusters: sides.iter().map(|side| side.context.cluster.as_str()).collect(),
            })?,
            (Output::Text, Verdict::Disconnected) => {
                format!("{pass} Disconnected cluster {} {arrow} {peer}!", source.cluster)
            }
            (Output::Text, Verdict::NotConnected) => {
                format!("{pass} {} and {peer} are not connected: nothing to do", source.cluster)
            }
        })
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
