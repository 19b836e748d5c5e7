use serde::{Deserialize, Serialize};

use super::{IpsecKey, RecordError, WireguardKey, json, net};
use crate::cluster::ClusterName;

/// What a node's agent says of its node to its own cluster's exporter, which puts it into the node's record.
///
/// It stands in the own etcd below [`crate::key::announcement_prefix`], which the cluster's agents may write and
/// other clusters may not read. It is not removed by who wrote it: an agent that has nothing (more) to say
/// writes an empty one, so that a reader that lists anew hears of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAnnouncement {
    /// Name of the cluster.
    pub cluster: ClusterName,
    /// Name of the node, and the end of the key.
    pub node: String,
    /// Others may encrypt what they send to the node by this key; none: they must not.
    pub wireguard: Option<WireguardKey>,
    /// The same for IPsec.
    pub ipsec: Option<IpsecKey>,
}

impl NodeAnnouncement {
    /// The longest value that is read, in bytes.
    pub const MAX: usize = 1024;

    /// Reads and checks one. `node` is the key without the prefix.
    ///
    /// # Errors
    /// It is too long, cannot be read, or is of another cluster or node.
    pub fn decode(cluster: &ClusterName, node: &str, value: &[u8]) -> Result<Self, RecordError> {
        if value.len() > Self::MAX {
            return Err(RecordError::TooLarge(value.len()));
        }
        let wire: Wire = json::decode(value)?;
        net::name("node", &wire.node)?;
        net::same_key(node, &wire.node)?;
        net::same_key(cluster.as_str(), &wire.cluster)?;
        let wireguard = match wire.wireguard_pub_key.as_str() {
            "" => None,
            key => Some(key.parse()?),
        };
        let ipsec = match wire.ipsec_pub_key.as_str() {
            "" => None,
            key => Some(key.parse()?),
        };
        Ok(Self { cluster: cluster.clone(), node: wire.node, wireguard, ipsec })
    }

    /// The value.
    pub fn encode(&self) -> Vec<u8> {
        json::encode(&Wire {
            cluster: self.cluster.to_string(),
            node: self.node.clone(),
            wireguard_pub_key: self.wireguard.map(|key| key.to_string()).unwrap_or_default(),
            ipsec_pub_key: self.ipsec.map(|key| key.to_string()).unwrap_or_default(),
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    cluster: String,
    node: String,
    #[serde(default)]
    wireguard_pub_key: String,
    #[serde(default)]
    ipsec_pub_key: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bound_to_its_cluster_and_node() {
        let alpha: ClusterName = "alpha".parse().unwrap();
        for (wireguard, ipsec) in [(None, IpsecKey::new([8; 32])), (WireguardKey::new([7; 32]), None)] {
            let said = NodeAnnouncement { cluster: alpha.clone(), node: "n1".into(), wireguard, ipsec };
            let value = said.encode();
            assert_eq!(NodeAnnouncement::decode(&alpha, "n1", &value), Ok(said));
            let reason = |cluster: &str, node, value: &[u8]| {
                let cluster = cluster.parse().unwrap();
                NodeAnnouncement::decode(&cluster, node, value).unwrap_err().reason()
            };
            assert_eq!(reason("beta", "n1", &value), "name_mismatch");
            assert_eq!(reason("alpha", "n2", &value), "name_mismatch");
            let long = [&value[..], &[b' '; NodeAnnouncement::MAX]].concat();
            assert_eq!(reason("alpha", "n1", &long), "too_large");
            assert_eq!(reason("alpha", "n1", b"{"), "bad_json");
        }
        for (field, reason) in [("wireguardPubKey", "bad_wireguard_key"), ("ipsecPubKey", "bad_ipsec_key")] {
            let bad = format!(r#"{{"cluster":"alpha","node":"n1","{field}":"AAAA"}}"#);
            let error = NodeAnnouncement::decode(&alpha, "n1", bad.as_bytes()).unwrap_err();
            assert_eq!(error.reason(), reason);
        }
    }
}
