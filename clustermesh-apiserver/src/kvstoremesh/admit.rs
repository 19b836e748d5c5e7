//! What may be mirrored.
//!
//! Values are copied as they are: whoever reads them checks them. But a mirror must not carry a key that
//! no reader could have asked for, or a value that etcd will not take.

use std::fmt;
use std::net::IpAddr;

use clustermesh_kvstore::key::Kind;
use clustermesh_kvstore::record::MAX_VALUE;
use ipnet::IpNet;

/// The longest part of a key behind its prefix, in bytes: two names of Kubernetes are far below.
const MAX_SUFFIX: usize = 600;

/// A record on its way into the mirror.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// What it is about.
    pub kind: Kind,
    /// Its key behind the prefix of its kind.
    pub suffix: &'a str,
    /// Its value.
    pub value: &'a [u8],
}

/// Why a record is not mirrored; the peer's doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No record of this kind has such a key.
    BadKey,
    /// Larger than any record.
    TooLarge,
}

impl Refusal {
    /// As in metrics.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::BadKey => "bad_key",
            Self::TooLarge => "too_large",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadKey => f.write_str("no record of this kind has such a key"),
            Self::TooLarge => write!(f, "the value is larger than {MAX_VALUE} bytes"),
        }
    }
}

/// Each record of each cluster passes here before it is mirrored.
///
/// # Errors
/// It is not to be mirrored. What was mirrored under its key before stays.
pub fn admit(record: &Record<'_>) -> Result<(), Refusal> {
    if record.value.len() > MAX_VALUE {
        return Err(Refusal::TooLarge);
    }
    let suffix = record.suffix;
    let fits = suffix.len() <= MAX_SUFFIX
        && match record.kind {
            Kind::Nodes => is_name(suffix),
            Kind::Identities => !suffix.is_empty() && suffix.bytes().all(|byte| byte.is_ascii_digit()),
            Kind::Ip => suffix.parse::<IpAddr>().is_ok() || suffix.parse::<IpNet>().is_ok(),
            Kind::Services | Kind::ServiceExports => {
                suffix.split_once('/').is_some_and(|(namespace, name)| is_name(namespace) && is_name(name))
            }
            // For the agents of their own cluster alone.
            Kind::LocalServices | Kind::LocalIdentities | Kind::LocalIp => false,
        };
    if fits { Ok(()) } else { Err(Refusal::BadKey) }
}

/// What Kubernetes allows in any name.
fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    !text.is_empty() && text.len() <= 253 && text.bytes().all(inner) && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_form_of_their_kind() {
        for (kind, suffix) in [
            (Kind::Nodes, "node-1.example"),
            (Kind::Identities, "65792"),
            (Kind::Ip, "10.1.0.10"),
            (Kind::Ip, "fd00:10:1::10"),
            (Kind::Ip, "10.0.0.0/8"),
            (Kind::Services, "shop/cart"),
            (Kind::ServiceExports, "shop/cart"),
        ] {
            assert_eq!(admit(&Record { kind, suffix, value: b"{}" }), Ok(()), "{kind} {suffix}");
        }
        for (kind, suffix) in [
            (Kind::Nodes, ""),
            (Kind::Nodes, "a/b"),
            (Kind::Nodes, "../beta"),
            (Kind::Identities, "65792/value"),
            (Kind::Identities, "-1"),
            (Kind::Ip, "10.1.0.10/../.."),
            (Kind::Services, "cart"),
            (Kind::Services, "shop/cart/x"),
            (Kind::Services, "shop//cart"),
            (Kind::ServiceExports, "shop/c\nart"),
            (Kind::LocalServices, "shop/cart"),
        ] {
            let refused = admit(&Record { kind, suffix, value: b"{}" });
            assert_eq!(refused, Err(Refusal::BadKey), "{kind} {suffix}");
        }
    }

    #[test]
    fn values_are_as_large_as_etcd_takes() {
        let value = vec![0; MAX_VALUE + 1];
        let record = Record { kind: Kind::Nodes, suffix: "n1", value: &value };
        assert_eq!(admit(&record), Err(Refusal::TooLarge));
        assert_eq!(admit(&Record { value: &value[1..], ..record }), Ok(()));
    }
}
