use serde::{Deserialize, Serialize};

use super::{RecordError, json};

/// What a cluster says about itself at its `cluster-config` key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Its ID; 0 if it has none. Not checked here: the range depends on the reader's mesh.
    pub id: u32,
    /// It writes canaries: readers have to wait for them.
    pub synced_canaries: bool,
    /// The data stands under [`crate::key::Layout::Cache`].
    pub cached: bool,
    /// 255 or 511; old exporters do not say.
    pub max_connected_clusters: Option<u32>,
    /// Whether services can be exported by the MCS-API; `None`: it does not know the feature.
    pub service_exports_enabled: Option<bool>,
}

impl ClusterConfig {
    /// Reads the JSON.
    ///
    /// # Errors
    /// `bad_json` or `too_large`.
    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        let Wire { id, capabilities: wire } = json::decode(value)?;
        Ok(Self {
            id,
            synced_canaries: wire.synced_canaries,
            cached: wire.cached,
            max_connected_clusters: Some(wire.max_connected_clusters).filter(|max| *max != 0),
            service_exports_enabled: wire.service_exports_enabled,
        })
    }

    /// The JSON.
    pub fn encode(&self) -> Vec<u8> {
        json::encode(&Wire {
            id: self.id,
            capabilities: WireCapabilities {
                synced_canaries: self.synced_canaries,
                cached: self.cached,
                max_connected_clusters: self.max_connected_clusters.unwrap_or(0),
                service_exports_enabled: self.service_exports_enabled,
            },
        })
    }
}

/// Cilium's `CiliumClusterConfig`.
#[derive(Serialize, Deserialize)]
struct Wire {
    #[serde(default, skip_serializing_if = "is_zero")]
    id: u32,
    #[serde(default)]
    capabilities: WireCapabilities,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireCapabilities {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    synced_canaries: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    cached: bool,
    #[serde(skip_serializing_if = "is_zero")]
    max_connected_clusters: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_exports_enabled: Option<bool>,
}

// serde's signature.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}
