//! Arguments of `clustermesh lab`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::objects::ObjectRef;
use super::process::EnterArgs;
use super::system::Process;
use crate::mesh::{Output, Wait};

#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// The lab to act on; not needed while only one runs, or if the cluster is written LAB/CLUSTER
    #[arg(long, global = true, env = "CLUSTERMESH_LAB", value_name = "NAME")]
    pub(crate) lab: Option<String>,
    #[command(subcommand)]
    pub(crate) command: LabCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Start the clusters of a topology file
    #[command(after_help = "Examples:
  clustermesh lab up topology-examples/two-clusters/topology.yaml
  clustermesh lab up topology.yaml --name second --wait-timeout 2m")]
    Up(UpArgs),
    /// Remove a lab, or what a crash left of it
    #[command(after_help = "Examples:
  clustermesh lab down
  clustermesh lab down two-clusters
  clustermesh lab down --all")]
    Down(DownArgs),
    /// List the labs of this machine
    #[command(after_help = "Examples:
  clustermesh lab list
  clustermesh lab list -o json")]
    List {
        /// How to print the result
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show nodes, processes, pods and services of a lab
    #[command(after_help = "Examples:
  clustermesh lab status
  clustermesh lab status -o json")]
    Status {
        /// Name of the lab
        name: Option<String>,
        /// How to print the result
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Run a command in a pod or on a node
    #[command(after_help = "Examples:
  clustermesh lab exec alpha/client -- mesh-probe call http://10.96.0.5/ -n 200
  clustermesh lab exec alpha/client -- ip address
  clustermesh lab exec -i alpha/node:node1 -- bash")]
    Exec(ExecArgs),
    /// Apply manifests to a cluster
    #[command(after_help = "Example:\n  clustermesh lab apply alpha -f orders.yaml -f more/")]
    Apply {
        /// The cluster
        cluster: String,
        /// Manifest files, or directories of them
        #[arg(short, long = "filename", required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Delete an object
    #[command(after_help = "Examples:
  clustermesh lab delete alpha service/shop/orders
  clustermesh lab delete alpha pod/client")]
    Delete {
        /// The cluster
        cluster: String,
        /// KIND/NAMESPACE/NAME
        object: ObjectRef,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Set (KEY=VALUE) or remove (KEY-) annotations of an object
    #[command(after_help = "Examples:
  clustermesh lab annotate alpha service/shop/orders service.cilium.io/affinity=local
  clustermesh lab annotate alpha service/shop/orders service.cilium.io/affinity-")]
    Annotate {
        /// The cluster
        cluster: String,
        /// KIND/NAMESPACE/NAME
        object: ObjectRef,
        /// KEY=VALUE to set, KEY- to remove
        #[arg(required = true)]
        changes: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Set the number of replicas of a deployment
    #[command(after_help = "Example:\n  clustermesh lab scale alpha deployment/shop/orders 0")]
    Scale {
        /// The cluster
        cluster: String,
        /// deployment/NAMESPACE/NAME
        object: ObjectRef,
        /// How many pods
        replicas: u16,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Send a signal to a process: etcd, apiserver, kvstoremesh or agent:NODE
    #[command(after_help = "Examples:
  clustermesh lab kill alpha agent:node1
  clustermesh lab kill alpha etcd --signal STOP")]
    Kill {
        #[command(flatten)]
        process: ProcessArgs,
        /// Name or number
        #[arg(long, default_value = "KILL")]
        signal: String,
    },
    /// End a process: etcd, apiserver, kvstoremesh or agent:NODE
    #[command(after_help = "Example:\n  clustermesh lab stop beta etcd")]
    Stop {
        #[command(flatten)]
        process: ProcessArgs,
    },
    /// Start a process: etcd, apiserver, kvstoremesh or agent:NODE
    #[command(after_help = "Example:\n  clustermesh lab start beta etcd --fresh")]
    Start(StartArgs),
    /// End a process and start it again: etcd, apiserver, kvstoremesh or agent:NODE
    #[command(after_help = "Example:\n  clustermesh lab restart alpha agent:node1")]
    Restart(StartArgs),
    /// Let the agents of a cluster encrypt what goes to other nodes, or not any more
    ///
    /// They are started again one after the other; how they are stays so for later starts.
    #[command(after_help = "Examples:
  clustermesh lab encrypt alpha clusters
  clustermesh lab encrypt alpha nodes --strict
  clustermesh lab encrypt alpha nodes --with ipsec,wireguard
  clustermesh lab encrypt alpha off")]
    Encrypt(EncryptArgs),
    /// Give the agents of a cluster other flags than a lab's usual ones
    ///
    /// They are started again one after the other; the flags stay for later starts, until others are given, or none.
    #[command(after_help = "Examples:
  clustermesh lab agent-flags alpha -- --ipcache-max-entries=100000
  clustermesh lab agent-flags alpha -- --bpf-lb-algorithm=maglev --pmtu-discovery=off
  clustermesh lab agent-flags alpha   # none")]
    AgentFlags(AgentFlagsArgs),
    /// Pull the cable of a node, or of a whole cluster
    #[command(after_help = "Examples:
  clustermesh lab cut beta/node1   # the node reaches nobody
  clustermesh lab cut beta         # the cluster reaches no other cluster")]
    Cut {
        /// CLUSTER or CLUSTER/NODE
        target: String,
    },
    /// Plug the cable in again
    #[command(after_help = "Example:\n  clustermesh lab heal beta/node1")]
    Heal {
        /// CLUSTER or CLUSTER/NODE
        target: String,
    },
    /// Print the log of a process (etcd, apiserver, kvstoremesh, agent:NODE) or a pod (NAMESPACE/POD)
    #[command(after_help = "Examples:
  clustermesh lab logs alpha/agent:node1
  clustermesh lab logs alpha/shop/orders-0")]
    Logs {
        /// CLUSTER/PROCESS or CLUSTER/NAMESPACE/POD
        target: String,
    },
    /// Become a command in a namespace and a cgroup
    #[command(hide = true)]
    Enter(EnterArgs),
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// The topology
    pub(crate) file: PathBuf,
    /// Name of the lab, if not the topology's
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Wait until pods are ready and agents synced; this is the default
    #[arg(long, hide = true)]
    wait: bool,
    /// How long pods and agents may take
    #[arg(long, default_value = "60s")]
    pub(crate) wait_timeout: Wait,
    /// Network, pods and etcd only: no apiservers, no agents
    #[arg(long)]
    pub(crate) no_mesh: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Name of the lab
    pub(crate) name: Option<String>,
    /// Remove every lab of this machine
    #[arg(long, conflicts_with = "name")]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// CLUSTER/POD, CLUSTER/NAMESPACE/POD or CLUSTER/node:NAME
    pub(crate) target: String,
    /// Pass standard input to the command
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,
    /// The command
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// How long new pods may take to become ready
    #[arg(long, default_value = "30s")]
    pub(crate) wait_timeout: Wait,
}

#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// The cluster
    pub(crate) cluster: String,
    /// etcd, apiserver, kvstoremesh or agent:NODE
    pub(crate) process: Process,
}

#[derive(Debug, Args)]
pub(crate) struct EncryptArgs {
    /// The cluster
    pub(crate) cluster: String,
    /// Between which nodes
    #[arg(value_enum)]
    pub(crate) between: Between,
    /// By what; with both, IPsec comes first where both ends can
    #[arg(long, value_enum, value_delimiter = ',', default_value = "wireguard")]
    pub(crate) with: Vec<With>,
    /// Drop what should be encrypted and is not
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AgentFlagsArgs {
    /// The cluster
    pub(crate) cluster: String,
    /// What `clustermesh-agent` understands, each with its value in one word
    #[arg(last = true, value_name = "FLAG")]
    pub(crate) flags: Vec<String>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

/// Between which nodes is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Between {
    /// None
    Off,
    /// Nodes of different clusters
    Clusters,
    /// All nodes
    Nodes,
}

/// By what is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum With {
    Wireguard,
    Ipsec,
}

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// etcd only: begin with an empty data directory and a new cluster ID
    #[arg(long, alias = "empty")]
    pub(crate) fresh: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}
