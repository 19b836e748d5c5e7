//! Operating a mesh: connect and disconnect clusters, look at their agents and at the kernel's tables.
//!
//! Everything is learned from the agents over their sockets ([`agents`]); the only thing ever written
//! are entries in the directories that agents watch ([`entry`]). Whether two clusters may be connected
//! is decided by plain code ([`plan`]), and only then something is written.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::context::Context;

mod agents;
mod bpf;
mod connect;
mod disconnect;
mod encrypt;
pub(crate) mod entry;
mod explain;
mod mirror;
mod observe;
mod plan;
mod policy;
mod status;
mod terminal;
mod users;
mod virtual_cidrs;
mod wait;

/// The commands that operate a mesh.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Connect(connect::ConnectArgs),
    Disconnect(disconnect::DisconnectArgs),
    Status(status::StatusArgs),
    Explain(explain::ExplainArgs),
    Policy(policy::PolicyArgs),
    Observe(Box<observe::ObserveArgs>),
    Bpf(bpf::BpfArgs),
    Encrypt(encrypt::EncryptArgs),
}

impl Command {
    /// Runs the command.
    ///
    /// # Errors
    /// What went wrong, in one line.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        match self {
            Self::Connect(args) => args.run().await,
            Self::Disconnect(args) => args.run().await,
            Self::Status(args) => args.run().await,
            Self::Explain(args) => args.run().await,
            Self::Policy(args) => args.run().await,
            Self::Observe(args) => args.run().await,
            Self::Bpf(args) => args.run().await,
            Self::Encrypt(args) => args.run().await,
        }
    }
}

/// Waits until all agents of the clusters in `dirs` have read their own cluster and programmed the kernel.
///
/// # Errors
/// When `limit` is over: what each agent still lacks.
pub(crate) async fn until_synced(dirs: &[PathBuf], limit: Duration) -> anyhow::Result<()> {
    let contexts = dirs.iter().map(|dir| Context::load(dir)).collect::<anyhow::Result<Vec<_>>>()?;
    let contexts: Vec<&Context> = contexts.iter().collect();
    wait::until(limit, &contexts, "all agents are ready", |statuses| {
        wait::pending(statuses, |_, status| status::why_agent_not_ready(status))
    })
    .await
}

/// Connects the clusters in two directories, as `connect --wait` does.
///
/// # Errors
/// As `connect`.
pub(crate) async fn connect(source: &Path, destination: &Path, limit: Duration) -> anyhow::Result<()> {
    connect::ConnectArgs::waiting(source, destination, Wait(limit)).run().await
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    #[value(alias = "summary")]
    Text,
    /// For programs.
    Json,
}

/// A duration as people write it: `500ms`, `60s`, `5m`, `1h30m`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait(Duration);

impl Wait {
    /// How long.
    pub(crate) fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for Wait {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed: jiff::SignedDuration =
            text.parse().map_err(|_| "write a duration such as 500ms, 60s or 5m".to_string())?;
        parsed.try_into().map(Self).map_err(|_| "a duration cannot be negative".into())
    }
}

/// Seconds for a message: `60s`, `0.5s`.
fn seconds(duration: Duration) -> String {
    let (whole, tenths) = (duration.as_secs(), duration.subsec_millis() / 100);
    if tenths == 0 { format!("{whole}s") } else { format!("{whole}.{tenths}s") }
}
