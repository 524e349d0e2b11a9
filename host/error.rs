//! What every operation's error has in common: a gRPC code, a stable reason, a message.
//!
//! Each room has its own error enum; the edges turn it into a [`Status`] once.

use std::fmt;

use strait_memory::{MemoryError, ParkError};

use crate::text::{self, MESSAGE_BYTES_MAX};

/// The gRPC codes that strait uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The caller asked for something that can never work.
    InvalidArgument,
    /// No such tensor, kernel or segment for this principal.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// It would work in another state.
    FailedPrecondition,
    /// A limit, quota or budget is used up.
    ResourceExhausted,
    /// Too large for this way; another way exists.
    OutOfRange,
    /// Took longer than allowed.
    DeadlineExceeded,
    /// The caller asked for it to end.
    Cancelled,
    /// The guest broke, or the host has a bug; the reason says which.
    Internal,
    /// Not for this principal.
    PermissionDenied,
    /// The host is ending.
    Unavailable,
    /// Not in this version.
    Unimplemented,
}

impl Code {
    /// gRPC's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::Cancelled => "CANCELLED",
            Self::Internal => "INTERNAL",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::Unavailable => "UNAVAILABLE",
            Self::Unimplemented => "UNIMPLEMENTED",
        }
    }
}

/// An error as it leaves the host: on the data socket as ERROR, over Flight as a gRPC status.
#[derive(Clone, Debug)]
pub struct Status {
    /// For programs: the class.
    pub code: Code,
    /// For programs: the case. The list is in `docs/protocol.md`.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// The guest's stack, for a trap.
    pub backtrace: Option<String>,
    /// Names and figures.
    pub details: serde_json::Map<String, serde_json::Value>,
}

impl Status {
    /// A status without backtrace and details. `message` may quote texts of others: what is more than a
    /// line of it is escaped, what is longer than 4 KiB cut.
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: text::one_line(message.into(), MESSAGE_BYTES_MAX),
            backtrace: None,
            details: serde_json::Map::new(),
        }
    }

    /// The same with one more detail; text as in the message.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<serde_json::Value>) -> Self {
        let value = match value.into() {
            serde_json::Value::String(text) => text::one_line(text, MESSAGE_BYTES_MAX).into(),
            other => other,
        };
        self.details.insert(key.to_owned(), value);
        self
    }
}

impl Status {
    /// The host's table of descriptors is full; `what` failed for that.
    #[must_use]
    pub fn no_descriptors(what: &str) -> Self {
        Self::new(
            Code::ResourceExhausted,
            "BUDGET_EXCEEDED",
            format!(
                "{what}; the host has no descriptors left: release segments and close connections, or have the operator raise its limit of open files"
            ),
        )
    }
}

/// Whether that is why Linux refused.
#[must_use]
pub fn out_of_descriptors(error: &std::io::Error) -> bool {
    matches!(
        rustix::io::Errno::from_io_error(error),
        Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
    )
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}/{})", self.message, self.code.name(), self.reason)
    }
}

impl std::error::Error for Status {}

impl From<MemoryError> for Status {
    fn from(error: MemoryError) -> Self {
        let message = error.to_string();
        match error {
            MemoryError::System { source, .. }
            | MemoryError::Park(ParkError::System { source, .. })
                if out_of_descriptors(&source) =>
            {
                Self::no_descriptors(&message)
            }
            MemoryError::Budget(_) | MemoryError::Park(ParkError::TooMany(_)) => {
                Self::new(Code::ResourceExhausted, "BUDGET_EXCEEDED", message)
            }
            // A descriptor that its sender kept from being sealed.
            MemoryError::SealsLocked { .. } | MemoryError::Leased { .. } => {
                Self::new(Code::InvalidArgument, "BAD_SEGMENT", message)
            }
            MemoryError::StillWritable { .. } => {
                Self::new(Code::FailedPrecondition, "STILL_WRITABLE", message)
            }
            _ => Self::new(Code::Internal, "HOST", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_stays_on_one_line_and_short() {
        let status = Status::new(
            Code::NotFound,
            "X",
            "no `a\n2026 INFO forged\r\0\u{1b}[2J\u{2028}ü`",
        )
        .with("name", "a\nb")
        .with("count", 7);
        assert_eq!(
            status.message,
            "no `a\\n2026 INFO forged\\r\\u{0}\\u{1b}[2J\\u{2028}ü`"
        );
        assert_eq!(status.details["name"], "a\\nb");
        assert_eq!(status.details["count"], 7);
        let long =
            Status::new(Code::NotFound, "X", "\n".repeat(60 << 20)).with("name", "ü".repeat(9000));
        assert!(long.message.ends_with("… (62910464 bytes more)"));
        let name = long.details["name"].as_str().expect("text");
        assert!(name.ends_with("ü… (13904 bytes more)"), "{name}");
    }
}
