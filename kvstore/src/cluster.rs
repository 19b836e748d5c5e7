//! Names and numbers of clusters and identities.
//!
//! Bit layout and rules are Cilium's: an identity is 24 bits on the wire, the upper 8 (or, with 511
//! clusters, 9) of which are the cluster ID.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// How many clusters a mesh may have; the same in all clusters of a mesh, for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MaxConnectedClusters {
    /// 255 clusters of 65,535 identities.
    #[default]
    C255,
    /// 511 clusters of 32,767 identities.
    C511,
}

impl MaxConnectedClusters {
    /// 255 or 511.
    pub const fn get(self) -> u16 {
        match self {
            Self::C255 => 255,
            Self::C511 => 511,
        }
    }

    /// Bits of the cluster-local part of an identity: 16 or 15.
    pub const fn identity_shift(self) -> u32 {
        match self {
            Self::C255 => 16,
            Self::C511 => 15,
        }
    }
}

impl TryFrom<u32> for MaxConnectedClusters {
    type Error = ClusterError;
    fn try_from(value: u32) -> Result<Self, ClusterError> {
        match value {
            255 => Ok(Self::C255),
            511 => Ok(Self::C511),
            other => Err(ClusterError::MaxConnectedClusters(other)),
        }
    }
}

impl FromStr for MaxConnectedClusters {
    type Err = ClusterError;
    fn from_str(s: &str) -> Result<Self, ClusterError> {
        s.parse::<u32>().unwrap_or(0).try_into()
    }
}

impl fmt::Display for MaxConnectedClusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// ID of a cluster, 1..=255 or 1..=511.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(NonZeroU16);

impl ClusterId {
    /// Checks that `id` lies in 1..=max.
    ///
    /// # Errors
    /// [`ClusterError::Id`] otherwise.
    pub fn new(id: u32, max: MaxConnectedClusters) -> Result<Self, ClusterError> {
        u16::try_from(id)
            .ok()
            .filter(|id| *id <= max.get())
            .and_then(NonZeroU16::new)
            .map(Self)
            .ok_or(ClusterError::Id { id, max: max.get() })
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0.get()
    }

    /// First and last identity of this cluster (inclusive).
    pub fn identity_range(self, max: MaxConnectedClusters) -> (Identity, Identity) {
        let shift = max.identity_shift();
        let first = u32::from(self.get()) << shift;
        (Identity(first), Identity(first + (1 << shift) - 1))
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a cluster: 1 to 32 characters, lower-case letters, digits and `-`, alphanumeric at both ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(Arc<str>);

impl ClusterName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = ClusterError;
    fn from_str(s: &str) -> Result<Self, ClusterError> {
        let edge = |c: Option<&u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        let b = s.as_bytes();
        let inner = b.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == b'-');
        if b.len() <= 32 && inner && edge(b.first()) && edge(b.last()) {
            Ok(Self(s.into()))
        } else {
            Err(ClusterError::Name(s.chars().take(64).collect()))
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A numeric security identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(pub u32);

impl Identity {
    /// The host that the reader runs on.
    pub const HOST: Self = Self(1);
    /// Everything outside of the mesh.
    pub const WORLD: Self = Self(2);
    /// Any other node.
    pub const REMOTE_NODE: Self = Self(6);
    /// First identity that is not reserved.
    pub const FIRST_USER: Self = Self(256);
    /// Cilium's names of reserved identities, from 1 on.
    const RESERVED: [&str; 10] = [
        "host",
        "world",
        "unmanaged",
        "health",
        "init",
        "remote-node",
        "kube-apiserver",
        "ingress",
        "world-ipv4",
        "world-ipv6",
    ];

    /// Reserved identities mean the same in every cluster and carry no cluster ID.
    pub const fn is_reserved(self) -> bool {
        self.0 < Self::FIRST_USER.0
    }

    /// The cluster ID in the identity's upper bits; 0 for reserved ones and for a cluster without ID.
    #[allow(clippy::cast_possible_truncation)]
    pub const fn cluster(self, max: MaxConnectedClusters) -> u16 {
        // At most nine bits remain.
        ((self.0 >> max.identity_shift()) & max.get() as u32) as u16
    }

    /// The name of a reserved identity, if it has one.
    pub fn reserved_name(self) -> Option<&'static str> {
        let index = usize::try_from(self.0).ok()?.checked_sub(1)?;
        Self::RESERVED.get(index).copied()
    }

    /// The reserved identity of this name.
    pub fn of_reserved_name(name: &str) -> Option<Self> {
        let index = Self::RESERVED.iter().position(|reserved| *reserved == name)?;
        u32::try_from(index + 1).ok().map(Self)
    }

    /// Whether `cluster` may allocate this identity.
    pub fn belongs_to(self, cluster: ClusterId, max: MaxConnectedClusters) -> bool {
        let (first, last) = cluster.identity_range(max);
        (first..=last).contains(&self)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Namespace and name of a Kubernetes object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespacedName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A cluster name, ID or limit that no mesh accepts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// The operator's: a number other than 255 or 511.
    #[error("max-connected-clusters must be 255 or 511, not {0}")]
    MaxConnectedClusters(u32),
    /// Out of range.
    #[error("cluster ID {id} is out of range: use 1 to {max}")]
    Id {
        /// What was given.
        id: u32,
        /// The largest allowed.
        max: u16,
    },
    /// Not a cluster name.
    #[error(
        "{0:?} is not a cluster name: use 1 to 32 lower-case letters, digits and '-', alphanumeric at both ends"
    )]
    Name(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_ranges_follow_the_width() {
        for (max, shift) in [(MaxConnectedClusters::C255, 16), (MaxConnectedClusters::C511, 15)] {
            assert!(ClusterId::new(0, max).is_err());
            assert!(ClusterId::new(u32::from(max.get()) + 1, max).is_err());
            assert!(ClusterId::new(65_537, max).is_err());
            let last = ClusterId::new(max.get().into(), max).unwrap();
            assert_eq!(last.identity_range(max).1, Identity((1 << 24) - 1));
            let one = ClusterId::new(1, max).unwrap();
            assert_eq!(one.identity_range(max), (Identity(1 << shift), Identity((2 << shift) - 1)));
            assert_eq!(Identity((1 << shift) + 5).cluster(max), 1);
            assert!(!Identity(255).belongs_to(one, max));
        }
    }

    #[test]
    fn names() {
        for good in ["a", "alpha-1", &"x".repeat(32)] {
            assert!(good.parse::<ClusterName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "ä", &"x".repeat(33)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
    }
}
