//! Whether a cluster's config lets it into the mesh, and how it is to be read.

use crate::cluster::{ClusterError, ClusterId, ClusterName, MaxConnectedClusters};
use crate::key::{Kind, Layout, canary_key, data_prefix};
use crate::record::{ClusterConfig, RecordError};
use crate::reflector::ReflectorSpec;

/// An accepted config: what of it changes how the cluster is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The cluster's ID.
    pub id: ClusterId,
    /// Where its data stands.
    pub layout: Layout,
    /// It writes canaries, which readers have to wait for.
    pub canaries: bool,
}

/// A config that this mesh cannot accept.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The peer's: it is no cluster config.
    #[error("cannot read the cluster config of {name}: {source}")]
    Unreadable {
        /// The cluster.
        name: ClusterName,
        /// Why not.
        source: RecordError,
    },
    /// The peer's: no ID, or one out of range.
    #[error("cluster {name} has no usable ID: {source}")]
    Id {
        /// The cluster.
        name: ClusterName,
        /// What is wrong with it.
        source: ClusterError,
    },
    /// The operator's: two meshes.
    #[error(
        "cluster {name} runs with max-connected-clusters {theirs}, this one with {ours}: identities would not mean the same; all clusters of a mesh need the same value"
    )]
    Width {
        /// The cluster.
        name: ClusterName,
        /// What it says.
        theirs: u32,
        /// What this process was started with.
        ours: u16,
    },
}

impl Accepted {
    /// Checks what a cluster says about itself. A mesh of 255 takes any peer, since old ones do not
    /// say; a mesh of 511 takes only those that say so.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn check(name: &ClusterName, value: &[u8], max: MaxConnectedClusters) -> Result<Self, ConfigError> {
        let config = ClusterConfig::decode(value)
            .map_err(|source| ConfigError::Unreadable { name: name.clone(), source })?;
        // Cilium's default, which a peer that says nothing runs with.
        let theirs = config.max_connected_clusters.unwrap_or(MaxConnectedClusters::C255.get().into());
        if max == MaxConnectedClusters::C511 && theirs != u32::from(max.get()) {
            return Err(ConfigError::Width { name: name.clone(), theirs, ours: max.get() });
        }
        let id = ClusterId::new(config.id, max)
            .map_err(|source| ConfigError::Id { name: name.clone(), source })?;
        let layout = if config.cached { Layout::Cache } else { Layout::State };
        Ok(Self { id, layout, canaries: config.synced_canaries })
    }

    /// How one kind is followed.
    pub fn reflector(&self, kind: Kind, name: &ClusterName) -> ReflectorSpec {
        let canary = self.canaries.then(|| canary_key(kind, name, self.layout));
        ReflectorSpec::new(data_prefix(kind, name, self.layout), canary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, max: MaxConnectedClusters) -> Result<Accepted, ConfigError> {
        Accepted::check(&"beta".parse().unwrap(), json.as_bytes(), max)
    }

    #[test]
    fn the_width_is_checked_only_in_a_wide_mesh() {
        let silent = r#"{"id":2,"capabilities":{}}"#;
        let wide = r#"{"id":2,"capabilities":{"maxConnectedClusters":511,"syncedCanaries":true}}"#;
        assert!(check(silent, MaxConnectedClusters::C255).is_ok());
        assert!(check(wide, MaxConnectedClusters::C255).is_ok());
        assert!(matches!(check(silent, MaxConnectedClusters::C511), Err(ConfigError::Width { .. })));
        assert!(check(wide, MaxConnectedClusters::C511).unwrap().canaries);
    }

    #[test]
    fn ids_out_of_range_and_broken_configs_are_refused() {
        for bad in [r#"{"capabilities":{}}"#, r#"{"id":256,"capabilities":{}}"#, "{", ""] {
            assert!(check(bad, MaxConnectedClusters::C255).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mirror_is_read_where_it_keeps_its_data() {
        let cached = r#"{"id":2,"capabilities":{"cached":true,"syncedCanaries":true}}"#;
        let accepted = check(cached, MaxConnectedClusters::C255).unwrap();
        let spec = accepted.reflector(Kind::Ip, &"beta".parse().unwrap());
        assert_eq!(spec.prefix, "cilium/cache/ip/v1/beta/");
        assert_eq!(spec.canary.as_deref(), Some("cilium/synced/beta/cilium/cache/ip/v1"));
    }
}
