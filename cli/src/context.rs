//! How to reach one cluster: its agents' sockets, the directory that tells them their remote clusters,
//! and the way into its etcd that it offers to others.
//!
//! A context is a directory with a `context.yaml` ([`ContextFile`]). Every cluster of a running lab has
//! one, so the lab's clusters can be named (`two-clusters/alpha`, or `alpha` where that is unambiguous).
//! [`resolve`] finds and checks; whatever a [`Context`] holds has been checked, and its paths are absolute.

use std::fmt::Display;
use std::path::{Component, Path, PathBuf};

use clustermesh_kvstore::cluster::ClusterName;
use clustermesh_kvstore::etcd::EtcdConfig;
use serde::{Deserialize, Serialize};

use crate::error::usage;

/// Name of the file within a context's directory.
pub(crate) const FILE: &str = "context.yaml";

/// `context.yaml` as written. Relative paths are relative to the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ContextFile {
    /// Who the cluster is.
    pub(crate) cluster: ClusterEntry,
    /// What a remote cluster has to use to read this cluster's etcd. Without a client certificate it comes
    /// with its own.
    pub(crate) etcd: EtcdConfig,
    /// What this cluster shows to the etcds of others that want it to come with its own certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) remote: Option<ClientFiles>,
    /// The file in which this cluster's exporter finds the clusters that may read its etcd; without it
    /// somebody else looks after them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) users: Option<PathBuf>,
    /// The directory in which this cluster's agents look for their remote clusters.
    pub(crate) clustermesh_config: PathBuf,
    /// The mirror that its agents follow instead of remote etcds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kvstoremesh: Option<Kvstoremesh>,
    /// This cluster's agents.
    pub(crate) agents: Vec<Agent>,
}

/// A client certificate with its key, PEM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ClientFiles {
    pub(crate) cert_file: PathBuf,
    pub(crate) key_file: PathBuf,
}

/// Name and ID of a cluster, as configured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClusterEntry {
    pub(crate) name: String,
    pub(crate) id: u32,
}

/// A cluster's mirror of remote clusters.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Kvstoremesh {
    /// The directory in which it looks for remote clusters.
    pub(crate) clustermesh_config: PathBuf,
    /// How the cluster's own agents read what it mirrors.
    pub(crate) etcd: EtcdConfig,
    /// Its status socket, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) socket: Option<PathBuf>,
}

/// One node's agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Agent {
    /// Name of its node.
    pub(crate) node: String,
    /// Its gRPC socket.
    pub(crate) socket: PathBuf,
}

/// A context that was found, read and checked.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Where it stands; absolute, without symlinks.
    pub(crate) dir: PathBuf,
    /// Name of the cluster.
    pub(crate) cluster: ClusterName,
    /// Its ID. Not checked: the range depends on the mesh, which only the agents know.
    pub(crate) id: u32,
    /// How a remote cluster reads its etcd.
    pub(crate) etcd: EtcdConfig,
    /// What it shows to others' etcds.
    pub(crate) remote: Option<ClientFiles>,
    /// Where its exporter finds the clusters that may read its etcd.
    pub(crate) users: Option<PathBuf>,
    /// Where its agents look for remote clusters.
    pub(crate) clustermesh_config: PathBuf,
    /// The mirror that they follow, if there is one.
    pub(crate) kvstoremesh: Option<Kvstoremesh>,
    /// Its agents, at least one.
    pub(crate) agents: Vec<Agent>,
}

