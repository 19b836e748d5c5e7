//! Encryption, as status shows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use clustermesh_agent_api::v1;
use tokio::sync::{oneshot, watch};
use tonic::Status;

use super::Source;
use crate::agent::Options;
use crate::encryption::{By, Report, ReportedPeer, RotateDesk, RotateError};
use crate::engine::Overview;
use crate::tunnels::Scope;

/// What is asked for, and how far it is.
#[derive(Clone, Debug)]
pub struct EncryptionView {
    /// None: tables in memory.
    asked: Option<Asked>,
    /// Of the overlay; 0: not known yet.
    mtu: Arc<AtomicU32>,
    report: watch::Receiver<Report>,
    rotate: RotateDesk,
}

#[derive(Clone, Debug, Default)]
struct Asked {
    scope: Option<Scope>,
    strict: bool,
    by: Vec<By>,
}

impl EncryptionView {
    /// Of an agent with these options.
    pub fn new(options: &Options, rotate: RotateDesk, report: watch::Receiver<Report>) -> Self {
        let asked = options.kernel.as_ref().map(|kernel| {
            let encryption = kernel.encryption.as_ref();
            encryption.map_or_else(Asked::default, |encryption| Asked {
                scope: Some(encryption.scope),
                strict: encryption.strict,
                by: [(encryption.wireguard, By::Wireguard), (encryption.ipsec, By::Ipsec)]
                    .into_iter()
                    .filter_map(|(is_on, by)| is_on.then_some(by))
                    .collect(),
            })
        });
        Self { asked, mtu: Arc::default(), report, rotate }
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
        let keys = report.keys.iter();
        let keys: Vec<_> = keys
            .map(|key| v1::EncryptionKey {
                public_key: key.public.clone(),
                made: key.made,
                by: key.by.as_str().into(),
            })
            .collect();
        Some(v1::Encryption {
            mode: mode.into(),
            strict: asked.strict,
            public_key: keys.first().map(|key| key.public_key.clone()).unwrap_or_default(),
            keys,
            mtu: view.mtu.load(Ordering::Relaxed),
            nodes: report.peers.iter().map(|peer| self.encrypted_node(peer, overview)).collect(),
            error: report.error.clone().unwrap_or_default(),
            by: asked.by.iter().map(|by| by.as_str().to_owned()).collect(),
        })
    }

    /// Has this node's key replaced.
    pub(super) async fn rotate_key(&self) -> Result<v1::RotateKeyResponse, Status> {
        let encrypts = self.encryption.asked.as_ref().is_some_and(|asked| asked.scope.is_some());
        if !encrypts {
            return Err(Status::failed_precondition("this node does not encrypt, it has no key"));
        }
        let (reply, answer) = oneshot::channel();
        let gone = || Status::unavailable("the agent is shutting down");
        self.encryption.rotate.send(reply).await.map_err(|_| gone())?;
        match answer.await.map_err(|_| gone())? {
            Ok(keys) => {
                let ipsec = keys.ipsec.map(|key| key.to_string());
                let all: Vec<_> =
                    ipsec.into_iter().chain(keys.wireguard.map(|key| key.to_string())).collect();
                let public_key = all.first().cloned().unwrap_or_default();
                Ok(v1::RotateKeyResponse { public_key, public_keys: all })
            }
            Err(error @ (RotateError::UnderWay(_) | RotateError::TooYoung(_))) => {
                Err(Status::failed_precondition(error.to_string()))
            }
            Err(error @ RotateError::Key(_)) => Err(Status::internal(error.to_string())),
        }
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
            by_previous_key: peer.by_previous,
            by: peer.by.as_str().into(),
        }
    }
}
