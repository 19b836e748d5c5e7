//! `clustermesh connect`: gather facts from both sides, check them, write both entries.

use std::path::Path;

use anyhow::bail;
use clap::Args;
use clustermesh_agent_api::v1::{Peer, StatusResponse};
use clustermesh_kvstore::virtual_cidrs::VirtualCidrs;
use serde::Serialize;

use super::entry::{self, Entry, FileSystem};
use super::plan::{AgentFacts, Facts, Outcome, Plan, Probe, Side, plan};
use super::status::why_not_ready;
use super::terminal::{Style, Tone, print};
use super::{Output, Wait, agents, users, virtual_cidrs, wait};
use crate::context::{self, Context};
use crate::error::usage;

/// Connect two clusters.
///
/// Checks first that they fit together (names, IDs, ranges, pod CIDRs, versions, and that each side's
/// nodes reach the other side's etcd); nothing is written unless all of that holds. Then each side gets
/// an entry for the other, or, if one of them cannot be written, neither does.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh connect --context alpha --destination-context beta --wait
  clustermesh connect --context alpha --destination-context beta --virtual-pod-cidrs
  clustermesh connect --context ./alpha --destination-context lab/beta --dry-run -o json")]
pub(crate) struct ConnectArgs {
    /// One cluster: a directory with a context.yaml, or a cluster of a running lab ([LAB/]CLUSTER).
    #[arg(long)]
    context: String,
    /// The other cluster.
    #[arg(long)]
    destination_context: String,
    /// Wait until every agent of both clusters has synced with the other one.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "60s")]
    wait_duration: Wait,
    /// Let each know the other's pods by virtual addresses, which every node translates: for clusters whose pod CIDRs
    /// overlap with each other, or with those of a third one (see docs/overlap.md).
    #[arg(long)]
    virtual_pod_cidrs: bool,
    /// Only check. The clusters may read each other's etcd for as long as that takes.
    #[arg(long)]
    dry_run: bool,
    /// How to print the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl ConnectArgs {
    /// The clusters in two directories, waiting until they are connected.
    pub(crate) fn waiting(source: &Path, destination: &Path, limit: Wait) -> Self {
        Self {
            context: source.display().to_string(),
            destination_context: destination.display().to_string(),
            wait: true,
            wait_duration: limit,
            virtual_pod_cidrs: false,
            dry_run: false,
            output: Output::Text,
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// A check that failed, a file that could not be written, or agents that did not get ready in time.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let source = context::resolve(&self.context)?;
        let destination = context::resolve(&self.destination_context)?;
        if source.dir == destination.dir {
            return Err(usage(format!(
                "--context and --destination-context both mean {}: give two clusters",
                source.dir.display()
            )));
        }
        // What is wrong with their directories or certificates is told before anybody is let in.
        Wanted::now(&source, &destination)?;
        Wanted::now(&destination, &source)?;
        let admissions = match hopeless(&source, &destination) {
            true => Admissions(Vec::new()),
            false => Admissions::grant(&source, &destination)?,
        };
        let verdict = self.check_and_write(&source, &destination).await;
        if !verdict.as_ref().is_ok_and(|verdict| verdict.is_connected()) {
            admissions.take_back();
        }
        if verdict?.is_connected() && self.wait {
            wait_until_ready(&source, &destination, self.wait_duration).await?;
            if self.output == Output::Text {
                let mark = Style::of_stdout().mark(Outcome::Pass);
                let agents = source.agents.len() + destination.agents.len();
                print(&format!("{mark} All {agents} agents are connected and synced"))?;
            }
        }
        Ok(())
    }

    /// All between letting each other in and waiting for the agents.
    async fn check_and_write(&self, source: &Context, destination: &Context) -> anyhow::Result<Verdict> {
        let mut of_source = Wanted::now(source, destination)?;
        let mut of_destination = Wanted::now(destination, source)?;
        let (from, to) =
            tokio::join!(side(source, destination, &of_source), side(destination, source, &of_destination));
        let mut facts = Facts { source: from?, destination: to? };
        if self.virtual_pod_cidrs {
            for (wanted, peer, side) in [
                (&mut of_source, destination, &mut facts.source),
                (&mut of_destination, source, &mut facts.destination),
            ] {
                let reader = if peer.dir == source.dir { destination } else { source };
                let cidrs = virtual_cidrs::choose(peer.id, &side.pod_cidrs_of_peer()).map_err(|why| {
                    usage(format!(
                        "no virtual prefix can be chosen for the pods of {}: {why}; write virtual-pod-cidrs into {} and \
                         connect again",
                        peer.cluster,
                        reader.clustermesh_config.join(peer.cluster.as_str()).display()
                    ))
                })?;
                *wanted = Wanted::new(reader, peer, cidrs)?;
                side.virtual_cidrs = wanted.virtual_cidrs.clone();
                side.entry = wanted.entry.state()?;
            }
        }
        let plan = plan(&facts);

        let written = match () {
            () if !plan.is_clear() => Ok(Verdict::Refused),
            () if facts.already_connected() => Ok(Verdict::AlreadyConnected),
            () if self.dry_run => Ok(Verdict::DryRun),
            () => entry::install(&FileSystem, &[&of_source.entry, &of_destination.entry])
                .map(|()| Verdict::Connected),
        };
        let verdict = *written.as_ref().unwrap_or(&Verdict::Failed);
        self.show(&facts, &plan, verdict)?;
        written?;
        if verdict == Verdict::Refused {
            bail!("{}", refusal(&facts, &plan));
        }
        Ok(verdict)
    }

    fn show(&self, facts: &Facts, plan: &Plan, verdict: Verdict) -> anyhow::Result<()> {
        let (a, b) = (&facts.source.cluster, &facts.destination.cluster);
        if self.output == Output::Json {
            return print(&serde_json::to_string_pretty(&Report {
                source: Named { name: a.as_str(), id: facts.source.id },
                destination: Named { name: b.as_str(), id: facts.destination.id },
                checks: plan,
                result: verdict,
            })?);
        }
        let style = Style::of_stdout();
        let mut text = checklist(plan, style);
        let pass = style.mark(Outcome::Pass);
        match verdict {
            Verdict::Connected => text += &format!("{pass} Connected cluster {a} <=> {b}!\n"),
            Verdict::AlreadyConnected => {
                text += &format!("{pass} Nothing to do\n");
            }
            Verdict::DryRun => {
                text += &format!("{pass} {a} and {b} can be connected (dry run: nothing written)\n")
            }
            // The error that follows says the rest.
            Verdict::Refused | Verdict::Failed => {}
        }
        print(&text)
    }
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Connected,
    AlreadyConnected,
    DryRun,
    /// A check failed.
    Refused,
    /// A file could not be written.
    Failed,
}

impl Verdict {
    const fn is_connected(self) -> bool {
        matches!(self, Self::Connected | Self::AlreadyConnected)
    }
}

/// Who was let in by this run. What has to be checked stands in the etcds, so each cluster lets the other
/// in before it is known whether they fit together.
struct Admissions<'a>(Vec<(&'a Context, &'a Context)>);

impl<'a> Admissions<'a> {
    fn grant(a: &'a Context, b: &'a Context) -> anyhow::Result<Self> {
        let mut granted = Self(Vec::new());
        for (context, peer) in [(a, b), (b, a)] {
            match users::admit(context, &peer.cluster) {
                Ok(true) => granted.0.push((context, peer)),
                Ok(false) => {}
                Err(error) => {
                    granted.take_back();
                    return Err(error);
                }
            }
        }
        Ok(granted)
    }

