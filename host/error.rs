//! What every operation's error has in common: a gRPC code, a stable reason, a message.
//!
//! Each room has its own error enum; the edges turn it into a [`Status`] once.

use serde::{Deserialize, Serialize};
use std::fmt;

use strait_memory::{BudgetExceeded, MemoryError, ParkError};
pub use strait_protocol::{Code, Reason};

use crate::text::{self, BACKTRACE_BYTES_MAX, MESSAGE_BYTES_MAX};

/// An error as it leaves the host: on the data socket as ERROR, over Flight as a gRPC status.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Portable", into = "Portable")]
pub struct Status {
    /// For programs: the class.
    pub code: Code,
    /// For programs: the case. The list is in `docs/protocol.md`.
    pub reason: Reason,
    /// For people.
    pub message: String,
    /// The guest's stack, for a trap.
    pub backtrace: Option<String>,
    /// Names and figures.
    pub details: serde_json::Map<String, serde_json::Value>,
}

/// A [`Status`] on its way between two processes of one host.
#[derive(Serialize, Deserialize)]
struct Portable {
    code: String,
    reason: String,
    message: String,
    backtrace: Option<String>,
    /// JSON, because its values are of any type.
    details: String,
}

impl From<Status> for Portable {
    fn from(status: Status) -> Self {
        Self {
            code: status.code.name().to_owned(),
            reason: status.reason.name().to_owned(),
            message: status.message,
            backtrace: status.backtrace,
            details: serde_json::Value::from(status.details).to_string(),
        }
    }
}

impl TryFrom<Portable> for Status {
    type Error = String;

    fn try_from(portable: Portable) -> Result<Self, String> {
        let code = Code::ALL.iter().find(|code| **code == *portable.code);
        let reason = Reason::ALL.iter().find(|word| **word == *portable.reason);
        let (Some(&code), Some(&reason)) = (code, reason) else {
            return Err(format!(
                "no code {:?} or reason {:?}",
                portable.code, portable.reason
            ));
        };
        let backtrace = portable.backtrace;
        Ok(Self {
            code,
            reason,
            // That process may not have been honest.
            message: text::one_line(portable.message, MESSAGE_BYTES_MAX),
            backtrace: backtrace.map(|text| text::lines(text, BACKTRACE_BYTES_MAX)),
            details: serde_json::from_str(&portable.details).map_err(|e| e.to_string())?,
        })
    }
}

impl Status {
    /// A status without backtrace and details. `message` may quote texts of others: what is more than a
    /// line of it is escaped, what is longer than 4 KiB cut.
    pub fn new(code: Code, reason: Reason, message: impl Into<String>) -> Self {
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
            Reason::BudgetExceeded,
            format!(
                "{what}; the host has no descriptors left: release segments and close connections, or have the operator raise its limit of open files"
            ),
        )
    }
}

/// Whether the host has no more to give, or a principal has all that it may have.
#[must_use]
pub fn used_up(exceeded: &BudgetExceeded) -> Reason {
    match exceeded.is_quota() {
        true => Reason::QuotaExceeded,
        false => Reason::BudgetExceeded,
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
        write!(f, "{} ({}/{})", self.message, self.code, self.reason)
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
            MemoryError::System { source, .. }
            | MemoryError::Park(ParkError::System { source, .. })
                if source.kind() == std::io::ErrorKind::OutOfMemory =>
            {
                Self::new(Code::ResourceExhausted, Reason::NoMemory, message)
            }
            MemoryError::Budget(exceeded) | MemoryError::Park(ParkError::TooMany(exceeded)) => {
                Self::new(Code::ResourceExhausted, used_up(&exceeded), message)
            }
            // A descriptor that its sender kept from being sealed.
            MemoryError::SealsLocked { .. } | MemoryError::Leased { .. } => {
                Self::new(Code::InvalidArgument, Reason::BadSegment, message)
            }
            MemoryError::StillWritable { .. } | MemoryError::KeptWritable { .. } => {
                Self::new(Code::FailedPrecondition, Reason::StillWritable, message)
            }
            _ => Self::new(Code::Internal, Reason::Host, message),
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
            Reason::FlightNotFound,
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
        let long = Status::new(
            Code::NotFound,
            Reason::FlightNotFound,
            "\n".repeat(60 << 20),
        )
        .with("name", "ü".repeat(9000));
        assert!(long.message.ends_with("… (62910464 bytes more)"));
        let name = long.details["name"].as_str().expect("text");
        assert!(name.ends_with("ü… (13904 bytes more)"), "{name}");
    }
}
