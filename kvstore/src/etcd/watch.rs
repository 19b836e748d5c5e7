use std::time::Duration;

use etcd_client::{EventType, ResponseHeader, WatchResponse};
use tokio::time::timeout;

use super::{KeyValue, Session, SessionError};

/// A watch of one range.
pub struct WatchStream {
    stream: etcd_client::WatchStream,
    session: Session,
    what: String,
    deadline: Duration,
}

/// What a watch says. Each message has etcd's revision when it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchMessage {
    /// The watch stands.
    Created {
        /// etcd's revision.
        revision: i64,
    },
    /// Changes, in order.
    Events {
        /// etcd's revision.
        revision: i64,
        /// The changes.
        events: Vec<WatchEvent>,
    },
    /// Nothing but a sign of life. Says nothing about which events have been sent: etcd before 3.4.25 and
    /// 3.5.8 answers for watches that lag behind, too.
    Progress {
        /// etcd's revision.
        revision: i64,
    },
    /// The watch has ended because its revision is compacted.
    Compacted,
    /// The watch has ended, because etcd said so.
    Canceled {
        /// What it said.
        reason: String,
    },
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// Created or changed.
    Put(KeyValue),
    /// Deleted.
    Delete {
        /// The key.
        key: Vec<u8>,
        /// When.
        revision: i64,
    },
}

impl WatchStream {
    pub(super) const fn new(
        stream: etcd_client::WatchStream,
        session: Session,
        what: String,
        deadline: Duration,
    ) -> Self {
        Self { stream, session, what, deadline }
    }

    /// Waits for the next message. Has no deadline: silence is normal, see [`Self::request_progress`].
    ///
    /// # Errors
    /// See [`SessionError`]. The watch is of no use then.
    pub async fn message(&mut self) -> Result<WatchMessage, SessionError> {
        match self.stream.message().await {
            Ok(Some(message)) => self.translate(&message),
            Ok(None) => {
                let error = SessionError::Lost("the watch was closed".into());
                self.session.end(error.clone());
                Err(error)
            }
            Err(error) => Err(self.session.failed(&self.what, error)),
        }
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// The connection does not even take the question.
    pub async fn request_progress(&mut self) -> Result<(), SessionError> {
        match timeout(self.deadline, self.stream.request_progress()).await {
            Ok(asked) => asked.map_err(|error| self.session.failed(&self.what, error)),
            Err(_) => Err(SessionError::Timeout { what: self.what.clone(), after: self.deadline }),
        }
    }

    fn translate(&self, message: &WatchResponse) -> Result<WatchMessage, SessionError> {
        let revision = match message.header() {
            Some(header) => {
                self.session.check_header(header)?;
                ResponseHeader::revision(header)
            }
            None => 0,
        };
        if message.compact_revision() > 0 {
            return Ok(WatchMessage::Compacted);
        }
        if message.canceled() {
            if message.cancel_reason().contains("permission denied") {
                return Err(SessionError::PermissionDenied { what: self.what.clone() });
            }
            return Ok(WatchMessage::Canceled { reason: message.cancel_reason().to_owned() });
        }
        if message.created() {
            return Ok(WatchMessage::Created { revision });
        }
        let events = message.events().iter().filter_map(|event| {
            let kv = event.kv()?.clone();
            Some(match event.event_type() {
                EventType::Put => WatchEvent::Put(kv.into()),
                EventType::Delete => {
                    WatchEvent::Delete { key: kv.key().to_vec(), revision: kv.mod_revision() }
                }
            })
        });
        let events: Vec<_> = events.collect();
        Ok(match events.is_empty() {
            true => WatchMessage::Progress { revision },
            false => WatchMessage::Events { revision, events },
        })
    }
}

impl std::fmt::Debug for WatchStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WatchStream({})", self.what)
    }
}
