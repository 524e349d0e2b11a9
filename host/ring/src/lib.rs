//! Frames through memory that a host and a client share.
//!
//! ```text
//! Ring ── receives and sends; looks for a while, then sleeps on the socket beside it
//!  ├▶ Half ── one side of the protocol: what it publishes, takes and believes. Over any `Shared` memory: loom's is one
//!  └▶ Spin ── how long to look again before sleeping, and how many threads may at a time
//! ```
//! `docs/protocol.md`, "Ring", is the contract. Neither side believes the other: a word that cannot be ends the ring, a slot
//! is copied out of the memory before it is looked at, and each side counts for itself and reads of its own words nothing back.

mod half;
mod ring;
mod spin;

pub use half::{Half, Shared, Violation};
pub use ring::{Came, Ring, RingError};
pub use spin::Spin;
