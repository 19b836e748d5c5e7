//! Ports and types of ICMP messages.

use clustermesh_kvstore::record::PortMatch;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Flaw, GapReason};
use crate::objects::meta::{Check, ObjectError};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// IP protocol numbers of a protocol's name in any case; those of all three if it is `ANY`.
pub(super) fn protocols(check: &Check<'_>, field: &str, name: &str) -> Result<Vec<u8>, ObjectError> {
    match name.to_ascii_uppercase().as_str() {
        "TCP" => Ok(vec![TCP]),
        "UDP" => Ok(vec![UDP]),
        "SCTP" => Ok(vec![SCTP]),
        "ANY" => Ok(vec![TCP, UDP, SCTP]),
        _ => Err(check.error(field, format_args!("{name:?} is none of TCP, UDP, SCTP, ANY"))),
    }
}

/// The ports from `port` to `end`, for each of `protocols`. Port 0 stands for all.
pub(super) fn range(
    field: &str,
    port: &IntOrString,
    end: Option<i32>,
    protocols: &[u8],
) -> Result<Vec<PortMatch>, Flaw> {
    let gap = |reason| Flaw::Gap(field.to_owned(), reason);
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => text.parse().map_err(|_| gap(GapReason::NamedPort))?,
    };
    let as_port = |number: i32| u16::try_from(number).map_err(|_| gap(GapReason::Ports));
    let (first, last) = match (as_port(number)?, end.filter(|end| *end != 0)) {
        (0, None) => (0, u16::MAX),
        (first, None) => (first, first),
        (first, Some(end)) => (first, as_port(end)?),
    };
    if first > last {
        return Err(gap(GapReason::Ports));
    }
    Ok(protocols.iter().map(|protocol| PortMatch::Ports { protocol: *protocol, first, last }).collect())
}

/// Messages of one type, by number or name.
pub(super) fn icmp(
    check: &Check<'_>,
    field: &str,
    family: Option<&str>,
    kind: &IntOrString,
) -> Result<PortMatch, ObjectError> {
    let v6 = match family {
        None | Some("" | "IPv4") => false,
        Some("IPv6") => true,
        Some(other) => return Err(check.error(field, format_args!("{other:?} is neither IPv4 nor IPv6"))),
    };
    let number = match kind {
        IntOrString::Int(number) => u8::try_from(*number).ok(),
        IntOrString::String(text) => text.parse().ok().or_else(|| {
            let names = if v6 { ICMP_V6 } else { ICMP_V4 };
            names.iter().find(|(name, _)| name == text).map(|(_, number)| *number)
        }),
    };
    match number {
        Some(kind) => Ok(PortMatch::Icmp { v6, kind }),
        None => Err(check.error(field, format_args!("{kind:?} is not a type of ICMP messages"))),
    }
}

/// The names that Cilium has for types of ICMP messages.
const ICMP_V4: &[(&str, u8)] = &[
    ("EchoReply", 0),
    ("DestinationUnreachable", 3),
    ("Redirect", 5),
    ("Echo", 8),
    ("EchoRequest", 8),
    ("RouterAdvertisement", 9),
    ("RouterSelection", 10),
    ("TimeExceeded", 11),
    ("ParameterProblem", 12),
    ("Timestamp", 13),
    ("TimestampReply", 14),
    ("Photuris", 40),
    ("ExtendedEchoRequest", 42),
    ("ExtendedEchoReply", 43),
];

/// The same for ICMPv6.
const ICMP_V6: &[(&str, u8)] = &[
    ("DestinationUnreachable", 1),
    ("PacketTooBig", 2),
    ("TimeExceeded", 3),
    ("ParameterProblem", 4),
    ("EchoRequest", 128),
    ("EchoReply", 129),
    ("MulticastListenerQuery", 130),
    ("MulticastListenerReport", 131),
    ("MulticastListenerDone", 132),
    ("RouterSolicitation", 133),
    ("RouterAdvertisement", 134),
    ("NeighborSolicitation", 135),
    ("NeighborAdvertisement", 136),
    ("RedirectMessage", 137),
    ("RouterRenumbering", 138),
    ("ICMPNodeInformationQuery", 139),
    ("ICMPNodeInformationResponse", 140),
    ("InverseNeighborDiscoverySolicitation", 141),
    ("InverseNeighborDiscoveryAdvertisement", 142),
    ("HomeAgentAddressDiscoveryRequest", 144),
    ("HomeAgentAddressDiscoveryReply", 145),
    ("MobilePrefixSolicitation", 146),
    ("MobilePrefixAdvertisement", 147),
    ("DuplicateAddressRequestCodeSuffix", 157),
    ("DuplicateAddressConfirmationCodeSuffix", 158),
    ("ExtendedEchoRequest", 160),
    ("ExtendedEchoReply", 161),
];
