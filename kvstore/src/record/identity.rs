use super::{MAX_VALUE, Record, RecordError};
use crate::cluster::Identity;
use crate::key::Kind;
use crate::labels::Labels;

/// First number that does not fit into a packet.
const END: u32 = 1 << 24;

/// A security identity: the key is its number, the value its labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityRecord {
    /// The number.
    pub id: Identity,
    /// The labels that it stands for.
    pub labels: Labels,
}

impl Record for IdentityRecord {
    const KIND: Kind = Kind::Identities;

    fn decode(suffix: &str, value: &[u8]) -> Result<Self, RecordError> {
        if value.len() > MAX_VALUE {
            return Err(RecordError::TooLarge(value.len()));
        }
        let id: u32 = suffix
            .parse()
            .ok()
            // "+1" and "01" are other keys for the same identity.
            .filter(|id: &u32| id.to_string() == suffix)
            .ok_or_else(|| RecordError::BadKey(suffix.into()))?;
        let text =
            std::str::from_utf8(value).map_err(|error| RecordError::BadLabels(error.to_string().into()))?;
        let labels = Labels::parse(text).map_err(|error| RecordError::BadLabels(error.to_string().into()))?;
        if labels.0.is_empty() {
            return Err(RecordError::BadLabels("there is none".into()));
        }
        Ok(Self { id: identity(id)?, labels })
    }

    fn suffix(&self) -> String {
        self.id.to_string()
    }

    fn encode(&self) -> Vec<u8> {
        self.labels.to_string().into_bytes()
    }
}

/// Checks that an identity can travel in a packet. Larger numbers are local to one node and never belong
/// into etcd.
pub(super) fn identity(id: u32) -> Result<Identity, RecordError> {
    if (1..END).contains(&id) { Ok(Identity(id)) } else { Err(RecordError::BadIdentity(id.into())) }
}
