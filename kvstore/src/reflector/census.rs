//! Sums what stands in etcd, beside whoever watches it.

use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio::time::sleep;

use super::{Backoff, Connection};
use crate::digest::{Digest, record_hash};
use crate::etcd::{KeyRange, Session, SessionError};

/// Keys in one reply.
const PAGE: i64 = 500;
/// From one page to the next: nobody is in a hurry, and etcd has other readers.
const PAUSE: Duration = Duration::from_millis(50);

impl Connection {
    /// The digest of all keys below `prefix`, and the revision at which they stood so. Holds one page of
    /// them at a time. Tries until etcd lets it come to the end.
    pub async fn census(&self, prefix: &str) -> (i64, Digest) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut rng = SmallRng::from_os_rng();
        loop {
            let session = self.session().await;
            match count(&session, &KeyRange::of(prefix)).await {
                Ok(found) => return found,
                Err(error) => tracing::debug!(prefix, %error, "cannot sum what is in etcd, trying again"),
            }
            sleep(backoff.wait(&mut rng)).await;
        }
    }
}

async fn count(session: &Session, range: &KeyRange) -> Result<(i64, Digest), SessionError> {
    let mut digest = Digest::default();
    let (mut last, mut revision) = (None, 0);
    loop {
        let page = session.list_page(range, last.as_deref(), PAGE, revision).await?;
        if revision == 0 {
            revision = page.revision;
        }
        for kv in &page.kvs {
            // Others are no keys that a reflector would tell of.
            if let Some(suffix) = range.suffix(&kv.key) {
                digest.add(record_hash(suffix, &kv.value));
            }
        }
        match page.kvs.into_iter().next_back() {
            Some(kv) if page.more => last = Some(kv.key),
            _ => return Ok((revision, digest)),
        }
        sleep(PAUSE).await;
    }
}
