//! WireGuard and [IPsec](ipsec) between nodes: what is encrypted is the tunnel packet from one node's underlay address
//! to another's.
//!
//! ```text
//! mesh (who has which underlay address, and its keys)  ->  core  ->  device, peers, steering   (wireguard_side, edge)
//!                                                      ->  ipsec: core  ->  states, policies   (ipsec, edge)
//! ```
//!
//! [`Core`] is plain: it knows the ends of tunnels and what is installed, and says what to do next. [`Keeper`]
//! has both of them read and write the kernel, in turn. The key is this node's own ([`PrivateKey`]); its public part goes by [`announce`] into
//! the own etcd, from where the exporter puts it into the node's record. Sessions, keys and routes survive the
//! agent: what is installed is taken over, and a peer is changed in place. Keys are replaced without loss, each in a
//! [`Lane`] of its own.
//!
//! The kernel looks up no more than a rule and a route per packet. WireGuard itself proves the outer source of what
//! arrives: a peer may only speak from the underlay addresses of its node.

pub mod announce;
mod board;
mod claims;
mod core;
mod devices;
pub mod ipsec;
mod keep;
mod lane;
mod leave;
mod private_key;
mod report;
mod rotate;
mod wireguard_side;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::tunnels::{EndChanges, Scope, TunnelEnd, UnderlayProtocol};

pub use self::core::{Awaited, Core, Installed, Own, PeerId, Step};
pub use board::TunnelBoard;
pub use claims::Refused;
pub(crate) use devices::device_name;
pub use keep::{Here, Keeper, Lines, Secrets};
pub use lane::{Lane, Slot};
pub use leave::leave;
pub(crate) use leave::leave_quietly;
pub use private_key::{KeyError, Keys, PrivateKey, file as key_file, forget as forget_key};
pub use report::{By, Report, ReportedKey, ReportedPeer, Standing};
pub use rotate::{Rotate, RotateDesk, RotateError};

/// WireGuard adds UDP's header of 8 bytes, its own of 16, and a tag of 16 to the underlay's IP header.
const WIREGUARD_OVERHEAD: u32 = 40;
/// VXLAN adds UDP's header of 8 bytes, its own of 8, and the frame's of 14 to the underlay's IP header.
const VXLAN_OVERHEAD: u32 = 30;
/// ESP adds a header of 8 bytes, 8 of the counter, and behind the packet a tag of 16.
const ESP_OVERHEAD: u32 = 32;
/// And, encrypted, two bytes of what was in there, before which it fills up to this (RFC 4303, section 2.4).
const ESP_TRAILER: u32 = 2;
const ESP_ALIGNMENT: u32 = 4;

/// Ends as they are after changes.
fn merge(ends: &mut BTreeMap<IpAddr, TunnelEnd>, changes: EndChanges) {
    for (ip, end) in changes {
        match end {
            Some(end) => drop(ends.insert(ip, end)),
            None => drop(ends.remove(&ip)),
        }
    }
}

/// Length of the header that ESP in transport mode stays behind.
fn ip_header(protocol: UnderlayProtocol) -> u32 {
    match protocol {
        UnderlayProtocol::Ipv4 => 20,
        UnderlayProtocol::Ipv6 => 40,
    }
}

/// MTU of the WireGuard devices over an underlay with this one.
fn wireguard_mtu(protocol: UnderlayProtocol, underlay: u32) -> u32 {
    underlay.saturating_sub(ip_header(protocol) + WIREGUARD_OVERHEAD)
}

/// What tunnels, and perhaps encryption, leave of an underlay's MTU; of both ways the worse.
pub fn overlay_mtu(protocol: UnderlayProtocol, underlay: u32, options: Option<&EncryptionOptions>) -> u32 {
    let header = ip_header(protocol);
    let clear = underlay.saturating_sub(header + VXLAN_OVERHEAD);
    let by_wireguard = wireguard_mtu(protocol, underlay).saturating_sub(header + VXLAN_OVERHEAD);
    let sealed = underlay.saturating_sub(header + ESP_OVERHEAD) / ESP_ALIGNMENT * ESP_ALIGNMENT;
    let by_ipsec = sealed.saturating_sub(ESP_TRAILER + VXLAN_OVERHEAD);
    match options {
        Some(EncryptionOptions { wireguard: true, ipsec: true, .. }) => by_wireguard.min(by_ipsec),
        Some(EncryptionOptions { ipsec: true, .. }) => by_ipsec,
        Some(EncryptionOptions { wireguard: true, .. }) => by_wireguard,
        _ => clear,
    }
}

/// What the operator wants.
#[derive(Clone, Debug)]
pub struct EncryptionOptions {
    /// By WireGuard.
    pub wireguard: bool,
    /// By IPsec, which comes first where both can.
    pub ipsec: bool,
    /// Between which nodes.
    pub scope: Scope,
    /// What should be encrypted is never sent or taken in clear text.
    pub strict: bool,
    /// Lowest of four UDP ports of WireGuard, the same in the whole mesh.
    pub port: u16,
    /// Name of the WireGuard devices, without their number.
    pub device: String,
    /// Where the private key is.
    pub state_dir: PathBuf,
    /// The age at which a key is replaced; none: when somebody asks for it.
    pub rotation: Option<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(wireguard: bool, ipsec: bool) -> EncryptionOptions {
        let (scope, state_dir) = (Scope::Nodes, PathBuf::new());
        let device = String::new();
        EncryptionOptions {
            wireguard,
            ipsec,
            scope,
            strict: false,
            port: 1,
            device,
            state_dir,
            rotation: None,
        }
    }

    /// Bytes of the underlay's packet for one of the overlay, in ESP.
    fn in_esp(protocol: UnderlayProtocol, overlay: u32) -> u32 {
        let payload = overlay + VXLAN_OVERHEAD + ESP_TRAILER;
        ip_header(protocol) + payload.next_multiple_of(ESP_ALIGNMENT) + ESP_OVERHEAD
    }

    #[test]
    fn packets_of_the_overlays_size_fit_and_larger_ones_do_not() {
        let over = |protocol| {
            [None, Some((true, false)), Some((false, true)), Some((true, true))].map(|which| {
                let options = which.map(|(wireguard, ipsec)| options(wireguard, ipsec));
                overlay_mtu(protocol, 1500, options.as_ref())
            })
        };
        assert_eq!(over(UnderlayProtocol::Ipv4), [1450, 1390, 1416, 1390]);
        assert_eq!(over(UnderlayProtocol::Ipv6), [1430, 1350, 1396, 1350]);
        for (protocol, underlay) in [UnderlayProtocol::Ipv4, UnderlayProtocol::Ipv6]
            .into_iter()
            .flat_map(|protocol| (1400..1600).map(move |underlay| (protocol, underlay)))
        {
            let mtu = overlay_mtu(protocol, underlay, Some(&options(false, true)));
            assert!(in_esp(protocol, mtu) <= underlay && in_esp(protocol, mtu + 1) > underlay, "{underlay}");
        }
    }
}
