//! Which of the node's tunnel packets WireGuard gets: a rule leads those to the tunnel's UDP port into a table of
//! our own, which has a route for each node that is to be encrypted. What it has no route for goes on to the
//! other tables, as if there were no rule. The rule is one of the underlay's family.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::TryStreamExt as _;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol};
use rtnetlink::IpVersion;

use super::{Netlink, NetlinkError, ROUTE_PROTOCOL, WireguardLinks, errno, host_prefix, libc_errno, request};
use crate::encryption::Lane;
use crate::tunnels::UnderlayProtocol;

/// The table (`ip route show table 51871`).
pub const TABLE: u32 = 51_871;
/// Where the rule stands among others: before the main table (32766), and before what network plug-ins have.
pub const RULE_PRIORITY: u32 = 197;

/// What becomes of tunnel packets to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steering {
    /// The WireGuard device of this lane encrypts them.
    Encrypted(Lane),
    /// They are dropped: no key, or no session, and clear text is not allowed.
    Blocked,
}

impl Netlink {
    /// Reads the table. Routes of others in it, and those over other devices than `wireguard`, are not ours.
    ///
    /// # Errors
    /// A dump that the kernel refused.
    pub async fn steered(
        &self,
        wireguard: &WireguardLinks,
    ) -> Result<BTreeMap<IpAddr, Steering>, NetlinkError> {
        let routes = self.steering_routes().await?;
        Ok(routes.iter().filter_map(|route| parse(route, wireguard)).collect())
    }

    /// Sets what becomes of tunnel packets to `node`; `source` is this node's own address in them. None: they go
    /// as they are.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn steer(
        &self,
        wireguard: &WireguardLinks,
        node: IpAddr,
        steering: Option<Steering>,
        source: Option<IpAddr>,
    ) -> Result<(), NetlinkError> {
        let Some(steering) = steering else {
            // Of whatever kind and scope it is.
            let any = route(node, RouteType::Unspec, RouteScope::NoWhere);
            return self.remove_steering(any).await;
        };
        let route = match steering {
            Steering::Encrypted(lane) => {
                let mut route = route(node, RouteType::Unicast, RouteScope::Link);
                route.attributes.push(RouteAttribute::Oif(wireguard[usize::from(lane.number())]));
                let source = source.filter(|source| source.is_ipv4() == node.is_ipv4());
                route.attributes.extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
                route
            }
            Steering::Blocked => route(node, RouteType::Unreachable, RouteScope::Universe),
        };
        let add = self.handle.route().add(route).replace().execute().await;
        add.map_err(request(format!("cannot steer tunnel packets to {node}")))
    }

    /// Makes the rule for tunnel packets to UDP `port` over an underlay of this family if it is missing; removes others of ours.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn ensure_rule(&self, protocol: UnderlayProtocol, port: u16) -> Result<(), NetlinkError> {
        let wanted = rule(protocol, port);
        let mut found = false;
        for other in self.steering_rules().await? {
            match is_like(&other, &wanted) && !found {
                true => found = true,
                false => self.remove_rule(other).await?,
            }
        }
        if found {
            return Ok(());
        }
        let mut add = self.handle.rule().add();
        *add.message_mut() = wanted;
        match add.execute().await {
            Err(e) if errno(&e) == Some(libc_errno::EEXIST) => Ok(()),
            other => other.map_err(request("cannot add the rule that leads tunnel packets to WireGuard")),
        }
    }

    /// Removes the rule: from now on tunnel packets go as they are.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn remove_rules(&self) -> Result<(), NetlinkError> {
        for rule in self.steering_rules().await? {
            self.remove_rule(rule).await?;
        }
        Ok(())
    }

    /// How many rules and routes there are of ours.
    ///
    /// # Errors
    /// A dump that the kernel refused.
    pub async fn count_steering(&self) -> Result<(usize, usize), NetlinkError> {
        Ok((self.steering_rules().await?.len(), self.steering_routes().await?.len()))
    }

    /// Empties the table.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn remove_all_steering(&self) -> Result<(), NetlinkError> {
        for route in self.steering_routes().await? {
            self.remove_steering(route).await?;
        }
        Ok(())
    }

    async fn steering_routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let mut dump = Box::pin(self.handle.route().get(filter).execute());
            while let Some(route) = dump.try_next().await.map_err(request("cannot list routes"))? {
                // Of IPv6 the kernel also tells what it has learnt of path MTUs by them.
                let is_route = !route.header.flags.contains(RouteFlags::Cloned);
                let ours = is_route && route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
                if ours && route.attributes.contains(&RouteAttribute::Table(TABLE)) {
                    routes.push(route);
                }
            }
        }
        Ok(routes)
    }

    async fn steering_rules(&self) -> Result<Vec<RuleMessage>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut rules = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let mut dump = Box::pin(self.handle.rule().get(version).execute());
            while let Some(rule) = dump.try_next().await.map_err(request("cannot list routing rules"))? {
                if rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL))) {
                    rules.push(rule);
                }
            }
        }
        Ok(rules)
    }

    async fn remove_rule(&self, rule: RuleMessage) -> Result<(), NetlinkError> {
        match self.handle.rule().del(rule).execute().await {
            Err(e) if errno(&e) == Some(libc_errno::ENOENT) => Ok(()),
            other => other.map_err(request("cannot remove a routing rule")),
        }
    }

    async fn remove_steering(&self, route: RouteMessage) -> Result<(), NetlinkError> {
        match self.handle.route().del(route).execute().await {
            Err(e) if errno(&e) == Some(libc_errno::ESRCH) => Ok(()),
            other => other.map_err(request("cannot remove a route to WireGuard")),
        }
    }
}

fn route(node: IpAddr, kind: RouteType, scope: RouteScope) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = if node.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    route.header.destination_prefix_length = host_prefix(node);
    (route.header.kind, route.header.scope) = (kind, scope);
    route.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    route.attributes = vec![RouteAttribute::Destination(node.into()), RouteAttribute::Table(TABLE)];
    route
}

fn parse(route: &RouteMessage, wireguard: &WireguardLinks) -> Option<(IpAddr, Steering)> {
    let (mut node, mut oif) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => node = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => node = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => oif = Some(*index),
            _ => {}
        }
    }
    let steering = match route.header.kind {
        RouteType::Unreachable => Steering::Blocked,
        RouteType::Unicast => {
            let mut lanes = Lane::all().zip(wireguard);
            Steering::Encrypted(lanes.find(|(_, index)| oif == Some(**index))?.0)
        }
        _ => return None,
    };
    let length = route.header.destination_prefix_length;
    node.filter(|node| length == host_prefix(*node)).map(|node| (node, steering))
}

/// Only what this node sends itself: it routes nobody else's tunnel packets.
fn rule(protocol: UnderlayProtocol, port: u16) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = match protocol {
        UnderlayProtocol::Ipv4 => AddressFamily::Inet,
        UnderlayProtocol::Ipv6 => AddressFamily::Inet6,
    };
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Iifname("lo".to_owned()),
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL)),
        RuleAttribute::IpProtocol(IpProtocol::Udp),
        RuleAttribute::DestinationPortRange(RulePortRange { start: port, end: port }),
        RuleAttribute::Table(TABLE),
    ];
    rule
}

fn is_like(found: &RuleMessage, wanted: &RuleMessage) -> bool {
    (found.header.family, found.header.action) == (wanted.header.family, wanted.header.action)
        && wanted.attributes.iter().all(|attribute| found.attributes.contains(attribute))
}
