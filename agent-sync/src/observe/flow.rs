//! A packet or a call, and who is at its ends.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use clustermesh_kvstore::cluster::{ClusterName, NamespacedName};
use clustermesh_kvstore::labels::{Labels, SOURCE_K8S};
use ebpf_global_svc::abi::{EVENT_POLICY, Event, event_kind};
use jiff::Timestamp;

/// Label of a pod's namespace, as Cilium has it.
const NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

/// An event with all that the engine knows about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// When it happened.
    pub time: Timestamp,
    /// As the programs told it.
    pub event: Event,
    /// Who sends.
    pub source: End,
    /// Who receives.
    pub destination: End,
    /// The service that was called, if it is known.
    pub service: Option<NamespacedName>,
    /// The rule that decided, in words.
    pub rule: Option<Box<str>>,
}

/// One end of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Its address; none: not known, as of a process that calls.
    pub ip: Option<IpAddr>,
    /// Host order; 0: none.
    pub port: u16,
    /// 0: not known.
    pub identity: u32,
    /// None: outside of the mesh, or not known.
    pub cluster: Option<ClusterName>,
    /// What its identity means.
    pub labels: Option<Arc<Labels>>,
    /// Its node, if it is one.
    pub node: Option<Box<str>>,
    /// The mesh has its address, so that its cluster has a name for it.
    pub is_known: bool,
}

impl End {
    /// Its namespace.
    pub fn namespace(&self) -> Option<&str> {
        let label = self.labels.as_ref()?.find(NAMESPACE_LABEL)?;
        (label.source == SOURCE_K8S).then_some(label.value.as_str())
    }
}

/// What kind of thing is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A packet was dropped, or a call refused.
    Drop,
    /// A policy decided.
    PolicyVerdict,
    /// A packet was passed on.
    Trace,
    /// A call got a backend.
    Call,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It went on.
    Forwarded,
    /// It did not.
    Dropped,
    /// It went on only because policies are audited.
    Audit,
    /// A frontend became a backend.
    Translated,
}

impl Flow {
    /// What is told.
    pub fn kind(&self) -> Kind {
        match self.event.kind {
            _ if self.event.flags & EVENT_POLICY != 0 => Kind::PolicyVerdict,
            event_kind::DROP => Kind::Drop,
            event_kind::CALL => Kind::Call,
            _ => Kind::Trace,
        }
    }

    /// What became of it.
    pub fn verdict(&self) -> Verdict {
        match self.event.kind {
            event_kind::DROP => Verdict::Dropped,
            event_kind::AUDIT => Verdict::Audit,
            event_kind::CALL => Verdict::Translated,
            _ => Verdict::Forwarded,
        }
    }
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Drop, Self::PolicyVerdict, Self::Trace, Self::Call];

    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::PolicyVerdict => "policy-verdict",
            Self::Trace => "trace",
            Self::Call => "call",
        }
    }

    /// Events of which flows of this kind are made: a bit for each [`event_kind`].
    pub fn events(self) -> u32 {
        match self {
            Self::Drop => 1 << event_kind::DROP,
            Self::PolicyVerdict => 1 << event_kind::DROP | 1 << event_kind::AUDIT | 1 << event_kind::ALLOW,
            Self::Trace => 1 << event_kind::TRACE,
            Self::Call => 1 << event_kind::CALL,
        }
    }
}

impl Verdict {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Forwarded, Self::Dropped, Self::Audit, Self::Translated];

    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forwarded => "FORWARDED",
            Self::Dropped => "DROPPED",
            Self::Audit => "AUDIT",
            Self::Translated => "TRANSLATED",
        }
    }

    /// Events of which flows with this verdict are made.
    pub fn events(self) -> u32 {
        match self {
            Self::Forwarded => 1 << event_kind::ALLOW | 1 << event_kind::TRACE,
            Self::Dropped => 1 << event_kind::DROP,
            Self::Audit => 1 << event_kind::AUDIT,
            Self::Translated => 1 << event_kind::CALL,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
