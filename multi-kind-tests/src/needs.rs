//! What a scenario needs of the kernel that not every kernel has.

use std::process::{Command, Stdio};

use serde::Deserialize;

/// A feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// WireGuard devices.
    Wireguard,
    /// ESP with AES-GCM.
    Ipsec,
}

/// `ip xfrm` of a security association from a node to itself.
const IPSEC: &[&str] = &[
    "xfrm",
    "state",
    "add",
    "src",
    "127.0.0.1",
    "dst",
    "127.0.0.1",
    "proto",
    "esp",
    "spi",
    "0x197",
    "mode",
    "transport",
    "aead",
    "rfc4106(gcm(aes))",
    "0x000000000000000000000000000000000000000000000000000000000000000000000000",
    "128",
];

impl Need {
    /// Why it is lacking; none: it is there.
    ///
    /// # Errors
    /// If nobody can tell.
    pub fn lacking(self) -> anyhow::Result<Option<String>> {
        let (name, ask) = match self {
            Self::Wireguard => ("WireGuard", &["link", "add", "wg0", "type", "wireguard"][..]),
            Self::Ipsec => ("ESP with AES-GCM", IPSEC),
        };
        // Asks the kernel itself, in a namespace that goes with the command.
        let mut ip = Command::new("unshare");
        let output = ip.args(["-n", "ip"]).args(ask).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        Ok((!output.status.success()).then(|| format!("this kernel has no {name} ({})", said.trim())))
    }
}
