//! The mesh that is measured: `topology-examples/bench` in a lab of its own.

use super::exec::{command, inside, run};
use super::kernel_path::Node;
use crate::workspace;
use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

/// The measured service: its ClusterIP as the manifests fix it.
pub(super) const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 7), 80);

/// First two octets of the underlay that the topology fixes.
const UNDERLAY: [u8; 2] = [172, 31];

/// Labs of the bench are called this and a process ID.
const PREFIX: &str = "bench-";

/// A running lab. Dropping it takes it down.
pub(super) struct Lab {
    name: String,
    cli: PathBuf,
    /// The topology with the generated services.
    folder: PathBuf,
    up_seconds: f64,
    pingpong: Ipv4Addr,
    bulk: Ipv4Addr,
}

/// Memory of one agent.
#[derive(Debug, Serialize)]
pub(super) struct Agent {
    /// `CLUSTER/NODE`
    pub(super) node: String,
    /// VmRSS: with the pages of the executable.
    pub(super) resident_mib: f64,
    /// RssAnon: what it allocated.
    pub(super) anonymous_mib: f64,
}

impl Lab {
    /// Brings the lab up and waits until both clusters know each other's services.
    pub(super) fn up(executables: &Path, services: u16) -> anyhow::Result<Self> {
        remove_leftovers(&executables.join("clustermesh"))?;
        let name = format!("{PREFIX}{}", std::process::id());
        let folder = workspace::target().join("bench").join(&name);
        write_topology(&workspace::root().join("topology-examples/bench"), &folder, services)?;
        let unspecified = Ipv4Addr::UNSPECIFIED;
        let mut lab = Self {
            name,
            cli: executables.join("clustermesh"),
            folder,
            up_seconds: 0.0,
            pingpong: unspecified,
            bulk: unspecified,
        };
        let started = Instant::now();
        lab.cli(&format!(
            "lab up {}/topology.yaml --name {} --wait --wait-timeout 600s",
            lab.folder.display(),
            lab.name
        ))?;
        lab.up_seconds = started.elapsed().as_secs_f64();
        lab.pingpong = address(&lab.netns("beta", "bench-pingpong"), "10.2.")?;
        lab.bulk = address(&lab.netns("beta", "bench-bulk"), "10.2.")?;
        Ok(lab)
    }

    /// The client's node and the servers' node.
    pub(super) fn nodes(&self) -> anyhow::Result<[Node; 2]> {
        let node = |cluster: &str| {
            let netns = self.netns(cluster, "node1");
            let [a, b] = UNDERLAY;
            let address = address(&netns, &format!("{a}.{b}."))?;
            anyhow::Ok(Node { netns, address })
        };
        Ok([node("alpha")?, node("beta")?])
    }

    /// Address of the pod that answers round trips.
    pub(super) fn pingpong(&self) -> Ipv4Addr {
        self.pingpong
    }

    /// Address of the pod that takes streams.
    pub(super) fn bulk(&self) -> Ipv4Addr {
        self.bulk
    }

    /// The time that [`Lab::up`] took.
    pub(super) fn up_seconds(&self) -> f64 {
        self.up_seconds
    }

    /// The command line prefix that runs the rest in the client pod, in its namespace and cgroup.
    pub(super) fn in_client(&self) -> String {
        format!("{} lab exec --lab {} alpha/bench/client --", self.cli.display(), self.name)
    }