    fn take_back(self) {
        for (context, peer) in self.0 {
            if let Err(error) = users::dismiss(context, &peer.cluster) {
                eprintln!(
                    "warning: {} may still read the etcd of {}: {error:#}",
                    peer.cluster, context.cluster
                );
            }
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    source: Named<'a>,
    destination: Named<'a>,
    result: Verdict,
    checks: &'a Plan,
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
    id: u32,
}

/// What one cluster is to have of the other.
struct Wanted {
    entry: Entry,
    virtual_cidrs: VirtualCidrs,
}

impl Wanted {
    fn new(reader: &Context, peer: &Context, virtual_cidrs: VirtualCidrs) -> anyhow::Result<Self> {
        Ok(Self { entry: Entry::new(reader, peer, &virtual_cidrs)?, virtual_cidrs })
    }

    /// With the virtual addresses that it has for it already.
    fn now(reader: &Context, peer: &Context) -> anyhow::Result<Self> {
        Self::new(reader, peer, entry::virtual_cidrs(reader, &peer.cluster))
    }
}

/// Whether their contexts alone tell that they cannot be connected: then none is let into the other's etcd, and
/// nobody waits for an exporter to do so.
fn hopeless(a: &Context, b: &Context) -> bool {
    a.cluster == b.cluster || a.id == b.id
}

/// Asks all agents of `context`, and lets one of them try the peer's etcd if that can lead to anything.
async fn side(context: &Context, peer: &Context, wanted: &Wanted) -> anyhow::Result<Side> {
    let statuses = agents::statuses(context).await;
    let asked = context.agents.iter().zip(&statuses).find(|(_, status)| status.is_ok());
    let probe = match asked {
        Some((agent, _)) if !hopeless(context, peer) => {
            Some(Probe { node: agent.node.clone(), result: agents::probe(agent, context, peer).await })
        }
        Some(_) | None => None,
    };
    let known_cidrs = match (asked, &probe) {
        // What cannot be asked is not looked at: the agents themselves refuse what another cluster holds.
        (Some((agent, _)), Some(_)) => agents::known_cidrs(agent).await.unwrap_or_default(),
        _ => Vec::new(),
    };
    Ok(Side {
        cluster: context.cluster.clone(),
        id: context.id,
        config_dir: context.clustermesh_config.clone(),
        agents: context
            .agents
            .iter()
            .zip(statuses)
            .map(|(agent, status)| AgentFacts { node: agent.node.clone(), status })
            .collect(),
        probe,
        virtual_cidrs: wanted.virtual_cidrs.clone(),
        known_cidrs,
        entry: wanted.entry.state()?,
    })
}

fn checklist(plan: &Plan, style: Style) -> String {
    let mut text = String::new();
    for check in &plan.checks {
        let message = match check.outcome {
            Outcome::Fail => style.paint(Tone::Bad, &check.message),
            Outcome::Warn => style.paint(Tone::Doubtful, &check.message),
            Outcome::Pass | Outcome::Skipped => check.message.clone(),
        };
        text += &format!("{} {message}\n", style.mark(check.outcome));
        if !check.hint.is_empty() {
            text += &format!("   {} {}\n", style.pick("💡", "  ->"), check.hint);
        }
    }
    text
}

fn refusal(facts: &Facts, plan: &Plan) -> String {
    let failures: Vec<_> = plan.failures().map(|check| check.message.as_str()).collect();
    format!(
        "{} and {} cannot be connected, nothing was written: {}",
        facts.source.cluster,
        facts.destination.cluster,
        failures.join("; ")
    )
}

async fn wait_until_ready(a: &Context, b: &Context, limit: Wait) -> anyhow::Result<()> {
    let goal = format!("{} and {} are connected", a.cluster, b.cluster);
    wait::until(limit.0, &[a, b], &goal, |statuses| {
        wait::pending(statuses, |context, status| lacks(status, if context.dir == a.dir { b } else { a }))
    })
    .await
}

/// Why this agent is not connected to `peer`; `None` if it is.
fn lacks(status: &StatusResponse, peer: &Context) -> Option<String> {
    let found: Option<&Peer> = status.remotes.iter().find(|remote| remote.name == peer.cluster.as_str());
    match found {
        None => Some(format!("has not read its entry for {} yet", peer.cluster)),
        Some(remote) if !remote.ready => Some(why_not_ready(remote)),
        Some(remote) if remote.cluster_id != peer.id => {
            Some(format!("{} has the ID {} instead of {}", remote.name, remote.cluster_id, peer.id))
        }
        Some(_) => None,
    }
}
