//! Encryption between nodes.

use std::collections::BTreeMap;

use clustermesh_agent_api::v1::{EncryptedNode, StatusResponse};
use prometheus_client::registry::Registry;

use super::{Counters, Labels, gauge, set};
use crate::encryption::Standing;

/// Nothing while encryption is off.
pub(super) fn register(status: &StatusResponse, registry: &mut Registry) {
    let Some(encryption) = status.encryption.as_ref().filter(|encryption| encryption.mode != "off") else {
        return;
    };
    let strict = gauge(registry, "encryption_strict", "What should be encrypted never goes in clear");
    set(&strict, Labels::new(), encryption.strict.into());
    let failing = gauge(registry, "encryption_failing", "The kernel does not follow what is wanted");
    set(&failing, Labels::new(), (!encryption.error.is_empty()).into());
    let mtu = gauge(registry, "encryption_overlay_mtu", "Pods' packets up to this size need no fragments");
    set(&mtu, Labels::new(), encryption.mtu.into());

    let mut by_cluster: BTreeMap<&str, Vec<&EncryptedNode>> = BTreeMap::new();
    for node in &encryption.nodes {
        by_cluster.entry(&node.cluster).or_default().push(node);
    }
    let nodes = gauge(registry, "encryption_nodes", "Addresses of nodes that are to be encrypted, by state");
    let [received, sent] = [
        ("encryption_received_bytes", "Bytes that came encrypted, of the peers that there are"),
        ("encryption_sent_bytes", "Bytes that went encrypted, of the peers that there are"),
    ]
    .map(|(name, help)| {
        let counters = Counters::default();
        registry.register(name, help, counters.clone());
        counters
    });
    for (cluster, members) in by_cluster {
        let cluster = || ("target_cluster", cluster.to_owned());
        for state in Standing::ALL {
            let count = members.iter().filter(|node| node.state == state.as_str()).count();
            set(&nodes, vec![cluster(), ("state", state.as_str().to_owned())], count as u64);
        }
        let sum = |bytes: fn(&EncryptedNode) -> u64| members.iter().map(|node| bytes(node)).sum();
        received.get_or_create(&vec![cluster()]).inc_by(sum(|node| node.received_bytes));
        sent.get_or_create(&vec![cluster()]).inc_by(sum(|node| node.sent_bytes));
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_agent_api::v1::Encryption;

    use super::super::encode;
    use super::*;

    #[test]
    fn nodes_are_counted_by_cluster_and_state() {
        let node = |state: &str, bytes| EncryptedNode {
            cluster: "beta".into(),
            state: state.into(),
            received_bytes: bytes,
            ..EncryptedNode::default()
        };
        let nodes = vec![node("encrypted", 5), node("encrypted", 6), node("own_key", 0)];
        let encryption = Encryption { mode: "nodes".into(), nodes, ..Encryption::default() };
        let text = |encryption| {
            encode(&StatusResponse { encryption: Some(encryption), ..StatusResponse::default() }, None)
                .unwrap()
        };
        let shown = text(encryption.clone());
        for line in [
            r#"clustermesh_encryption_nodes{target_cluster="beta",state="encrypted"} 2"#,
            r#"clustermesh_encryption_nodes{target_cluster="beta",state="own_key"} 1"#,
            r#"clustermesh_encryption_nodes{target_cluster="beta",state="no_key"} 0"#,
            r#"clustermesh_encryption_received_bytes_total{target_cluster="beta"} 11"#,
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line} is not in\n{shown}");
        }
        let off = Encryption { mode: "off".into(), ..encryption };
        assert!(!text(off).contains("encryption"));
    }
}