    /// What the agents of this lab occupy now.
    pub(super) fn agents(&self) -> anyhow::Result<Vec<Agent>> {
        let own = format!("/{}/", self.name);
        let mut agents = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let process = entry?.path();
            // Processes come and go while this looks.
            let Ok(arguments) = fs::read_to_string(process.join("cmdline")) else { continue };
            let mut arguments = arguments.split('\0');
            let is_agent = arguments.next().is_some_and(|program| program.ends_with("clustermesh-agent"));
            let arguments: Vec<&str> = arguments.collect();
            if !is_agent || !arguments.iter().any(|argument| argument.contains(&own)) {
                continue;
            }
            let value = |flag: &str| {
                let at = arguments.iter().position(|argument| *argument == flag)?;
                arguments.get(at + 1).copied()
            };
            let status = fs::read_to_string(process.join("status"))?;
            agents.push(Agent {
                node: format!(
                    "{}/{}",
                    value("--cluster-name").unwrap_or("?"),
                    value("--node-name").unwrap_or("?")
                ),
                resident_mib: mebibytes(&status, "VmRSS:")?,
                anonymous_mib: mebibytes(&status, "RssAnon:")?,
            });
        }
        ensure!(!agents.is_empty(), "no agent of lab {} is running", self.name);
        agents.sort_by(|a, b| a.node.cmp(&b.node));
        Ok(agents)
    }

    fn netns(&self, cluster: &str, name: &str) -> String {
        format!("cm-{}-{cluster}-{name}", self.name)
    }

    /// Runs `clustermesh`; what it prints goes to standard error, with the rest of the progress.
    fn cli(&self, arguments: &str) -> anyhow::Result<()> {
        let line = format!("{} {arguments}", self.cli.display());
        let status = command(&line)?.stdin(Stdio::null()).stdout(std::io::stderr()).status();
        let status = status.with_context(|| format!("cannot run {line}"))?;
        ensure!(status.success(), "`{line}` failed ({status})");
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.cli(&format!("lab down {}", self.name)) {
            eprintln!("the lab {} is left behind: {error:#}", self.name);
        }
        // Scratch files in the target folder do no harm.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Takes down the labs of benches that were killed.
fn remove_leftovers(cli: &Path) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir("/run/clustermesh/labs") else { return Ok(()) };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(PREFIX).filter(|pid| pid.parse::<u32>().is_ok()) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            run(&format!("{} lab down {name}", cli.display()))?;
        }
    }
    Ok(())
}

/// Copies the topology and adds services, all global and with the same backend, so that there are
/// `services` of them.
fn write_topology(from: &Path, to: &Path, services: u16) -> anyhow::Result<()> {
    copy_folder(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    let mut manifest = String::new();
    for number in 1..services {
        let _ = write!(
            manifest,
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: other-{number}\n  namespace: bench\n  \
             annotations:\n    service.cilium.io/global: \"true\"\nspec:\n  selector:\n    app: pingpong\n  \
             ports:\n  - {{name: tcp, protocol: TCP, port: 80, targetPort: 7777}}\n  \
             - {{name: udp, protocol: UDP, port: 80, targetPort: 7777}}\n"
        );
    }
    if !manifest.is_empty() {
        fs::write(to.join("manifests/both/others.yaml"), manifest)?;
    }
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// The IPv4 address in a namespace that starts with `start`.
fn address(netns: &str, start: &str) -> anyhow::Result<Ipv4Addr> {
    let interfaces: Vec<Interface> =
        serde_json::from_str(&run(&format!("{} ip -j -4 address show", inside(netns)))?)?;
    let mut addresses = interfaces.iter().flat_map(|interface| &interface.addr_info);
    let found = addresses.find(|info| info.local.starts_with(start));
    let found = found.with_context(|| format!("namespace {netns} has no address in {start}0.0"))?;
    Ok(found.local.parse()?)
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    addr_info: Vec<AddressInfo>,
}

#[derive(Deserialize)]
struct AddressInfo {
    #[serde(default)]
    local: String,
}

fn mebibytes(status: &str, field: &str) -> anyhow::Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kibibytes = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    let kibibytes: f64 = kibibytes.with_context(|| format!("no {field} in /proc/PID/status"))?.parse()?;
    Ok(kibibytes / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_status_of_a_process() {
        let status = "Name:\tagent\nVmRSS:\t   20480 kB\nRssAnon:\t    512 kB\n";
        assert!((mebibytes(status, "VmRSS:").expect("there") - 20.0).abs() < 1e-9);
        assert!((mebibytes(status, "RssAnon:").expect("there") - 0.5).abs() < 1e-9);
        assert!(mebibytes(status, "VmSwap:").is_err());
    }
}
