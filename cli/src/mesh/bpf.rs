//! `clustermesh bpf TABLE list`: the datapath's tables as they are installed now.

use anyhow::bail;
use clap::{Args, Subcommand, ValueEnum};
use clustermesh_agent_api::v1::DumpTableRow;
use comfy_table::{ContentArrangement, Table, presets};
use futures::future::join_all;
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use super::terminal::{one_line, print};
use super::{Output, agents};
use crate::context::{self, Context};
use crate::error::usage;

/// Look into the datapath's tables.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh bpf service list --context alpha
  clustermesh bpf ipcache list --context alpha --node node1
  clustermesh bpf backend list --context lab/alpha -o json")]
pub(crate) struct BpfArgs {
    /// Which table.
    #[arg(value_enum)]
    table: TableName,
    #[command(subcommand)]
    verb: Verb,
}

/// The tables that agents can dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TableName {
    /// Frontends: address, port, protocol -> weight, tier and number of backends of each cluster, session affinity.
    Service,
    /// Slots of services: which backend is the n-th of a cluster.
    Slot,
    /// Backends: address, port, cluster, state.
    Backend,
    /// Session affinity: which client is bound to which backend, and for how long it has not called.
    Affinity,
    /// Pod and node addresses -> identity and node.
    Ipcache,
    /// Pod CIDRs -> cluster and node.
    Prefix,
    /// Pods of the node itself.
    Endpoint,
    /// Underlay addresses of nodes -> cluster.
    Node,
    /// Numbers that stand for nodes on an IPv6 underlay -> their addresses.
    Underlay,
    /// State of clusters: healthy, draining, dead.
    Cluster,
    /// What policies allow and deny each identity of this node's pods
    Policy,
    /// Address ranges that policies name
    Cidr,
    /// Virtual pod prefixes of other clusters -> the real ones, and back
    Translate,
    /// Connections that policies let through
    Ct,
    /// Connections to services that are translated packet by packet
    Nat,
    /// How often each rule of a policy has decided
    Verdict,
    /// Packets received from other nodes, by identity.
    Overlay,
    /// Packets and connections, by reason.
    Metrics,
    /// What sockets were connected to before translation.
    Sockrev,
    /// Calls of services, by the cluster that answered them; none: they were refused.
    Calls,
    /// What became of the events that `observe` shows: sent, or left out and why.
    Events,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print all rows.
    List(ListArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// The cluster: a directory with a context.yaml, or a cluster of a running lab ([LAB/]CLUSTER).
    #[arg(long)]
    context: String,
    /// Only this node.
    #[arg(long)]
    node: Option<String>,
    /// How to print the rows.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl BpfArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If an agent cannot be asked; the rows of the others are printed all the same.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let Verb::List(args) = &self.verb;
        let context = only_node(context::resolve(&args.context)?, args.node.as_deref())?;
        let name =
            self.table.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default();
        let dumps = join_all(context.agents.iter().map(|agent| agents::dump(agent, &name))).await;
        let (mut rows, mut errors) = (Vec::new(), Vec::new());
        for (agent, dump) in context.agents.iter().zip(dumps) {
            match dump {
                Ok(found) => rows.extend(found.into_iter().map(|row| NodeRow { node: &agent.node, row })),
                Err(error) => errors.push(format!("{}/{}: {error}", context.cluster, agent.node)),
            }
        }
        match args.output {
            Output::Json => print(&serde_json::to_string_pretty(&rows)?)?,
            Output::Text if rows.is_empty() && !errors.is_empty() => {}
            Output::Text => print(&table(&rows))?,
        }
        if !errors.is_empty() {
            bail!("{}", errors.join("; "));
        }
        Ok(())
    }
}

fn only_node(mut context: Context, node: Option<&str>) -> anyhow::Result<Context> {
    let Some(node) = node else { return Ok(context) };
    let all: Vec<_> = context.agents.iter().map(|agent| agent.node.clone()).collect();
    context.agents.retain(|agent| agent.node == node);
    if context.agents.is_empty() {
        return Err(usage(format!("{} has no node {node:?}; it has {}", context.cluster, all.join(", "))));
    }
    Ok(context)
}

/// A row and where it is from.
struct NodeRow<'a> {
    node: &'a str,
    row: DumpTableRow,
}

/// An object: `node`, then the columns in their order.
impl Serialize for NodeRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.row.columns.len() + 1))?;
        map.serialize_entry("node", self.node)?;
        for column in &self.row.columns {
            map.serialize_entry(&column.name, &column.value)?;
        }
        map.end()
    }
}

fn table(rows: &[NodeRow<'_>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let Some(first) = rows.first() else { return "no entries".into() };
    let header = first.row.columns.iter().map(|column| column.name.to_uppercase().replace('_', "-"));
    table.set_header(std::iter::once("NODE".to_string()).chain(header));
    for NodeRow { node, row } in rows {
        table.add_row(
            std::iter::once((*node).to_string())
                .chain(row.columns.iter().map(|column| one_line(&column.value))),
        );
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use clustermesh_agent_api::v1::Column;

    use super::*;

    fn row(columns: &[(&str, &str)]) -> DumpTableRow {
        let columns = columns.iter().map(|(n, v)| Column { name: (*n).into(), value: (*v).into() }).collect();
        DumpTableRow { columns }
    }

    #[test]
    fn rows_keep_the_order_of_columns() {
        let rows = [
            NodeRow { node: "n1", row: row(&[("ip", "10.0.0.1"), ("cluster_id", "2")]) },
            NodeRow { node: "n2", row: row(&[("ip", "fd00::1"), ("cluster_id", "1")]) },
        ];
        assert_eq!(
            serde_json::to_string(&rows).unwrap(),
            r#"[{"node":"n1","ip":"10.0.0.1","cluster_id":"2"},{"node":"n2","ip":"fd00::1","cluster_id":"1"}]"#
        );
        let text = table(&rows);
        let words: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["NODE", "IP", "CLUSTER-ID"]);
        assert_eq!(words[2], ["n2", "fd00::1", "1"]);
        assert_eq!(table(&[]), "no entries");
    }
}
