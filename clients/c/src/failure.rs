//! Errors as C is given them, and what is around every function.

use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use strait_client::Error;
use strait_client::address::AddressError;

/// What a program can do about an error. Numbers are never reused for another kind; a newer library may have more.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The host refused, or the kernel failed: code, reason, request_id, backtrace and details are the host's own.
    Remote = 1,
    /// A lease is over and the connection is fine: map it again.
    LeaseExpired = 2,
    /// The connection is over. What is mapped stays readable, everything else needs a new one.
    Disconnected = 3,
    /// No host to connect to.
    NoHost = 4,
    /// An argument that can never work; nothing was sent.
    Argument = 5,
    /// It would work at another time: an operation under way uses the handle, or the handle is over.
    State = 6,
    /// The client was connected before a fork, and this is the child.
    Forked = 7,
    /// What this library does not do yet.
    Unsupported = 8,
    /// The host said something that the protocol does not allow.
    Protocol = 9,
    /// Linux refused memory, a descriptor or a thread.
    Linux = 10,
    /// A bug in this library (reason HOST, as for a bug in the host).
    Bug = 11,
}

/// An error. Whoever gets one frees it with strait_error_free.
#[derive(Debug)]
pub struct Failure {
    pub(crate) kind: ErrorKind,
    pub(crate) code: CString,
    pub(crate) reason: CString,
    pub(crate) message: CString,
    pub(crate) request_id: Option<CString>,
    pub(crate) backtrace: Option<CString>,
    pub(crate) details: Option<CString>,
}

impl Failure {
    fn new(kind: ErrorKind, code: &str, reason: &str, message: String) -> Self {
        Self {
            kind,
            code: c_text(code),
            reason: c_text(reason),
            message: c_text(message),
            request_id: None,
            backtrace: None,
            details: None,
        }
    }

    pub(crate) fn argument(message: String) -> Self {
        Self::new(
            ErrorKind::Argument,
            "INVALID_ARGUMENT",
            "BAD_ARGUMENT",
            message,
        )
    }

    pub(crate) fn null(what: &str) -> Self {
        Self::argument(format!("`{what}` is NULL"))
    }

    pub(crate) fn state(message: &str) -> Self {
        Self::new(
            ErrorKind::State,
            "FAILED_PRECONDITION",
            "WRONG_STATE",
            message.to_owned(),
        )
    }

    fn bug(panic: &(dyn std::any::Any + Send)) -> Self {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
        let message = format!(
            "a bug of libstrait: it panicked: {}",
            said.unwrap_or("it did not say why")
        );
        Self::new(ErrorKind::Bug, "INTERNAL", "HOST", message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (kind, code, reason) = match &error {
            Error::Remote(remote) => {
                let mut failure = Self::new(
                    ErrorKind::Remote,
                    &remote.code,
                    &remote.reason,
                    remote.message.clone(),
                );
                failure.request_id = Some(c_text(&*remote.request_id));
                failure.backtrace = remote.backtrace.as_deref().map(c_text);
                if !remote.details.is_empty() {
                    failure.details = serde_json::to_string(&remote.details).ok().map(c_text);
                }
                return failure;
            }
            Error::LeaseExpired {
                message,
                request_id,
            } => {
                let (code, reason) = ("FAILED_PRECONDITION", "LEASE_EXPIRED");
                let mut failure = Self::new(ErrorKind::LeaseExpired, code, reason, message.clone());
                failure.request_id = Some(c_text(&**request_id));
                return failure;
            }
            Error::Disconnected => (ErrorKind::Disconnected, "UNAVAILABLE", "DISCONNECTED"),
            Error::NoHost { .. } | Error::Address(AddressError::Nowhere(_)) => {
                (ErrorKind::NoHost, "UNAVAILABLE", "NO_HOST")
            }
            Error::Address(AddressError::Form(address)) if is_remote(address) => {
                (ErrorKind::Unsupported, "UNIMPLEMENTED", "REMOTE_ADDRESS")
            }
            Error::Address(_) => (ErrorKind::Argument, "INVALID_ARGUMENT", "BAD_ADDRESS"),
            Error::Forked { .. } => (ErrorKind::Forked, "FAILED_PRECONDITION", "FORKED"),
            Error::Protocol(_) => (ErrorKind::Protocol, "INTERNAL", "BROKEN_PROTOCOL"),
            Error::Memory(_) | Error::Linux { .. } => {
                (ErrorKind::Linux, "RESOURCE_EXHAUSTED", "LINUX")
            }
            Error::StillWritten { .. } | Error::NotWritable { .. } => {
                (ErrorKind::State, "FAILED_PRECONDITION", "WRONG_STATE")
            }
            Error::RequestTooLong { .. }
            | Error::RequestId(_)
            | Error::NoTensor { .. }
            | Error::Dtype { .. }
            | Error::Length { .. }
            | Error::Inputs { .. }
            | Error::Shape { .. }
            | Error::Layout(_) => (ErrorKind::Argument, "INVALID_ARGUMENT", "BAD_ARGUMENT"),
        };
        Self::new(kind, code, reason, error.to_string())
    }
}

/// Whether an address is one of a host on another machine, or of one that listens on TCP.
fn is_remote(address: &str) -> bool {
    [
        "tcp://",
        "tls://",
        "grpc://",
        "grpc+tcp://",
        "grpc+tls://",
        "grpc+unix://",
    ]
    .iter()
    .any(|scheme| address.starts_with(scheme))
}

/// Around every function that may fail: what it fails with, and a panic, as an error for C.
pub(crate) fn entry(run: impl FnOnce() -> Result<(), Failure>) -> Option<Box<Failure>> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => None,
        Ok(Err(failure)) => Some(Box::new(failure)),
        Err(panic) => Some(Box::new(Failure::bug(&*panic))),
    }
}

/// Around every function that has an answer for everything: `otherwise` where there is no handle, or a panic.
pub(crate) fn asked<H, T>(handle: Option<&H>, otherwise: T, ask: impl FnOnce(&H) -> T) -> T {
    let Some(handle) = handle else {
        return otherwise;
    };
    catch_unwind(AssertUnwindSafe(|| ask(handle))).unwrap_or(otherwise)
}

/// Ends a handle.
pub(crate) fn end<T>(handle: Option<Box<T>>) {
    // There is nobody to tell of a panic.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(handle)));
}

/// As C has texts; one with a 0 in it, which no text of the protocol has, is cut there.
pub(crate) fn c_text(text: impl Into<Vec<u8>>) -> CString {
    let mut bytes = text.into();
    bytes.truncate(
        bytes
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(bytes.len()),
    );
    CString::new(bytes).unwrap_or_default()
}
