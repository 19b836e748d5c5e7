//! What the mesh is compared with: two pods on the same two nodes, joined by the kernel's own means.
//!
//! The client and server pods have two addresses each. One pair is routed plainly between the nodes
//! (the limit: nothing can be cheaper on this topology), the other goes through an ordinary VXLAN
//! device with static entries, as flannel sets it up. Service addresses are routed to node 1, where
//! [`super::nat`] translates them.
//!
//! All addresses are from the benchmarking ranges of RFC 2544, which no lab uses.

use super::exec::{command, inside, run};
use anyhow::{Context as _, ensure};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Stdio};

/// Server pod by plain routing.
pub(super) const SERVER_PLAIN: Ipv4Addr = Ipv4Addr::new(198, 18, 2, 2);
/// Server pod over the kernel's VXLAN.
pub(super) const SERVER_VXLAN: Ipv4Addr = Ipv4Addr::new(198, 18, 12, 2);

/// The mesh's VXLAN leaves this much of 1500 bytes; all variants use it, so that segments are equal.
const MTU: u32 = 1450;
const VNI: u32 = 4094;
/// The IANA port; the mesh's own device listens on 8472.
const VXLAN_PORT: u16 = 4789;
const PREFIX: &str = "cmbench-";

/// One of the two nodes, which somebody else made.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Name of its network namespace.
    pub(super) netns: String,
    /// Its address on the underlay.
    pub(super) address: Ipv4Addr,
}

/// The two pods and what joins them. Dropping it removes the pods; the rest goes with the nodes.
pub(super) struct KernelPath {
    client: String,
    server: String,
    nodes: [Node; 2],
    servers: Vec<Child>,
}

/// What differs between the two ends.
struct End<'a> {
    pod: &'a str,
    node: &'a Node,
    peer: &'a Node,
    /// Third octet of the plainly routed subnets: here and there. The VXLAN ones are ten above.
    subnet: u8,
    peer_subnet: u8,
}

impl KernelPath {
    /// Adds a client pod to `nodes[0]` and a server pod to `nodes[1]`.
    pub(super) fn attach(nodes: [Node; 2]) -> anyhow::Result<Self> {
        remove_leftovers()?;
        let pid = std::process::id();
        let path = Self {
            client: format!("{PREFIX}{pid}-client"),
            server: format!("{PREFIX}{pid}-server"),
            nodes,
            servers: Vec::new(),
        };
        let [node1, node2] = &path.nodes;
        let ends = [
            End { pod: &path.client, node: node1, peer: node2, subnet: 1, peer_subnet: 2 },
            End { pod: &path.server, node: node2, peer: node1, subnet: 2, peer_subnet: 1 },
        ];
        for end in ends {
            end.make().with_context(|| format!("cannot attach a pod to {}", end.node.netns))?;
        }
        // Service addresses, of which the client knows nothing but the way.
        run(&format!("ip -n {} route add 198.19.0.0/16 via 198.18.11.1 src 198.18.11.2", path.client))?;
        Ok(path)
    }

    /// Starts a server in the server pod and waits until it listens, which it says in its first line. It
    /// is killed with this process or this path.
    pub(super) fn serve(&mut self, line: &str) -> anyhow::Result<()> {
        // In a session of its own like the lab's processes: the kernel's autogroups divide CPU time
        // between sessions first.
        let mut child = command(&format!("setpriv --pdeathsig KILL setsid {} {line}", inside(&self.server)))?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a server in the server pod")?;
        let stdout = child.stdout.take().context("the server's output is piped")?;
        self.servers.push(child);
        let mut first = String::new();
        BufReader::new(stdout).read_line(&mut first)?;
        ensure!(!first.is_empty(), "`{line}` ended before it listened");
        Ok(())
    }

    /// The command line prefix that runs the rest in the client pod.
    pub(super) fn in_client(&self) -> String {
        inside(&self.client)
    }

    /// The namespace in which services are translated.
    pub(super) fn translating_node(&self) -> &str {
        &self.nodes[0].netns
    }
}

impl Drop for KernelPath {
    fn drop(&mut self) {
        for server in &mut self.servers {
            // Already gone is as good.
            let _ = server.kill();
            let _ = server.wait();
        }
        for pod in [&self.client, &self.server] {
            // A pod that was never made is no failure of the clean-up.
            let _ = run(&format!("ip netns delete {pod}"));
        }
        for node in &self.nodes {
            // With the pod went its veth and all routes over it; what is left is the VXLAN device.
            let _ = run(&format!("ip -n {} link delete {VXLAN}", node.netns));
        }
    }
}

const VXLAN: &str = "cmbench-vx";
const VETH: &str = "cmbench-pod";

impl End<'_> {
    fn make(&self) -> anyhow::Result<()> {
        let Self { pod, subnet: here, peer_subnet: there, .. } = self;
        let (node, peer) = (&self.node.netns, self.peer.address);
        let lines = [
            format!("ip netns add {pod}"),
            format!("ip -n {pod} link set lo up"),
            format!("ip -n {node} link add {VETH} mtu {MTU} type veth peer name eth0 netns {pod} mtu {MTU}"),
            format!("ip -n {node} address add 198.18.{here}.1/24 dev {VETH}"),
            format!("ip -n {node} address add 198.18.1{here}.1/24 dev {VETH}"),
            format!("ip -n {node} link set {VETH} up"),
            format!("ip -n {pod} address add 198.18.{here}.2/24 dev eth0"),
            format!("ip -n {pod} address add 198.18.1{here}.2/24 dev eth0"),
            format!("ip -n {pod} link set eth0 up"),
            // The source is named so that answers over UDP come from the address that was asked.
            format!("ip -n {pod} route add 198.18.{there}.0/24 via 198.18.{here}.1 src 198.18.{here}.2"),
            format!("ip -n {pod} route add 198.18.1{there}.0/24 via 198.18.1{here}.1 src 198.18.1{here}.2"),
            format!("{} sysctl -q -w net.ipv4.ip_forward=1", inside(node)),
            format!("{} sysctl -q -w net.ipv4.conf.{VETH}.rp_filter=0", inside(node)),
            format!("ip -n {node} route add 198.18.{there}.0/24 via {peer}"),
            // Without UDP checksums, like the mesh's tunnel.
            format!(
                "ip -n {node} link add {VXLAN} mtu {MTU} address {} type vxlan id {VNI} local {} \
                 dstport {VXLAN_PORT} nolearning noudpcsum",
                mac(*here),
                self.node.address
            ),
            format!("ip -n {node} address add 198.18.1{here}.0/32 dev {VXLAN}"),
            format!("ip -n {node} link set {VXLAN} up"),
            format!("{} sysctl -q -w net.ipv4.conf.{VXLAN}.rp_filter=0", inside(node)),
            format!("bridge -n {node} fdb append {} dev {VXLAN} dst {peer}", mac(*there)),
            format!(
                "ip -n {node} neighbour add 198.18.1{there}.0 lladdr {} dev {VXLAN} nud permanent",
                mac(*there)
            ),
            format!("ip -n {node} route add 198.18.1{there}.0/24 via 198.18.1{there}.0 dev {VXLAN} onlink"),
        ];
        lines.iter().try_for_each(|line| run(line).map(drop))
    }
}

fn mac(subnet: u8) -> String {
    format!("02:be:9c:00:00:{subnet:02x}")
}

/// Removes the pods of benches that were killed.
fn remove_leftovers() -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir("/run/netns") else { return Ok(()) };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some((pid, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        if !Path::new("/proc").join(pid).exists() {
            run(&format!("ip netns delete {name}"))?;
        }
    }
    Ok(())
}
