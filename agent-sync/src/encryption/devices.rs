//! The four WireGuard devices of a node, one for each [`Lane`].

use tracing::warn;

use super::{EncryptionOptions, Installed, Keys, Lane};
use crate::netlink::{Netlink, NetlinkError, PeerChange, Wireguard, WireguardLinks, WireguardSpec};
use crate::tunnels::UnderlayProtocol;

/// Name of a lane's device.
pub(crate) fn device_name(prefix: &str, lane: Lane) -> String {
    format!("{prefix}{}", lane.number())
}

/// UDP port of a lane's device.
fn device_port(lowest: u16, lane: Lane) -> u16 {
    // The flag leaves room for it.
    lowest.saturating_add(lane.number().into())
}

/// Made when the agent starts; those that are not in use are down, and listen nowhere.
pub(super) struct Devices {
    netlink: Netlink,
    links: WireguardLinks,
    wireguard: Vec<(Lane, Wireguard)>,
    port: u16,
}

impl Devices {
    /// Takes over the devices, or makes them.
    ///
    /// # Errors
    /// The kernel has no WireGuard, or refused.
    pub(super) async fn open(
        netlink: Netlink,
        options: &EncryptionOptions,
        protocol: UnderlayProtocol,
        mtu: u32,
    ) -> Result<Self, NetlinkError> {
        let (mut links, mut wireguard) = (WireguardLinks::default(), Vec::new());
        for lane in Lane::all() {
            let name = device_name(&options.device, lane);
            links[usize::from(lane.number())] =
                netlink.ensure_wireguard(&WireguardSpec { name: name.clone(), mtu }).await?;
            match protocol {
                UnderlayProtocol::Ipv4 => loosen_source_check(&name),
                UnderlayProtocol::Ipv6 => take_ipv6(&name),
            }
            wireguard.push((lane, Wireguard::open(&name)?));
        }
        Ok(Self { netlink, links, wireguard, port: options.port })
    }

    /// Reads devices and peers, and what is steered there. Each device that is up gets the key of its slot and its
    /// port again, should it have others; without a key it is left to be closed.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(super) async fn read(&self, keys: &Keys) -> Result<Installed, NetlinkError> {
        let mut installed =
            Installed { steering: self.netlink.steered(&self.links).await?, ..Installed::default() };
        for (lane, wireguard) in &self.wireguard {
            let device = wireguard.read().await?;
            installed.peers.extend(device.peers.into_iter().map(|(key, state)| ((*lane, key), state)));
            if !self.netlink.is_up(self.link(*lane)).await? {
                continue;
            }
            installed.open.insert(*lane);
            let port = device_port(self.port, *lane);
            if let Some(key) = keys.in_slot(lane.own())
                && (device.key != Some(key.public()) || device.port != port)
            {
                warn!(device = wireguard.device(), "its key or port was another one; set again");
                wireguard.configure(key.bytes(), port).await?;
            }
        }
        Ok(installed)
    }

    /// The states of all peers, into what was read before.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(super) async fn read_peers(&self, mut installed: Installed) -> Result<Installed, NetlinkError> {
        installed.peers.clear();
        for (lane, wireguard) in self.wireguard.iter().filter(|(lane, _)| installed.open.contains(lane)) {
            let device = wireguard.read().await?;
            installed.peers.extend(device.peers.into_iter().map(|(key, state)| ((*lane, key), state)));
        }
        Ok(installed)
    }

    /// Gives a device its key and port, and brings it up.
    ///
    /// # Errors
    /// What the kernel refused, say because the port is in use.
    pub(super) async fn bring_up(&self, lane: Lane, keys: &Keys) -> Result<(), NetlinkError> {
        // The core opens lanes of keys that there are.
        if let Some(key) = keys.in_slot(lane.own()) {
            self.wireguard(lane).configure(key.bytes(), device_port(self.port, lane)).await?;
        }
        self.netlink.set_up(self.link(lane), true).await
    }

    /// # Errors
    /// What the kernel refused.
    pub(super) async fn take_down(&self, lane: Lane) -> Result<(), NetlinkError> {
        self.netlink.set_up(self.link(lane), false).await
    }

    /// # Errors
    /// What the kernel refused.
    pub(super) async fn change(&self, lane: Lane, changes: &[PeerChange]) -> Result<(), NetlinkError> {
        self.wireguard(lane).change(changes).await
    }

    pub(super) fn links(&self) -> &WireguardLinks {
        &self.links
    }

    fn link(&self, lane: Lane) -> u32 {
        self.links[usize::from(lane.number())]
    }

    fn wireguard(&self, lane: Lane) -> &Wireguard {
        // In the order of their numbers.
        &self.wireguard[usize::from(lane.number())].1
    }
}

/// The reverse path check would look for the way back without our rule, which is about UDP ports, and find another
/// device. WireGuard has checked the source already.
fn loosen_source_check(device: &str) {
    let path = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
    if let Err(error) = std::fs::write(&path, "2") {
        warn!(%error, path, "cannot loosen the reverse path check: if it is strict, packets that come encrypted are lost");
    }
}

/// Nodes may have it off for new devices.
fn take_ipv6(device: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "0") {
        warn!(%error, path, "cannot switch IPv6 on: if it is off, nothing is encrypted");
    }
}
