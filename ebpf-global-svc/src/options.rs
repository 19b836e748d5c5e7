//! What the operator decides about a node's datapath.

use std::{net::Ipv4Addr, path::PathBuf};

use crate::MapSizes;

/// How [`Datapath::open`](crate::Datapath::open) sets a node up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatapathOptions {
    /// Folder of the pins, in a BPF file system that is mounted if it is missing. One per agent.
    pub bpf_root: PathBuf,
    /// Cgroup v2 folder whose processes reach services by their frontends; none: no service
    /// translation at sockets.
    pub cgroup: Option<PathBuf>,
    /// Own cluster ID, 1..=511.
    pub cluster: u16,
    /// Bits of the cluster-local part of an identity: 16 (255 clusters) or 15 (511 clusters).
    pub identity_shift: u16,
    /// Own address on an IPv4 underlay; `None` leaves the one that an earlier life set, if any: see
    /// [`Datapath::set_node`](crate::Datapath::set_node), which alone tells that on an IPv6 one.
    pub node_ip: Option<Ipv4Addr>,
    /// Whether tunnels run over IPv6: the tables have [numbers](crate::abi::UnderlayValue) of nodes then.
    pub underlay_ipv6: bool,
    /// UDP port of the overlay.
    pub overlay_port: u16,
    /// Whether something encrypts what goes to other nodes: then no packet goes there past the kernel.
    pub encrypts: bool,
    /// Whether [`Datapath::set_strict`](crate::Datapath::set_strict) may stay on from an earlier life.
    pub strict: bool,
    /// Entries per map.
    pub sizes: MapSizes,
}

impl DatapathOptions {
    /// Default sizes and port, 255 clusters, no service translation at sockets.
    #[must_use]
    pub fn new(bpf_root: impl Into<PathBuf>, cluster: u16) -> Self {
        Self {
            bpf_root: bpf_root.into(),
            cgroup: None,
            cluster,
            identity_shift: 16,
            node_ip: None,
            underlay_ipv6: false,
            overlay_port: 8472,
            encrypts: false,
            strict: false,
            sizes: MapSizes::default(),
        }
    }
}
