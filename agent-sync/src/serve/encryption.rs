//! Encryption, as status shows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use clustermesh_agent_api::v1;
use clustermesh_kvstore::record::WireguardKey;
use tokio::sync::watch;

use super::Source;
use crate::agent::Options;
use crate::encryption::{PrivateKey, Report, ReportedPeer, Scope};
use crate::engine::Overview;

/// What is asked for, and how far it is.
#[derive(Clone, Debug)]
pub struct EncryptionView {
    /// None: tables in memory.
    asked: Option<Asked>,
    /// Of the overlay; 0: not known yet.
    mtu: Arc<AtomicU32>,
    report: watch::Receiver<Report>,
}

#[derive(Clone, Debug, Default)]
struct Asked {
    scope: Option<Scope>,
    strict: bool,
    key: Option<WireguardKey>,
}

impl EncryptionView {
    /// Of an agent with these options.
    pub fn new(options: &Options, key: Option<&PrivateKey>, report: watch::Receiver<Report>) -> Self {
        let asked = options.kernel.as_ref().map(|kernel| {
            let encryption = kernel.encryption.as_ref();
            encryption.map_or_else(Asked::default, |encryption| Asked {
                scope: Some(encryption.scope),
                strict: encryption.strict,
                key: key.map(PrivateKey::public),
            })
        });
        Self { asked, mtu: Arc::default(), report }
    }

    /// The overlay's MTU.
    pub fn set_mtu(&self, mtu: u32) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }
}

impl Source {
    pub(super) fn encryption(&self, overview: &Overview) -> Option<v1::Encryption> {
        let view = &self.encryption;
        let asked = view.asked.as_ref()?;
        let report = view.report.borrow();
        let mode = match asked.scope {
            None => "off",
            Some(Scope::Clusters) => "clusters",
            Some(Scope::Nodes) => "nodes",
        };
        Some(v1::Encryption {
            mode: mode.into(),
            strict: asked.strict,
            public_key: asked.key.map(|key| key.to_string()).unwrap_or_default(),
            mtu: view.mtu.load(Ordering::Relaxed),
            nodes: report.peers.iter().map(|peer| self.encrypted_node(peer, overview)).collect(),
            error: report.error.clone().unwrap_or_default(),
        })
    }

    fn encrypted_node(&self, peer: &ReportedPeer, overview: &Overview) -> v1::EncryptedNode {
        v1::EncryptedNode {
            cluster: self.name_of(peer.cluster, overview),
            cluster_id: peer.cluster.into(),
            node: peer.node.clone(),
            ip: peer.ip.to_string(),
            state: peer.standing.as_str().into(),
            last_handshake: peer.handshake,
            received_bytes: peer.received,
            sent_bytes: peer.sent,
        }
    }
}
