//! What went wrong, for people, programs and the shell.

use std::error::Error as _;
use std::fmt;
use std::io;

use serde_json::{Map, Value, json};
use strait_client::address;
use strait_tensor::FileError;
use tokio::signal::unix::SignalKind;

use crate::error::Status;
use crate::text::on_one_line;

/// The exit code; the list for people is in `--help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// Nobody reads our output any more: no reason to complain.
    Quiet = 0,
    Other = 1,
    Usage = 2,
    Input = 3,
    Kernel = 4,
    Host = 5,
    Unfit = 6,
    /// As a shell counts a death by signal.
    Interrupt = 130,
    Terminate = 143,
}

impl Exit {
    /// For an error that a host made.
    fn of(code: &str, reason: &str) -> Self {
        match (code, reason) {
            (_, "GUEST_TRAP" | "INPUT_WRITTEN" | "BAD_ANSWER" | "KERNEL_FAILED") => Self::Kernel,
            ("RESOURCE_EXHAUSTED" | "DEADLINE_EXCEEDED" | "CANCELLED", _) => Self::Kernel,
            (_, "LEASE_EXPIRED") => Self::Other,
            (
                "INVALID_ARGUMENT"
                | "NOT_FOUND"
                | "ALREADY_EXISTS"
                | "FAILED_PRECONDITION"
                | "OUT_OF_RANGE"
                | "PERMISSION_DENIED"
                | "UNAUTHENTICATED"
                | "UNIMPLEMENTED",
                _,
            ) => Self::Input,
            ("UNAVAILABLE", _) => Self::Host,
            _ => Self::Other,
        }
    }
}

/// Why a command ends without its result.
#[derive(Debug)]
pub(super) struct Failure(Box<Facts>);

#[derive(Debug)]
struct Facts {
    exit: Exit,
    code: Option<String>,
    reason: String,
    message: String,
    request_id: Option<String>,
    backtrace: Option<String>,
    details: Map<String, Value>,
    /// The command's JSON object is written already.
    answered: bool,
}

impl Failure {
    fn new(exit: Exit, reason: &str, message: impl Into<String>) -> Self {
        Self(Box::new(Facts {
            exit,
            code: None,
            reason: reason.to_owned(),
            message: message.into(),
            request_id: None,
            backtrace: None,
            details: Map::new(),
            answered: false,
        }))
    }