impl Context {
    /// Reads `dir/context.yaml`.
    ///
    /// # Errors
    /// A usage error that names the file and the field.
    pub(crate) fn load(dir: &Path) -> anyhow::Result<Self> {
        let file = dir.join(FILE);
        let bad = |what: &dyn Display| usage(format!("{}: {what}", file.display()));
        let text = std::fs::read_to_string(&file).map_err(|e| bad(&e))?;
        let mut options = serde_saphyr::Options::default();
        // One line on the terminal; the message has line and column.
        options.with_snippet = false;
        let read: ContextFile = serde_saphyr::from_str_with_options(&text, options).map_err(|e| bad(&e))?;
        let cluster = read.cluster.name.parse().map_err(|e| bad(&e))?;
        // Through its text, which is where its rules are checked.
        let checked = |etcd: &EtcdConfig| EtcdConfig::parse(&etcd.to_yaml()).map_err(|e| bad(&e));
        let etcd = checked(&read.etcd)?;
        if read.agents.is_empty() {
            return Err(bad(&"agents is empty: name at least one {node, socket}"));
        }
        let dir = dir.canonicalize().map_err(|e| bad(&e))?;
        let absolute = |path: PathBuf| dir.join(path);
        let absolute_files = |etcd: EtcdConfig| EtcdConfig {
            trusted_ca_file: etcd.trusted_ca_file.map(absolute),
            cert_file: etcd.cert_file.map(absolute),
            key_file: etcd.key_file.map(absolute),
            ..etcd
        };
        let kvstoremesh = match read.kvstoremesh {
            Some(mirror) => Some(Kvstoremesh {
                clustermesh_config: absolute(mirror.clustermesh_config),
                etcd: absolute_files(checked(&mirror.etcd)?),
                socket: mirror.socket.map(absolute),
            }),
            None => None,
        };
        Ok(Self {
            cluster,
            id: read.cluster.id,
            etcd: absolute_files(etcd),
            kvstoremesh,
            remote: read.remote.map(|files| ClientFiles {
                cert_file: absolute(files.cert_file),
                key_file: absolute(files.key_file),
            }),
            users: read.users.map(absolute),
            clustermesh_config: absolute(read.clustermesh_config),
            agents: read
                .agents
                .into_iter()
                .map(|a| Agent { socket: absolute(a.socket), node: a.node })
                .collect(),
            dir,
        })
    }

    /// How this cluster reads the etcd of `peer`: with the certificate that the peer hands out, or else
    /// with its own.
    pub(crate) fn access_to(&self, peer: &Self) -> EtcdConfig {
        let own = self.remote.as_ref().filter(|_| peer.etcd.cert_file.is_none());
        match own {
            Some(files) => EtcdConfig {
                cert_file: Some(files.cert_file.clone()),
                key_file: Some(files.key_file.clone()),
                ..peer.etcd.clone()
            },
            None => peer.etcd.clone(),
        }
    }

    /// The directories with an entry for each remote cluster, in the order in which these are removed: the
    /// agents let go of a cluster before the mirror takes it from them.
    pub(crate) fn config_dirs(&self) -> impl Iterator<Item = &Path> {
        let mirror = self.kvstoremesh.as_ref().map(|mirror| mirror.clustermesh_config.as_path());
        std::iter::once(self.clustermesh_config.as_path()).chain(mirror)
    }
}

/// Finds the context that `name` means: a directory with a `context.yaml`, a lab's cluster as
/// `LAB/CLUSTER`, or a cluster's name that only one running lab has.
///
/// # Errors
/// A usage error that lists what could have been meant.
pub(crate) fn resolve(name: &str) -> anyhow::Result<Context> {
    resolve_in(&labs_dir(), chosen_lab().as_deref(), name)
}

/// All contexts of the only running lab, or of the one that `CLUSTERMESH_LAB` names, for commands
/// without `--context`.
///
/// # Errors
/// A usage error if no lab is running, or more than one and none is named.
pub(crate) fn only_lab() -> anyhow::Result<Vec<Context>> {
    only_lab_in(&labs_dir(), chosen_lab().as_deref())
}

/// The lab that commands mean if nothing else says so, as for `clustermesh lab`.
fn chosen_lab() -> Option<String> {
    std::env::var("CLUSTERMESH_LAB").ok().filter(|lab| !lab.is_empty())
}

/// Name of the cluster that `name` would mean if it existed: its last component.
pub(crate) fn cluster_of(name: &str) -> Option<ClusterName> {
    Path::new(name).file_name()?.to_str()?.parse().ok()
}

/// A cluster of a running lab.
struct LabCluster {
    lab: String,
    cluster: String,
    dir: PathBuf,
}

/// Where labs live; tests and unusual installations set `CLUSTERMESH_RUN_DIR`.
fn labs_dir() -> PathBuf {
    let run = std::env::var_os("CLUSTERMESH_RUN_DIR").unwrap_or_else(|| "/run/clustermesh".into());
    Path::new(&run).join("labs")
}

