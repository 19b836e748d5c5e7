use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::RecordError;

/// A node's WireGuard public key: a point of Curve25519 (RFC 7748), in text as `wg` writes it, 44 characters of
/// base64. Never all zero, which WireGuard takes for no key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WireguardKey([u8; Self::LENGTH]);

impl WireguardKey {
    /// Bytes of a key.
    pub const LENGTH: usize = 32;

    /// A key; none if the bytes are all zero.
    pub fn new(bytes: [u8; Self::LENGTH]) -> Option<Self> {
        (bytes != [0; Self::LENGTH]).then_some(Self(bytes))
    }

    /// Its bytes.
    pub const fn bytes(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }
}

impl FromStr for WireguardKey {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        let bytes = BASE64.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.and_then(Self::new).ok_or_else(|| RecordError::BadWireguardKey(text.into()))
    }
}

impl fmt::Display for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for WireguardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_text() {
        // `wg genkey | wg pubkey`
        let text = "8HU2Y9WdRtRw0Y0yEIO6HHcwG7Ri5Y5m4+Nn6rFJ4Uk=";
        assert_eq!(text.parse::<WireguardKey>().unwrap().to_string(), text);
        let zero = BASE64.encode([0; 32]);
        let others =
            ["", "8HU2Y9WdRtRw0Y0yEIO6HHcwG7Ri5Y5m4+Nn6rFJ4Uk", "AAAA", &zero, &text.replace("k=", "l=")];
        for other in others {
            let error = other.parse::<WireguardKey>().unwrap_err();
            assert_eq!(error.reason(), "bad_wireguard_key", "{other}");
        }
    }
}
