//! Operating a mesh: connect and disconnect clusters, look at their agents and at the kernel's tables.
//!
//! Everything is learned from the agents over their sockets ([`agents`]); the only thing ever written
//! are entries in the directories that agents watch ([`entry`]). Whether two clusters may be connected
//! is decided by plain code ([`plan`]), and only then something is written.

use std::str::FromStr;
use std::time::Duration;

mod agents;
mod bpf;
mod connect;
mod disconnect;
mod entry;
mod plan;
mod status;
mod terminal;
mod wait;

/// The commands that operate a mesh.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Connect(connect::ConnectArgs),
    Disconnect(disconnect::DisconnectArgs),
    Status(status::StatusArgs),
    Bpf(bpf::BpfArgs),
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
            Self::Bpf(args) => args.run().await,
        }
    }
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
