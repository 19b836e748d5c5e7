//! The VXLAN device: one per node, in external mode, so that each packet names its own tunnel end and VNI.

use std::net::IpAddr;

use futures::TryStreamExt as _;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::{Netlink, NetlinkError, errno, libc_errno, request};

/// The overlay device that a node wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlaySpec {
    /// Device name, at most 15 bytes.
    pub name: String,
    /// UDP port, the same on all nodes of the mesh.
    pub port: u16,
    /// MTU of the device: the underlay's, or the WireGuard device's, less what VXLAN adds: 50 bytes over IPv4, 70 over
    /// IPv6.
    pub mtu: u32,
}

impl Netlink {
    /// Creates the overlay device if it is missing, sets its MTU, brings it up, and returns its ifindex.
    ///
    /// NOARP: destinations behind it are found by tunnel key, so the kernel must not ask for neighbours.
    ///
    /// # Errors
    /// [`NetlinkError::ForeignDevice`] if the name is taken by something else, or what the kernel refused.
    pub async fn ensure_overlay(&self, spec: &OverlaySpec) -> Result<u32, NetlinkError> {
        let link = match self.link_by_name(&spec.name).await? {
            Some(link) => link,
            None => {
                self.create_overlay(spec).await?;
                self.link_by_name(&spec.name).await?.ok_or_else(|| foreign(spec))?
            }
        };
        if !is_overlay(&link, spec.port) {
            return Err(foreign(spec));
        }
        let index = link.header.index;
        let message = LinkUnspec::new_with_index(index).mtu(spec.mtu).arp(false).up().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(request(format!("cannot bring up {}", spec.name)))?;
        Ok(index)
    }

    /// The overlay device if there is one; nothing is changed.
    ///
    /// # Errors
    /// [`NetlinkError::ForeignDevice`] if the name is taken by something else, or what the kernel refused.
    pub async fn find_overlay(&self, name: &str, port: u16) -> Result<Option<u32>, NetlinkError> {
        match self.link_by_name(name).await? {
            None => Ok(None),
            Some(link) if is_overlay(&link, port) => Ok(Some(link.header.index)),
            Some(_) => Err(NetlinkError::ForeignDevice { name: name.to_owned(), port }),
        }
    }

    /// Removes a device of ours. One that is gone is fine.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_link(&self, index: u32) -> Result<(), NetlinkError> {
        match self.handle.link().del(index).execute().await {
            Err(e) if errno(&e) == Some(libc_errno::ENODEV) => Ok(()),
            other => other.map_err(request("cannot remove a device")),
        }
    }

    async fn create_overlay(&self, spec: &OverlaySpec) -> Result<(), NetlinkError> {
        // Without a VNI: in external mode it comes with each packet, and the kernel refuses a fixed one.
        let message = LinkMessageBuilder::<LinkVxlan>::new(&spec.name)
            .collect_metadata(true)
            .learning(false)
            .port(spec.port)
            .mtu(spec.mtu)
            .build();
        match self.handle.link().add(message).execute().await {
            Err(e) if errno(&e) == Some(libc_errno::EEXIST) => Err(foreign(spec)),
            other => other.map_err(request(format!("cannot create VXLAN device {}", spec.name))),
        }
    }

    /// MTU of the device that has `address`; none: no device has it.
    ///
    /// # Errors
    /// A dump that the kernel refused.
    pub async fn mtu_of(&self, address: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let Some(index) = self.device_of(address).await? else { return Ok(None) };
        let mut links = self.handle.link().get().match_index(index).execute();
        let link = links.try_next().await.map_err(request("cannot look up a device"))?;
        Ok(link.and_then(|link| {
            link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            })
        }))
    }

    /// Ifindex of the device of this name; none if there is no such device.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn device(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        Ok(self.link_by_name(name).await?.map(|link| link.header.index))
    }

    /// Ifindex of the device that has an address; none if there is none.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn device_of(&self, address: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut addresses = self.handle.address().get().set_address_filter(address).execute();
        let found = addresses.try_next().await.map_err(request("cannot list addresses"))?;
        let Some(found) = found else { return Ok(None) };
        // The rest of the dump, for the next one.
        while addresses.try_next().await.map_err(request("cannot list addresses"))?.is_some() {}
        Ok(Some(found.header.index))
    }

    /// Whether a device is one end of a veth pair; false if it is gone.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn is_veth(&self, index: u32) -> Result<bool, NetlinkError> {
        let mut links = self.handle.link().get().match_index(index).execute();
        match links.try_next().await {
            Ok(link) => Ok(link.is_some_and(|link| is_of_kind(&link, &InfoKind::Veth))),
            Err(e) if errno(&e) == Some(libc_errno::ENODEV) => Ok(false),
            Err(e) => Err(request("cannot look up a device")(e)),
        }
    }

    pub(super) async fn link_by_name(&self, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
        let mut links = self.handle.link().get().match_name(name).execute();
        match links.try_next().await {
            Ok(link) => Ok(link),
            Err(e) if errno(&e) == Some(libc_errno::ENODEV) => Ok(None),
            Err(e) => Err(request(format!("cannot look up device {name}"))(e)),
        }
    }
}

fn is_of_kind(link: &LinkMessage, kind: &InfoKind) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => {
            info.iter().any(|info| matches!(info, LinkInfo::Kind(other) if other == kind))
        }
        _ => false,
    })
}

fn is_overlay(link: &LinkMessage, port: u16) -> bool {
    let info = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::LinkInfo(info) => Some(info),
        _ => None,
    });
    let Some(info) = info else { return false };
    let is_vxlan = info.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Vxlan)));
    let data = info.iter().find_map(|i| match i {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    });
    is_vxlan
        && data.is_some_and(|data| {
            data.iter().any(|d| matches!(d, InfoVxlan::CollectMetadata(true)))
                && data.iter().any(|d| matches!(d, InfoVxlan::Port(p) if *p == port))
        })
}

fn foreign(spec: &OverlaySpec) -> NetlinkError {
    NetlinkError::ForeignDevice { name: spec.name.clone(), port: spec.port }
}
