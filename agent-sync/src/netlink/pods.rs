//! Which device leads to which pod: read from host routes, whoever made them.
//!
//! A network plug-in that gives each pod a routed veth (as most do) has a /32 or /128 route per pod. The
//! neighbour table, or the plug-in's permanent entry in it, knows the pod's MAC address.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use netlink_packet_route::route::{RouteAttribute, RouteType};
use rtnetlink::MulticastGroup;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};
use tracing::warn;

use super::{Netlink, NetlinkError, request, routes};

/// Changes that arrive within this time of the first are read together.
const SETTLE: Duration = Duration::from_millis(5);
/// Read again this often even if the kernel said nothing: multicast messages may be lost.
const RESCAN: Duration = Duration::from_secs(10);

/// After a failed read the next one follows this soon.
const RETRY: Duration = Duration::from_millis(200);

/// The host's side of a pod's veth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Device in the node's namespace.
    pub ifindex: u32,
    /// MAC of the pod's side; `None` while no neighbour entry has it.
    pub pod_mac: Option<[u8; 6]>,
    /// MAC of the host's side.
    pub host_mac: [u8; 6],
}

/// All pods that this node routes to over a veth, by address.
pub type PodLinks = BTreeMap<IpAddr, PodLink>;

impl Netlink {
    /// Reads links, routes and neighbours.
    ///
    /// # Errors
    /// A dump that the kernel refused.
    pub async fn pod_links(&self) -> Result<PodLinks, NetlinkError> {
        let veths = self.veths().await?;
        let macs = self.neighbours().await?;
        let mut pods = PodLinks::new();
        for message in self.main_table().await? {
            let direct = message.header.kind == RouteType::Unicast
                && !message.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_)));
            let Some((prefix, ifindex, _)) = routes::parse(&message) else { continue };
            let host_route = prefix.prefix_len() == prefix.max_prefix_len();
            if let Some(host_mac) = veths.get(&ifindex).filter(|_| direct && host_route) {
                let pod_mac = macs.get(&(ifindex, prefix.addr())).copied();
                pods.insert(prefix.addr(), PodLink { ifindex, pod_mac, host_mac: *host_mac });
            }
        }
        Ok(pods)
    }

    /// Follows [`Netlink::pod_links`]; the receiver holds the newest snapshot. Ends when it is dropped.
    ///
    /// # Errors
    /// [`NetlinkError::Open`], or the first read failed.
    pub async fn watch_pod_links(&self) -> Result<watch::Receiver<Arc<PodLinks>>, NetlinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        // Subscribed before the first read, so that no change falls between the two.
        let (connection, _handle, mut changes) =
            rtnetlink::new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        let (tx, rx) = watch::channel(Arc::new(self.pod_links().await?));
        let netlink = self.clone();
        tokio::spawn(async move {
            let mut rescan = interval(RESCAN);
            rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut failed = false;
            loop {
                tokio::select! {
                    () = tx.closed() => return,
                    _ = rescan.tick() => {}
                    () = sleep(RETRY), if failed => {}
                    change = changes.next() => {
                        if change.is_none() {
                            return;
                        }
                        let settled = Instant::now() + SETTLE;
                        while let Ok(Some(_)) = timeout_at(settled, changes.next()).await {}
                    }
                }
                let read = netlink.pod_links().await;
                failed = read.is_err();
                match read {
                    Ok(pods) => {
                        tx.send_if_modified(|current| {
                            let changed = **current != pods;
                            if changed {
                                *current = Arc::new(pods);
                            }
                            changed
                        });
                    }
                    Err(error) => {
                        warn!(%error, "cannot read the node's routes; keeping the last view of its pods")
                    }
                }
            }
        });
        Ok(rx)
    }

    /// MAC address of each veth of this namespace.
    async fn veths(&self) -> Result<HashMap<u32, [u8; 6]>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut veths = HashMap::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await.map_err(request("cannot list devices"))? {
            let (mut is_veth, mut mac) = (false, None);
            for attribute in &link.attributes {
                match attribute {
                    LinkAttribute::LinkInfo(info) => {
                        is_veth = info.iter().any(|i| matches!(i, LinkInfo::Kind(InfoKind::Veth)));
                    }
                    LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                    _ => {}
                }
            }
            if let (true, Some(mac)) = (is_veth, mac) {
                veths.insert(link.header.index, mac);
            }
        }
        Ok(veths)
    }

    async fn neighbours(&self) -> Result<HashMap<(u32, IpAddr), [u8; 6]>, NetlinkError> {
        let _one_dump = self.dumping.lock().await;
        let mut macs = HashMap::new();
        let mut entries = Box::pin(self.handle.neighbours().get().execute());
        while let Some(entry) = entries.try_next().await.map_err(request("cannot list neighbours"))? {
            let (mut ip, mut mac) = (None, None);
            for attribute in &entry.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        ip = Some(IpAddr::V6(*v6));
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
                    }
                    _ => {}
                }
            }
            if let (Some(ip), Some(mac)) = (ip, mac) {
                macs.insert((entry.header.ifindex, ip), mac);
            }
        }
        Ok(macs)
    }
}
