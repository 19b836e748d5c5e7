//! What a device does for the kernel, as `ethtool -K` sets it: over generic netlink, so that nobody needs the tool.

use std::os::fd::OwnedFd;

use anyhow::{Context as _, bail};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, send, socket};

use super::netns;

/// From `linux/genetlink.h` and `linux/ethtool_netlink.h`.
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const SET_FEATURES: u8 = 12;
const HEADER: u16 = 1;
const DEVICE: u16 = 2;
const WANTED: u16 = 3;
const BITS: u16 = 3;
const BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const NESTED: u16 = 0x8000;
/// From `linux/netlink.h`: a request that is answered in any case.
const ASKS: u16 = 5;
const ERROR: u16 = 2;
/// Of a message, and of that with the head of generic netlink.
const HEAD: usize = 16;
const GENERIC_HEAD: usize = HEAD + 4;

/// Has the kernel finish the checksums of what a device of a namespace sends, instead of leaving that to the device.
///
/// # Errors
/// The namespace does not exist, or the kernel refuses.
pub(crate) fn finish_checksums(namespace: &str, device: &str) -> anyhow::Result<()> {
    netns::within(namespace, || {
        switch_off(device, "tx-checksum-ip-generic")
            .with_context(|| format!("cannot have checksums of {device} finished"))
    })
}

fn switch_off(device: &str, feature: &str) -> anyhow::Result<()> {
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::GENERIC))?;
    let name = attribute(FAMILY_NAME, b"ethtool\0");
    let answer = ask(&socket, CONTROLLER, GET_FAMILY, &name)?;
    let Some(family) = find(answer.get(GENERIC_HEAD..).unwrap_or_default(), FAMILY_ID) else {
        bail!("this kernel has no ethtool over netlink");
    };
    let header = attribute(HEADER | NESTED, &attribute(DEVICE, text(device).as_bytes()));
    let bit = attribute(BIT | NESTED, &attribute(BIT_NAME, text(feature).as_bytes()));
    let wanted = attribute(WANTED | NESTED, &attribute(BITS | NESTED, &bit));
    ask(&socket, family, SET_FEATURES, &[header, wanted].concat()).map(drop)
}

/// One request and the first message of the answer; the kernel's error, if that is one.
fn ask(socket: &OwnedFd, kind: u16, command: u8, attributes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let length = u32::try_from(GENERIC_HEAD + attributes.len())?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend([kind.to_ne_bytes(), ASKS.to_ne_bytes()].concat());
    // Number and sender, which nobody asks for.
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    send(socket, &message, SendFlags::empty())?;
    let mut answer = vec![0; 8192];
    let (length, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
    answer.truncate(length);
    let Some((head, rest)) = answer.split_at_checked(HEAD) else { bail!("the kernel's answer is cut off") };
    if u16::from_ne_bytes([head[4], head[5]]) == ERROR
        && let [a, b, c, d, ..] = rest
        && [*a, *b, *c, *d] != [0; 4]
    {
        let code = i32::from_ne_bytes([*a, *b, *c, *d]);
        return Err(std::io::Error::from_raw_os_error(code.wrapping_neg()).into());
    }
    Ok(answer)
}

fn text(text: &str) -> String {
    format!("{text}\0")
}

/// Length and kind, then the value, filled up to words.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // Names of devices and features, and what holds them.
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The number that an attribute holds.
fn find(mut attributes: &[u8], kind: u16) -> Option<u16> {
    while let [a, b, c, d, ..] = attributes {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        if u16::from_ne_bytes([*c, *d]) == kind
            && let Some([low, high]) = attributes.get(4..6)
        {
            return Some(u16::from_ne_bytes([*low, *high]));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_filled_up_and_found_again() {
        let all = [attribute(2, b"abc"), attribute(7, &[]), attribute(1, &21_u16.to_ne_bytes())].concat();
        assert_eq!(all.len(), 8 + 4 + 8);
        assert_eq!(find(&all, 1), Some(21));
        assert_eq!(find(&all, 3), None);
        assert_eq!(find(&all[..17], 1), None);
        assert_eq!(find(&[0; 5], 1), None);
    }
}
