//! What the programs tell of single packets and calls, for those who look on.
//!
//! [`reader`] (edge) takes events out of the kernel's ring, has the engine say who and what they are about
//! ([`flow`], plain), and leaves them with the [`hub`] (plain), which remembers some and hands them to whoever
//! observes. The hub knows who wants what, and so does the engine through it, which tells the programs: what nobody
//! wants is not written in the first place. [`filter`] (plain) decides what an observer gets to see, [`names`] (edge)
//! reads what pods are called, which the engine does not keep.
//!
//! All of it is bounded: what is remembered, what waits for a slow observer, and what the programs send.

mod filter;
mod flow;
mod hub;
mod message;
mod names;
mod reader;

pub use filter::{EndFilter, FilterError, FlowFilter};
pub use flow::{End, Flow, Kind, Verdict};
pub use hub::{Demand, Hub, Limits, Observer, Received};
pub(crate) use message::{message, nanoseconds, reason_text};
pub(crate) use names::PodNames;
pub(crate) use reader::read_events;
