//! Where a lab keeps things and what they are called. Every name that reaches the kernel or the file
//! system is made here.

use std::path::{Path, PathBuf};

use super::objects::ObjectName;
use super::topology::{Cluster, Node};

/// Home of all labs of this machine.
pub(crate) const LABS: &str = "/run/clustermesh/labs";
/// Where `ip netns` keeps its namespaces.
pub(crate) const NETNS: &str = "/run/netns";
/// The agents' pinned maps.
const BPFFS: &str = "/sys/fs/bpf/clustermesh";

/// The names and places of one lab.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    lab: String,
    cgroups: PathBuf,
}

impl Layout {
    /// Names for lab `lab` on a machine whose cgroup2 is mounted at `cgroup_mount`.
    pub(crate) fn new(lab: &str, cgroup_mount: &Path) -> Self {
        Self { lab: lab.to_owned(), cgroups: cgroup_mount.join("clustermesh").join(lab) }
    }

    /// Name of the lab.
    pub(crate) fn lab(&self) -> &str {
        &self.lab
    }

    /// Run directory of the lab.
    pub(crate) fn dir(&self) -> PathBuf {
        Path::new(LABS).join(&self.lab)
    }

    /// The file whose lock serialises commands; outside of the run directory, which comes and goes.
    pub(crate) fn lock_file(&self) -> PathBuf {
        Path::new(LABS).join(format!(".{}.lock", self.lab))
    }

    pub(crate) fn state_file(&self) -> PathBuf {
        self.dir().join("state.json")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.dir().join("logs")
    }

    /// Log of a process (`etcd`, `apiserver`, `agent-node1`) or a pod (`shop.orders-0`).
    pub(crate) fn log(&self, cluster: &str, process: &str) -> PathBuf {
        self.logs().join(format!("{cluster}-{process}.log"))
    }

    pub(crate) fn cluster(&self, cluster: &str) -> PathBuf {
        self.dir().join(cluster)
    }

    pub(crate) fn cluster_state(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("state.json")
    }

    /// What the mesh tools need to know of a cluster.
    pub(crate) fn context(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("context.yaml")
    }

    /// The authority of all clusters and what it has issued, in a folder per cluster.
    pub(crate) fn pki(&self) -> PathBuf {
        self.dir().join("pki")
    }

    /// Which other clusters may read the cluster's etcd.
    pub(crate) fn users(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("users.yaml")
    }

    /// Config directory of the cluster's agents: one file per connected cluster.
    pub(crate) fn clustermesh_config(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("clustermesh")
    }

    /// Status socket of the cluster's kvstoremesh.
    pub(crate) fn kvstoremesh_socket(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("kvstoremesh.sock")
    }

    /// Config directory of the cluster's kvstoremesh.
    pub(crate) fn kvstoremesh_config(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("kvstoremesh")
    }

    /// What the apiserver watches.
    pub(crate) fn manifests(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("manifests")
    }

    /// etcd client configuration of the cluster's own `client` (`admin` or `agent`).
    pub(crate) fn etcd_config(&self, cluster: &str, client: &str) -> PathBuf {
        self.cluster(cluster).join(format!("etcd-{client}.yaml"))
    }

    pub(crate) fn etcd_data(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("etcd")
    }

    /// Files of a pod's volumes.
    pub(crate) fn volumes(&self, cluster: &str, pod: &ObjectName) -> PathBuf {
        self.cluster(cluster).join("volumes").join(pod.dotted())
    }

    /// Flags of the cluster's agents about encryption, one a line; without the file there are none.
    pub(crate) fn encryption(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("encryption")
    }

    /// Other flags of the cluster's agents, in the same form.
    pub(crate) fn agent_flags(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("agent-flags")
    }

    /// Private key of a node.
    pub(crate) fn node_state(&self, cluster: &str, node: &str) -> PathBuf {
        self.node(cluster, node).join("state")
    }

    pub(crate) fn node(&self, cluster: &str, node: &str) -> PathBuf {
        self.cluster(cluster).join(node)
    }

    pub(crate) fn agent_socket(&self, cluster: &str, node: &str) -> PathBuf {
        self.node(cluster, node).join("agent.sock")
    }

    /// Pins of the whole lab.
    pub(crate) fn bpf(&self) -> PathBuf {
        Path::new(BPFFS).join(&self.lab)
    }

    pub(crate) fn node_bpf(&self, cluster: &str, node: &str) -> PathBuf {
        self.bpf().join(cluster).join(node)
    }

    /// cgroup of the whole lab.
    pub(crate) fn cgroup(&self) -> PathBuf {
        self.cgroups.clone()
    }

    /// cgroup of whoever is outside of the mesh.
    pub(crate) fn outside_cgroup(&self) -> PathBuf {
        self.cgroup().join("outside")
    }

    pub(crate) fn node_cgroup(&self, cluster: &str, node: &str) -> PathBuf {
        self.cgroup().join(cluster).join(node)
    }

    /// cgroup of one process of the node's system.
    pub(crate) fn process_cgroup(&self, cluster: &str, node: &str, process: &str) -> PathBuf {
        self.node_cgroup(cluster, node).join("system").join(process)
    }

    pub(crate) fn pod_cgroup(&self, cluster: &str, node: &str, pod: &ObjectName) -> PathBuf {
        self.node_cgroup(cluster, node).join("pods").join(pod.dotted())
    }

    /// What the names of all network namespaces of this lab start with.
    pub(crate) fn netns_prefix(&self) -> String {
        format!("cm-{}-", self.lab)
    }

    /// The namespace with the switches.
    pub(crate) fn fabric(&self) -> String {
        format!("cm-{}-fabric", self.lab)
    }

    pub(crate) fn node_netns(&self, cluster: &str, node: &str) -> String {
        format!("cm-{}-{cluster}-{node}", self.lab)
    }

    pub(crate) fn pod_netns(&self, cluster: &str, pod: &ObjectName) -> String {
        format!("cm-{}-{cluster}-{}-{}", self.lab, pod.namespace, pod.name)
    }
}

/// Switch of a cluster in the fabric.
pub(crate) fn cluster_switch(cluster: &Cluster) -> String {
    format!("sw{}", cluster.index + 1)
}

/// The cluster switch's end of its link to the core switch.
pub(crate) fn cluster_uplink(cluster: &Cluster) -> String {
    format!("up{}", cluster.index + 1)
}

/// The core switch's end of the same link.
pub(crate) fn core_port(cluster: &Cluster) -> String {
    format!("core{}", cluster.index + 1)
}

/// The cluster switch's port of a node: `port1.2` is the second node of the first cluster.
pub(crate) fn node_port(cluster: &Cluster, node: &Node) -> String {
    let index = cluster.nodes.iter().position(|n| n.name == node.name).unwrap_or_default();
    format!("port{}.{}", cluster.index + 1, index + 1)
}
