//! The WireGuard device: its key and port, and who is at the other ends. Generic netlink, family `wireguard`
//! (the kernel's `include/uapi/linux/wireguard.h`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use clustermesh_kvstore::record::WireguardKey;
use futures::{StreamExt as _, TryStreamExt as _};
use genetlink::{GenetlinkError, GenetlinkHandle};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkWireguard};

use super::{Netlink, NetlinkError, errno, host_prefix, libc_errno, request};
use crate::encryption::Lane;

/// Of the device, on every node: nobody speaks to it.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 197, 1);
/// Peers in one message: far below what a netlink socket takes.
const BATCH: usize = 64;

/// Indices of the devices, by their lanes' numbers.
pub type WireguardLinks = [u32; Lane::COUNT as usize];

/// The device that a node wants.
#[derive(Clone)]
pub struct WireguardSpec {
    /// Device name, at most 15 bytes.
    pub name: String,
    /// MTU of the device: the underlay's less what WireGuard adds.
    pub mtu: u32,
}

/// The device as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireguardDevice {
    /// Of its private key; none: it has none yet.
    pub key: Option<WireguardKey>,
    /// UDP port.
    pub port: u16,
    /// By public key.
    pub peers: BTreeMap<WireguardKey, WireguardState>,
}

/// A peer of the device as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireguardState {
    /// Where packets to it go.
    pub endpoint: Option<SocketAddr>,
    /// Addresses that are its own. Prefixes that are no single addresses are left out.
    pub allowed: BTreeSet<IpAddr>,
    /// When the last handshake was complete, in seconds since the Unix epoch; 0: never.
    pub handshake: u64,
    /// Bytes from it, decrypted.
    pub received: u64,
    /// Bytes to it, before encryption.
    pub sent: u64,
}

/// A change of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerChange {
    /// It is so from now on. A session that it has goes on.
    Set {
        /// Its public key.
        key: WireguardKey,
        /// Where packets to it go; none: as it is.
        endpoint: Option<SocketAddr>,
        /// Its addresses, all of them. Those that another peer had go over to it in one step.
        allowed: BTreeSet<IpAddr>,
    },
    /// A handshake is asked for now, though nothing is to be sent.
    Greet(WireguardKey),
    /// It goes, with its session.
    Remove(WireguardKey),
}

impl Netlink {
    /// Creates the device if it is missing, sets its MTU, and returns its ifindex. A new one is down.
    ///
    /// # Errors
    /// [`NetlinkError::NoWireguard`] if the kernel has none, [`NetlinkError::ForeignWireguard`] if the name is taken
    /// by something else, or what the kernel refused.
    pub async fn ensure_wireguard(&self, spec: &WireguardSpec) -> Result<u32, NetlinkError> {
        let index = match self.find_wireguard(&spec.name).await? {
            Some(index) => index,
            None => {
                let message = LinkMessageBuilder::<LinkWireguard>::new(&spec.name).mtu(spec.mtu).build();
                match self.handle.link().add(message).execute().await {
                    Err(e) if errno(&e) == Some(libc_errno::EOPNOTSUPP) => {
                        return Err(NetlinkError::NoWireguard);
                    }
                    other => {
                        other.map_err(request(format!("cannot create WireGuard device {}", spec.name)))?
                    }
                }
                let created = self.find_wireguard(&spec.name).await?;
                created.ok_or_else(|| NetlinkError::ForeignWireguard(spec.name.clone()))?
            }
        };
        self.give_address(index).await?;
        let message = LinkUnspec::new_with_index(index).mtu(spec.mtu).build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(request(format!("cannot set the MTU of {}", spec.name)))?;
        Ok(index)
    }

    /// Brings a device up, or takes it down: WireGuard listens only while it is up.
    ///
    /// # Errors
    /// What the kernel refused, say because the port is in use.
    pub async fn set_up(&self, index: u32, up: bool) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index);
        let message = if up { message.up() } else { message.down() }.build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(request("cannot bring a WireGuard device up or down"))
    }

    /// Whether a device is up.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn is_up(&self, index: u32) -> Result<bool, NetlinkError> {
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links.try_next().await.map_err(request("cannot look up a WireGuard device"))?;
        Ok(link.is_some_and(|link| link.header.flags.contains(LinkFlags::Up)))
    }

    /// Any address at all: the kernel's reverse path check, also a loose one, takes nothing in from a device without.
    async fn give_address(&self, index: u32) -> Result<(), NetlinkError> {
        let mut add = self.handle.address().add(index, ADDRESS.into(), 32);
        // Never the source of anything.
        add.message_mut().header.scope = AddressScope::Host;
        match add.execute().await {
            Err(e) if errno(&e) == Some(libc_errno::EEXIST) => Ok(()),
            other => other.map_err(request("cannot give the WireGuard device an address")),
        }
    }

    /// The device if there is one; nothing is changed.
    ///
    /// # Errors
    /// [`NetlinkError::ForeignWireguard`] if the name is taken by something else, or what the kernel refused.
    pub async fn find_wireguard(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        match self.link_by_name(name).await? {
            None => Ok(None),
            Some(link) if is_wireguard(&link) => Ok(Some(link.header.index)),
            Some(_) => Err(NetlinkError::ForeignWireguard(name.to_owned())),
        }
    }
}

