//! The topology file: which clusters and nodes a lab has, and which local command stands for an image.
//!
//! [`TopologyFile`] is the file as written; [`Topology::check`] turns it into checked values and
//! names every mistake with the field it is in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clustermesh_kvstore::cluster::{ClusterId, ClusterName, MaxConnectedClusters};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::addressing::{Cidrs, last_of_underlay, node_cidrs, underlay_address};
use crate::error::usage;

const DEFAULT_UNDERLAY: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(172, 31, 0, 0), 16));

/// Nodes have a directory each, beside these of their cluster.
const RESERVED: [&str; 5] = ["clustermesh", "etcd", "kvstoremesh", "manifests", "volumes"];
/// Clusters have a directory each, beside these of the lab.
const RESERVED_FOR_LAB: [&str; 2] = ["logs", "pki"];

/// The file as written.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TopologyFile {
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    underlay: Option<String>,
    /// A prefix of the other family, if tunnels do not run between the nodes' first addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tunnels: Option<String>,
    clusters: Vec<ClusterEntry>,
    #[serde(default)]
    images: Vec<ImageCommand>,
    #[serde(default)]
    connect: Vec<[String; 2]>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ClusterEntry {
    name: String,
    id: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_connected_clusters: Option<u32>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    #[serde(rename = "serviceCIDRs")]
    service_cidrs: Vec<String>,
    nodes: Nodes,
    /// Mirror the other clusters into this one's etcd, and let the agents follow that.
    #[serde(default)]
    kvstoremesh: bool,
    #[serde(default)]
    manifests: Vec<PathBuf>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged, expecting = "nodes must be a number, or a list of {name, labels}")]
enum Nodes {
    Count(usize),
    List(Vec<NodeEntry>),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeEntry {
    name: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// Which local command stands for the images that match a glob.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageCommand {
    pub(crate) image: String,
    pub(crate) command: Vec<String>,
}

/// A checked topology.
#[derive(Clone, Debug)]
pub(crate) struct Topology {
    pub(crate) underlay: IpNet,
    /// Where tunnels run, unless that is the underlay.
    pub(crate) tunnels: Option<IpNet>,
    pub(crate) clusters: Vec<Cluster>,
    pub(crate) images: Vec<ImageCommand>,
    pub(crate) connect: Vec<(ClusterName, ClusterName)>,
}

impl Topology {
    /// Where nodes have addresses.
    pub(crate) fn underlays(&self) -> impl Iterator<Item = IpNet> {
        std::iter::once(self.underlay).chain(self.tunnels)
    }

    /// The addresses of a host on the underlays that is no node: the last ones there.
    pub(crate) fn outside_addresses(&self) -> impl Iterator<Item = (IpAddr, IpNet)> {
        self.underlays().map(|net| (last_of_underlay(net), net))
    }
}

/// One cluster of a lab.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    /// Position in the file; numbers the cluster's switch in the fabric.
    pub(crate) index: usize,
    pub(crate) name: ClusterName,
    pub(crate) id: ClusterId,
    pub(crate) max_connected: MaxConnectedClusters,
    pub(crate) service_cidrs: Cidrs,
    pub(crate) nodes: Vec<Node>,
    /// Its agents follow a mirror in their own etcd.
    pub(crate) kvstoremesh: bool,
    /// As written: relative to the topology file.
    pub(crate) manifests: Vec<PathBuf>,
}

/// One node of a cluster.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// The node's address on the underlay, and its first Kubernetes InternalIP.
    pub(crate) address: IpAddr,
    /// The second one, if tunnels do not end at the first.
    pub(crate) tunnel_address: Option<IpAddr>,
    pub(crate) pod_cidrs: Cidrs,
}

impl TopologyFile {
    /// Reads and parses `path`.
    ///
    /// # Errors
    /// If it cannot be read or is not a topology (a usage error, with file, line and field).
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| usage(format!("cannot read the topology {}: {e}", path.display())))?;
        serde_saphyr::from_str(&text)
            .map_err(|e| usage(format!("{}: {}", path.display(), e.without_snippet())))
    }
}

