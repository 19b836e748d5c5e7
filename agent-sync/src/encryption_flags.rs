//! Flags about encryption between nodes.

use std::path::PathBuf;

use agent_sync::encryption::{EncryptionOptions, Scope};
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

pub(crate) const WIREGUARD_DEVICE: &str = "cm_wg0";
pub(crate) const STATE_DIR: &str = "/var/lib/clustermesh";
/// Cilium's.
const WIREGUARD_PORT: u16 = 51_871;

#[derive(Clone, Debug, Args)]
pub(crate) struct EncryptionFlags {
    /// Encrypt what goes to other nodes, with WireGuard (see docs/encryption.md)
    #[arg(long)]
    enable_wireguard: bool,
    /// What is encrypted: between nodes of different clusters, or between all nodes
    #[arg(long, value_enum, value_name = "BETWEEN", default_value_t = Between::Clusters)]
    encrypt: Between,
    /// Drop what should be encrypted and cannot be, and what comes in clear
    #[arg(long, requires = "enable_wireguard")]
    encryption_strict: bool,
    /// UDP port of WireGuard, the same in the whole mesh
    #[arg(long, value_name = "PORT", default_value_t = WIREGUARD_PORT,
        value_parser = RangedU64ValueParser::<u16>::new().range(1..))]
    wireguard_port: u16,
    /// WireGuard device, made if it is missing
    #[arg(long, value_name = "NAME", default_value = WIREGUARD_DEVICE)]
    wireguard_device: String,
    /// Directory of this node's private key
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Between {
    /// Nodes of different clusters
    Clusters,
    /// All nodes
    Nodes,
}

impl EncryptionFlags {
    pub(crate) fn device(&self) -> &str {
        &self.wireguard_device
    }

    /// None: nothing is encrypted.
    pub(crate) fn options(self) -> Option<EncryptionOptions> {
        self.enable_wireguard.then_some(EncryptionOptions {
            scope: match self.encrypt {
                Between::Clusters => Scope::Clusters,
                Between::Nodes => Scope::Nodes,
            },
            strict: self.encryption_strict,
            port: self.wireguard_port,
            device: self.wireguard_device,
            state_dir: self.state_dir,
        })
    }
}
