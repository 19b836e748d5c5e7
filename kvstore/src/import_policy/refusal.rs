use std::fmt;

/// Why a record is refused: one word out of a fixed set, for counters and for those who look for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// It cannot be read, or is not what its key says: the word of the [`RecordError`].
    ///
    /// [`RecordError`]: crate::record::RecordError
    Record(&'static str),
    /// It names another cluster.
    ClusterName,
    /// It has another cluster's ID.
    ClusterId,
    /// The labels of an identity name another cluster, or none.
    ClusterLabel,
    /// An identity that is neither reserved nor of the cluster's range.
    IdentityRange,
    /// No pod and no node can have this address.
    ImplausibleAddress,
    /// A pod prefix that would take in whole parts of the internet.
    PrefixTooWide,
    /// A prefix where a pod's address belongs.
    NotAnAddress,
    /// More of something within one record than is taken.
    TooMany,
    /// A service of this cluster by another one.
    NotOwnCluster,
    /// More records than the quota of this kind.
    QuotaExceeded,
    /// Operator: larger than `max-record-bytes`.
    RecordSize,
    /// Operator: more than `max-backends`.
    Backends,
    /// Operator: outside of `pod-cidrs`.
    PodCidr,
    /// Operator: its address is, for this reader, another one's virtual address.
    VirtualCidr,
    /// Operator: outside of `node-cidrs`.
    NodeCidr,
    /// Operator: one of `refuse-identities`.
    ReservedIdentity,
    /// Operator: a namespace that is not allowed.
    Namespace,
    /// Operator: a service that is not allowed.
    Service,
}

impl Reason {
    /// All that do not come from the record's syntax.
    pub const OF_POLICY: [Self; 18] = [
        Self::ClusterName,
        Self::ClusterId,
        Self::ClusterLabel,
        Self::IdentityRange,
        Self::ImplausibleAddress,
        Self::PrefixTooWide,
        Self::NotAnAddress,
        Self::TooMany,
        Self::NotOwnCluster,
        Self::QuotaExceeded,
        Self::RecordSize,
        Self::Backends,
        Self::PodCidr,
        Self::VirtualCidr,
        Self::NodeCidr,
        Self::ReservedIdentity,
        Self::Namespace,
        Self::Service,
    ];

    /// The word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Record(word) => word,
            Self::ClusterName => "cluster_name_mismatch",
            Self::ClusterId => "cluster_id_mismatch",
            Self::ClusterLabel => "cluster_label_mismatch",
            Self::IdentityRange => "identity_out_of_range",
            Self::ImplausibleAddress => "implausible_address",
            Self::PrefixTooWide => "prefix_too_wide",
            Self::NotAnAddress => "not_an_address",
            Self::TooMany => "too_many",
            Self::NotOwnCluster => "not_own_cluster",
            Self::QuotaExceeded => "quota_exceeded",
            Self::RecordSize => "record_too_large",
            Self::Backends => "too_many_backends",
            Self::PodCidr => "outside_pod_cidrs",
            Self::VirtualCidr => "virtual_address",
            Self::NodeCidr => "outside_node_cidrs",
            Self::ReservedIdentity => "identity_not_allowed",
            Self::Namespace => "namespace_not_allowed",
            Self::Service => "service_not_allowed",
        }
    }

    /// Whether the record itself is understood and the operator does not want it. What was held under
    /// its key is then wanted no more either; a record that nobody can read says nothing about it.
    pub const fn is_operators(self) -> bool {
        matches!(
            self,
            Self::RecordSize
                | Self::Backends
                | Self::PodCidr
                | Self::VirtualCidr
                | Self::NodeCidr
                | Self::ReservedIdentity
                | Self::Namespace
                | Self::Service
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a record is refused: the reason, and a sentence with what it says and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// The reason.
    pub reason: Reason,
    /// The sentence.
    pub detail: String,
}

impl Refusal {
    pub(super) fn new(reason: Reason, detail: String) -> Self {
        Self { reason, detail }
    }
}

pub(super) fn refuse<T>(reason: Reason, detail: String) -> Result<T, Refusal> {
    Err(Refusal::new(reason, detail))
}