impl Topology {
    /// Checks `file`; all mistakes are reported at once.
    ///
    /// # Errors
    /// One line per mistake: the field, what is wrong, what to write instead.
    pub(crate) fn check(file: &TopologyFile) -> Result<Self, Mistakes> {
        let mut mistakes = Mistakes::default();
        mistakes.expect("name", lab_name(&file.name));
        let underlay = check_underlay("underlay", file.underlay.as_deref(), &mut mistakes);
        let underlay = underlay.unwrap_or(DEFAULT_UNDERLAY);
        let tunnels = check_underlay("tunnels", file.tunnels.as_deref(), &mut mistakes);
        if tunnels.is_some_and(|net| net.addr().is_ipv4() == underlay.addr().is_ipv4()) {
            mistakes.add(
                "tunnels",
                format!("write a prefix of the other family than that of the underlay, {underlay}"),
            );
        }
        if file.clusters.is_empty() {
            mistakes.add("clusters", "a lab needs at least one cluster");
        }
        let clusters: Vec<Cluster> = file
            .clusters
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| {
                let shape = Shape { index, clusters: file.clusters.len(), underlay, tunnels };
                check_cluster(entry, shape, &mut mistakes)
            })
            .collect();
        check_across(&clusters, &mut mistakes);
        for (index, image) in file.images.iter().enumerate() {
            if image.command.is_empty() {
                mistakes.add(format!("images[{index}].command"), "write the command as a list of words");
            }
        }
        let connect = check_connect(file, &mut mistakes);
        mistakes.into_result(Self { underlay, tunnels, clusters, images: file.images.clone(), connect })
    }

    /// The cluster called `name`.
    ///
    /// # Errors
    /// A usage error that lists the clusters there are.
    pub(crate) fn cluster(&self, name: &str) -> anyhow::Result<&Cluster> {
        self.clusters.iter().find(|c| c.name.as_str() == name).ok_or_else(|| {
            let known: Vec<&str> = self.clusters.iter().map(|c| c.name.as_str()).collect();
            usage(format!("no cluster {name:?} in this lab; it has {}", known.join(", ")))
        })
    }
}

impl Node {
    /// Where the node's own processes appear to pods: the first address of each pod CIDR.
    pub(crate) fn internal_ips(&self) -> Vec<IpAddr> {
        self.pod_cidrs.nth(1)
    }

    /// Its addresses on the underlay, the first one first.
    pub(crate) fn underlay_ips(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.address).chain(self.tunnel_address)
    }

    /// Where its tunnels end.
    pub(crate) fn tunnel_end(&self) -> IpAddr {
        self.tunnel_address.unwrap_or(self.address)
    }
}

impl Cluster {
    /// The node that runs etcd, the apiserver and the kvstoremesh.
    pub(crate) fn first_node(&self) -> &Node {
        // check_cluster refuses a cluster without nodes.
        &self.nodes[0]
    }

    /// The node called `name`.
    ///
    /// # Errors
    /// A usage error that lists the nodes there are.
    pub(crate) fn node(&self, name: &str) -> anyhow::Result<&Node> {
        self.nodes.iter().find(|n| n.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
            usage(format!("cluster {} has no node {name:?}; it has {}", self.name, known.join(", ")))
        })
    }

    /// The manifest files, directories expanded to the YAML and JSON files in them, by name.
    ///
    /// # Errors
    /// A usage error for a path that does not exist or a directory without manifests.
    pub(crate) fn manifest_files(&self, base: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for path in &self.manifests {
            files.extend(
                manifest_files(&base.join(path))
                    .with_context(|| format!("cluster {}: manifests: {}", self.name, path.display()))?,
            );
        }
        Ok(files)
    }
}

/// `path` itself, or, of a directory, the YAML and JSON files in it by name.
///
/// # Errors
/// A usage error if there is nothing.
pub(crate) fn manifest_files(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable = |e: std::io::Error| usage(format!("cannot read {}: {e}", path.display()));
    if !std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let extension = file.extension().and_then(|e| e.to_str());
        if file.is_file() && matches!(extension, Some("yaml" | "yml" | "json")) {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(usage(format!("no .yaml, .yml or .json file in {}", path.display())));
    }
    files.sort();
    Ok(files)
}

/// Checks the name of a lab: it becomes part of namespace, cgroup and directory names.
///
/// # Errors
/// What a lab name looks like.
pub(crate) fn lab_name(name: &str) -> Result<(), String> {
    name.parse::<ClusterName>().map(|_| ()).map_err(|_| {
        format!(
            "{name:?} is not a lab name: use 1 to 32 lower-case letters, digits and '-', \
             alphanumeric at both ends"
        )
    })
}