    /// Options that contradict each other.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "USAGE", message)
    }

    /// Something that the caller gave does not fit.
    pub(super) fn input(reason: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Input, reason, message)
    }

    /// The machine, or strait itself.
    pub(super) fn other(reason: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Other, reason, message)
    }

    /// This machine, user or environment cannot run a host.
    pub(super) fn unfit(message: impl Into<String>) -> Self {
        Self::new(Exit::Unfit, "UNFIT", message)
    }

    /// What went wrong, alone.
    pub(super) fn message(&self) -> &str {
        &self.0.message
    }

    /// Stdout could not be written.
    pub(super) fn stdout(error: &io::Error) -> Self {
        let exit = if error.kind() == io::ErrorKind::BrokenPipe {
            Exit::Quiet
        } else {
            Exit::Other
        };
        Self::new(exit, "OUTPUT", format!("cannot write to stdout: {error}"))
    }

    /// A signal asked this process to end.
    pub(super) fn signal(kind: SignalKind) -> Self {
        let exit = if kind == SignalKind::interrupt() {
            Exit::Interrupt
        } else {
            Exit::Terminate
        };
        Self::new(
            exit,
            "SIGNAL",
            format!("ended by signal {}", kind.as_raw_value()),
        )
    }

    /// The same, with nothing more to write to stdout.
    pub(super) fn answered(mut self) -> Self {
        self.0.answered = true;
        self
    }

    /// The same as if it had happened with `target`, where a temporary path stands in its message.
    pub(super) fn about(mut self, temporary: &str, target: &str) -> Self {
        self.0.message = self.0.message.replace(temporary, target);
        self
    }

    /// The same with the request that it belongs to.
    pub(super) fn of_request(mut self, id: &str) -> Self {
        self.0.request_id = Some(id.to_owned());
        self
    }

    /// What to do, where the message, which is for clients of every language, does not name the
    /// command.
    fn hint(&self) -> Option<&'static str> {
        Some(match self.0.reason.as_str() {
            "FLIGHT_NOT_FOUND" => "`strait ls` lists the flights there are",
            "KERNEL_NOT_FOUND" | "AMBIGUOUS_KERNEL" => {
                "`strait kernels` lists the host's kernels, `strait kernels --local` the standard ones"
            }
            "UNKNOWN_INPUT" | "MISSING_INPUT" | "UNKNOWN_OUTPUT" | "UNKNOWN_PARAMETER"
            | "MISSING_PARAMETER" | "BAD_PARAMETER" => {
                "`strait kernels KERNEL` shows its ports and parameters (with --local: without a host)"
            }
            "NAME_TAKEN" => "`--replace` takes the name over, `strait rm NAME` frees it",
            "DEADLINE" => "`--deadline-ms` asks for more time",
            "DISCONNECTED" => "the host's log says why it ended or closed the connection",
            _ => return None,
        })
    }

    /// The exit code that the process ends with.
    pub(super) fn exit(&self) -> Exit {
        self.0.exit
    }

    /// Whether the command's JSON object is written already.
    pub(super) fn is_answered(&self) -> bool {
        self.0.answered
    }

    pub(super) fn to_json(&self) -> Value {
        let mut object = json!({
            "reason": self.0.reason,
            "message": self.0.message,
            "exit_code": self.0.exit as u8,
        });
        let optional = [
            ("code", &self.0.code),
            ("request_id", &self.0.request_id),
            ("backtrace", &self.0.backtrace),
            ("hint", &self.hint().map(str::to_owned)),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                object[key] = value.as_str().into();
            }
        }
        if !self.0.details.is_empty() {
            object["details"] = Value::Object(self.0.details.clone());
        }
        object
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Names, paths and guests' words are in it: none of them makes a line that looks like ours.
        let message = on_one_line(&self.0.message);
        write!(f, "strait: {message}\n  reason: {}", self.0.reason)?;
        if let Some(code) = &self.0.code {
            write!(f, " ({code})")?;
        }
        if let Some(hint) = self.hint() {
            write!(f, "\n  hint: {hint}")?;
        }
        if let Some(id) = &self.0.request_id {
            write!(f, "\n  request: {}", on_one_line(id))?;
        }
        if let Some(backtrace) = &self.0.backtrace {
            write!(f, "\n  guest backtrace:")?;
            for line in backtrace.trim_end().lines() {
                write!(f, "\n    {}", on_one_line(line))?;
            }
        }
        Ok(())
    }
}

