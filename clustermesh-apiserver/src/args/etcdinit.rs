//! Arguments of `etcdinit`. Flags and variables are named as Cilium's, so that its charts can call either.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
use clustermesh_kvstore::cluster::ClusterName;

use super::LogFormat;

/// Prepares the etcd of a cluster: sets its users and roles and enables authentication.
///
/// Without --etcd-config the etcd is one that does not run yet: its data directory is emptied, etcd runs
/// on it for a moment on loopback only, and whoever starts it next finds it ready. With --etcd-config it
/// is one that runs: users and roles that exist are corrected, others stay, nothing else is changed.
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Examples:
  clustermesh-apiserver etcdinit --cluster-name alpha --etcd-data-dir /var/run/etcd
  clustermesh-apiserver etcdinit --cluster-name alpha --etcd-config /etc/clustermesh/etcd-admin.yaml")]
pub struct EtcdInitArgs {
    /// Name of this cluster; its users are called after it.
    #[arg(long, env = "CILIUM_CLUSTER_NAME")]
    pub cluster_name: ClusterName,
    /// etcd's data directory. What an etcd left there is removed.
    #[arg(long, env = "CILIUM_ETCD_DATA_DIR", default_value = "/var/run/etcd", value_name = "DIR")]
    pub etcd_data_dir: PathBuf,
    /// The name that etcd is later started with (its --name).
    #[arg(
        long,
        env = "CILIUM_ETCD_CLUSTER_NAME",
        default_value = "clustermesh-apiserver",
        value_name = "NAME"
    )]
    pub etcd_cluster_name: String,
    /// A token of which etcd makes its cluster ID; one that no etcd of this cluster had before.
    #[arg(
        long,
        env = "CILIUM_ETCD_INITIAL_CLUSTER_TOKEN",
        default_value = "clustermesh-apiserver",
        value_name = "TOKEN"
    )]
    pub etcd_initial_cluster_token: String,
    /// The program to run.
    #[arg(long, default_value = "etcd", value_name = "PROGRAM")]
    pub etcd_binary: PathBuf,
    /// An etcd that runs: endpoints and TLS files, in the form that Cilium uses. The certificate's CN has
    /// to be root or admin-CLUSTER, which are the only ones that may do this a second time.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["etcd_data_dir", "etcd_cluster_name", "etcd_initial_cluster_token", "etcd_binary"]
    )]
    pub etcd_config: Option<PathBuf>,
    /// How long all of it may take.
    #[arg(long, env = "CILIUM_TIMEOUT", default_value = "2m", value_name = "DURATION")]
    pub timeout: Timeout,
    /// Form of the logs on standard error; RUST_LOG says how much of them.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

/// A time as people write it: `90s`, `2m`, `1m30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout(pub Duration);

impl FromStr for Timeout {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed: jiff::SignedDuration = text.parse().map_err(|_| "write a time such as 90s or 2m")?;
        match Duration::try_from(parsed) {
            Ok(time) if !time.is_zero() => Ok(Self(time)),
            _ => Err("the time has to be longer than nothing"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<EtcdInitArgs, clap::Error> {
        EtcdInitArgs::try_parse_from(std::iter::once("etcdinit").chain(line.split(' ')))
    }

    #[test]
    fn flags() {
        let args = parse("--cluster-name alpha --timeout 1m30s").unwrap();
        assert_eq!(args.timeout, Timeout(Duration::from_secs(90)));
        assert_eq!(args.etcd_data_dir, PathBuf::from("/var/run/etcd"));
        parse("--cluster-name alpha --etcd-config e.yaml").unwrap();
        for wrong in [
            "--cluster-name Alpha",
            "--cluster-name alpha --timeout 0s",
            "--cluster-name alpha --etcd-config e.yaml --etcd-data-dir /d",
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