fn is_wireguard(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => {
            info.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Wireguard)))
        }
        _ => false,
    })
}

/// A generic netlink connection about one WireGuard device.
pub struct Wireguard {
    handle: GenetlinkHandle,
    device: String,
}

impl Wireguard {
    /// Opens a connection; must run inside a tokio runtime, which drives it.
    ///
    /// # Errors
    /// [`NetlinkError::Open`].
    pub fn open(device: &str) -> Result<Self, NetlinkError> {
        let (connection, handle, _) = genetlink::new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle, device: device.to_owned() })
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Reads the device with all of its peers.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn read(&self) -> Result<WireguardDevice, NetlinkError> {
        let mut device = WireguardDevice::default();
        let attributes = vec![WireguardAttribute::IfName(self.device.clone())];
        let what = || format!("cannot read {}", self.device);
        for answer in self.request(WireguardCmd::GetDevice, NLM_F_DUMP, attributes, what).await? {
            device.add(answer.attributes);
        }
        Ok(device)
    }

    /// Sets the device's own key and port.
    ///
    /// # Errors
    /// What the kernel refused, say because the port is in use.
    pub async fn configure(&self, key: &[u8; WireguardKey::LENGTH], port: u16) -> Result<(), NetlinkError> {
        let attributes = vec![
            WireguardAttribute::IfName(self.device.clone()),
            WireguardAttribute::PrivateKey(*key),
            WireguardAttribute::ListenPort(port),
        ];
        let what = || format!("cannot give {} its key and UDP port {port}", self.device);
        self.request(WireguardCmd::SetDevice, NLM_F_ACK, attributes, what).await.map(drop)
    }

    /// Changes peers; others stay as they are.
    ///
    /// # Errors
    /// What the kernel refused; some of the changes may have been made.
    pub async fn change(&self, changes: &[PeerChange]) -> Result<(), NetlinkError> {
        for batch in changes.chunks(BATCH) {
            let peers = batch.iter().flat_map(PeerChange::peers).collect();
            let attributes =
                vec![WireguardAttribute::IfName(self.device.clone()), WireguardAttribute::Peers(peers)];
            let what = || format!("cannot change peers of {}", self.device);
            self.request(WireguardCmd::SetDevice, NLM_F_ACK, attributes, what).await?;
        }
        Ok(())
    }

    async fn request(
        &self,
        cmd: WireguardCmd,
        flags: u16,
        attributes: Vec<WireguardAttribute>,
        what: impl Fn() -> String,
    ) -> Result<Vec<WireguardMessage>, NetlinkError> {
        let failed = |source| NetlinkError::Wireguard { what: what(), source };
        let message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(message).await.map_err(|error| failed(io_error(error)))?;
        let mut messages = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.map_err(|error| failed(io::Error::other(error)))?.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message.payload),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(failed(error.to_io())),
                _ => {}
            }
        }
        Ok(messages)
    }
}

fn io_error(error: GenetlinkError) -> io::Error {
    match error {
        GenetlinkError::NetlinkError(error) => error,
        other => io::Error::other(other),
    }
}

impl WireguardDevice {
    /// Takes in one message of a dump: a peer with many addresses comes in several.
    fn add(&mut self, attributes: Vec<WireguardAttribute>) {
        for attribute in attributes {
            match attribute {
                WireguardAttribute::PublicKey(key) => self.key = WireguardKey::new(key),
                WireguardAttribute::ListenPort(port) => self.port = port,
                WireguardAttribute::Peers(peers) => peers.into_iter().for_each(|peer| self.add_peer(peer)),
                _ => {}
            }
        }
    }

    fn add_peer(&mut self, peer: WireguardPeer) {
        let key = peer.iter().find_map(|attribute| match attribute {
            WireguardPeerAttribute::PublicKey(key) => WireguardKey::new(*key),
            _ => None,
        });
        let Some(key) = key else { return };
        let state = self.peers.entry(key).or_default();
        for attribute in peer.0 {
            match attribute {
                WireguardPeerAttribute::Endpoint(endpoint) => state.endpoint = Some(endpoint),
                WireguardPeerAttribute::LastHandshake(at) => {
                    state.handshake = u64::try_from(at.seconds).unwrap_or(0);
                }
                WireguardPeerAttribute::RxBytes(bytes) => state.received = bytes,
                WireguardPeerAttribute::TxBytes(bytes) => state.sent = bytes,
                WireguardPeerAttribute::AllowedIps(allowed) => {
                    state.allowed.extend(allowed.iter().filter_map(address));
                }
                _ => {}
            }
        }
    }
}

