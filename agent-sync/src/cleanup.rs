//! Takes away what an agent has left on its node: programs and maps, routes and devices, IPsec's states and policies,
//! and its private key.
//!
//! An agent that stops leaves all of it on purpose, and the next one takes over. This is for nodes that
//! leave the mesh, and for maps that shall get other sizes.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use ebpf_global_svc::{Datapath, DatapathError, Remains};
use ipnet::IpNet;
use tokio::net::UnixStream;

use crate::encryption::{self, KeyError, Lane, device_name};
use crate::netlink::{Netlink, NetlinkError, REQID, ROUTE_PROTOCOL, TABLE, Xfrm, XfrmCount};

/// Routes that are named.
const SHOWN: usize = 8;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Place {
    /// Folder of the pins.
    pub bpf_root: PathBuf,
    /// Socket on which a running agent would answer.
    pub grpc_socket: PathBuf,
    /// Name of the VXLAN device.
    pub tunnel_device: String,
    /// Its UDP port.
    pub tunnel_port: u16,
    /// Name of the WireGuard devices, without their number.
    pub wireguard_device: String,
    /// Where this node's private key is.
    pub state_dir: PathBuf,
}

/// Why nothing, or not all, was removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The operator's: an agent would put it all back.
    #[error("an agent is listening on {}: stop it first", .0.display())]
    Running(PathBuf),
    /// The pins.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The network's configuration.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The private key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// What an agent has left. No other one can start while this exists, if anything is pinned.
pub struct Leftovers {
    root: PathBuf,
    state_dir: PathBuf,
    remains: Option<Remains>,
    netlink: Netlink,
    device: Option<(String, u32)>,
    routes: Vec<IpNet>,
    wireguard: Vec<(String, u32)>,
    /// Rules and routes that lead tunnel packets to WireGuard.
    steering: (usize, usize),
    /// None: the kernel has no IPsec.
    xfrm: Option<(Xfrm, XfrmCount)>,
    key: Option<PathBuf>,
}

impl CleanupError {
    /// Whether the command line is at fault, rather than the machine.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Datapath(DatapathError::Foreign { .. }))
    }
}

impl Leftovers {
    /// Looks, and changes nothing. Must run in the node's network namespace.
    ///
    /// # Errors
    /// An agent is running, or what is there cannot be looked at or is not an agent's.
    pub async fn find(place: &Place) -> Result<Self, CleanupError> {
        // Without pins there is no lock to see an agent by: it may run on another root.
        if UnixStream::connect(&place.grpc_socket).await.is_ok() {
            return Err(CleanupError::Running(place.grpc_socket.clone()));
        }
        let remains = Datapath::remains(&place.bpf_root)?;
        let netlink = Netlink::open()?;
        let mut wireguard = Vec::new();
        for lane in Lane::all() {
            let name = device_name(&place.wireguard_device, lane);
            wireguard.extend(netlink.find_wireguard(&name).await?.map(|index| (name, index)));
        }
        let xfrm = match Xfrm::open(Ipv4Addr::UNSPECIFIED.into(), 0) {
            Err(NetlinkError::NoIpsec(_)) => None,
            xfrm => Some(xfrm?),
        };
        let xfrm = match xfrm {
            Some(xfrm) => {
                let count = xfrm.count().await?;
                Some((xfrm, count))
            }
            None => None,
        };
        let index = netlink.find_overlay(&place.tunnel_device, place.tunnel_port).await?;
        Ok(Self {
            root: place.bpf_root.clone(),
            remains,
            device: index.map(|index| (place.tunnel_device.clone(), index)),
            routes: netlink.owned_routes().await?,
            wireguard,
            steering: netlink.count_steering().await?,
            xfrm,
            key: Some(encryption::key_file(&place.state_dir)).filter(|file| file.exists()),
            state_dir: place.state_dir.clone(),
            netlink,
        })
    }

    /// Removes it: the programs first, so that none runs on maps that are half gone, the device last.
    ///
    /// # Errors
    /// What could not be removed; another call goes on from there.
    pub async fn remove(self) -> Result<(), CleanupError> {
        if let Some(remains) = self.remains {
            remains.remove()?;
        }
        self.netlink.remove_routes().await?;
        if let Some((_, index)) = self.device {
            self.netlink.remove_link(index).await?;
        }
        self.netlink.remove_rules().await?;
        self.netlink.remove_all_steering().await?;
        for (_, index) in self.wireguard {
            self.netlink.remove_link(index).await?;
        }
        if let Some((xfrm, _)) = self.xfrm {
            xfrm.remove_policies().await?;
            xfrm.remove_states().await?;
        }
        encryption::forget_key(&self.state_dir)?;
        Ok(())
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        let networked = self.device.is_some() || !self.routes.is_empty();
        let encrypts = !self.wireguard.is_empty() || self.steering != (0, 0) || self.key.is_some();
        self.remains.is_none() && !networked && !encrypts && self.ipsec() == XfrmCount::default()
    }

    fn ipsec(&self) -> XfrmCount {
        self.xfrm.as_ref().map_or(XfrmCount::default(), |(_, count)| *count)
    }

    /// Folder of the pins.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl fmt::Display for Leftovers {
    /// A line for each part.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(remains) = &self.remains {
            let of =
                remains.config().map_or_else(String::new, |config| format!(" of cluster {}", config.cluster));
            writeln!(f, "programs{of}, {} links: {}", remains.links().len(), remains.links().join(", "))?;
            writeln!(f, "maps in {}: {}", self.root.display(), remains.maps().join(", "))?;
        }
        if !self.routes.is_empty() {
            let mut shown: Vec<_> = self.routes.iter().take(SHOWN).map(IpNet::to_string).collect();
            if self.routes.len() > SHOWN {
                shown.push(format!("and {} more", self.routes.len() - SHOWN));
            }
            writeln!(f, "routes of protocol {ROUTE_PROTOCOL}: {}", shown.join(", "))?;
        }
        if let Some((name, _)) = &self.device {
            writeln!(f, "VXLAN device {name}")?;
        }
        if self.steering != (0, 0) {
            let (rules, routes) = self.steering;
            writeln!(f, "routing rules: {rules}, routes of table {TABLE}: {routes}")?;
        }
        for (name, _) in &self.wireguard {
            writeln!(f, "WireGuard device {name}")?;
        }
        if self.ipsec() != XfrmCount::default() {
            let XfrmCount { states, policies } = self.ipsec();
            writeln!(f, "IPsec: {states} states of reqid {REQID}, {policies} policies")?;
        }
        if let Some(file) = &self.key {
            writeln!(f, "private key {}", file.display())?;
        }
        Ok(())
    }
}
