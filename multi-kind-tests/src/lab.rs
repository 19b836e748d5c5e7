//! One lab, driven through the `clustermesh` command line.

use crate::interrupt::Interrupt;
use crate::pace;
use crate::process::{self, Finished};
use anyhow::Context as _;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Labs keep their files here; see `clustermesh lab --help`.
const LABS: &str = "/run/clustermesh/labs";
/// How long a lab, or clusters that were just connected, may take until everybody is ready.
pub(crate) const READY: Duration = Duration::from_secs(60);
/// Longer than any single command of the lab takes, so that a hang ends.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// Where the programs of this workspace are.
#[derive(Clone, Debug)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// The programs in `folder`.
    ///
    /// # Errors
    /// If one that scenarios need is missing.
    pub fn in_folder(folder: &Path) -> anyhow::Result<Self> {
        for name in ["clustermesh", "clustermesh-agent", "clustermesh-apiserver", "mesh-probe"] {
            let path = folder.join(name);
            anyhow::ensure!(path.is_file(), "there is no {}; build the workspace first", path.display());
        }
        Ok(Self { folder: folder.canonicalize()? })
    }

    /// Full path of a program.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// `clustermesh` with arguments.
    pub fn clustermesh(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("clustermesh"));
        command.args(arguments);
        command
    }
}

/// How the command line is used.
#[derive(Clone)]
pub struct Access {
    /// The programs under test.
    pub binaries: Binaries,
    /// Ends commands early.
    pub interrupt: Interrupt,
    /// Print every command first.
    pub show: bool,
}

/// A lab that is up. Taken down when dropped, unless it is somebody else's.
pub struct Lab {
    name: String,
    access: Access,
    topology: PathBuf,
    ours: bool,
}

impl Lab {
    /// Brings up a lab of its own name.
    ///
    /// # Errors
    /// What `clustermesh lab up` says.
    pub fn up(access: Access, topology: &Path, name: &str) -> anyhow::Result<Self> {
        // From here on it is ours: a half-made lab is taken down as well.
        let lab = Self { name: name.to_owned(), access, topology: topology.to_path_buf(), ours: true };
        let file = topology.to_string_lossy();
        let patience = format!("{}s", pace::slowed(READY).as_secs());
        lab.clustermesh(&["lab", "up", &file, "--name", name, "--wait-timeout", &patience])?;
        Ok(lab)
    }

    /// Uses a lab that somebody else brought up, and leaves it up.
    pub fn adopt(access: Access, topology: &Path, name: &str) -> Self {
        Self { name: name.to_owned(), access, topology: topology.to_path_buf(), ours: false }
    }

    /// Name of the lab.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The topology file that it was made from.
    pub fn topology(&self) -> &Path {
        &self.topology
    }

    /// `LAB/CLUSTER`, as the command line takes it.
    pub fn context(&self, cluster: &str) -> String {
        format!("{}/{cluster}", self.name)
    }

    /// Runs `clustermesh` and gives its output.
    ///
    /// # Errors
    /// If it fails or hangs; says what it said.
    pub fn clustermesh(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output =
            self.try_clustermesh(arguments)?.success(&format!("clustermesh {}", arguments.join(" ")))?;
        if self.access.show && matches!(arguments[0], "connect" | "disconnect" | "lab") {
            output.lines().for_each(|line| println!("  | {line}"));
        }
        Ok(output)
    }

    /// Runs `clustermesh`, whatever its status.
    ///
    /// # Errors
    /// If it cannot be run, hangs, or we are interrupted.
    pub fn try_clustermesh(&self, arguments: &[&str]) -> anyhow::Result<Finished> {
        let command = self.access.binaries.clustermesh(arguments);
        self.announce(&command);
        process::run(command, pace::slowed(COMMAND_DEADLINE), &self.access.interrupt)
    }

