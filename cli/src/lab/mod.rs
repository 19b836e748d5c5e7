//! The lab: several clusters on one Linux machine, in which nothing is faked but the machines.
//!
//! Each node is a network namespace with an address on an underlay, each pod a namespace with a veth and a
//! cgroup; each cluster has its own etcd, apiserver and agents as real processes. There is no daemon: every
//! command does the work of controllers, scheduler and kubelets for the change it was asked for, and writes
//! the manifests as an API server would serve them ([`effective`]).
//!
//! From the outside in: [`topology`] and [`objects`] are what the user wrote, [`state`] what a lab
//! remembers, [`addressing`], [`placement`] and [`container`] decide (no I/O), [`network`], [`cgroup`],
//! [`process`] and [`pki`] touch the machine, [`pods`] and [`system`] bring it in line.

mod addressing;
mod agent_flags;
pub(crate) mod args;
mod cgroup;
mod change;
mod container;
mod down;
mod effective;
mod encrypt;
mod ethtool;
mod exec;
pub(crate) mod layout;
mod netns;
mod network;
mod objects;
mod pki;
mod placement;
mod pods;
mod process;
mod show;
pub(crate) mod state;
mod system;
pub(crate) mod topology;
mod up;

#[cfg(test)]
mod testing;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use self::args::{DownArgs, LabArgs, LabCommand};
use self::layout::Layout;
use self::objects::Objects;
use self::pods::Pods;
use self::state::{LabState, Lock, names};
use self::topology::{Cluster, Topology, lab_name};
use crate::error::usage;
use crate::output::print_line;

/// A lab that exists.
#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) layout: Layout,
    pub(crate) state: LabState,
    pub(crate) topology: Topology,
}

impl Lab {
    /// Opens the lab called `name`.
    ///
    /// # Errors
    /// A usage error if there is none.
    pub(crate) fn open(name: &str) -> anyhow::Result<Self> {
        lab_name(name).map_err(usage)?;
        let layout = Layout::new(name, &cgroup::mount_point()?);
        let state = LabState::load(&layout)?;
        let topology = Topology::check(&state.topology).with_context(|| {
            format!("the state of lab {name} is damaged; remove it with `clustermesh lab down {name}`")
        })?;
        Ok(Self { layout, state, topology })
    }

    /// Opens the lab called `name`, or, without a name, the only one there is.
    ///
    /// # Errors
    /// A usage error if there is none, or a choice.
    pub(crate) fn choose(name: Option<&str>) -> anyhow::Result<Self> {
        match (name, &names()[..]) {
            (Some(name), _) => Self::open(name),
            (None, [only]) => Self::open(only),
            (None, []) => Err(usage("no lab runs; start one with `clustermesh lab up FILE`")),
            (None, many) => {
                Err(usage(format!("several labs run: {}; choose one with --lab", many.join(", "))))
            }
        }
    }

    /// Takes the lab and the cluster off the front of `path`: `LAB/CLUSTER/rest` or `CLUSTER/rest`.
    ///
    /// # Errors
    /// A usage error if there is no such lab or cluster.
    pub(crate) fn locate<'p>(
        lab: Option<&str>,
        path: &'p str,
    ) -> anyhow::Result<(Self, String, Option<&'p str>)> {
        let (first, rest) = path.split_once('/').map_or((path, None), |(first, rest)| (first, Some(rest)));
        if let (None, Some(rest)) = (lab, rest)
            && names().iter().any(|name| name == first)
        {
            let (cluster, below) = rest.split_once('/').map_or((rest, None), |(c, below)| (c, Some(below)));
            let lab = Self::open(first)?;
            // A cluster may be called like its lab; then the path means the cluster's.
            if lab.topology.cluster(cluster).is_ok() || lab.topology.cluster(first).is_err() {
                lab.topology.cluster(cluster)?;
                return Ok((lab, cluster.to_owned(), below));
            }
        }
        let lab = Self::choose(lab)?;
        lab.topology.cluster(first)?;
        Ok((lab, first.to_owned(), rest))
    }

    /// A cluster whose name [`Lab::locate`] has found.
    fn cluster(&self, name: &str) -> anyhow::Result<&Cluster> {
        self.topology.cluster(name)
    }

    fn pods<'a>(&'a self, cluster: &'a Cluster) -> Pods<'a> {
        Pods { layout: &self.layout, cluster, images: &self.topology.images }
    }
}

