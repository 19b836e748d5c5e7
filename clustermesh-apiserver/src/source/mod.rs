//! Where facts come from. A source reads the outside world, checks what it reads, and hands on
//! changes of [`Object`](crate::objects::Object)s; it neither knows nor cares what becomes of them.

pub mod kubernetes;
pub mod manifests;
mod wire;

use crate::objects::Change;

/// What a source says.
#[derive(Clone, Debug, PartialEq)]
pub enum SourceEvent {
    /// Objects that changed together.
    Changes(Vec<Change>),
    /// Everything that was there at the start has been handed on. Said once.
    Synced,
    /// How many inputs are broken now; their last good state stands.
    Broken(usize),
    /// Why nothing more can be read at the moment, or that it can again.
    Trouble(Option<String>),
}
