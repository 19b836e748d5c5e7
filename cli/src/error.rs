//! What the command line tells its caller when something fails.

use std::fmt::Display;

/// The caller's mistake: a flag, a file, a value in a file. Ends the program with status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// A [`Usage`] error from anything that can be displayed.
pub(crate) fn usage(message: impl Display) -> anyhow::Error {
    anyhow::Error::new(Usage(message.to_string()))
}

/// Exit status for `error`: 2 for the caller's mistakes, else 1.
pub(crate) fn exit_status(error: &anyhow::Error) -> u8 {
    if error.chain().any(|cause| cause.is::<Usage>()) { 2 } else { 1 }
}
