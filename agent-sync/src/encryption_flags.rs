//! Flags about encryption between nodes.

use std::path::PathBuf;
use std::time::Duration;

use agent_sync::encryption::EncryptionOptions;
use agent_sync::encryption::ipsec::HELLO_PORT;
use agent_sync::tunnels::Scope;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

pub(crate) const WIREGUARD_DEVICE: &str = "cm_wg";
pub(crate) const STATE_DIR: &str = "/var/lib/clustermesh";
/// Cilium's.
const WIREGUARD_PORT: u16 = 51_871;

#[derive(Clone, Debug, Args)]
pub(crate) struct EncryptionFlags {
    /// Encrypt what goes to other nodes, with WireGuard (see docs/encryption.md)
    #[arg(long)]
    enable_wireguard: bool,
    /// Encrypt what goes to other nodes, with IPsec, which comes first where a node can do both; needs --node-ip
    #[arg(long, requires = "node_ip")]
    enable_ipsec: bool,
    /// What is encrypted: between nodes of different clusters, or between all nodes
    #[arg(long, value_enum, value_name = "BETWEEN", default_value_t = Between::Clusters)]
    encrypt: Between,
    /// Drop what should be encrypted and cannot be, and what comes in clear
    #[arg(long)]
    encryption_strict: bool,
    /// Lowest of the four UDP ports of WireGuard, the same in the whole mesh
    #[arg(long, value_name = "PORT", default_value_t = WIREGUARD_PORT,
        value_parser = RangedU64ValueParser::<u16>::new().range(1..=65_532))]
    wireguard_port: u16,
    /// WireGuard devices, made if they are missing: their names without the number (0 to 3) at the end
    #[arg(long, value_name = "NAME", default_value = WIREGUARD_DEVICE, value_parser = device_prefix)]
    wireguard_device: String,
    /// Replace this node's key when it is so many hours old; 0: only when `clustermesh encrypt rotate` asks for it
    #[arg(long, value_name = "HOURS", default_value_t = 0,
        value_parser = RangedU64ValueParser::<u64>::new().range(0..=87_600))]
    key_rotation_interval: u64,
    /// Directory of this node's private key
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
}

/// Flags that make no sense together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EncryptionError {
    /// Nothing could ever be sent.
    #[error("--encryption-strict needs --enable-wireguard or --enable-ipsec")]
    StrictAlone,
    /// IPsec's own packets could not be told from the tunnels'.
    #[error("--tunnel-port {HELLO_PORT} is what --enable-ipsec needs for itself: choose another one")]
    TunnelPort,
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
    ///
    /// # Errors
    /// Flags that make no sense together.
    pub(crate) fn options(self, tunnel_port: u16) -> Result<Option<EncryptionOptions>, EncryptionError> {
        let encrypts = self.enable_wireguard || self.enable_ipsec;
        if self.encryption_strict && !encrypts {
            return Err(EncryptionError::StrictAlone);
        }
        if self.enable_ipsec && tunnel_port == HELLO_PORT {
            return Err(EncryptionError::TunnelPort);
        }
        Ok(encrypts.then_some(EncryptionOptions {
            wireguard: self.enable_wireguard,
            ipsec: self.enable_ipsec,
            scope: match self.encrypt {
                Between::Clusters => Scope::Clusters,
                Between::Nodes => Scope::Nodes,
            },
            strict: self.encryption_strict,
            port: self.wireguard_port,
            device: self.wireguard_device,
            state_dir: self.state_dir,
            rotation: (self.key_rotation_interval > 0)
                .then_some(Duration::from_secs(self.key_rotation_interval * 3600)),
        }))
    }
}

/// Names of devices have up to 15 bytes, of which the number takes one.
pub(crate) fn device_prefix(name: &str) -> Result<String, String> {
    let fits = (1..15).contains(&name.len());
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    (fits && plain).then(|| name.to_owned()).ok_or_else(|| "1 to 14 letters, digits, _, - and .".to_owned())
}
