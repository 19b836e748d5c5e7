//! Programs in the background, and what they have used.

use anyhow::{Context as _, bail};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A running program; killed when dropped.
pub(super) struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts a program; what it says goes to `log`.
    pub(super) fn start(program: &Path, arguments: &[String], log: &Path) -> anyhow::Result<Self> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        // It ends with us, also if we are killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        Ok(Self { child, name })
    }

    /// The file system as it sees it.
    pub(super) fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.child.id()))
    }

    /// Peak of its resident memory, in MiB.
    pub(super) fn peak_mib(&self) -> anyhow::Result<f64> {
        self.memory_mib("VmHWM")
    }

    /// A figure of its memory, as proc(5) calls it, in MiB.
    pub(super) fn memory_mib(&self, name: &str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .with_context(|| format!("{} has ended", self.name))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: f64 = kib.with_context(|| format!("no {name} in status"))?.parse()?;
        Ok(kib / 1024.0)
    }

    /// CPU time it has used, in seconds.
    pub(super) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // After the name, which is in brackets: user and system time are the 14th and 15th of all (proc(5)).
        let fields: Vec<&str> =
            stat.rsplit_once(')').context("no name in stat")?.1.split_whitespace().collect();
        let ticks =
            |n: usize| fields.get(n).context("too few fields in stat")?.parse::<f64>().context("no number");
        // Linux counts for programs in hundredths, whatever its own clock.
        Ok((ticks(11)? + ticks(12)?) / 100.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `mesh-load` and gives what it printed.
pub(super) fn load(programs: &Path, arguments: &[String]) -> anyhow::Result<Value> {
    finish(start_load(programs, arguments)?)
}

/// Starts `mesh-load`, for [`finish`].
pub(super) fn start_load(programs: &Path, arguments: &[String]) -> anyhow::Result<Child> {
    let mut command = Command::new(programs.join("mesh-load"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("cannot run mesh-load")
}

/// Waits for the end of a `mesh-load`.
pub(super) fn finish(child: Child) -> anyhow::Result<Value> {
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("mesh-load failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    if output.stdout.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&output.stdout).context("mesh-load printed something else than JSON")
}
