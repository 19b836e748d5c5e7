use std::fmt;

/// Why a record is refused. It is always whoever wrote it who is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Longer than [`super::MAX_VALUE`].
    #[error("the value has {0} bytes; at most {max} are read", max = super::MAX_VALUE)]
    TooLarge(usize),
    /// Neither JSON nor the expected fields.
    #[error("the value is not the expected JSON: {0}")]
    BadJson(Text),
    /// Not UTF-8, or not a set of labels.
    #[error("the value is not a set of labels: {0}")]
    BadLabels(Text),
    /// The key is none that this kind of record can have.
    #[error("the key {0} is not a key of this kind")]
    BadKey(Text),
    /// Empty, too long or with characters that names cannot have.
    #[error("{field} {name} is not a name")]
    BadName {
        /// Which name.
        field: &'static str,
        /// What it is.
        name: Text,
    },
    /// Not an IP address, or one that is another's alias.
    #[error("{field} {address} is not an IP address")]
    BadAddress {
        /// Where it stands.
        field: &'static str,
        /// What it is.
        address: Text,
    },
    /// The same address twice in a map.
    #[error("{field} lists {address} twice")]
    DuplicateAddress {
        /// Where it stands.
        field: &'static str,
        /// The address.
        address: Text,
    },
    /// The mask has holes, the wrong length, or the address has bits outside of it.
    #[error("{field} has a mask that does not fit its address")]
    BadMask {
        /// Where it stands.
        field: &'static str,
    },
    /// Neither TCP nor UDP nor SCTP.
    #[error("{0} is not a protocol; TCP, UDP and SCTP are")]
    BadProtocol(Text),
    /// Not in 1..=65535.
    #[error("{0} is not a port")]
    BadPort(u64),
    /// Does not fit into 24 bits, so it cannot travel in a packet.
    #[error("{0} is not an identity of a cluster")]
    BadIdentity(u64),
    /// A word that is none of those allowed.
    #[error("{field} is {value}, which is not one of the known values")]
    BadValue {
        /// Which field.
        field: &'static str,
        /// What it says.
        value: Text,
    },
    /// Not 32 bytes in base64, or all zero.
    #[error("{0} is not a WireGuard public key")]
    BadWireguardKey(Text),
    /// Not 32 bytes in base64, or all zero.
    #[error("{0} is not a node's public key for IPsec")]
    BadIpsecKey(Text),
    /// A policy that cannot mean anything, or too much of it.
    #[error("the policy makes no sense: {0}")]
    BadPolicy(Text),
    /// The value belongs under another key.
    #[error("the key ends in {key}, but the value is that of {value}")]
    NameMismatch {
        /// End of the key.
        key: Text,
        /// What the value says.
        value: Text,
    },
}

impl RecordError {
    /// A short stable word for counters.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "too_large",
            Self::BadJson(_) => "bad_json",
            Self::BadLabels(_) => "bad_labels",
            Self::BadKey(_) => "bad_key",
            Self::BadName { .. } => "bad_name",
            Self::BadAddress { .. } => "bad_address",
            Self::DuplicateAddress { .. } => "duplicate_address",
            Self::BadMask { .. } => "bad_mask",
            Self::BadProtocol(_) => "bad_protocol",
            Self::BadPort(_) => "bad_port",
            Self::BadIdentity(_) => "bad_identity",
            Self::BadValue { .. } => "bad_value",
            Self::BadWireguardKey(_) => "bad_wireguard_key",
            Self::BadIpsecKey(_) => "bad_ipsec_key",
            Self::BadPolicy(_) => "bad_policy",
            Self::NameMismatch { .. } => "name_mismatch",
        }
    }
}

/// A piece of a peer's text, shortened, shown quoted and escaped: a record cannot write into our logs
/// what it likes.
#[derive(Clone, PartialEq, Eq)]
pub struct Text(String);

impl Text {
    const MAX: usize = 80;
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.chars().take(Self::MAX).collect())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}