impl PeerChange {
    /// As the kernel is told: one peer may be named more than once, in order.
    fn peers(&self) -> Vec<WireguardPeer> {
        let peer = |key: &WireguardKey, flags, more: Vec<WireguardPeerAttribute>| {
            let key = WireguardPeerAttribute::PublicKey(*key.bytes());
            WireguardPeer([vec![key, WireguardPeerAttribute::Flags(flags)], more].concat())
        };
        match self {
            Self::Set { key, endpoint, allowed } => {
                let endpoint = endpoint.map(WireguardPeerAttribute::Endpoint);
                let allowed = allowed.iter().map(|ip| allowed_ip(*ip)).collect();
                let allowed = WireguardPeerAttribute::AllowedIps(allowed);
                let more = endpoint.into_iter().chain([allowed]).collect();
                vec![peer(key, WireguardPeerFlags::ReplaceAllowedIps, more)]
            }
            // Switching keep-alives on sends one at once; switching them off again takes nothing back.
            Self::Greet(key) => [1, 0]
                .map(|seconds| {
                    let keepalive = WireguardPeerAttribute::PersistentKeepalive(seconds);
                    peer(key, WireguardPeerFlags::UpdateOnly, vec![keepalive])
                })
                .into(),
            Self::Remove(key) => vec![peer(key, WireguardPeerFlags::RemoveMe, Vec::new())],
        }
    }
}

fn allowed_ip(ip: IpAddr) -> WireguardAllowedIp {
    let family = if ip.is_ipv4() { WireguardAddressFamily::Ipv4 } else { WireguardAddressFamily::Ipv6 };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(ip),
        WireguardAllowedIpAttr::Cidr(host_prefix(ip)),
    ])
}

fn address(allowed: &WireguardAllowedIp) -> Option<IpAddr> {
    let (mut ip, mut length) = (None, None);
    for attribute in allowed.iter() {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(address) => ip = Some(*address),
            WireguardAllowedIpAttr::Cidr(bits) => length = Some(*bits),
            _ => {}
        }
    }
    ip.filter(|ip| length == Some(host_prefix(*ip)))
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{Emitable as _, ParseableParametrized as _};
    use netlink_packet_generic::GenlHeader;
    use netlink_packet_wireguard::WireguardTimeSpec;

    use super::*;

    fn key(byte: u8) -> WireguardKey {
        WireguardKey::new([byte; 32]).unwrap()
    }

    /// Through bytes, as the kernel would give it.
    fn told(attributes: Vec<WireguardAttribute>) -> Vec<WireguardAttribute> {
        let message = WireguardMessage { cmd: WireguardCmd::GetDevice, attributes };
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        WireguardMessage::parse_with_param(&bytes, GenlHeader { cmd: 0, version: 1 }).unwrap().attributes
    }

    #[test]
    fn a_peer_in_several_messages_is_one() {
        let [a, b]: [IpAddr; 2] = [[172, 31, 2, 1].into(), [0xfd00, 0, 0, 0, 0, 0, 2, 2].into()];
        let part = |ip, more: Vec<WireguardPeerAttribute>| {
            let key = WireguardPeerAttribute::PublicKey(*key(7).bytes());
            let allowed = WireguardPeerAttribute::AllowedIps(vec![allowed_ip(ip)]);
            WireguardAttribute::Peers(vec![WireguardPeer([vec![key, allowed], more].concat())])
        };
        let at = "[fd00::2:2]:51871".parse().unwrap();
        let handshake = WireguardTimeSpec { seconds: 1_800_000_000, nano_seconds: 5 };
        let more = vec![
            WireguardPeerAttribute::Endpoint(at),
            WireguardPeerAttribute::LastHandshake(handshake),
            WireguardPeerAttribute::RxBytes(10),
            WireguardPeerAttribute::TxBytes(20),
        ];
        let mut device = WireguardDevice::default();
        device.add(told(vec![WireguardAttribute::PublicKey(*key(1).bytes()), part(a, more)]));
        device.add(told(vec![WireguardAttribute::ListenPort(51871), part(b, Vec::new())]));
        let peer = WireguardState {
            endpoint: Some(at),
            allowed: [a, b].into(),
            handshake: 1_800_000_000,
            received: 10,
            sent: 20,
        };
        let peers = [(key(7), peer)].into();
        assert_eq!(device, WireguardDevice { key: Some(key(1)), port: 51871, peers });
    }

    #[test]
    fn wide_prefixes_are_nobodys_address() {
        let net = WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv4),
            WireguardAllowedIpAttr::IpAddr("10.0.0.0".parse().unwrap()),
            WireguardAllowedIpAttr::Cidr(8),
        ]);
        assert_eq!(address(&net), None);
        let net = WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv6),
            WireguardAllowedIpAttr::IpAddr("fd00::".parse().unwrap()),
            WireguardAllowedIpAttr::Cidr(32),
        ]);
        assert_eq!(address(&net), None);
        assert_eq!(address(&allowed_ip([10, 0, 0, 1].into())), Some([10, 0, 0, 1].into()));
    }
}
