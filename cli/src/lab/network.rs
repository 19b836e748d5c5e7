//! The lab's network: switches in a namespace of their own, a namespace per node and per pod.
//!
//! ```text
//!  pod eth0 ── veth… node lo (node's pod-CIDR address)        fabric namespace
//!  169.254.1.1/fe80::1     node eth0 (underlay) ── port1.1 [sw1] up1 ── core1 [core] core2 ── up2 [sw2] …
//! ```
//! The core switch has an address itself: whoever calls from there is a host outside of the mesh.
//! Each cluster hangs on its own switch, so that a cluster can be cut off whole while its nodes still see
//! each other. Nothing of it touches the machine's own network.

use std::fmt::Write;
use std::net::IpAddr;

use super::addressing::{mac, short_hash};
use super::layout::{Layout, cluster_switch, cluster_uplink, core_port, node_port};
use super::objects::ObjectName;
use super::state::PodState;
use super::topology::{Cluster, Node, Topology};
use super::{ethtool, netns};

const POD_MTU: u16 = 1450;
const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";

/// Pods and nodes use the addresses they are given, at once: no duplicate detection, no advertisements.
const COMMON: [(&str, &str); 4] = [
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
];
/// A node routes between its pods and the overlay, which is asymmetric on purpose.
const NODE: [(&str, &str); 5] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// Makes the switches and the nodes, connected to each other.
///
/// # Errors
/// The `ip` command that failed.
pub(crate) async fn create(layout: &Layout, topology: &Topology) -> anyhow::Result<()> {
    let mut namespaces = format!("netns add {}\n", layout.fabric());
    let mut links = String::new();
    let mut fabric = String::from(
        "link set lo up\nlink add core type bridge stp_state 0 mcast_snooping 0\nlink set core up\n",
    );
    let mut ports = String::new();
    for (outside, net) in topology.outside_addresses() {
        let _ = writeln!(fabric, "addr add {outside}/{} dev core{}", net.prefix_len(), at_once(outside));
    }
    for cluster in &topology.clusters {
        let (switch, up, core) = (cluster_switch(cluster), cluster_uplink(cluster), core_port(cluster));
        let _ = writeln!(fabric, "link add {switch} type bridge stp_state 0 mcast_snooping 0");
        let _ = writeln!(fabric, "link add {up} type veth peer name {core}");
        let _ = writeln!(fabric, "link set {up} master {switch} up");
        let _ = writeln!(fabric, "link set {core} master core up");
        let _ = writeln!(fabric, "link set {switch} up");
        for node in &cluster.nodes {
            let netns = layout.node_netns(cluster.name.as_str(), &node.name);
            let port = node_port(cluster, node);
            let address = mac(&node.address.to_string());
            let _ = writeln!(namespaces, "netns add {netns}");
            let _ = writeln!(
                links,
                "link add eth0 address {address} netns {netns} type veth peer name {port} netns {}",
                layout.fabric()
            );
            let _ = writeln!(ports, "link set {port} master {switch} up");
        }
    }
    netns::ip(None, &namespaces).await?;
    netns::sysctl(&layout.fabric(), &COMMON)?;
    for cluster in &topology.clusters {
        for node in &cluster.nodes {
            let netns = layout.node_netns(cluster.name.as_str(), &node.name);
            netns::sysctl(&netns, &COMMON)?;
            netns::sysctl(&netns, &NODE)?;
        }
    }
    netns::ip(None, &links).await?;
    netns::ip(Some(&layout.fabric()), &(fabric + &ports)).await?;
    // From outside packets come finished, as over a wire: programs ahead of a node's kernel see them as they are.
    ethtool::finish_checksums(&layout.fabric(), "core")?;
    let nodes = topology.clusters.iter().flat_map(|c| c.nodes.iter().map(move |n| (c, n)));
    let batches = nodes.map(|(cluster, node)| async move {
        let netns = layout.node_netns(cluster.name.as_str(), &node.name);
        netns::ip(Some(&netns), &node_commands(topology, node)).await
    });
    futures::future::try_join_all(batches).await?;
    Ok(())
}

/// Gives pods their namespaces and connects them to their nodes.
///
/// # Errors
/// The `ip` command that failed.
pub(crate) async fn add_pods(layout: &Layout, cluster: &Cluster, pods: &[PodState]) -> anyhow::Result<()> {
    let name = cluster.name.as_str();
    let netns_of = |pod: &PodState| layout.pod_netns(name, &pod.name);
    let namespaces: String = pods.iter().map(|pod| format!("netns add {}\n", netns_of(pod))).collect();
    netns::ip(None, &namespaces).await?;
    let mut links = String::new();
    for pod in pods {
        netns::sysctl(&netns_of(pod), &COMMON)?;
        let (pod_mac, host_mac) = pod_macs(name, &pod.name);
        let _ = writeln!(
            links,
            "link add eth0 mtu {POD_MTU} address {pod_mac} netns {} type veth peer name {} mtu {POD_MTU} \
             address {host_mac} netns {}",
            netns_of(pod),
            host_interface(name, &pod.name),
            layout.node_netns(name, &pod.node)
        );
    }
    netns::ip(None, &links).await?;
    let pod_batches = pods.iter().map(|pod| async move {
        netns::ip(Some(&layout.pod_netns(name, &pod.name)), &pod_commands(name, pod)).await
    });
    let node_batches = cluster.nodes.iter().map(|node| async move {
        let commands: String =
            pods.iter().filter(|p| p.node == node.name).map(|pod| host_commands(name, node, pod)).collect();
        netns::ip(Some(&layout.node_netns(name, &node.name)), &commands).await
    });
    futures::try_join!(
        futures::future::try_join_all(pod_batches),
        futures::future::try_join_all(node_batches)
    )?;
    Ok(())
}

