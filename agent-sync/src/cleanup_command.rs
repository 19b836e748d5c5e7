//! `clustermesh-agent cleanup`, as an operator calls it.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::PathBuf;

use agent_sync::cleanup::{CleanupError, Leftovers, Place};
use anyhow::Context as _;
use clap::Args;

/// Remove what an agent has left on its node: programs and maps, routes, devices, states of IPsec, its private key
///
/// An agent that stops leaves the datapath running, for the next one. This ends it: mesh traffic of the node is
/// interrupted until an agent has synced again. Refused while an agent runs. Run it in the node's network
/// namespace, with the flags of the agent.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  clustermesh-agent cleanup --dry-run
  clustermesh-agent cleanup --bpf-root /sys/fs/bpf/clustermesh --yes")]
pub(crate) struct CleanupFlags {
    /// Folder of the pinned maps and programs
    #[arg(long, default_value = crate::BPF_ROOT)]
    bpf_root: PathBuf,
    /// Unix socket of the agent, by which one that runs is noticed
    #[arg(long, default_value = crate::GRPC_SOCKET)]
    grpc_socket: PathBuf,
    /// The agent's VXLAN device
    #[arg(long, default_value = crate::TUNNEL_DEVICE)]
    tunnel_device: String,
    /// Its UDP port
    #[arg(long, default_value_t = crate::TUNNEL_PORT)]
    tunnel_port: u16,
    /// The agent's WireGuard devices, without their number
    #[arg(long, default_value = crate::encryption_flags::WIREGUARD_DEVICE,
        value_parser = crate::encryption_flags::device_prefix)]
    wireguard_device: String,
    /// Directory of this node's private key
    #[arg(long, default_value = crate::encryption_flags::STATE_DIR)]
    state_dir: PathBuf,
    /// Only show what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
}

/// What the caller has to say first.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unconfirmed {
    /// Nobody is there to be asked.
    #[error("nothing was removed: say --yes to remove it, or --dry-run only to see it")]
    NobodyToAsk,
    /// The answer was no.
    #[error("nothing was removed")]
    Declined,
}

impl CleanupFlags {
    /// Runs the command.
    ///
    /// # Errors
    /// An agent is running, nobody said yes, or the kernel refused.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let place = Place {
            bpf_root: self.bpf_root,
            grpc_socket: self.grpc_socket,
            tunnel_device: self.tunnel_device,
            tunnel_port: self.tunnel_port,
            wireguard_device: self.wireguard_device,
            state_dir: self.state_dir,
        };
        let found = Leftovers::find(&place).await?;
        if found.is_empty() {
            println!("nothing is left of an agent under {}", found.root().display());
            return Ok(());
        }
        let list = found.to_string();
        if self.dry_run {
            print!("would remove:\n{list}");
            return Ok(());
        }
        if !self.yes {
            print!("will remove:\n{list}");
            confirm()?;
        }
        found.remove().await?;
        print!("removed:\n{list}");
        Ok(())
    }
}

/// Whether the command line is to blame for an error of it.
pub(crate) fn is_usage(error: &anyhow::Error) -> bool {
    error.downcast_ref::<CleanupError>().is_some_and(CleanupError::is_usage) || error.is::<Unconfirmed>()
}

fn confirm() -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Unconfirmed::NobodyToAsk.into());
    }
    print!("Mesh traffic of this node ends. Go on? [y/N] ");
    std::io::stdout().flush().context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Unconfirmed::Declined.into()),
    }
}
