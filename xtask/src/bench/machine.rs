//! What the figures were measured on.

use super::exec::run;
use super::nat;
use anyhow::Context as _;
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
    /// None: this kernel has no IPVS, or there is no program for it.
    pub(super) ipvs: Option<String>,
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
            ipvs: nat::ipvs().inspect_err(|reason| eprintln!("SKIPPED services of IPVS: {reason}")).ok(),
        })
    }

    /// Whether others were at work before the bench began.
    pub(super) fn is_busy(&self) -> bool {
        self.load_before > 0.5
    }
}

/// What the hypervisor gave to others while we wanted to run.
pub(super) struct Steal {
    before: (u64, u64),
}

impl Steal {
    /// Counts from now on.
    pub(super) fn start() -> anyhow::Result<Self> {
        Ok(Self { before: ticks(&fs::read_to_string("/proc/stat")?)? })
    }

    /// Percent of all CPU time since the start.
    pub(super) fn percent(&self) -> anyhow::Result<f64> {
        let after = ticks(&fs::read_to_string("/proc/stat")?)?;
        let (stolen, all) = (after.0 - self.before.0, (after.1 - self.before.1).max(1));
        #[expect(clippy::cast_precision_loss, reason = "a share for people")]
        Ok(stolen as f64 * 100.0 / all as f64)
    }
}

/// Stolen and all ticks of all CPUs, from `/proc/stat` (proc(5): steal is the eighth figure; the two
/// after it are contained in the first two).
fn ticks(stat: &str) -> anyhow::Result<(u64, u64)> {
    let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu "));
    let figures: Result<Vec<u64>, _> = line
        .context("/proc/stat does not begin with cpu")?
        .split_whitespace()
        .take(8)
        .map(str::parse)
        .collect();
    let figures = figures?;
    Ok((figures.get(7).copied().unwrap_or(0), figures.iter().sum()))
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.virtual_machine { "virtual " } else { "" };
        write!(
            f,
            "Linux {}, {} {kind}CPUs ({}), load before {:.2}\n{}, {}, {}",
            self.kernel,
            self.cpus,
            self.cpu,
            self.load_before,
            self.nftables,
            self.iptables,
            self.ipvs.as_deref().unwrap_or("no IPVS")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steal_is_the_eighth_figure() {
        let stat = "cpu  1 2 3 4 5 6 7 80 1 2\ncpu0 9 9 9 9 9 9 9 9 9 9\n";
        assert_eq!(ticks(stat).expect("figures"), (80, 108));
        assert!(ticks("").is_err());
    }
}