/// All that is wrong with a topology, field by field.
#[derive(Debug, Default, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub(crate) struct Mistakes(Vec<String>);

impl Mistakes {
    fn add(&mut self, field: impl Display, message: impl Display) {
        self.0.push(format!("{field}: {message}"));
    }

    fn expect<T, E: Display>(&mut self, field: impl Display, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.add(field, e)).ok()
    }

    fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }
}

/// What the place of a cluster in the lab depends on.
#[derive(Clone, Copy)]
struct Shape {
    index: usize,
    clusters: usize,
    underlay: IpNet,
    tunnels: Option<IpNet>,
}

/// An underlay as written, if it is.
fn check_underlay(field: &str, text: Option<&str>, mistakes: &mut Mistakes) -> Option<IpNet> {
    match text?.parse::<IpNet>() {
        Ok(net) if net.max_prefix_len() - net.prefix_len() >= 8 => Some(net.trunc()),
        _ => {
            let hint = "write an IPv4 prefix of /24 or larger, or an IPv6 prefix of /120 or larger, for example \
                        172.31.0.0/16 or fd00:172:31::/48";
            mistakes.add(field, hint);
            None
        }
    }
}

fn check_cluster(entry: &ClusterEntry, shape: Shape, mistakes: &mut Mistakes) -> Option<Cluster> {
    let at = format!("clusters[{}]", shape.index);
    let name = mistakes.expect(format!("{at}.name"), entry.name.parse::<ClusterName>());
    if RESERVED_FOR_LAB.contains(&entry.name.as_str()) {
        mistakes.add(format!("{at}.name"), format!("{:?} is reserved", entry.name));
    }
    let max_connected = mistakes.expect(
        format!("{at}.maxConnectedClusters"),
        MaxConnectedClusters::try_from(entry.max_connected_clusters.unwrap_or(255)),
    );
    let id = mistakes.expect(format!("{at}.id"), ClusterId::new(entry.id, max_connected.unwrap_or_default()));
    let pod_cidrs = check_cidrs(format!("{at}.podCIDRs"), &entry.pod_cidrs, mistakes);
    let service_cidrs = check_cidrs(format!("{at}.serviceCIDRs"), &entry.service_cidrs, mistakes);
    let named = check_nodes(&at, &entry.nodes, mistakes);
    let (pod_cidrs, service_cidrs, named) = (pod_cidrs?, service_cidrs?, named?);

    if service_cidrs.families() != pod_cidrs.families() {
        mistakes.add(format!("{at}.serviceCIDRs"), "give the same address families as in podCIDRs");
    }
    let mut others = vec![("underlay", Cidrs::from(shape.underlay))];
    others.extend(shape.tunnels.map(|net| ("tunnels", Cidrs::from(net))));
    let pairs = others.iter().flat_map(|(other_field, other)| {
        [("podCIDRs", &pod_cidrs, *other_field, other), ("serviceCIDRs", &service_cidrs, *other_field, other)]
    });
    let first = ("serviceCIDRs", &service_cidrs, "podCIDRs", &pod_cidrs);
    for (field, net, other_field, other) in std::iter::once(first).chain(pairs) {
        if net.overlaps(other) {
            mistakes.add(format!("{at}.{field}"), format!("{net} overlaps {other_field} {other}"));
        }
    }
    let count = named.len();
    let mut nodes = Vec::with_capacity(count);
    for (index, node) in named.into_iter().enumerate() {
        let place = (index, count);
        let pods = mistakes.expect(format!("{at}.podCIDRs"), node_cidrs(&pod_cidrs, place));
        let mut address =
            |field, net| mistakes.expect(field, underlay_address(net, (shape.index, shape.clusters), index));
        nodes.push(Node {
            address: address("underlay", shape.underlay)?,
            tunnel_address: match shape.tunnels {
                Some(net) => Some(address("tunnels", net)?),
                None => None,
            },
            name: node.name,
            labels: node.labels,
            pod_cidrs: pods?,
        });
    }
    Some(Cluster {
        index: shape.index,
        name: name?,
        id: id?,
        max_connected: max_connected?,
        service_cidrs,
        nodes,
        kvstoremesh: entry.kvstoremesh,
        manifests: entry.manifests.clone(),
    })
}

