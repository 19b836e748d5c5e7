//! The etcd of a cluster: where it is ([`EtcdConfig`]) and a [`Session`] with it.
//!
//! A session is one connection to one endpoint and to one etcd cluster. Whatever shows that this is no
//! longer so (a broken or silent connection, a reply that carries another etcd cluster's ID) ends the
//! session for all its users; nothing reconnects beneath them. Getting a new one is for
//! [`crate::reflector::Connection`].

mod auth;
mod config;
mod diagnose;
mod error;
mod session;
mod tls;
mod watch;

pub use auth::{Access, KeySpan};
pub use config::{EtcdConfig, EtcdConfigError, EtcdSource, TlsVersion};
pub use error::SessionError;
pub use session::{KeyValue, Page, Session, SessionOptions, WriteOp};
pub use tls::Credentials;
pub use watch::{WatchEvent, WatchMessage, WatchStream};

/// Keys of one request: exactly one, or all that start with a prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyRange {
    /// This key.
    Key(String),
    /// All keys that start with this.
    Prefix(String),
}

impl KeyRange {
    /// A text that ends in `/` is a prefix, any other one key: `nodes/v1/a` must not match those of a
    /// cluster `ab`.
    pub fn of(text: &str) -> Self {
        if text.ends_with('/') { Self::Prefix(text.into()) } else { Self::Key(text.into()) }
    }

    /// The key or prefix.
    pub fn start(&self) -> &str {
        match self {
            Self::Key(start) | Self::Prefix(start) => start,
        }
    }

    /// What follows the prefix in a key of this range; `None` if it is not one.
    pub fn suffix<'k>(&self, key: &'k [u8]) -> Option<&'k str> {
        let rest = std::str::from_utf8(key).ok()?.strip_prefix(self.start())?;
        (matches!(self, Self::Prefix(_)) || rest.is_empty()).then_some(rest)
    }

    /// The first key behind the range.
    pub fn end(&self) -> Vec<u8> {
        let mut end = self.start().as_bytes().to_vec();
        match self {
            Self::Key(_) => end.push(0),
            // Prefixes end in an ASCII character, so its successor exists.
            Self::Prefix(_) => {
                if let Some(last) = end.last_mut() {
                    *last = last.saturating_add(1);
                }
            }
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_at_their_boundary() {
        let prefix = KeyRange::of("nodes/v1/a/");
        assert_eq!(prefix.suffix(b"nodes/v1/a/n1"), Some("n1"));
        assert_eq!(prefix.suffix(b"nodes/v1/ab/n1"), None);
        assert_eq!(prefix.end(), b"nodes/v1/a0");
        let key = KeyRange::of("cilium/.heartbeat");
        assert_eq!(key.suffix(b"cilium/.heartbeat"), Some(""));
        assert_eq!(key.suffix(b"cilium/.heartbeat2"), None);
        assert_eq!(key.end(), b"cilium/.heartbeat\0");
    }
}
