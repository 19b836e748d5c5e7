use serde::{Deserialize, Serialize};

use super::{Digest, SourceTime};
use crate::record::{MAX_VALUE, RecordError};

/// Entries of [`DigestRecord::recent`] that a writer states and a reader looks at; 10 kB at most.
pub const MAX_RECENT: usize = 256;

/// What the writer of a prefix says of it, in a key beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DigestRecord {
    /// Of all that the writer wants below the prefix and has written.
    pub digest: Digest,
    /// The digest is that of this revision of the etcd that the record stands in.
    pub revision: i64,
    /// Newest changes, ascending by revision: those since the record before this one, or the last
    /// [`MAX_RECENT`] of them.
    pub recent: Vec<Timed>,
}

/// A revision, and the earliest source event among those that it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(i64, i64)", into = "(i64, i64)")]
pub struct Timed {
    /// Of the transaction that wrote the change.
    pub revision: i64,
    /// Of the event.
    pub at: SourceTime,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    digest: String,
    count: u64,
    revision: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    recent: Vec<Timed>,
}

impl DigestRecord {
    /// As JSON.
    pub fn encode(&self) -> Vec<u8> {
        let wire = Wire {
            digest: self.digest.to_string(),
            count: self.digest.count,
            revision: self.revision,
            recent: self.recent.clone(),
        };
        // Numbers, a text and a list: nothing that JSON could refuse.
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// Reads what stands in etcd. Of a longer list than a writer may state, the newest entries count.
    ///
    /// # Errors
    /// The writer's: not such a record.
    pub fn decode(value: &[u8]) -> Result<Self, RecordError> {
        if value.len() > MAX_VALUE {
            return Err(RecordError::TooLarge(value.len()));
        }
        let bad = |error: String| RecordError::BadJson(error.into());
        let mut wire: Wire = serde_json::from_slice(value).map_err(|error| bad(error.to_string()))?;
        let sum = sum(&wire.digest).ok_or_else(|| bad("a digest has 16 hexadecimal digits".into()))?;
        wire.recent.drain(..wire.recent.len().saturating_sub(MAX_RECENT));
        Ok(Self { digest: Digest { sum, count: wire.count }, revision: wire.revision, recent: wire.recent })
    }
}

fn sum(text: &str) -> Option<u64> {
    // The parser alone would take a sign.
    let plain = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(text, 16).ok().filter(|_| plain)
}

impl From<(i64, i64)> for Timed {
    fn from((revision, at): (i64, i64)) -> Self {
        Self { revision, at: SourceTime(at) }
    }
}

impl From<Timed> for (i64, i64) {
    fn from(timed: Timed) -> Self {
        (timed.revision, timed.at.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(revision: i64) -> Timed {
        Timed { revision, at: SourceTime(1_763_690_000_000_000 + revision) }
    }

    #[test]
    fn records_read_as_they_were_written() {
        let digest = Digest { sum: 0x1f, count: 2 };
        let record = DigestRecord { digest, revision: 7, recent: vec![timed(6), timed(7)] };
        let text = r#"{"digest":"000000000000001f","count":2,"revision":7,"recent":[[6,1763690000000006],[7,1763690000000007]]}"#;
        assert_eq!(String::from_utf8(record.encode()).unwrap(), text);
        assert_eq!(DigestRecord::decode(text.as_bytes()), Ok(record));
        let quiet = r#"{"digest":"000000000000001f","count":2,"revision":7}"#;
        assert_eq!(DigestRecord::decode(quiet.as_bytes()).unwrap().encode(), quiet.as_bytes());
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for bad in [
            "",
            "{}",
            r#"{"digest":"1f","count":2,"revision":7}"#,
            r#"{"digest":"+00000000000001f","count":2,"revision":7}"#,
            r#"{"digest":"000000000000001f","count":-2,"revision":7}"#,
            r#"{"digest":"000000000000001f","count":2,"revision":7,"recent":[[1]]}"#,
        ] {
            assert!(DigestRecord::decode(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(matches!(DigestRecord::decode(&vec![b' '; MAX_VALUE + 1]), Err(RecordError::TooLarge(_))));
    }

    #[test]
    fn a_list_without_end_is_cut() {
        let recent = (0..2 * MAX_RECENT as i64).map(timed).collect();
        let endless = DigestRecord { recent, ..DigestRecord::default() };
        let read = DigestRecord::decode(&endless.encode()).unwrap().recent;
        assert_eq!((read.len(), read[0]), (MAX_RECENT, timed(MAX_RECENT as i64)));
    }
}