fn check_cidrs(field: String, texts: &[String], mistakes: &mut Mistakes) -> Option<Cidrs> {
    let mut cidrs = Cidrs::default();
    for text in texts {
        match text.parse::<IpNet>() {
            Ok(net) if net.trunc() != net => {
                mistakes.add(&field, format!("{net} has host bits set; write {}", net.trunc()));
                return None;
            }
            Ok(IpNet::V4(net)) if cidrs.v4.is_none() && net.prefix_len() <= 28 => cidrs.v4 = Some(net),
            Ok(IpNet::V6(net)) if cidrs.v6.is_none() && net.prefix_len() <= 120 => cidrs.v6 = Some(net),
            Ok(net) => {
                mistakes.add(
                    &field,
                    format!("{net}: give at most one IPv4 (up to /28) and one IPv6 prefix (up to /120)"),
                );
                return None;
            }
            Err(_) => {
                mistakes.add(&field, format!("{text:?} is not a prefix; write for example 10.1.0.0/16"));
                return None;
            }
        }
    }
    if cidrs.v4.is_none() && cidrs.v6.is_none() {
        mistakes.add(
            field,
            "give an IPv4 prefix, an IPv6 prefix, or both, for example [10.1.0.0/16, fd00:10:1::/48]",
        );
        return None;
    }
    Some(cidrs)
}

fn check_nodes(at: &str, nodes: &Nodes, mistakes: &mut Mistakes) -> Option<Vec<NodeEntry>> {
    let nodes = match nodes {
        Nodes::Count(count) => {
            (1..=*count).map(|n| NodeEntry { name: format!("node{n}"), labels: BTreeMap::new() }).collect()
        }
        Nodes::List(list) => list.clone(),
    };
    let mut seen = BTreeSet::new();
    for (index, node) in nodes.iter().enumerate() {
        if !is_dns_label(&node.name) {
            let hint = "use up to 63 lower-case letters, digits and '-', alphanumeric at both ends";
            mistakes.add(format!("{at}.nodes[{index}].name"), format!("{:?}: {hint}", node.name));
        }
        if RESERVED.contains(&node.name.as_str()) {
            mistakes.add(format!("{at}.nodes[{index}].name"), format!("{:?} is reserved", node.name));
        }
        if !seen.insert(&node.name) {
            mistakes.add(format!("{at}.nodes[{index}].name"), format!("{:?} is used twice", node.name));
        }
    }
    if nodes.is_empty() || nodes.len() > 64 {
        mistakes.add(format!("{at}.nodes"), "a cluster has 1 to 64 nodes");
        return None;
    }
    Some(nodes)
}

fn check_across(clusters: &[Cluster], mistakes: &mut Mistakes) {
    for (index, cluster) in clusters.iter().enumerate() {
        for other in &clusters[..index] {
            let at = format!("clusters[{}]", cluster.index);
            if other.name == cluster.name {
                mistakes.add(format!("{at}.name"), format!("{} is used twice", cluster.name));
            }
        }
    }
}

fn check_connect(file: &TopologyFile, mistakes: &mut Mistakes) -> Vec<(ClusterName, ClusterName)> {
    let mut connect = Vec::new();
    for (index, [left, right]) in file.connect.iter().enumerate() {
        let known = |name: &String| file.clusters.iter().any(|cluster| cluster.name == *name);
        if left == right || !known(left) || !known(right) {
            mistakes.add(
                format!("connect[{index}]"),
                format!("[{left}, {right}]: write the names of two different clusters of this file"),
            );
        } else if let (Ok(a), Ok(b)) = (left.parse(), right.parse()) {
            // A name that does not parse was reported where it stands.
            connect.push((a, b));
        }
    }
    connect
}

/// Whether `name` may name a node, a namespace or a pod.
pub(crate) fn is_dns_label(name: &str) -> bool {
    let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = name.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|c| word(*c) || *c == b'-')
        && bytes.first().is_some_and(|c| word(*c))
        && bytes.last().is_some_and(|c| word(*c))
}

