//! `clustermesh status`: what all agents of one or more clusters say, summed up and one by one.

mod encryption_text;
mod mirror_text;
mod report;
mod text;

use anyhow::bail;
use clap::Args;
use futures::future::join_all;

use super::terminal::{Style, print};
use super::wait::{self, Pending};
use super::{Output, Wait, agents, mirror};
use crate::context::{self, Context};
pub(super) use encryption_text::by;
use report::{ClusterReport, Report};
pub(crate) use report::{why_agent_not_ready, why_not_ready};

/// Show what clusters are connected to, and what their nodes have synced.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh status
  clustermesh status --context alpha --wait --wait-duration 30s
  clustermesh status --context alpha --refused
  clustermesh status -o json")]
pub(crate) struct StatusArgs {
    /// A cluster: a directory with a context.yaml, or a cluster of a running lab ([LAB/]CLUSTER). Can be
    /// repeated. Without it: all clusters of the running lab.
    #[arg(long)]
    context: Vec<String>,
    /// Also list the keys of other clusters that the import policy refused lately, here and in the kvstoremesh.
    #[arg(long)]
    refused: bool,
    /// Wait until every agent is ready and connected to all clusters.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    wait_duration: Wait,
    /// How to print the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl StatusArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If an agent cannot be asked, or, with `--wait`, if agents do not get ready in time.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let contexts = match &self.context[..] {
            [] => context::only_lab()?,
            names => names.iter().map(|name| context::resolve(name)).collect::<Result<_, _>>()?,
        };
        let waited = if self.wait { wait_until_ready(&contexts, self.wait_duration).await } else { Ok(()) };
        let clusters = join_all(contexts.iter().map(|context| async {
            let statuses = match self.refused {
                true => agents::statuses_with_refused(context).await,
                false => agents::statuses(context).await,
            };
            let socket = context.kvstoremesh.as_ref().and_then(|mirror| mirror.socket.as_deref());
            let mirror = match socket {
                Some(socket) => Some(mirror::ask(socket, self.refused).await),
                None => None,
            };
            ClusterReport::new(context, statuses).with_mirror(mirror)
        }))
        .await;
        let report = Report { clusters };
        print(&match self.output {
            Output::Json => serde_json::to_string_pretty(&report)?,
            Output::Text => text::render(&report, Style::of_stdout()),
        })?;
        waited?;
        let silent = report.unreachable();
        if !silent.is_empty() {
            bail!("{}", silent.join("; "));
        }
        Ok(())
    }
}

async fn wait_until_ready(contexts: &[Context], limit: Wait) -> anyhow::Result<()> {
    let contexts: Vec<_> = contexts.iter().collect();
    wait::until(limit.0, &contexts, "all are ready", |statuses| {
        let mut pending = Vec::new();
        for (context, of_agents) in statuses {
            let report = ClusterReport::new(context, of_agents.clone());
            pending.extend(report.connectivity.errors.into_iter().map(|error| Pending {
                cluster: context.cluster.to_string(),
                why: error.to_string(),
                node: error.node,
            }));
        }
        pending
    })
    .await
}