    /// A command that runs inside a pod (`CLUSTER/NAMESPACE/POD`).
    pub fn in_pod(&self, pod: &str, arguments: &[&str]) -> Command {
        // With standard input, whose end is the end of a load.
        let mut command = self.access.binaries.clustermesh(&["lab", "exec", "--stdin"]);
        command.arg(self.context(pod)).arg("--").args(arguments);
        self.announce(&command);
        command
    }

    /// Runs a program in a pod to its end.
    ///
    /// # Errors
    /// If it cannot be run, hangs, or we are interrupted.
    pub fn run_in_pod(&self, pod: &str, arguments: &[&str], deadline: Duration) -> anyhow::Result<Finished> {
        process::run(self.in_pod(pod, arguments), deadline, &self.access.interrupt)
    }

    /// When the manifests of a cluster were last written, in microseconds since the Unix epoch.
    ///
    /// # Errors
    /// If the lab's files cannot be read.
    pub fn manifests_changed(&self, cluster: &str) -> anyhow::Result<u64> {
        let folder = self.folder().join(cluster).join("manifests");
        let mut newest = UNIX_EPOCH;
        let entries =
            std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            // A file may be replaced between the listing and the look at it.
            if let Ok(modified) = entry?.metadata().and_then(|metadata| metadata.modified()) {
                newest = newest.max(modified);
            }
        }
        micros(newest)
    }

    /// Pairs of clusters that are connected, each in alphabetical order.
    ///
    /// # Errors
    /// If the lab's files cannot be read.
    pub fn connections(&self) -> anyhow::Result<BTreeSet<(String, String)>> {
        let mut pairs = BTreeSet::new();
        for entry in std::fs::read_dir(self.folder()).context("the lab has no files")? {
            let entry = entry?;
            let cluster = entry.file_name().to_string_lossy().into_owned();
            let Ok(peers) = std::fs::read_dir(entry.path().join("clustermesh")) else { continue };
            for peer in peers {
                let peer = peer?.file_name().to_string_lossy().into_owned();
                // Certificates lie beside the entries; cluster names have no dots.
                if !peer.contains('.') {
                    pairs.insert(ordered(&cluster, &peer));
                }
            }
        }
        Ok(pairs)
    }

    /// The network namespace of a node (`CLUSTER/NODE`).
    pub fn node_namespace(&self, node: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/cm-{}-{}", self.name, node.replace('/', "-")))
    }

    /// Where the lab keeps its files.
    pub fn folder(&self) -> PathBuf {
        Path::new(LABS).join(&self.name)
    }

    /// Copies the logs of all processes to `target`, for a look after the lab has gone.
    ///
    /// # Errors
    /// If they cannot be copied.
    pub fn save_logs(&self, target: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(target)?;
        for entry in std::fs::read_dir(self.folder().join("logs")).context("the lab has no logs")? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), target.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    /// Takes the lab down.
    ///
    /// # Errors
    /// What `clustermesh lab down` says.
    pub fn down(mut self) -> anyhow::Result<()> {
        self.take_down()
    }

    fn announce(&self, command: &Command) {
        if self.access.show {
            println!("  $ {}", process::describe(command));
        }
    }

    fn take_down(&mut self) -> anyhow::Result<()> {
        if !std::mem::take(&mut self.ours) {
            return Ok(());
        }
        // Also after Ctrl-C: cleaning up is not interrupted.
        let command = self.access.binaries.clustermesh(&["lab", "down", &self.name]);
        self.announce(&command);
        process::run(command, pace::slowed(COMMAND_DEADLINE), &Interrupt::default())?
            .success("clustermesh lab down")?;
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("lab {} was not taken down: {error:#}", self.name);
        }
    }
}

/// A pair in alphabetical order.
pub fn ordered(one: &str, other: &str) -> (String, String) {
    let (first, second) = if one <= other { (one, other) } else { (other, one) };
    (first.to_owned(), second.to_owned())
}

/// Microseconds since the Unix epoch.
///
/// # Errors
/// If the clock is before 1970.
pub fn micros(time: SystemTime) -> anyhow::Result<u64> {
    Ok(u64::try_from(time.duration_since(UNIX_EPOCH)?.as_micros())?)
}