/// Disconnects a pod and removes its namespace; half of it missing is fine.
///
/// # Errors
/// If the kernel refuses.
pub(crate) async fn remove_pod(layout: &Layout, cluster: &str, pod: &PodState) -> anyhow::Result<()> {
    let node = layout.node_netns(cluster, &pod.node);
    let interface = host_interface(cluster, &pod.name);
    let exists = netns::within(&node, || Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))
        .is_ok_and(|devices| devices.lines().any(|l| l.trim_start().starts_with(&format!("{interface}:"))));
    if exists {
        // The namespace itself goes when its last process does; the link, and with it the pod's routes, go now.
        netns::ip(Some(&node), &format!("link del {interface}\n")).await?;
    }
    netns::remove(&layout.pod_netns(cluster, &pod.name)).await
}

/// Pulls a cable in the fabric, or plugs it in again: of a node, or of a whole cluster.
///
/// # Errors
/// The `ip` command that failed.
pub(crate) async fn set_link(
    layout: &Layout,
    cluster: &Cluster,
    node: Option<&Node>,
    up: bool,
) -> anyhow::Result<()> {
    let port = node.map_or_else(|| core_port(cluster), |node| node_port(cluster, node));
    let state = if up { "up" } else { "down" };
    netns::ip(Some(&layout.fabric()), &format!("link set {port} {state}\n")).await
}

/// Name of the node's end of a pod's veth pair.
pub(crate) fn host_interface(cluster: &str, pod: &ObjectName) -> String {
    format!("veth{}", short_hash(&format!("{cluster}/{pod}")))
}

fn pod_macs(cluster: &str, pod: &ObjectName) -> (String, String) {
    (mac(&format!("{cluster}/{pod}/pod")), mac(&format!("{cluster}/{pod}/host")))
}

fn node_commands(topology: &Topology, node: &Node) -> String {
    let mut batch = String::from("link set lo up\n");
    for ip in node.internal_ips() {
        let _ = writeln!(batch, "addr add {}", own_address(ip, "lo"));
    }
    for (address, net) in node.underlay_ips().zip(topology.underlays()) {
        let _ = writeln!(batch, "addr add {address}/{} dev eth0{}", net.prefix_len(), at_once(address));
    }
    batch.push_str("link set eth0 up\n");
    batch
}

fn pod_commands(cluster: &str, pod: &PodState) -> String {
    let (_, host_mac) = pod_macs(cluster, &pod.name);
    let mut batch = String::from("link set lo up\nlink set eth0 up\n");
    for ip in &pod.ips {
        let _ = writeln!(batch, "addr add {}", own_address(*ip, "eth0"));
        let gateway = if ip.is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 };
        let _ = writeln!(batch, "neigh replace {gateway} lladdr {host_mac} dev eth0 nud permanent");
        if ip.is_ipv4() {
            let _ = writeln!(batch, "route add {gateway} dev eth0 scope link");
        }
        let _ = writeln!(batch, "route add default via {gateway} dev eth0 src {ip}");
    }
    batch
}

fn host_commands(cluster: &str, node: &Node, pod: &PodState) -> String {
    let interface = host_interface(cluster, &pod.name);
    let (pod_mac, _) = pod_macs(cluster, &pod.name);
    let mut batch = format!("link set {interface} up\n");
    for ip in &pod.ips {
        // The node speaks to its pods from the address that other nodes know it by.
        let source = node.internal_ips().into_iter().find(|own| own.is_ipv4() == ip.is_ipv4());
        let source = source.map(|own| format!(" src {own}")).unwrap_or_default();
        let _ = writeln!(batch, "neigh replace {ip} lladdr {pod_mac} dev {interface} nud permanent");
        let _ = writeln!(batch, "route add {} dev {interface}{source}", host_prefix(*ip));
    }
    batch
}

/// An address that is usable at once, also before the other end of the link is up.
fn own_address(ip: IpAddr, device: &str) -> String {
    format!("{} dev {device}{}", host_prefix(ip), at_once(ip))
}

/// What makes `ip` give an address without asking whether somebody else has it.
fn at_once(ip: IpAddr) -> &'static str {
    if ip.is_ipv6() { " nodad" } else { "" }
}

fn host_prefix(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}
