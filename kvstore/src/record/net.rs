//! Addresses, masks and names as they stand in values and keys.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{MAX_NAME, RecordError};
use crate::cluster::NamespacedName;

/// Parses an address. An IPv4 address in IPv6 clothes (`::ffff:a.b.c.d`) is refused: it would be the same
/// address under a second name.
pub(super) fn address(field: &'static str, text: &str) -> Result<IpAddr, RecordError> {
    text.parse()
        .ok()
        .filter(|address| !matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()))
        .ok_or_else(|| RecordError::BadAddress { field, address: text.into() })
}

/// As [`address`]; the empty text is none.
pub(super) fn optional_address(field: &'static str, text: &str) -> Result<Option<IpAddr>, RecordError> {
    if text.is_empty() { Ok(None) } else { address(field, text).map(Some) }
}

pub(super) fn optional_v4(field: &'static str, text: &str) -> Result<Option<Ipv4Addr>, RecordError> {
    match optional_address(field, text)? {
        None => Ok(None),
        Some(IpAddr::V4(address)) => Ok(Some(address)),
        Some(IpAddr::V6(_)) => Err(RecordError::BadAddress { field, address: text.into() }),
    }
}

pub(super) fn optional_v6(field: &'static str, text: &str) -> Result<Option<Ipv6Addr>, RecordError> {
    match optional_address(field, text)? {
        None => Ok(None),
        Some(IpAddr::V6(address)) => Ok(Some(address)),
        Some(IpAddr::V4(_)) => Err(RecordError::BadAddress { field, address: text.into() }),
    }
}

/// The text of an optional address, empty for none.
pub(super) fn text<T: ToString>(address: Option<T>) -> String {
    address.map(|address| address.to_string()).unwrap_or_default()
}

/// An address with its mask in base64. Bits of the address outside of the mask are refused: they would
/// make two keys of one prefix.
pub(super) fn prefix(field: &'static str, ip: &str, mask: &str) -> Result<IpNet, RecordError> {
    let bad = || RecordError::BadMask { field };
    let mask = BASE64.decode(mask).map_err(|_| bad())?;
    let prefix = match address(field, ip)? {
        IpAddr::V4(ip) => {
            let mask = Ipv4Addr::from(<[u8; 4]>::try_from(mask).map_err(|_| bad())?);
            Ipv4Net::with_netmask(ip, mask).map(IpNet::V4)
        }
        IpAddr::V6(ip) => {
            let mask = Ipv6Addr::from(<[u8; 16]>::try_from(mask).map_err(|_| bad())?);
            Ipv6Net::with_netmask(ip, mask).map(IpNet::V6)
        }
    };
    prefix.ok().filter(|prefix| prefix.addr() == prefix.network()).ok_or_else(bad)
}

/// The mask of a prefix in base64.
pub(super) fn mask(prefix: IpNet) -> String {
    match prefix.netmask() {
        IpAddr::V4(mask) => BASE64.encode(mask.octets()),
        IpAddr::V6(mask) => BASE64.encode(mask.octets()),
    }
}

/// Checks that a name can be one part of a key.
pub(super) fn name(field: &'static str, name: &str) -> Result<(), RecordError> {
    let fine = !name.is_empty() && name.len() <= MAX_NAME && !name.contains(['/', '\0', '\n']);
    if fine { Ok(()) } else { Err(RecordError::BadName { field, name: name.into() }) }
}

/// Checks that a value stands under its own key.
pub(super) fn same_key(key: &str, value: &str) -> Result<(), RecordError> {
    if key == value {
        Ok(())
    } else {
        Err(RecordError::NameMismatch { key: key.into(), value: value.into() })
    }
}

/// The name of an object of `cluster`, checked part by part and against the key it stands under.
pub(super) fn object(
    suffix: &str,
    cluster: &str,
    namespace: String,
    object: String,
) -> Result<NamespacedName, RecordError> {
    name("cluster", cluster)?;
    name("namespace", &namespace)?;
    name("name", &object)?;
    let object = NamespacedName { namespace, name: object };
    same_key(suffix, &object.to_string())?;
    Ok(object)
}

/// A map by address from one by text.
pub(super) fn by_address<V, W>(
    field: &'static str,
    map: BTreeMap<String, V>,
    check: impl Fn(V) -> Result<W, RecordError>,
) -> Result<BTreeMap<IpAddr, W>, RecordError> {
    let mut checked = BTreeMap::new();
    for (text, value) in map {
        if checked.insert(address(field, &text)?, check(value)?).is_some() {
            return Err(RecordError::DuplicateAddress { field, address: text.into() });
        }
    }
    Ok(checked)
}

/// A map by text from one by address. The order becomes that of the texts, as Go has it.
pub(super) fn by_text<V, W>(map: &BTreeMap<IpAddr, V>, encode: impl Fn(&V) -> W) -> BTreeMap<String, W> {
    map.iter().map(|(address, value)| (address.to_string(), encode(value))).collect()
}
