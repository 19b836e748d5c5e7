//! What the figures were measured on.

use super::exec::run;
use serde::Serialize;
use std::fmt;
use std::fs;
use std::thread::available_parallelism;

/// Facts without which the figures mean nothing.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) kernel: String,
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) virtual_machine: bool,
    /// Runnable processes over the last minute before the bench; above about 0.5 others disturb it.
    pub(super) load_before: f64,
    pub(super) nftables: String,
    pub(super) iptables: String,
}

impl Machine {
    /// Looks at this machine.
    pub(super) fn look() -> anyhow::Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let load = fs::read_to_string("/proc/loadavg")?;
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu: field("model name").unwrap_or_else(|| "unknown processor".into()),
            cpus: available_parallelism()?.get(),
            virtual_machine: field("flags").is_some_and(|flags| flags.contains("hypervisor")),
            load_before: load.split(' ').next().and_then(|one| one.parse().ok()).unwrap_or(0.0),
            nftables: run("nft --version")?.trim().to_owned(),
            iptables: run("iptables --version")?.trim().to_owned(),
        })
    }

    /// Whether others were at work before the bench began.
    pub(super) fn is_busy(&self) -> bool {
        self.load_before > 0.5
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.virtual_machine { "virtual " } else { "" };
        write!(
            f,
            "Linux {}, {} {kind}CPUs ({}), load before {:.2}\n{}, {}",
            self.kernel, self.cpus, self.cpu, self.load_before, self.nftables, self.iptables
        )
    }
}
