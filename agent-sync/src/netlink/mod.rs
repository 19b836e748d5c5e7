//! The agent's netlink edge: the overlay device, the routes over it, the WireGuard device and what is steered
//! there, IPsec's states and policies, and which veth leads to which pod.
//!
//! Comes in: what the mesh wants (device, pod CIDRs of other nodes). Goes out: a snapshot of the pods that
//! this node routes to, again whenever the kernel says that a link, route or neighbour changed. Only
//! routes with our own protocol number ([`ROUTE_PROTOCOL`]) are ever removed.

mod board;
mod keep;
mod overlay;
mod pods;
mod routes;
mod steering;
mod wireguard;
mod xfrm;

pub use board::RouteBoard;
pub use keep::keep_routes;
pub use overlay::OverlaySpec;
pub use pods::{PodLink, PodLinks};
pub use routes::{ROUTE_PROTOCOL, RouteVia};
pub use steering::{RULE_PRIORITY, Steering, TABLE};
pub use wireguard::{PeerChange, Wireguard, WireguardDevice, WireguardLinks, WireguardSpec, WireguardState};
pub use xfrm::{PRIORITY, REQID, Xfrm, XfrmCount};

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::Mutex;

/// A netlink connection of this network namespace. Cheap to clone.
#[derive(Clone)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    /// A netlink socket carries one dump at a time; another meanwhile is refused as busy.
    dumping: Arc<Mutex<()>>,
}

/// What went wrong between the agent and the kernel's network configuration.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No netlink socket: a sandbox without it, or no file descriptors left.
    #[error("cannot open a netlink socket: {0}; the agent needs the node's network namespace")]
    Open(#[source] io::Error),
    /// The kernel refused a request.
    #[error("{what}: {source}{}", hint(source))]
    Request {
        /// What the agent was about to do.
        what: String,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// A device of the wanted name exists and is something else.
    #[error(
        "device {name} exists but is not a VXLAN device in external mode on UDP port {port}; remove it (`ip link del {name}`) or choose another --tunnel-device"
    )]
    ForeignDevice {
        /// Name of the device.
        name: String,
        /// UDP port that the mesh uses.
        port: u16,
    },
    /// The kernel refused a request about the WireGuard device.
    #[error("{what}: {source}")]
    Wireguard {
        /// What the agent was about to do.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel cannot encrypt.
    #[error(
        "this kernel has no WireGuard: load its module (`modprobe wireguard`, Linux 5.6 or later), or start the agent without --enable-wireguard"
    )]
    NoWireguard,
    /// A device of the wanted name exists and is something else.
    #[error(
        "device {0} exists but is no WireGuard device; remove it (`ip link del {0}`) or choose another --wireguard-device"
    )]
    ForeignWireguard(String),
    /// The kernel refused a request about IPsec.
    #[error("{what}: {source}")]
    Xfrm {
        /// What the agent was about to do.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel cannot encrypt.
    #[error(
        "this kernel has no IPsec as it is needed ({0}): load its modules (`modprobe -a xfrm_user esp4 esp6 gcm seqiv`), or start the agent without --enable-ipsec"
    )]
    NoIpsec(String),
    /// IPsec's associations are between addresses.
    #[error("--enable-ipsec needs --node-ip")]
    NoNodeIp,
    /// Another program has the port.
    #[error(
        "cannot listen on UDP {address}: {source}; IPsec needs it, and --node-ip has to be an address of this node"
    )]
    Hello {
        /// Address and port.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Netlink {
    /// Opens a connection; must run inside a tokio runtime, which drives it.
    ///
    /// # Errors
    /// [`NetlinkError::Open`].
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle, dumping: Arc::default() })
    }
}

/// Length of the prefix that is this address alone.
fn host_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn hint(error: &rtnetlink::Error) -> &'static str {
    match errno(error) {
        Some(libc_errno::EPERM | libc_errno::EACCES) => {
            " (needs root or CAP_NET_ADMIN in the node's network namespace)"
        }
        Some(libc_errno::EOPNOTSUPP) => " (this kernel lacks the VXLAN module?)",
        _ => "",
    }
}

/// The positive errno in a kernel reply, if it was one.
fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

fn request(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    move |source| NetlinkError::Request { what: what.into(), source }
}

/// The few errno values this room looks at (asm-generic/errno-base.h and errno.h).
mod libc_errno {
    pub(super) const EPERM: i32 = 1;
    pub(super) const ENOENT: i32 = 2;
    pub(super) const ESRCH: i32 = 3;
    pub(super) const EACCES: i32 = 13;
    pub(super) const EEXIST: i32 = 17;
    pub(super) const ENODEV: i32 = 19;
    pub(super) const ENOSYS: i32 = 38;
    pub(super) const EPROTONOSUPPORT: i32 = 93;
    pub(super) const EOPNOTSUPP: i32 = 95;
}
