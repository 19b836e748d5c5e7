//! Where things stand in etcd.

use std::fmt;

use crate::cluster::ClusterName;

/// Rewritten every 60 s by the exporter of an etcd; a reader that sees it change knows that the etcd
/// still takes writes. Its value is a wall clock and means nothing to others.
pub const HEARTBEAT: &str = "cilium/.heartbeat";

/// What a prefix holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Nodes with their addresses and pod CIDRs.
    Nodes,
    /// Security identities.
    Identities,
    /// Addresses with the identity and the node they belong to.
    Ip,
    /// Global services with their backends.
    Services,
    /// Services exported through the Multi-Cluster Services API.
    ServiceExports,
    /// All services of a cluster, for its own agents only: remote clusters have no right to read them.
    LocalServices,
    /// Identities of namespaces that are not exported, for the cluster's own agents only.
    LocalIdentities,
    /// Addresses of namespaces that are not exported, for the cluster's own agents only.
    LocalIp,
    /// Network policies of a cluster, for its own agents only.
    LocalPolicies,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Nodes,
        Self::Identities,
        Self::Ip,
        Self::Services,
        Self::ServiceExports,
        Self::LocalServices,
        Self::LocalIdentities,
        Self::LocalIp,
        Self::LocalPolicies,
    ];

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// The name used in keys, metrics and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Identities => "identities",
            Self::Ip => "ip",
            Self::Services => "services",
            Self::ServiceExports => "serviceexports",
            Self::LocalServices => "localservices",
            Self::LocalIdentities => "localidentities",
            Self::LocalIp => "localip",
            Self::LocalPolicies => "localpolicies",
        }
    }

    /// Whether it is for the agents of its own cluster alone.
    pub const fn is_private(self) -> bool {
        self.private_folder().is_some()
    }

    /// Where it stands among what other clusters have no right to read.
    const fn private_folder(self) -> Option<&'static str> {
        match self {
            Self::LocalServices => Some("services"),
            Self::LocalIdentities => Some("identities"),
            Self::LocalIp => Some("ip"),
            Self::LocalPolicies => Some("policies"),
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Who filled an etcd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layout {
    /// The exporter of the cluster itself: data of this one cluster.
    #[default]
    State,
    /// A kvstoremesh: copies of other clusters' data, told apart by the cluster's name.
    Cache,
}

impl Layout {
    const fn root(self) -> &'static str {
        match self {
            Self::State => "cilium/state",
            Self::Cache => "cilium/cache",
        }
    }
}

/// The prefix under which the keys of a kind stand. Ends in `/`.
pub fn data_prefix(kind: Kind, cluster: &ClusterName, layout: Layout) -> String {
    let root = layout.root();
    if let Some(folder) = kind.private_folder() {
        return format!("clustermesh/local/{folder}/v1/{cluster}/");
    }
    match (kind, layout) {
        // These two do not name the cluster at home, so a mirror has to add it.
        (Kind::Identities, Layout::State) => format!("{root}/identities/v1/id/"),
        (Kind::Identities, Layout::Cache) => format!("{root}/identities/v1/{cluster}/id/"),
        (Kind::Ip, Layout::State) => format!("{root}/ip/v1/default/"),
        _ => format!("{root}/{kind}/v1/{cluster}/"),
    }
}

/// The key that says: everything of this kind has been written since this etcd came up.
pub fn canary_key(kind: Kind, cluster: &ClusterName, layout: Layout) -> String {
    match kind.private_folder() {
        Some(folder) => format!("cilium/synced/{cluster}/clustermesh/local/{folder}/v1"),
        None => format!("cilium/synced/{cluster}/{}/{kind}/v1", layout.root()),
    }
}

/// The folder of the digests of a cluster's kinds: one for those that other clusters may read, one for
/// those that only its own agents may. Ends in `/`.
pub fn digest_prefix(kind: Kind, cluster: &ClusterName, layout: Layout) -> String {
    match kind.is_private() {
        true => format!("clustermesh/local/digests/v1/{cluster}/"),
        // Below the folder that Cilium's roles open to readers; Cilium's own readers pass it by.
        false => format!("{}/digests/v1/{cluster}/", layout.root()),
    }
}

/// Where the writer of a kind states its digest, see [`crate::digest`].
pub fn digest_key(kind: Kind, cluster: &ClusterName, layout: Layout) -> String {
    format!("{}{kind}", digest_prefix(kind, cluster, layout))
}

/// What agents of a cluster say of their nodes to its exporter, by name of the node: see
/// [`crate::record::NodeAnnouncement`]. Other clusters have no right to read it. Ends in `/`.
pub fn announcement_prefix(cluster: &ClusterName) -> String {
    format!("clustermesh/announced/v1/{cluster}/")
}

/// Where a cluster says who it is and what it can do.
pub fn cluster_config_key(cluster: &ClusterName) -> String {
    format!("cilium/cluster-config/{cluster}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_cilium_wrote_has_its_place() {
        let alpha: ClusterName = "alpha".parse().unwrap();
        let dumps = [
            (Layout::State, include_str!("../testdata/state-1.17.tsv")),
            (Layout::Cache, include_str!("../testdata/cache-1.17.tsv")),
        ];
        for (layout, dump) in dumps {
            let mut seen = std::collections::BTreeSet::new();
            for key in dump.lines().filter(|line| !line.starts_with('#')).map(|line| line.split('\t').next())
            {
                let key = key.unwrap();
                let place = Kind::ALL.into_iter().find_map(|kind| {
                    let data = key.starts_with(&data_prefix(kind, &alpha, layout));
                    let canary = key == canary_key(kind, &alpha, layout);
                    (data || canary).then_some((kind, canary))
                });
                match place {
                    Some(place) => drop(seen.insert(place)),
                    None => assert!(key == HEARTBEAT || key == cluster_config_key(&alpha), "{key}"),
                }
            }
            // Data and canary of everything but our own kinds.
            let shared = Kind::ALL.into_iter().filter(|kind| !kind.is_private()).count();
            assert_eq!(seen.len(), 2 * shared, "{layout:?}: {seen:?}");
        }
    }

    #[test]
    fn prefixes_end_where_a_name_ends() {
        let name: ClusterName = "a".parse().unwrap();
        for kind in Kind::ALL {
            for layout in [Layout::State, Layout::Cache] {
                assert!(data_prefix(kind, &name, layout).ends_with('/'));
                assert!(!canary_key(kind, &name, layout).ends_with('/'));
                let digest = digest_key(kind, &name, layout);
                assert!(Kind::ALL.iter().all(|kind| !digest.starts_with(&data_prefix(*kind, &name, layout))));
            }
        }
        assert_eq!(
            data_prefix(Kind::LocalServices, &name, Layout::State),
            "clustermesh/local/services/v1/a/"
        );
    }
}