fn resolve_in(labs: &Path, chosen: Option<&str>, name: &str) -> anyhow::Result<Context> {
    let path = Path::new(name);
    if path.join(FILE).is_file() {
        return Context::load(path);
    }
    if path.is_file() && path.file_name().is_some_and(|file| file == FILE) {
        return Context::load(path.parent().unwrap_or(Path::new(".")));
    }
    let clusters = lab_clusters(labs);
    let components: Vec<_> = path.components().collect();
    let matching: Vec<&LabCluster> = match components[..] {
        [Component::Normal(cluster)] => clusters
            .iter()
            .filter(|c| c.cluster.as_str() == cluster && chosen.is_none_or(|lab| c.lab == lab))
            .collect(),
        [Component::Normal(lab), Component::Normal(cluster)] => {
            clusters.iter().filter(|c| c.lab.as_str() == lab && c.cluster.as_str() == cluster).collect()
        }
        _ => Vec::new(),
    };
    match matching[..] {
        [only] => Context::load(&only.dir),
        [] => Err(usage(format!(
            "no context {name:?}: it is neither a directory with a {FILE} nor a cluster of a running lab ({})",
            list(&clusters)
        ))),
        _ => Err(usage(format!(
            "context {name:?} is ambiguous: say which of {}",
            matching.iter().map(|c| format!("{}/{}", c.lab, c.cluster)).collect::<Vec<_>>().join(", ")
        ))),
    }
}

fn only_lab_in(labs: &Path, chosen: Option<&str>) -> anyhow::Result<Vec<Context>> {
    let mut clusters = lab_clusters(labs);
    if let Some(chosen) = chosen {
        if !clusters.iter().any(|c| c.lab == chosen) {
            let list = list(&clusters);
            return Err(usage(format!("lab {chosen}, which CLUSTERMESH_LAB names, is not running ({list})")));
        }
        clusters.retain(|c| c.lab == chosen);
    }
    let Some(first) = clusters.first() else {
        return Err(usage(
            "which cluster? give --context DIR, or start a lab with `clustermesh lab up TOPOLOGY.yaml`",
        ));
    };
    if clusters.iter().any(|c| c.lab != first.lab) {
        return Err(usage(format!("which cluster? give --context ({})", list(&clusters))));
    }
    clusters.iter().map(|c| Context::load(&c.dir)).collect()
}

/// All clusters of all running labs, in order of their names.
fn lab_clusters(labs: &Path) -> Vec<LabCluster> {
    let mut found = Vec::new();
    for (lab, lab_dir) in subdirectories(labs) {
        for (cluster, dir) in subdirectories(&lab_dir) {
            if dir.join(FILE).is_file() {
                found.push(LabCluster { lab: lab.clone(), cluster, dir });
            }
        }
    }
    found
}

/// Names and paths of the directories in `dir`, sorted; none if it cannot be read.
fn subdirectories(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    found.sort();
    found
}

