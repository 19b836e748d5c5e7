//! `clustermesh explain`: why a service, a pod, an address or an identity is as it is.

use std::fmt::Write as _;

use anyhow::bail;
use clap::{Args, ValueEnum};
use clustermesh_agent_api::v1::{DumpTableRow, ExplainResponse, ExplainedAddress, ExplainedPart};

use super::terminal::{Style, Tone, one_line, print};
use super::{Output, agents};
use crate::context::{self, Context};
use crate::error::usage;

/// Show what each cluster says of something, what is used of it, and why the rest is not.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh explain service shop/orders --context alpha
  clustermesh explain endpoint shop/orders-1 --context alpha
  clustermesh explain ip 10.2.0.7 --context alpha
  clustermesh explain identity 131373 --context alpha -o json")]
pub(crate) struct ExplainArgs {
    /// What it is.
    #[arg(value_enum)]
    kind: Kind,
    /// namespace/name, an address, or a number.
    name: String,
    /// The cluster whose view it is: a directory with a context.yaml, or a cluster of a running lab
    /// ([LAB/]CLUSTER). Without it: all clusters of the running lab.
    #[arg(long)]
    context: Option<String>,
    /// The node whose agent is asked [default: the first of each cluster].
    #[arg(long)]
    node: Option<String>,
    /// How to print the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// A service, as namespace/name.
    Service,
    /// A pod, as namespace/name: its addresses are searched for in the etcds of all clusters.
    #[value(alias = "pod")]
    Endpoint,
    /// The address of a pod or node.
    Ip,
    /// A security identity.
    Identity,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Endpoint => "endpoint",
            Self::Ip => "ip",
            Self::Identity => "identity",
        }
    }
}

impl ExplainArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If an agent cannot be asked, or does not know what is meant.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let contexts = match &self.context {
            None => context::only_lab()?,
            Some(name) => vec![context::resolve(name)?],
        };
        let mut views = Vec::new();
        for context in &contexts {
            let agent = self.agent(context)?;
            match agents::explain(agent, self.kind.as_str(), &self.name).await {
                Ok(view) => views.push((context.cluster.to_string(), agent.node.clone(), view)),
                Err(error) => bail!("{}/{}: {error}", context.cluster, agent.node),
            }
        }
        match self.output {
            Output::Json => {
                let views: Vec<_> = views
                    .iter()
                    .map(|(cluster, node, view)| serde_json::json!({"cluster": cluster, "node": node, "explained": view}))
                    .collect();
                print(&serde_json::to_string_pretty(&views)?)
            }
            Output::Text => {
                let style = Style::of_stdout();
                let texts: Vec<_> =
                    views.iter().map(|(cluster, node, view)| render(cluster, node, view, style)).collect();
                print(&texts.join("\n"))
            }
        }
    }

    fn agent<'a>(&self, context: &'a Context) -> anyhow::Result<&'a context::Agent> {
        let found = match &self.node {
            None => context.agents.first(),
            Some(node) => context.agents.iter().find(|agent| agent.node == *node),
        };
        let nodes = || context.agents.iter().map(|agent| agent.node.as_str()).collect::<Vec<_>>().join(", ");
        found.ok_or_else(|| match &self.node {
            Some(node) => usage(format!("{} has no node {node:?}; it has {}", context.cluster, nodes())),
            None => usage(format!("{} has no agents", context.cluster)),
        })
    }
}

fn render(cluster: &str, node: &str, view: &ExplainResponse, style: Style) -> String {
    let mut out = format!("{} {}, as {cluster}/{node} sees it\n", view.kind, one_line(&view.name));
    for sentence in &view.verdict {
        let _ = writeln!(out, "  {}", one_line(sentence));
    }
    for part in &view.clusters {
        render_part(&mut out, part, style);
    }
    for table in view.installed.iter().filter(|table| !table.rows.is_empty()) {
        let _ = writeln!(out, "  installed in {}:", one_line(&table.table));
        for row in &table.rows {
            let _ = writeln!(out, "    {}", columns(row));
        }
    }
    out
}

fn render_part(out: &mut String, part: &ExplainedPart, style: Style) {
    let name = match part.cluster_id {
        0 => part.cluster.clone(),
        id => format!("{} (ID {id})", part.cluster),
    };
    let _ = write!(out, "  {}: {}", one_line(&name), painted(&part.outcome, style));
    if part.revision > 0 {
        let _ = write!(out, ", revision {} of {}", part.revision, one_line(&part.key));
    }
    out.push('\n');
    for sentence in &part.why {
        let _ = writeln!(out, "    - {}", one_line(sentence));
    }
    for address in &part.addresses {
        render_address(out, address, style);
    }
}

fn render_address(out: &mut String, address: &ExplainedAddress, style: Style) {
    let ExplainedAddress { outcome, key, revision, identity, node, node_ip, .. } = address;
    let ip = one_line(&address.address);
    let _ = writeln!(out, "    {ip}: {}, revision {revision} of {}", painted(outcome, style), one_line(key));
    let node = match (node.as_str(), node_ip.as_str()) {
        ("", "") => "none".to_owned(),
        ("", ip) => format!("{}, which the cluster does not have", one_line(ip)),
        (name, ip) => format!("{} ({})", one_line(name), one_line(ip)),
    };
    let _ = writeln!(out, "      node: {node}");
    if *identity > 0 {
        let labels: Vec<_> = address.labels.iter().map(|label| one_line(label)).collect();
        let _ = writeln!(out, "      identity {identity}: {}", labels.join(" "));
    }
    for sentence in &address.why {
        let _ = writeln!(out, "      - {}", one_line(sentence));
    }
}

fn painted(outcome: &str, style: Style) -> String {
    let tone = match outcome {
        "chosen" => Tone::Good,
        "refused" => Tone::Bad,
        _ => Tone::Doubtful,
    };
    style.paint(tone, &one_line(outcome))
}

fn columns(row: &DumpTableRow) -> String {
    let texts = row.columns.iter().map(|column| format!("{}={}", column.name, one_line(&column.value)));
    texts.collect::<Vec<_>>().join(" ")
}
