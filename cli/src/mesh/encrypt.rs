//! `clustermesh encrypt`: how encryption between nodes is, and new keys.

use std::collections::BTreeSet;

use anyhow::bail;
use clap::{Args, Subcommand};
use clustermesh_agent_api::v1::Encryption;
use jiff::Timestamp;
use serde::Serialize;

use super::status::by;
use super::terminal::one_line;
use super::{Output, agents};
use crate::context::{self, Context};
use crate::error::usage;
use crate::output::{print_json, print_line, print_table};

/// Encryption between nodes: how it is, and new keys
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh encrypt status --context alpha
  clustermesh encrypt status -o json
  clustermesh encrypt rotate --context alpha --node node1")]
pub(crate) struct EncryptArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show keys and peers of each node
    Status {
        #[command(flatten)]
        place: Place,
        /// How to print the result
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Replace the keys of nodes, without interruption
    ///
    /// Each agent makes a new key and announces it. The one before is used until the others have answered to the new
    /// one, and is removed then; until then it cannot be replaced again.
    Rotate {
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// The cluster: a directory with a context.yaml, or a cluster of a running lab ([LAB/]CLUSTER). Without it: all
    /// clusters of the running lab.
    #[arg(long)]
    context: Option<String>,
    /// Only this node.
    #[arg(long)]
    node: Option<String>,
}

/// An agent's answer.
#[derive(Serialize)]
struct NodeView {
    cluster: String,
    node: String,
    encryption: Option<Encryption>,
    error: Option<String>,
}

impl EncryptArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// If an agent cannot be asked, or has no new key; the others are asked all the same.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        match &self.command {
            Command::Status { place, output } => status(place, *output).await,
            Command::Rotate { place } => rotate(place).await,
        }
    }
}

impl Place {
    fn contexts(&self) -> anyhow::Result<Vec<Context>> {
        let mut contexts = match &self.context {
            None => context::only_lab()?,
            Some(name) => vec![context::resolve(name)?],
        };
        if let Some(node) = &self.node {
            contexts.iter_mut().for_each(|context| context.agents.retain(|agent| agent.node == *node));
            contexts.retain(|context| !context.agents.is_empty());
            if contexts.is_empty() {
                return Err(usage(format!("there is no node {node}")));
            }
        }
        Ok(contexts)
    }
}

async fn status(place: &Place, output: Output) -> anyhow::Result<()> {
    let mut views = Vec::new();
    for context in place.contexts()? {
        let answers = agents::statuses(&context).await;
        for (agent, answer) in context.agents.iter().zip(answers) {
            let (encryption, error) = match answer {
                Ok(status) => (status.encryption, None),
                Err(error) => (None, Some(error)),
            };
            let (cluster, node) = (context.cluster.to_string(), agent.node.clone());
            views.push(NodeView { cluster, node, encryption, error });
        }
    }
    match output {
        Output::Json => print_json(&views)?,
        Output::Text => views.iter().for_each(show),
    }
    let failed: Vec<_> = views
        .iter()
        .filter_map(|view| Some(format!("{}/{}: {}", view.cluster, view.node, view.error.as_ref()?)))
        .collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

fn show(view: &NodeView) {
    let name = format!("{}/{}", view.cluster, view.node);
    let Some(encryption) = view.encryption.as_ref().filter(|encryption| encryption.mode != "off") else {
        // What could not be asked is told at the end.
        if view.error.is_none() {
            print_line(format_args!("{name}: no encryption"));
        }
        return;
    };
    let strict = if encryption.strict { ", strict" } else { "" };
    let (mode, mtu) = (one_line(&encryption.mode), encryption.mtu);
    print_line(format_args!("{name}: {} between {mode}{strict}, MTU {mtu}", by(encryption)));
    let now = Timestamp::now().as_second();
    let mut seen = BTreeSet::new();
    for key in &encryption.keys {
        let word = if seen.insert(&key.by) { "key" } else { "previous key, still in use" };
        let by = if encryption.by.len() > 1 { format!("{} ", one_line(&key.by)) } else { String::new() };
        let age = match key.made {
            0 => String::new(),
            made => format!(", {} old", age(now, made)),
        };
        print_line(format_args!("  {by}{word} {}{age}", one_line(&key.public_key)));
    }
    if !encryption.error.is_empty() {
        print_line(format_args!("  error: {}", one_line(&encryption.error)));
    }
    let rows: Vec<_> = encryption
        .nodes
        .iter()
        .map(|node| {
            let state = match node.by_previous_key {
                true => format!("{}, by the previous key", one_line(&node.state)),
                false => one_line(&node.state),
            };
            let handshake = match node.last_handshake {
                0 => "never".to_owned(),
                at => format!("{} ago", age(now, at)),
            };
            let (received, sent) = (node.received_bytes.to_string(), node.sent_bytes.to_string());
            let name = format!("{}/{}", one_line(&node.cluster), one_line(&node.node));
            vec![name, one_line(&node.ip), state, one_line(&node.by), handshake, received, sent]
        })
        .collect();
    print_table(&["NODE", "ADDRESS", "STATE", "BY", "ANSWERED", "RECEIVED", "SENT"], rows);
}

/// Seconds as `5s`, `7m`, `3h` or `12d`.
fn age(now: i64, then: u64) -> String {
    let seconds = u64::try_from(now).unwrap_or(0).saturating_sub(then);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

async fn rotate(place: &Place) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for context in place.contexts()? {
        for agent in &context.agents {
            let name = format!("{}/{}", context.cluster, agent.node);
            match agents::rotate_key(agent).await {
                Ok(keys) => {
                    keys.iter().for_each(|key| print_line(format_args!("{name}: new key {}", one_line(key))))
                }
                Err(error) => failed.push(format!("{name}: {error}")),
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        for (seconds, shown) in [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(age(1_800_000_000, 1_800_000_000 - seconds), shown);
        }
        assert_eq!(age(5, 9), "0s", "a clock that is behind");
    }
}
