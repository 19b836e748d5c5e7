//! Starting processes in a namespace and a cgroup.
//!
//! The program starts itself as `clustermesh enter`, which joins the cgroup and the namespace and then
//! becomes the command: the cgroup is entered before the first system call of the command, so that the
//! node's programs see all of its sockets, and no shell and no `nsenter` stand in between.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};

use super::cgroup::Cgroup;
use super::netns;

/// Where a process lives.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Place {
    /// File of the network namespace.
    #[arg(long)]
    pub(crate) netns: PathBuf,
    /// Directory of the cgroup.
    #[arg(long)]
    pub(crate) cgroup: PathBuf,
}

/// Arguments of the hidden command `clustermesh enter`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct EnterArgs {
    #[command(flatten)]
    place: Place,
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// A process to start.
#[derive(Debug)]
pub(crate) struct Spec<'a> {
    pub(crate) place: Place,
    pub(crate) argv: &'a [String],
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) log: PathBuf,
}

/// Starts a process that outlives this one.
///
/// # Errors
/// If it cannot be started. That its command does not exist is seen in its log.
pub(crate) fn spawn(spec: Spec<'_>) -> anyhow::Result<Child> {
    Cgroup::at(spec.place.cgroup.clone()).create()?;
    let log = File::options()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("cannot open {}", spec.log.display()))?;
    let own = std::env::current_exe().context("cannot find the path of this program")?;
    Command::new(own)
        .args(["lab", "enter", "--netns"])
        .arg(&spec.place.netns)
        .arg("--cgroup")
        .arg(&spec.place.cgroup)
        .arg("--")
        .args(spec.argv)
        .env_clear()
        .envs(environment(spec.env))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share the log")?)
        .stderr(log)
        .spawn()
        .context("cannot start this program again")
}

/// `clustermesh enter`: becomes the command, in its own session.
///
/// # Errors
/// Always if it returns.
pub(crate) fn enter(args: &EnterArgs) -> anyhow::Result<()> {
    rustix::process::setsid().context("cannot leave the terminal's session")?;
    become_command(&args.place, Command::new(&args.command[0]).args(&args.command[1..]))
}

/// Replaces the calling process by `command` in `place`. Must be called before any thread is started.
///
/// # Errors
/// Always if it returns.
pub(crate) fn become_command(place: &Place, command: &mut Command) -> anyhow::Result<()> {
    Cgroup::at(place.cgroup.clone()).join()?;
    netns::enter(&place.netns)?;
    let error = command.exec();
    bail!("cannot run {}: {error}", command.get_program().to_string_lossy())
}

/// The environment of lab processes: what they are given, and of the caller's only what programs need to
/// be found and to talk to a terminal. Programs beside this one come first on the path.
pub(crate) fn environment(mut own: BTreeMap<String, String>) -> BTreeMap<String, String> {
    for name in ["HOME", "LANG", "TERM", "RUST_LOG", "RUST_BACKTRACE"] {
        if let Ok(value) = std::env::var(name) {
            own.entry(name.to_owned()).or_insert(value);
        }
    }
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    let path = match binaries() {
        Some(dir) => format!("{}:{path}", dir.display()),
        None => path,
    };
    own.entry("PATH".to_owned()).or_insert(path);
    own
}

/// Directory of this program, where its companions are.
pub(crate) fn binaries() -> Option<PathBuf> {
    std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf))
}

/// The last lines of a log, indented, for an error message.
pub(crate) fn log_tail(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<String> = text.lines().map(|line| format!("  {line}")).collect();
    if all.is_empty() {
        return "  (it wrote nothing)".to_owned();
    }
    all[all.len().saturating_sub(lines)..].join("\n")
}
