//! Routes of other nodes' pod CIDRs over the overlay, for processes on the host itself.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
};
use rtnetlink::RouteMessageBuilder;

use super::{Netlink, NetlinkError, errno, libc_errno, request};

/// `rtm_protocol` of the routes that the agent owns (`ip route show proto 197`).
pub const ROUTE_PROTOCOL: u8 = 197;

/// How a pod CIDR is reached over the overlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteVia {
    /// Source address that host processes use, so that answers come back through the overlay.
    pub source: Option<IpAddr>,
}

impl Netlink {
    /// Makes the routes of protocol [`ROUTE_PROTOCOL`] over device `overlay` exactly `desired`.
    ///
    /// # Errors
    /// The first request that the kernel refused; what came before stays, and a retry completes it.
    pub async fn sync_routes(
        &self,
        overlay: u32,
        desired: &BTreeMap<IpNet, RouteVia>,
    ) -> Result<(), NetlinkError> {
        let mut missing = desired.clone();
        for message in self.own_routes().await? {
            let installed = parse(&message);
            let wanted = installed.as_ref().is_some_and(|(prefix, oif, via)| {
                *oif == overlay && missing.get(prefix).is_some_and(|want| want == via)
            });
            match installed {
                Some((prefix, ..)) if wanted => {
                    missing.remove(&prefix);
                }
                _ => self.delete_route(message).await?,
            }
        }
        for (prefix, via) in missing {
            self.add_route(overlay, prefix, via).await?;
        }
        Ok(())
    }

    /// Makes the route to one prefix; none: removes it.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn set_route(
        &self,
        overlay: u32,
        prefix: IpNet,
        via: Option<RouteVia>,
    ) -> Result<(), NetlinkError> {
        match via {
            Some(via) => self.add_route(overlay, prefix, via).await,
            None => self.delete_route(message(overlay, prefix, RouteVia::default())).await,
        }
    }

    /// Destinations of the routes of protocol [`ROUTE_PROTOCOL`].
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn owned_routes(&self) -> Result<Vec<IpNet>, NetlinkError> {
        let routes = self.own_routes().await?;
        Ok(routes.iter().filter_map(parse).map(|(prefix, ..)| prefix).collect())
    }

    /// Removes the routes of protocol [`ROUTE_PROTOCOL`].
    ///
    /// # Errors
    /// The first request that the kernel refused.
    pub async fn remove_routes(&self) -> Result<(), NetlinkError> {
        for message in self.own_routes().await? {
            self.delete_route(message).await?;
        }
        Ok(())
    }

    async fn own_routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut own = Vec::new();
        for message in self.main_table().await? {
            if message.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) {
                own.push(message);
            }
        }
        Ok(own)
    }

    /// All routes of the main table, both families.
    pub(super) async fn main_table(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let mut dump = Box::pin(self.handle.route().get(filter).execute());
            while let Some(route) = dump.try_next().await.map_err(request("cannot list routes"))? {
                if route.header.table == RouteHeader::RT_TABLE_MAIN {
                    routes.push(route);
                }
            }
        }
        Ok(routes)
    }

    async fn delete_route(&self, message: RouteMessage) -> Result<(), NetlinkError> {
        match self.handle.route().del(message).execute().await {
            // Gone with its device meanwhile.
            Err(e) if errno(&e) == Some(libc_errno::ESRCH) => Ok(()),
            other => other.map_err(request("cannot remove a route of the overlay")),
        }
    }

    async fn add_route(&self, overlay: u32, prefix: IpNet, via: RouteVia) -> Result<(), NetlinkError> {
        self.handle
            .route()
            .add(message(overlay, prefix, via))
            .replace()
            .execute()
            .await
            .map_err(request(format!("cannot route {prefix} over the overlay")))
    }
}

/// A route of ours.
fn message(overlay: u32, prefix: IpNet, via: RouteVia) -> RouteMessage {
    match prefix {
        IpNet::V4(net) => {
            let mut b = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(net.network(), net.prefix_len());
            if let Some(IpAddr::V4(source)) = via.source {
                b = b.pref_source(source);
            }
            b.output_interface(overlay)
                .scope(RouteScope::Link)
                .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
                .build()
        }
        IpNet::V6(net) => {
            let mut b = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(net.network(), net.prefix_len());
            if let Some(IpAddr::V6(source)) = via.source {
                b = b.pref_source(source);
            }
            b.output_interface(overlay).protocol(RouteProtocol::Other(ROUTE_PROTOCOL)).build()
        }
    }
}

/// Destination, output device and preferred source of a route; `None` for what is no such route.
pub(super) fn parse(message: &RouteMessage) -> Option<(IpNet, u32, RouteVia)> {
    let (mut destination, mut oif, mut via) = (None, None, RouteVia::default());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => via.source = Some(IpAddr::V4(*ip)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => via.source = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => oif = Some(*index),
            _ => {}
        }
    }
    let prefix = IpNet::new(destination?, message.header.destination_prefix_length).ok()?;
    Some((prefix, oif?, via))
}
