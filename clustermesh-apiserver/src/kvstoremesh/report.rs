//! `/status`: the mirror's whole view as JSON, for the command line and for people with curl.

use std::collections::BTreeMap;

use clustermesh_kvstore::import_policy::RefusedKey;
use serde::Serialize;

/// The mirror.
#[derive(Clone, Debug, Serialize)]
pub struct MirrorReport {
    /// Of this program.
    pub version: String,
    /// Agents may read the mirror.
    pub ready: bool,
    /// Why not, "" if they may.
    pub not_ready: String,
    /// The local etcd is connected.
    pub etcd_connected: bool,
    /// Why the import policy's file as it is now is not in force; "" if it is.
    pub import_policy_error: String,
    /// Clusters whose mirror is being removed.
    pub removing: usize,
    /// The clusters that are mirrored.
    pub remotes: Vec<RemoteReport>,
}

/// One remote cluster.
#[derive(Clone, Debug, Serialize)]
pub struct RemoteReport {
    /// Its name.
    pub name: String,
    /// Its etcd is connected.
    pub connected: bool,
    /// Its config was accepted.
    pub accepted: bool,
    /// Everything of it is in the local etcd.
    pub mirrored: bool,
    /// Keys that are yet to be written.
    pub pending_keys: usize,
    /// What keeps it from being mirrored now, "" if nothing does.
    pub error: String,
    /// What it has, and what of that is refused.
    pub kinds: Vec<KindReport>,
}

/// One kind of a cluster.
#[derive(Clone, Debug, Serialize)]
pub struct KindReport {
    /// The kind.
    pub kind: String,
    /// Records in the mirror.
    pub records: usize,
    /// Records that the import policy refused so far.
    pub refused_by_reason: BTreeMap<String, u64>,
    /// Records let in only because it is audited.
    pub audited_by_reason: BTreeMap<String, u64>,
    /// Keys refused lately, the newest first.
    pub newest_refused: Vec<RefusedReport>,
}

/// A key that was refused.
#[derive(Clone, Debug, Serialize)]
pub struct RefusedReport {
    /// Without its prefix; a long one is cut.
    pub key: String,
    /// One word.
    pub reason: String,
    /// A sentence.
    pub detail: String,
    /// It was let in all the same.
    pub audited: bool,
}

impl From<&RefusedKey> for RefusedReport {
    fn from(key: &RefusedKey) -> Self {
        let RefusedKey { key, reason, detail, audited } = key;
        Self { key: key.clone(), reason: reason.to_string(), detail: detail.clone(), audited: *audited }
    }
}