fn list(clusters: &[LabCluster]) -> String {
    if clusters.is_empty() {
        return "no lab is running".into();
    }
    let names: Vec<_> = clusters.iter().map(|c| format!("{}/{}", c.lab, c.cluster)).collect();
    format!("running: {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::exit_status;

    const GOOD: &str = "\
cluster: {name: CLUSTER, id: 1}
etcd:
  endpoints: [https://172.31.1.1:2379]
  trusted-ca-file: pki/ca.crt
  cert-file: /elsewhere/remote.crt
  key-file: pki/remote.key
clustermeshConfig: clustermesh
agents:
- {node: node1, socket: node1/agent.sock}
";

    fn write(dir: &Path, text: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(FILE), text).unwrap();
    }

    fn lab(labs: &Path, lab: &str, clusters: &[&str]) {
        for cluster in clusters {
            write(&labs.join(lab).join(cluster), &GOOD.replace("CLUSTER", cluster));
        }
        fs::create_dir_all(labs.join(lab).join("logs")).unwrap();
    }

    fn refusal(result: anyhow::Result<impl std::fmt::Debug>) -> String {
        let error = result.unwrap_err();
        assert_eq!(exit_status(&error), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn a_directory_gives_absolute_paths() {
        let tmp = tempfile::tempdir().unwrap();
        write(tmp.path(), &GOOD.replace("CLUSTER", "alpha"));
        let dir = tmp.path().canonicalize().unwrap();
        for name in [tmp.path().to_path_buf(), tmp.path().join(FILE)] {
            let context = resolve_in(Path::new("/nonexistent"), None, name.to_str().unwrap()).unwrap();
            assert_eq!((context.cluster.as_str(), context.id), ("alpha", 1));
            assert_eq!(context.dir, dir);
            assert_eq!(context.etcd.trusted_ca_file, Some(dir.join("pki/ca.crt")));
            assert_eq!(context.etcd.cert_file, Some("/elsewhere/remote.crt".into()));
            assert_eq!(context.clustermesh_config, dir.join("clustermesh"));
            assert_eq!(context.agents[0].socket, dir.join("node1/agent.sock"));
        }
    }

    #[test]
    fn clusters_of_labs_are_found_by_name() {
        let tmp = tempfile::tempdir().unwrap();
        let labs = tmp.path();
        assert!(refusal(resolve_in(labs, None, "alpha")).contains("no lab is running"));
        assert!(refusal(only_lab_in(labs, None)).contains("lab up"));

        lab(labs, "one", &["beta", "alpha"]);
        let names: Vec<_> =
            only_lab_in(labs, None).unwrap().into_iter().map(|c| c.cluster.to_string()).collect();
        assert_eq!(names, ["alpha", "beta"]);
        assert_eq!(resolve_in(labs, None, "alpha").unwrap().cluster.as_str(), "alpha");

        lab(labs, "two", &["alpha"]);
        let ambiguous = refusal(resolve_in(labs, None, "alpha"));
        assert!(ambiguous.contains("one/alpha, two/alpha"), "{ambiguous}");
        assert!(resolve_in(labs, None, "two/alpha").unwrap().dir.ends_with("two/alpha"));
        assert!(resolve_in(labs, None, "beta").unwrap().dir.ends_with("one/beta"));
        assert!(refusal(only_lab_in(labs, None)).contains("one/alpha, one/beta, two/alpha"));
        assert!(resolve_in(labs, Some("two"), "alpha").unwrap().dir.ends_with("two/alpha"));
        assert!(resolve_in(labs, Some("two"), "one/alpha").unwrap().dir.ends_with("one/alpha"));
        assert_eq!(only_lab_in(labs, Some("one")).unwrap().len(), 2);
        assert!(refusal(only_lab_in(labs, Some("three"))).contains("CLUSTERMESH_LAB"));
        for unknown in ["gamma", "one/gamma", "three/alpha", "../one/alpha", ""] {
            let missing = refusal(resolve_in(labs, None, unknown));
            assert!(missing.contains("running: one/alpha, one/beta, two/alpha"), "{unknown}: {missing}");
        }
    }

    #[test]
    fn mistakes_are_one_line_with_the_file() {
        let tmp = tempfile::tempdir().unwrap();
        for (from, to, hint) in [
            ("CLUSTER", "Alpha", "not a cluster name"),
            ("[https://172.31.1.1:2379]", "[]", "`endpoints` is empty"),
            ("[https://172.31.1.1:2379]", "[172.31.1.1:2379]", "https://host:port"),
            ("  key-file: pki/remote.key\n", "", "`key-file`"),
            ("- {node: node1, socket: node1/agent.sock}", "  []", "agents"),
            ("  trusted-ca-file: pki/ca.crt\n", "", "`trusted-ca-file`"),
            ("clustermeshConfig", "clusterMeshConfig", "clusterMeshConfig"),
            ("id: 1", "id: one", "line 1"),
            ("cluster:", "cluster", "line 1"),
        ] {
            write(tmp.path(), &GOOD.replace(from, to).replace("CLUSTER", "alpha"));
            let message = refusal(Context::load(tmp.path()));
            assert!(message.contains(hint) && message.contains(FILE), "{to}: {message}");
            assert_eq!(message.lines().count(), 1, "{message}");
        }
    }

    #[test]
    fn the_cluster_of_an_unknown_context_is_its_last_component() {
        assert_eq!(cluster_of("lab/beta").unwrap().as_str(), "beta");
        assert_eq!(cluster_of("/some/dir/beta/").unwrap().as_str(), "beta");
        assert!(cluster_of("..").is_none());
    }
}
