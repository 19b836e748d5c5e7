//! Makes the kernel's WireGuard follow the [`Core`].

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use clustermesh_kvstore::record::WireguardKey;
use tokio::time::Instant;
use tracing::{info, warn};

use super::devices::Devices;
use super::rotate::{RotateError, is_due};
use super::{Core, EncryptionOptions, Here, KeyError, Keys, Own, PrivateKey, Step, wireguard_mtu};
use crate::netlink::{Netlink, NetlinkError, PeerChange, WireguardLinks};
use crate::tunnels::EndChanges;
use crate::tunnels::UnderlayProtocol;

/// While peers have not answered that were asked a short time ago.
const POLL: Duration = Duration::from_millis(100);
/// So long.
const PATIENCE: Duration = Duration::from_secs(10);
/// After that, while some have still not answered, or something is left of old keys.
const POLL_SLOWLY: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct WireguardSide {
    netlink: Netlink,
    devices: Devices,
    rotation: Option<Duration>,
    tunnel_port: u16,
    protocol: UnderlayProtocol,
    keys: Keys,
    core: Core,
    began: Instant,
    patient_until: Instant,
}

impl WireguardSide {
    /// Takes over the devices, or makes them, with this node's keys.
    ///
    /// # Errors
    /// The kernel has no WireGuard, or refused.
    pub(super) async fn open(
        netlink: Netlink,
        options: &EncryptionOptions,
        keys: Keys,
        Here { cluster, node, tunnels, tunnel_port, underlay }: Here<'_>,
    ) -> Result<Self, NetlinkError> {
        let mtu = wireguard_mtu(tunnels.protocol, underlay);
        let devices = Devices::open(netlink.clone(), options, tunnels.protocol, mtu).await?;
        let installed = devices.read(&keys).await?;
        let key = keys.current().public();
        let previous = keys.previous().map(PrivateKey::public);
        let own = Own { cluster, node: node.to_owned(), key, previous };
        let core = Core::new(own, options.scope, options.strict, options.port, installed);
        info!(devices = options.device, %key, peers = core.installed().peers.len(), "WireGuard is there");
        let now = Instant::now();
        let rotation = options.rotation;
        Ok(Self {
            netlink,
            devices,
            rotation,
            tunnel_port,
            protocol: tunnels.protocol,
            keys,
            core,
            began: now,
            patient_until: now,
        })
    }

    pub(super) fn links(&self) -> &WireguardLinks {
        self.devices.links()
    }

    pub(super) fn core(&self) -> &Core {
        &self.core
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(super) fn public(&self) -> WireguardKey {
        self.keys.current().public()
    }

    pub(super) fn apply(&mut self, changes: EndChanges) {
        self.core.apply(changes);
    }

    /// See [`Core::set_elsewhere`].
    pub(super) fn set_elsewhere(&mut self, encrypted: BTreeSet<IpAddr>, yielding: BTreeSet<IpAddr>) {
        self.core.set_elsewhere(encrypted, yielding);
    }

    /// Reads what has to be read and does what is to be done. `whole`: all is read anew.
    pub(super) async fn round(&mut self, whole: bool) -> Result<(), NetlinkError> {
        let now = self.began.elapsed();
        if whole {
            self.netlink.ensure_rule(self.protocol, self.tunnel_port).await?;
            self.core.observe(self.devices.read(&self.keys).await?, now);
            let greet: Vec<_> = self.core.waiting().collect();
            for (lane, key) in greet {
                self.devices.change(lane, &[PeerChange::Greet(key)]).await?;
            }
        } else if self.core.waiting().next().is_some() || self.core.has_old() {
            let known = self.core.installed().clone();
            self.core.observe(self.devices.read_peers(known).await?, now);
        }
        for step in self.core.plan() {
            self.perform(&step).await?;
            self.core.done(&step);
        }
        Ok(())
    }

    async fn perform(&mut self, step: &Step) -> Result<(), NetlinkError> {
        match step {
            Step::Open(lane) => self.devices.bring_up(*lane, &self.keys).await,
            Step::Close(lane) => self.devices.take_down(*lane).await,
            Step::Peers(lane, changes) => {
                if changes.iter().any(|change| matches!(change, PeerChange::Greet(_))) {
                    self.patient_until = Instant::now() + PATIENCE;
                }
                self.devices.change(*lane, changes).await
            }
            Step::Steer(ip, steering) => {
                self.netlink.steer(self.devices.links(), *ip, *steering, self.core.own_ip()).await
            }
        }
    }

    /// The previous key goes when nobody uses it.
    pub(super) fn retire(&mut self) {
        let Some((previous, true)) = self.core.previous() else { return };
        if let Err(error) = self.keys.retire() {
            warn!(%error, "cannot remove the previous key");
            return;
        }
        info!(key = %previous, "nobody uses the previous key any more; removed it");
        self.core.retire();
    }

    /// Whether the present key is to be replaced at its age. A clock that was set back only makes it later.
    pub(super) fn is_due(&self) -> bool {
        self.core.previous().is_none() && is_due(self.rotation, self.keys.made().elapsed().ok())
    }

    /// Whether the key may be replaced.
    ///
    /// # Errors
    /// The one before it is in use.
    pub(super) fn may_rotate(&self) -> Result<(), RotateError> {
        match self.core.previous() {
            Some(_) => Err(RotateError::UnderWay(self.core.behind().len())),
            None => Ok(()),
        }
    }

    /// Replaces the key.
    ///
    /// # Errors
    /// The files; then all is as before.
    pub(super) fn rotate(&mut self) -> Result<(), KeyError> {
        self.keys.rotate()?;
        let key = self.public();
        info!(%key, "replacing this node's key for WireGuard");
        self.core.rotate(key);
        Ok(())
    }

    /// Until the next look; none: nothing is waited for.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self.core.waiting().next() {
            Some(_) if Instant::now() < self.patient_until => Some(POLL),
            None if !self.core.has_old() && self.core.previous().is_none() => None,
            _ => Some(POLL_SLOWLY),
        }
    }
}
