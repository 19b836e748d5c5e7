//! `clustermesh policy check`: an import policy's file, before it is put in force.

mod text;

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::{Args, Subcommand};
use clustermesh_agent_api::v1::CheckPolicyResponse;
use clustermesh_kvstore::import_policy::PolicyFile;
use serde::Serialize;

use super::terminal::{Style, print};
use super::{Output, agents};
use crate::context;
use crate::error::usage;

/// Work on import policies: what remote clusters may say.
#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Check(CheckArgs),
}

/// Find mistakes in a policy's file and, with a context, say what it would refuse and let in.
///
/// Nothing is changed: the agent of the context lists what its remote clusters say once more and judges it by
/// the file as well as by the policy in force.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh policy check --policy policy.yaml
  clustermesh policy check --policy policy.yaml --context alpha
  clustermesh policy check --policy policy.yaml --context alpha --cluster beta -o json")]
pub(crate) struct CheckArgs {
    /// The file (see docs/import-policy.md).
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// A cluster whose agents would obey it: a directory with a context.yaml, or a cluster of a running lab
    /// ([LAB/]CLUSTER). Can be repeated. Without it only the file is looked at.
    #[arg(long)]
    context: Vec<String>,
    /// Only this remote cluster. Can be repeated [default: all].
    #[arg(long, value_name = "NAME", requires = "context")]
    cluster: Vec<String>,
    /// How to print the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// The outcome, as programs read it.
#[derive(Debug, Serialize)]
struct Report {
    policy: PathBuf,
    /// Mistakes in the file; if there are any, nothing else was looked at.
    mistakes: Vec<Mistake>,
    contexts: Vec<ContextReport>,
}

#[derive(Debug, Serialize)]
struct Mistake {
    /// From 1; none if the message has it, or if it cannot be told.
    line: Option<u64>,
    text: String,
}

#[derive(Debug, Serialize)]
struct ContextReport {
    cluster: String,
    node: String,
    checked: CheckPolicyResponse,
}

impl PolicyArgs {
    /// Runs the command.
    ///
    /// # Errors
    /// As of its verb.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        match &self.verb {
            Verb::Check(args) => args.run().await,
        }
    }
}

impl CheckArgs {
    async fn run(&self) -> anyhow::Result<()> {
        let contexts =
            self.context.iter().map(|name| context::resolve(name)).collect::<anyhow::Result<Vec<_>>>()?;
        let text = std::fs::read_to_string(&self.policy)
            .map_err(|error| usage(format!("{}: {error}", self.policy.display())))?;
        let mistakes = mistakes(&text);
        if !mistakes.is_empty() {
            return self.refuse(mistakes);
        }
        let mut report = Report { policy: self.policy.clone(), mistakes, contexts: Vec::new() };
        for context in &contexts {
            let Some(agent) = context.agents.first() else {
                return Err(usage(format!("{} has no agents", context.cluster)));
            };
            match agents::check_policy(agent, &text, &self.cluster).await {
                Ok(checked) => report.contexts.push(ContextReport {
                    cluster: context.cluster.to_string(),
                    node: agent.node.clone(),
                    checked,
                }),
                Err(error) => bail!("{}/{}: {error}", context.cluster, agent.node),
            }
        }
        print(&match self.output {
            Output::Json => serde_json::to_string_pretty(&report)?,
            Output::Text => text::render(&report, Style::of_stdout()),
        })?;
        let unknown = report.contexts.iter().flat_map(|context| {
            let unknown = context.checked.clusters.iter().filter(|checked| !checked.error.is_empty());
            unknown.map(|checked| format!("{}: {}", checked.cluster, checked.error))
        });
        match unknown.collect::<Vec<_>>() {
            unknown if unknown.is_empty() => Ok(()),
            unknown => bail!("not everything could be checked: {}", unknown.join("; ")),
        }
    }

    /// All mistakes at once, as a compiler tells them.
    fn refuse(&self, mistakes: Vec<Mistake>) -> anyhow::Result<()> {
        let path = self.policy.display();
        let count = mistakes.len();
        match self.output {
            Output::Json => {
                let report = Report { policy: self.policy.clone(), mistakes, contexts: Vec::new() };
                print(&serde_json::to_string_pretty(&report)?)?;
            }
            Output::Text => {
                let lines: Vec<_> = mistakes.iter().map(|mistake| place(&self.policy, mistake)).collect();
                print(&lines.join("\n"))?;
            }
        }
        Err(usage(format!("{path}: {count} {}", if count == 1 { "mistake" } else { "mistakes" })))
    }
}

/// `FILE:LINE: text`, which editors understand.
fn place(file: &Path, mistake: &Mistake) -> String {
    let line = mistake.line.map(|line| format!("{line}: ")).unwrap_or_else(|| " ".into());
    format!("{}:{line}{}", file.display(), mistake.text)
}

fn mistakes(text: &str) -> Vec<Mistake> {
    match PolicyFile::contradictions(text) {
        Err(error) => vec![Mistake { line: error.line(), text: error.reason().to_owned() }],
        Ok(found) => found.into_iter().map(|found| Mistake { line: found.line, text: found.text }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_have_the_place_that_editors_jump_to() {
        let shown = |text: &str| {
            let mistakes = mistakes(text);
            mistakes.iter().map(|mistake| place(Path::new("p.yaml"), mistake)).collect::<Vec<_>>()
        };
        assert_eq!(shown("clusters: {beta: {pod-cidrs: [10.2.0.0/16]}}"), [""; 0]);
        let [bad] = &shown("clusters:\n  beta:\n    pod-cidrs: [10.2.0.1/16]\n")[..] else { panic!() };
        assert_eq!(
            bad,
            "p.yaml:3: clusters.beta.pod-cidrs: 10.2.0.1/16 is not possible; write 10.2.0.0/16 if that is meant"
        );
        let [unknown] = &shown("clusters:\n  beta:\n    pods: any\n")[..] else { panic!() };
        assert!(unknown.starts_with("p.yaml:3: ") && unknown.contains("pods"), "{unknown}");
        let two =
            shown("clusters:\n  beta: {pod-cidrs: [10.2.0.0/16]}\n  gamma:\n    pod-cidrs: [10.2.3.0/24]\n");
        assert_eq!(two.len(), 1);
        assert!(two[0].starts_with("p.yaml:4: clusters.gamma.pod-cidrs: 10.2.3.0/24 overlaps"), "{two:?}");
    }
}
