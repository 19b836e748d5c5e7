//! Arguments of `kvstoremesh`: the mirror of remote clusters.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clustermesh_kvstore::cluster::{ClusterError, ClusterId, ClusterName, MaxConnectedClusters};

use super::LogFormat;
use crate::export::Cluster;

/// Mirrors all remote clusters into the local etcd, so that the agents of this cluster follow one etcd.
#[derive(Clone, Debug, Parser)]
#[command(after_help = "Example:
  clustermesh-apiserver kvstoremesh --cluster-name alpha --cluster-id 1 --clustermesh-config /etc/clustermesh/remotes \\
    --etcd-config /etc/clustermesh/etcd.yaml --http-addr 127.0.0.1:9881")]
pub struct KvstoremeshArgs {
    /// Name of this cluster, whose own configuration is passed over.
    #[arg(long)]
    pub cluster_name: ClusterName,
    /// ID of this cluster; no other may have it.
    #[arg(long)]
    pub cluster_id: u32,
    /// How many clusters the mesh may have, 255 or 511: the same in all of them, for good.
    #[arg(long, default_value_t, value_name = "255|511")]
    pub max_connected_clusters: MaxConnectedClusters,
    /// One etcd configuration for each remote cluster; the file's name is the cluster's.
    #[arg(long, value_name = "DIR")]
    pub clustermesh_config: PathBuf,
    /// The local etcd: endpoints and TLS files, in the form that Cilium uses.
    #[arg(long, value_name = "FILE")]
    pub etcd_config: Option<PathBuf>,
    /// Cilium's way to say it: etcd.config=FILE. Other options (etcd.qps ...) have no meaning here.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',')]
    pub kvstore_opt: Vec<String>,
    /// What remote clusters may say, as for agents (see docs/import-policy.md) [default: whatever is plausible].
    #[arg(long, value_name = "FILE")]
    pub import_policy: Option<PathBuf>,
    /// Count what breaks a rule of the import policy, but let it in.
    #[arg(long, requires = "import_policy")]
    pub import_policy_dry_run: bool,
    /// A remote cluster that is not connected after this time does not keep /readyz waiting.
    #[arg(long, default_value = "15s", value_parser = duration, value_name = "TIME")]
    pub per_cluster_ready_timeout: Duration,
    /// After this time /readyz waits for nothing.
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "TIME")]
    pub global_ready_timeout: Duration,
    /// Leave what was mirrored of a cluster that is configured no more, until its leases end.
    #[arg(long)]
    pub disable_drain_on_disconnection: bool,
    /// How long agents have to let go of a cluster that is configured no more, before its data goes.
    #[arg(long, default_value = "3m", value_parser = duration, value_name = "TIME")]
    pub removal_grace: Duration,
    /// Withdraw the services of a cluster that cannot be reached for this long; 0s: never.
    #[arg(long, alias = "cache-ttl", default_value = "0s", value_parser = duration, value_name = "TIME")]
    pub clustermesh_cache_ttl: Duration,
    /// How often all records of a kind are looked at, of clusters that state no digests (Cilium); what differs
    /// from what is mirrored is listed again. 0s: never.
    #[arg(long, default_value = "1h", value_parser = duration, value_name = "TIME")]
    pub relist_interval: Duration,
    /// Serve /metrics, /healthz, /readyz and /status here.
    #[arg(long, value_name = "ADDR:PORT")]
    pub http_addr: Option<SocketAddr>,
    /// Unix socket on which `clustermesh status` is answered: the same pages.
    #[arg(long, value_name = "PATH")]
    pub status_socket: Option<PathBuf>,
    /// Form of the logs on standard error; RUST_LOG says how much of them.
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
}

impl KvstoremeshArgs {
    /// The own cluster, if its ID fits into the mesh.
    ///
    /// # Errors
    /// The ID is out of range.
    pub fn cluster(&self) -> Result<Cluster, ClusterError> {
        let id = ClusterId::new(self.cluster_id, self.max_connected_clusters)?;
        Ok(Cluster { name: self.cluster_name.clone(), id })
    }

    /// The configuration of the local etcd, in either spelling.
    pub fn local_etcd(&self) -> Option<PathBuf> {
        let option = || self.kvstore_opt.iter().find_map(|option| option.strip_prefix("etcd.config="));
        self.etcd_config.clone().or_else(|| option().map(PathBuf::from))
    }

    /// How long a cluster may be away before its services are withdrawn.
    pub fn cache_ttl(&self) -> Option<Duration> {
        Some(self.clustermesh_cache_ttl).filter(|ttl| !ttl.is_zero())
    }

    /// From one look at all records to the next.
    pub fn relist_interval(&self) -> Option<Duration> {
        Some(self.relist_interval).filter(|interval| !interval.is_zero())
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<jiff::SignedDuration>().ok().and_then(|time| Duration::try_from(time).ok());
    parsed.ok_or_else(|| "write a time as 15s, 10m or 1h30m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<KvstoremeshArgs, clap::Error> {
        let base = "kvstoremesh --cluster-name=alpha --cluster-id=1 --clustermesh-config=/c";
        KvstoremeshArgs::try_parse_from(base.split(' ').chain(line.split_whitespace()))
    }

    #[test]
    fn cilium_s_flags_are_understood() {
        let args = parse(
            "--kvstore-opt=etcd.config=/e.yaml --kvstore-opt=etcd.qps=100 --per-cluster-ready-timeout=1m30s \
             --clustermesh-cache-ttl=2h",
        )
        .unwrap();
        assert_eq!(args.local_etcd(), Some("/e.yaml".into()));
        assert_eq!(args.per_cluster_ready_timeout, Duration::from_secs(90));
        assert_eq!(args.cache_ttl(), Some(Duration::from_secs(7200)));
        let args = parse("--kvstore-opt=etcd.qps=100,etcd.config=/e.yaml").unwrap();
        assert_eq!(args.local_etcd(), Some("/e.yaml".into()));
    }

    #[test]
    fn defaults_are_cilium_s() {
        let args = parse("--etcd-config=/e.yaml").unwrap();
        assert_eq!(args.per_cluster_ready_timeout, Duration::from_secs(15));
        assert_eq!(args.global_ready_timeout, Duration::from_secs(600));
        assert_eq!(args.removal_grace, Duration::from_secs(180));
        assert_eq!(args.cache_ttl(), None);
        assert_eq!(parse("").unwrap().local_etcd(), None);
        let error = parse("--removal-grace=soon").unwrap_err();
        assert!(error.to_string().contains("15s, 10m"), "{error}");
    }
}
