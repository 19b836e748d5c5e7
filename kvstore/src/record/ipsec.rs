use std::fmt;
use std::str::FromStr;

use super::{RecordError, WireguardKey};

/// A node's public key for IPsec, by which it and others agree on the keys of security associations: a point of
/// Curve25519 (RFC 7748) in the text of a [`WireguardKey`], and never one: it lives as long as the agent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpsecKey(WireguardKey);

impl IpsecKey {
    /// Bytes of a key.
    pub const LENGTH: usize = WireguardKey::LENGTH;
    /// Where it stands in a node's record: an annotation, which Cilium's agents do not look at. Their own
    /// `EncryptionKey` is the index of a key that all nodes have.
    pub const ANNOTATION: &str = "clustermesh.io/ipsec-pub-key";

    /// A key; none if the bytes are all zero.
    pub fn new(bytes: [u8; Self::LENGTH]) -> Option<Self> {
        WireguardKey::new(bytes).map(Self)
    }

    /// Its bytes.
    pub const fn bytes(&self) -> &[u8; Self::LENGTH] {
        self.0.bytes()
    }
}

impl FromStr for IpsecKey {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        text.parse().map(Self).map_err(|_| RecordError::BadIpsecKey(text.into()))
    }
}

impl fmt::Display for IpsecKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for IpsecKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_it_was_written_or_refused_by_its_own_reason() {
        let key = IpsecKey::new([7; 32]).unwrap();
        assert_eq!(key.to_string().parse(), Ok(key));
        for other in ["", "AAAA", &"A".repeat(44)] {
            assert_eq!(other.parse::<IpsecKey>().unwrap_err().reason(), "bad_ipsec_key", "{other}");
        }
    }
}
