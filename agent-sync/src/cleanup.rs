//! Takes away what an agent has left in the kernel: its programs and maps, its routes and its device.
//!
//! An agent that stops leaves all of it on purpose, and the next one takes over. This is for nodes that
//! leave the mesh, and for maps that shall get other sizes.

use std::fmt;
use std::path::{Path, PathBuf};

use ebpf_global_svc::{Datapath, DatapathError, Remains};
use ipnet::IpNet;
use tokio::net::UnixStream;

use crate::netlink::{Netlink, NetlinkError, ROUTE_PROTOCOL};

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
}

/// What an agent has left. No other one can start while this exists, if anything is pinned.
pub struct Leftovers {
    root: PathBuf,
    remains: Option<Remains>,
    netlink: Netlink,
    device: Option<(String, u32)>,
    routes: Vec<IpNet>,
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
        let index = netlink.find_overlay(&place.tunnel_device, place.tunnel_port).await?;
        Ok(Self {
            root: place.bpf_root.clone(),
            remains,
            device: index.map(|index| (place.tunnel_device.clone(), index)),
            routes: netlink.owned_routes().await?,
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
            self.netlink.remove_overlay(index).await?;
        }
        Ok(())
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.remains.is_none() && self.device.is_none() && self.routes.is_empty()
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
        Ok(())
    }
}
