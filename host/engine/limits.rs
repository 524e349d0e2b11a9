//! What a guest may use, and why it is ended.

use serde::{Deserialize, Serialize};

/// What one invocation may use. Sizes in bytes; the wall time is the request's deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The guest's own memory, without windows.
    pub guest_bytes: u64,
    /// Inputs and outputs together.
    pub window_bytes: u64,
    /// Outputs together, as `open` announces them.
    pub result_bytes: u64,
    /// Log lines together, each with 64 bytes for what stands before its text.
    pub log_bytes: u64,
}

/// Most elements of a guest's tables: function pointers, not data.
pub(super) const TABLE_ELEMENTS_MAX: usize = 100_000;

/// Why the host ended a guest.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Stop {
    #[error("cancelled")]
    Cancelled,
    #[error("deadline of {0} ms")]
    Deadline(u64),
    #[error("it wrote to an input")]
    InputWritten,
    #[error("guest memory of {asked} bytes, the limit is {limit}")]
    GuestBytes { asked: u64, limit: u64 },
    #[error("log lines of {asked} bytes, the limit is {limit}")]
    LogBytes { asked: u64, limit: u64 },
    #[error("tables of {asked} elements, the limit is {TABLE_ELEMENTS_MAX}")]
    Table { asked: usize },
    #[error("a log line that is not in the guest's own memory: {0}")]
    LogRange(String),
}
