//! What a scenario needs of the kernel that not every kernel has.

use std::process::{Command, Stdio};

use serde::Deserialize;

/// A feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// WireGuard devices.
    Wireguard,
}

impl Need {
    /// Why it is lacking; none: it is there.
    ///
    /// # Errors
    /// If nobody can tell.
    pub fn lacking(self) -> anyhow::Result<Option<String>> {
        match self {
            // Asks the kernel itself, in a namespace that goes with the command.
            Self::Wireguard => {
                let command = ["unshare", "-n", "ip", "link", "add", "wg0", "type", "wireguard"];
                let mut ip = Command::new(command[0]);
                let output = ip.args(&command[1..]).stdin(Stdio::null()).output()?;
                let said = String::from_utf8_lossy(&output.stderr);
                Ok(match output.status.success() {
                    true => None,
                    false => Some(format!("this kernel has no WireGuard ({})", said.trim())),
                })
            }
        }
    }
}
