//! Which of the node's tunnel packets WireGuard gets: a rule leads those to the tunnel's UDP port into a table of
//! our own, which has a route for each node that is to be encrypted. What it has no route for goes on to the
//! other tables, as if there were no rule.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use futures::TryStreamExt as _;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{Netlink, NetlinkError, ROUTE_PROTOCOL, WireguardLinks, errno, libc_errno, request};
use crate::encryption::Lane;

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
    ) -> Result<BTreeMap<Ipv4Addr, Steering>, NetlinkError> {
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
        node: Ipv4Addr,
        steering: Option<Steering>,
        source: Option<Ipv4Addr>,
    ) -> Result<(), NetlinkError> {
        let Some(steering) = steering else {
            // Of whatever kind and scope it is.
            let any = destination(node).kind(RouteType::Unspec).scope(RouteScope::NoWhere);
            return self.remove_steering(any.build()).await;
        };
        let mut route = destination(node);
        route = match steering {
            Steering::Encrypted(lane) => {
                route = route.output_interface(wireguard[usize::from(lane.number())]).scope(RouteScope::Link);
                source.into_iter().fold(route, |route, source| route.pref_source(source))
            }
            Steering::Blocked => route.kind(RouteType::Unreachable),
        };
        let add = self.handle.route().add(route.build()).replace().execute().await;
        add.map_err(request(format!("cannot steer tunnel packets to {node}")))
    }

    /// Makes the rule for tunnel packets to UDP `port` if it is missing; removes others of ours.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn ensure_rule(&self, port: u16) -> Result<(), NetlinkError> {
        let wanted = rule(port);
        let mut found = false;
        for other in self.steering_rules().await? {
            match is_rule(&other, port) && !found {
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
        let mut filter = RouteMessage::default();
        filter.header.address_family = AddressFamily::Inet;
        let mut dump = Box::pin(self.handle.route().get(filter).execute());
        let mut routes = Vec::new();
        while let Some(route) = dump.try_next().await.map_err(request("cannot list routes"))? {
            let ours = route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
            if ours && route.attributes.contains(&RouteAttribute::Table(TABLE)) {
                routes.push(route);
            }
        }
        Ok(routes)
    }

    async fn steering_rules(&self) -> Result<Vec<RuleMessage>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut dump = Box::pin(self.handle.rule().get(IpVersion::V4).execute());
        let mut rules = Vec::new();
        while let Some(rule) = dump.try_next().await.map_err(request("cannot list routing rules"))? {
            if rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(ROUTE_PROTOCOL))) {
                rules.push(rule);
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

fn destination(node: Ipv4Addr) -> RouteMessageBuilder<Ipv4Addr> {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(node, 32)
        .table_id(TABLE)
        .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
}

fn parse(route: &RouteMessage, wireguard: &WireguardLinks) -> Option<(Ipv4Addr, Steering)> {
    let (mut node, mut oif) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => node = Some(*ip),
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
    node.filter(|_| route.header.destination_prefix_length == 32).map(|node| (node, steering))
}

/// Only what this node sends itself: it routes nobody else's tunnel packets.
fn rule(port: u16) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
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

fn is_rule(found: &RuleMessage, port: u16) -> bool {
    let wanted = rule(port);
    found.header.action == wanted.header.action
        && wanted.attributes.iter().all(|attribute| found.attributes.contains(attribute))
}