/// Runs a `lab` command that replaces this process, which must not have started a thread yet. Returns
/// false if `args` is another command.
///
/// # Errors
/// If the process cannot become the command.
pub(crate) fn become_command(args: &LabArgs) -> anyhow::Result<bool> {
    match &args.command {
        LabCommand::Enter(args) => process::enter(args).map(|()| true),
        LabCommand::Exec(exec) => exec::exec(args.lab.as_deref(), exec).map(|()| true),
        _ => Ok(false),
    }
}

/// Runs a `lab` command.
///
/// # Errors
/// What failed.
pub(crate) async fn run(args: &LabArgs) -> anyhow::Result<()> {
    let lab = args.lab.as_deref();
    match &args.command {
        LabCommand::Up(args) => up::up(args).await,
        LabCommand::Down(args) => down(lab, args).await,
        LabCommand::List { output } => show::list(*output),
        LabCommand::Status { name, output } => show::status(&Lab::choose(name.as_deref().or(lab))?, *output),
        LabCommand::Logs { target } => show::logs(lab, target),
        LabCommand::Apply { cluster, files, wait } => change::apply(lab, cluster, files, wait).await,
        LabCommand::Delete { cluster, object, wait } => change::delete(lab, cluster, object, wait).await,
        LabCommand::Annotate { cluster, object, changes, wait } => {
            change::annotate(lab, cluster, object, changes, wait).await
        }
        LabCommand::Scale { cluster, object, replicas, wait } => {
            change::scale(lab, cluster, object, *replicas, wait).await
        }
        LabCommand::Kill { process, signal } => change::kill(lab, process, signal).await,
        LabCommand::Stop { process } => change::stop(lab, process).await,
        LabCommand::Start(args) => change::start(lab, args, false).await,
        LabCommand::Restart(args) => change::start(lab, args, true).await,
        LabCommand::Encrypt(args) => encrypt::encrypt(lab, args).await,
        LabCommand::AgentFlags(args) => agent_flags::set(lab, args).await,
        LabCommand::Cut { target } => change::set_link(lab, target, false).await,
        LabCommand::Heal { target } => change::set_link(lab, target, true).await,
        LabCommand::Enter(_) | LabCommand::Exec(_) => {
            bail!("this command must run before any thread is started")
        }
    }
}

async fn down(lab: Option<&str>, args: &DownArgs) -> anyhow::Result<()> {
    let cgroups = requirements(&["ip"])?;
    let labs = match args.name.as_deref().or(lab) {
        _ if args.all => down::found(&cgroups),
        Some(name) => vec![name.to_owned()],
        None => match &down::found(&cgroups)[..] {
            [] => return Err(usage("no lab runs")),
            [only] => vec![only.clone()],
            many => {
                return Err(usage(format!("several labs run: {}; name one, or use --all", many.join(", "))));
            }
        },
    };
    for name in labs {
        lab_name(&name).map_err(usage)?;
        let layout = Layout::new(&name, &cgroups);
        let lock = Lock::acquire(&layout)?;
        let existed = down::remove(&layout).await?;
        lock.remove();
        let said = if existed { "Removed" } else { "There is no" };
        print_line(format!("{said} lab {name}"));
    }
    Ok(())
}

/// Adds the objects of a manifest, and says what of it a lab has no use for.
///
/// # Errors
/// A usage error with file and field.
fn read_manifest(objects: &mut Objects, file: &Path) -> anyhow::Result<()> {
    for kind in objects.read(file)? {
        print_line(format!("note: {}: a lab has no use for {kind}; left out", file.display()));
    }
    Ok(())
}

/// Checks what a command needs of the machine; returns where cgroup2 is mounted.
///
/// # Errors
/// One message that says what is missing and what to do.
fn requirements(programs: &[&str]) -> anyhow::Result<PathBuf> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "a lab needs root: it makes network namespaces, cgroups and eBPF programs; run the command with sudo"
        );
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<&str> = programs
        .iter()
        .copied()
        .filter(|program| !std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
        .collect();
    if !missing.is_empty() {
        bail!(
            "{} is not installed; run `cargo xtask setup`, which installs all that a lab needs",
            missing.join(" and ")
        );
    }
    cgroup::mount_point()
}