impl From<strait_client::Error> for Failure {
    fn from(error: strait_client::Error) -> Self {
        use strait_client::Error;
        let mut message = error.to_string();
        if let (Error::Memory(_), Some(source)) = (&error, error.source()) {
            message = format!("{message}: {source}");
        }
        match error {
            Error::Address(address::AddressError::Form(_)) => Self::input("BAD_ADDRESS", message),
            Error::Address(_) | Error::NoHost { .. } => Self::new(Exit::Host, "NO_HOST", message),
            Error::Disconnected => Self::new(Exit::Host, "DISCONNECTED", message),
            Error::Remote(remote) => Self(Box::new(Facts {
                exit: Exit::of(&remote.code, &remote.reason),
                code: Some(remote.code),
                reason: remote.reason,
                message: remote.message,
                request_id: Some(remote.request_id),
                backtrace: remote.backtrace,
                details: remote.details,
                answered: false,
            })),
            Error::LeaseExpired {
                message,
                request_id,
            } => Self::other("LEASE_EXPIRED", message).of_request(&request_id),
            Error::RequestId(_) | Error::RequestTooLong { .. } => {
                Self::input("BAD_REQUEST", message)
            }
            Error::NoTensor { .. } => Self::input("TENSOR_NOT_FOUND", message),
            Error::Layout(_) => Self::input("BAD_TENSOR", message),
            Error::Protocol(_) => Self::new(Exit::Host, "PROTOCOL", message),
            _ => Self::other("CLIENT", message),
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self(Box::new(Facts {
            exit: Exit::of(status.code.name(), status.reason.name()),
            code: Some(status.code.name().to_owned()),
            reason: status.reason.name().to_owned(),
            message: status.message,
            request_id: None,
            backtrace: status.backtrace,
            details: status.details,
            answered: false,
        }))
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let message = error.to_string();
        match error {
            FileError::Io { error, .. } => Self::file(&error, message),
            FileError::NoTensor { .. } => Self::input("TENSOR_NOT_FOUND", message),
            _ => Self::input("BAD_FILE", message),
        }
    }
}

impl Failure {
    /// The operating system's answer about a file that the caller named.
    pub(super) fn file(error: &io::Error, message: String) -> Self {
        use io::ErrorKind::{
            InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied,
            UnexpectedEof,
        };
        match error.kind() {
            NotFound | PermissionDenied | IsADirectory | NotADirectory | UnexpectedEof
            | InvalidInput | InvalidFilename => Self::input("BAD_FILE", message),
            _ => Self::other("FILE", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_by_code_and_reason() {
        for (code, reason, exit) in [
            ("INVALID_ARGUMENT", "BAD_PARAMETER", Exit::Input),
            ("NOT_FOUND", "KERNEL_NOT_FOUND", Exit::Input),
            ("ALREADY_EXISTS", "NAME_TAKEN", Exit::Input),
            ("INTERNAL", "GUEST_TRAP", Exit::Kernel),
            ("INTERNAL", "KERNEL_FAILED", Exit::Kernel),
            ("RESOURCE_EXHAUSTED", "LIMIT_GUEST_BYTES", Exit::Kernel),
            ("DEADLINE_EXCEEDED", "DEADLINE", Exit::Kernel),
            ("UNAVAILABLE", "DRAINING", Exit::Host),
            ("INTERNAL", "HOST", Exit::Other),
            ("FAILED_PRECONDITION", "LEASE_EXPIRED", Exit::Other),
        ] {
            assert_eq!(Exit::of(code, reason), exit, "{code}/{reason}");
        }
    }

    #[test]
    fn nobody_forges_a_line() {
        let mut failure = Failure::input("BAD_FILE", "a\nstrait: done\u{1b}[2J.npy: not there");
        failure.0.backtrace = Some("  0: f\n1: g\rh\n".to_owned());
        let text = failure.to_string();
        let lines: Vec<&str> = text.split('\n').collect();
        assert_eq!(
            lines,
            [
                "strait: a\\nstrait: done\\u{1b}[2J.npy: not there",
                "  reason: BAD_FILE",
                "  guest backtrace:",
                "      0: f",
                "    1: g\\rh",
            ]
        );
        assert_eq!(
            failure.to_json()["message"],
            "a\nstrait: done\u{1b}[2J.npy: not there"
        );
    }

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let status = Status::new(
            crate::error::Code::NotFound,
            crate::error::Reason::FlightNotFound,
            "there is no flight `q`",
        );
        let failure = Failure::from(status).of_request("job-1");
        let text = failure.to_string();
        for part in [
            "no flight `q`",
            "FLIGHT_NOT_FOUND (NOT_FOUND)",
            "strait ls",
            "job-1",
        ] {
            assert!(text.contains(part), "{text:?} lacks {part:?}");
        }
        let json = failure.to_json();
        assert_eq!(json["exit_code"], 3);
        assert_eq!(json["request_id"], "job-1");
        assert_eq!(json["reason"], "FLIGHT_NOT_FOUND");
    }
}
