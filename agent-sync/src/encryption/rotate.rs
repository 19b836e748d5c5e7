//! Asking for a new key.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::announce::PublicKeys;

/// Answered once the new keys are announced, or when there are none.
pub type Rotate = oneshot::Sender<Result<PublicKeys, RotateError>>;

/// For who may ask.
pub type RotateDesk = mpsc::Sender<Rotate>;

/// Why there is no new key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RotateError {
    /// One at a time.
    #[error(
        "the key before the present one is still in use ({0} nodes have not moved yet, others may still send by \
         it): try again in a minute, `clustermesh encrypt status` shows who is waited for"
    )]
    UnderWay(usize),
    /// Those before it have to go first.
    #[error("the key for IPsec was replaced a moment ago: try again in {0} s")]
    TooYoung(u64),
    /// The files of keys.
    #[error("{0}")]
    Key(String),
}

/// Whether a key of this age is to be replaced.
pub(super) fn is_due(interval: Option<Duration>, age: Option<Duration>) -> bool {
    matches!((interval, age), (Some(interval), Some(age)) if age >= interval)
}
