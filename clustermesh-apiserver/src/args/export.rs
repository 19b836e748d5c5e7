//! Arguments of `clustermesh`: the exporter.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgAction, Parser};
use clustermesh_kvstore::cluster::{ClusterError, ClusterId, ClusterName, MaxConnectedClusters};

use super::LogFormat;
use crate::export::{Cluster, Rules};

/// Exports a cluster's nodes, identities, addresses and services into its etcd, where the agents of all
/// connected clusters read them.
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Example:
  clustermesh-apiserver clustermesh --cluster-name alpha --cluster-id 1 --source manifests:/etc/clustermesh/manifests \\
    --etcd-config /etc/clustermesh/etcd.yaml --http-addr 127.0.0.1:9880")]
pub struct ExportArgs {
    /// Name of this cluster, unique in the mesh.
    #[arg(long)]
    pub cluster_name: ClusterName,
    /// ID of this cluster, unique in the mesh: 1 to 255, or to 511 (see --max-connected-clusters).
    #[arg(long)]
    pub cluster_id: u32,
    /// How many clusters the mesh may have, 255 or 511: the same in all of them, for good.
    #[arg(long, default_value_t, value_name = "255|511")]
    pub max_connected_clusters: MaxConnectedClusters,
    /// Where the cluster is described: its API server, or a directory of Kubernetes manifests; either is followed.
    #[arg(long, value_name = "kubernetes|manifests:DIR")]
    pub source: SourceSpec,
    /// How to reach the API server; without it, as a pod of the cluster does.
    #[arg(long, visible_alias = "k8s-kubeconfig-path", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig to use instead of its current one.
    #[arg(long, requires = "kubeconfig", value_name = "NAME")]
    pub context: Option<String>,
    /// Whether other clusters get to know what is in a namespace without the annotation
    /// clustermesh.cilium.io/global.
    #[arg(
        long,
        visible_alias = "clustermesh-default-global-namespace",
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_name = "true|false"
    )]
    pub default_global_namespace: bool,
    /// Whether selectors of network policies that name no cluster mean pods of this one, or of all clusters.
    #[arg(
        long,
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_name = "true|false"
    )]
    pub policy_default_local_cluster: bool,
    /// The cluster's etcd: endpoints and TLS files, in the form that Cilium uses.
    #[arg(long, value_name = "FILE")]
    pub etcd_config: PathBuf,
    /// Let other clusters read the etcd, each as a user of its own: those in --cluster-users-config-path.
    #[arg(long, requires = "cluster_users_config_path")]
    pub cluster_users_enabled: bool,
    /// The users of other clusters, as Cilium lists them; the file is followed.
    #[arg(long, value_name = "FILE")]
    pub cluster_users_config_path: Option<PathBuf>,
    /// Serve /metrics, /healthz and /readyz here.
    #[arg(long, value_name = "ADDR:PORT")]
    pub http_addr: Option<SocketAddr>,
    /// How long an identity that no pod has any more keeps its number, in seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub identity_gc_grace: u64,
    /// Form of the logs on standard error; RUST_LOG says how much of them.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl ExportArgs {
    /// The cluster, if its ID fits into the mesh.
    ///
    /// # Errors
    /// The ID is out of range.
    pub fn cluster(&self) -> Result<Cluster, ClusterError> {
        let id = ClusterId::new(self.cluster_id, self.max_connected_clusters)?;
        Ok(Cluster { name: self.cluster_name.clone(), id })
    }

    /// The users file, if it counts.
    pub fn users_file(&self) -> Option<&Path> {
        self.cluster_users_config_path.as_deref().filter(|_| self.cluster_users_enabled)
    }

    /// What other clusters get to know, and what policies mean.
    pub fn rules(&self) -> Rules {
        Rules {
            default_global: self.default_global_namespace,
            complete: self.source == SourceSpec::Kubernetes,
            policy_default_local_cluster: self.policy_default_local_cluster,
        }
    }

    /// `--identity-gc-grace` as a time.
    pub fn identity_grace(&self) -> Duration {
        Duration::from_secs(self.identity_gc_grace)
    }
}

/// A source of objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// An API server.
    Kubernetes,
    /// A directory of manifests.
    Manifests(PathBuf),
}

impl FromStr for SourceSpec {
    type Err = SourceSpecError;

    fn from_str(text: &str) -> Result<Self, SourceSpecError> {
        match text.split_once(':') {
            None if text == "kubernetes" => Ok(Self::Kubernetes),
            Some(("manifests", directory)) if !directory.is_empty() => Ok(Self::Manifests(directory.into())),
            _ => Err(SourceSpecError),
        }
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubernetes => f.write_str("kubernetes"),
            Self::Manifests(directory) => write!(f, "manifests:{}", directory.display()),
        }
    }
}

/// The operator's: no such source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("use kubernetes, or manifests:DIR with the directory to follow")]
pub struct SourceSpecError;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &[&str]) -> Result<ExportArgs, clap::Error> {
        let base = ["clustermesh-apiserver", "--etcd-config", "etcd.yaml"];
        ExportArgs::try_parse_from(base.iter().chain(more))
    }

    #[test]
    fn flags() {
        let good = ["--cluster-name", "alpha", "--cluster-id", "300", "--source", "manifests:/m"];
        let args = parse(&good).unwrap();
        assert_eq!(args.source, SourceSpec::Manifests("/m".into()));
        assert!(args.cluster().is_err());
        assert_eq!(args.rules(), Rules::default());
        let args = parse(&[&good[..], &["--max-connected-clusters", "511"]].concat()).unwrap();
        assert_eq!(args.cluster().unwrap().id.get(), 300);
    }

    #[test]
    fn flags_of_an_api_server() {
        let good = ["--cluster-name", "alpha", "--cluster-id", "1", "--source", "kubernetes"];
        let more = ["--k8s-kubeconfig-path", "/k", "--context", "c", "--default-global-namespace=false"];
        let args = parse(&[&good[..], &more].concat()).unwrap();
        assert_eq!((args.kubeconfig.as_deref(), args.context.as_deref()), (Some("/k".as_ref()), Some("c")));
        let expected = Rules { default_global: false, complete: true, policy_default_local_cluster: true };
        assert_eq!(args.rules(), expected);
        let any = ["--policy-default-local-cluster=false"];
        assert!(!parse(&[&good[..], &any].concat()).unwrap().rules().policy_default_local_cluster);
        let cilium = ["--clustermesh-default-global-namespace=false"];
        assert!(!parse(&[&good[..], &cilium].concat()).unwrap().default_global_namespace);
        assert!(parse(&[&good[..], &["--context", "c"]].concat()).is_err());
    }

    #[test]
    fn bad_flags_say_what_is_right() {
        for (flags, expected) in [
            (["--cluster-name", "Alpha", "--source", "manifests:/m"], "lower-case letters"),
            (["--cluster-name", "alpha", "--source", "manifests"], "manifests:DIR"),
        ] {
            let error = parse(&[&flags[..], &["--cluster-id", "1"]].concat()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