/// Whether `text` matches `glob`, in which `*` stands for any characters (also `/`) and `?` for one.
pub(crate) fn glob_matches(glob: &str, text: &str) -> bool {
    fn matches(glob: &[char], text: &[char]) -> bool {
        match glob.split_first() {
            None => text.is_empty(),
            Some(('*', rest)) => (0..=text.len()).any(|skip| matches(rest, &text[skip..])),
            Some((c, rest)) => {
                text.split_first().is_some_and(|(t, text)| (*c == '?' || c == t) && matches(rest, text))
            }
        }
    }
    let (glob, text): (Vec<char>, Vec<char>) = (glob.chars().collect(), text.chars().collect());
    matches(&glob, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
name: two-clusters
clusters:
- name: alpha
  id: 1
  podCIDRs: [10.1.0.0/16, 'fd00:10:1::/48']
  serviceCIDRs: [10.101.0.0/16, 'fd00:10:101::/112']
  nodes: 2
  manifests: [alpha]
- name: beta
  id: 2
  maxConnectedClusters: 255
  podCIDRs: [10.2.0.0/16, 'fd00:10:2::/48']
  serviceCIDRs: [10.102.0.0/16, 'fd00:10:102::/112']
  nodes: [{name: west, labels: {zone: w}}, {name: east}]
images: [{image: 'docker.io/nginx*', command: [python3, -m, http.server]}]
connect: [[alpha, beta]]
";

    fn check(text: &str) -> Result<Topology, String> {
        let file: TopologyFile = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
        Topology::check(&file).map_err(|e| e.to_string())
    }

    #[test]
    fn a_good_file_becomes_addresses() {
        let topology = check(GOOD).unwrap();
        let [alpha, beta] = &topology.clusters[..] else { panic!("two clusters") };
        assert_eq!(alpha.nodes[1].name, "node2");
        assert_eq!(alpha.nodes[1].address, IpAddr::from([172, 31, 1, 2]));
        assert_eq!(alpha.nodes[1].pod_cidrs.to_string(), "10.1.1.0/24, fd00:10:1:1::/64");
        assert_eq!(beta.nodes[0].address, IpAddr::from([172, 31, 2, 1]));
        assert_eq!(beta.nodes[0].labels["zone"], "w");
        assert_eq!(topology.connect.len(), 1);
    }

    #[test]
    fn mistakes_name_the_field() {
        for (from, to, field) in [
            ("name: two-clusters", "name: Two", "name: \"Two\" is not a lab name"),
            ("id: 1\n", "id: 300\n", "clusters[0].id: cluster ID 300 is out of range: use 1 to 255"),
            ("name: beta", "name: alpha", "clusters[1].name: alpha is used twice"),
            ("10.102.0.0/16", "10.2.5.0/24", "clusters[1].serviceCIDRs: 10.2.5.0/24"),
            ("10.2.0.0/16", "172.31.9.0/24", "clusters[1].podCIDRs: 172.31.9.0/24"),
            ("10.2.0.0/16", "10.2.0.1/16", "write 10.2.0.0/16"),
            ("nodes: 2", "nodes: 0", "clusters[0].nodes: a cluster has 1 to 64 nodes"),
            ("nodes: 2", "nodes: two", "nodes must be a number"),
            ("name: east", "name: west", "clusters[1].nodes[1].name: \"west\" is used twice"),
            ("[alpha, beta]]", "[alpha, gamma]]", "connect[0]: [alpha, gamma]"),
            ("maxConnectedClusters: 255", "maxConnectedClusters: 256", "clusters[1].maxConnectedClusters"),
            ("manifests: [alpha]", "manifest: [alpha]", "manifest"),
            ("command: [python3, -m, http.server]", "command: []", "images[0].command"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = check(&GOOD.replacen(from, to, 1)).expect_err(to);
            assert!(error.contains(field), "{to}: {error}");
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let error = check(&GOOD.replace("id: 1\n", "id: 0\n").replace("id: 2\n", "id: 999\n")).unwrap_err();
        assert_eq!(error.lines().count(), 2, "{error}");
    }

    #[test]
    fn globs() {
        for (glob, text, matches) in [
            ("*", "docker.io/nginx:1.15.8", true),
            ("docker.io/nginx*", "docker.io/nginx:1.15.8@sha256:00", true),
            ("*/json-mock:?.*", "quay.io/cilium/json-mock:1.2", true),
            ("nginx", "nginx:1", false),
            ("nginx?", "nginx", false),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXcYb", false),
        ] {
            assert_eq!(glob_matches(glob, text), matches, "{glob} {text}");
        }
    }
}
