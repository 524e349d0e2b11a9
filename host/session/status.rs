//! Every room's errors as a [`Status`]: one exhaustive match each.

use strait_memory::{AdoptError, MemoryError};
use strait_tensor::LayoutError;

use super::state::WrongState;
use super::workers::QueueFull;
use crate::engine::{InvokeError, LoadError};
use crate::error::{Code, Status, out_of_descriptors};
use crate::lease::{LeaseError, SealError};
use crate::plugin::{CheckError, PluginError};

impl From<LeaseError> for Status {
    fn from(error: LeaseError) -> Self {
        let (code, reason) = match &error {
            LeaseError::NoLease(_) => (Code::NotFound, "SEGMENT_NOT_FOUND"),
            LeaseError::Expired { .. } | LeaseError::NotYours(_) => {
                (Code::FailedPrecondition, "LEASE_EXPIRED")
            }
        };
        Self::new(code, reason, error.to_string())
    }
}

impl From<SealError> for Status {
    fn from(error: SealError) -> Self {
        match error {
            SealError::Memory(error) => error.into(),
            SealError::Tampered(_) => {
                Self::new(Code::InvalidArgument, "BAD_SEGMENT", error.to_string())
            }
            SealError::Lost(_) => Self::new(Code::Internal, "HOST", error.to_string()),
        }
    }
}

impl From<AdoptError> for Status {
    fn from(error: AdoptError) -> Self {
        let message = error.to_string();
        match error {
            AdoptError::Budget(_) => Self::new(Code::ResourceExhausted, "BUDGET_EXCEEDED", message),
            AdoptError::System { source, .. } if out_of_descriptors(&source) => {
                Self::no_descriptors(&message)
            }
            AdoptError::System { .. } => Self::new(Code::Internal, "HOST", message),
            AdoptError::NotMemfd { .. }
            | AdoptError::NotTmpfs { .. }
            | AdoptError::Resizable { .. }
            | AdoptError::Writable { .. }
            | AdoptError::Unaligned { .. }
            | AdoptError::OutOfRange { .. }
            | AdoptError::Overlap { .. }
            | AdoptError::Hole { .. }
            | AdoptError::Leased => Self::new(Code::InvalidArgument, "BAD_SEGMENT", message),
        }
    }
}

impl From<LayoutError> for Status {
    fn from(error: LayoutError) -> Self {
        Self::new(Code::InvalidArgument, "BAD_TENSOR", error.to_string())
    }
}

impl From<WrongState> for Status {
    fn from(error: WrongState) -> Self {
        Self::new(Code::FailedPrecondition, "WRONG_STATE", error.to_string())
            .with("from", error.from.to_string())
            .with("to", error.to.to_string())
    }
}

impl From<QueueFull> for Status {
    fn from(error: QueueFull) -> Self {
        Self::new(Code::ResourceExhausted, "QUOTA_EXCEEDED", error.to_string())
    }
}

impl From<PluginError> for Status {
    fn from(error: PluginError) -> Self {
        let (code, reason) = match &error {
            PluginError::Description { .. } => (Code::InvalidArgument, "BAD_PLUGIN"),
            PluginError::NameTaken(_) => (Code::AlreadyExists, "NAME_TAKEN"),
            PluginError::KernelNotFound { .. } => (Code::NotFound, "KERNEL_NOT_FOUND"),
            PluginError::Ambiguous { .. } => (Code::FailedPrecondition, "AMBIGUOUS_KERNEL"),
        };
        Self::new(code, reason, error.to_string())
    }
}

impl From<LoadError> for Status {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Plugin(error) => error.into(),
            LoadError::NotAPlugin(_) | LoadError::Describe(_) => {
                Self::new(Code::InvalidArgument, "BAD_PLUGIN", error.to_string())
            }
        }
    }
}

impl From<CheckError> for Status {
    fn from(error: CheckError) -> Self {
        let (reason, name) = match &error {
            CheckError::UnknownInput { port, .. } => ("UNKNOWN_INPUT", port),
            CheckError::MissingInput { port, .. } => ("MISSING_INPUT", port),
            CheckError::BadInput { port, .. } => ("BAD_INPUT", port),
            CheckError::UnknownParameter { name, .. } => ("UNKNOWN_PARAMETER", name),
            CheckError::MissingParameter { name, .. } => ("MISSING_PARAMETER", name),
            CheckError::BadParameter { name, .. } => ("BAD_PARAMETER", name),
            CheckError::UnknownOutput { port, .. } => ("UNKNOWN_OUTPUT", port),
        };
        Self::new(Code::InvalidArgument, reason, error.to_string()).with("name", name.as_str())
    }
}

impl From<InvokeError> for Status {
    fn from(error: InvokeError) -> Self {
        let message = error.to_string();
        let status = |code, reason| Self::new(code, reason, message.clone());
        match error {
            InvokeError::Load(error) => (*error).into(),
            InvokeError::Trap {
                during, backtrace, ..
            } => {
                let mut status = status(Code::Internal, "GUEST_TRAP").with("during", during);
                status.backtrace = backtrace;
                status
            }
            InvokeError::InputWritten {
                port,
                backtrace,
                dirtied_bytes,
                ..
            } => {
                let mut status = status(Code::Internal, "INPUT_WRITTEN")
                    .with("port", port)
                    .with("dirtied_bytes", dirtied_bytes);
                status.backtrace = backtrace;
                status
            }
            InvokeError::BadAnswer { during, .. } => {
                status(Code::Internal, "BAD_ANSWER").with("during", during)
            }
            InvokeError::BadArgument { name, .. } => {
                status(Code::InvalidArgument, "BAD_PARAMETER").with("name", name)
            }
            InvokeError::Unsupported { .. } => status(Code::InvalidArgument, "UNSUPPORTED"),
            InvokeError::Failed { .. } => status(Code::Internal, "KERNEL_FAILED"),
            InvokeError::Deadline { deadline_ms, .. } => {
                status(Code::DeadlineExceeded, "DEADLINE").with("deadline_ms", deadline_ms)
            }
            InvokeError::Cancelled(_) => status(Code::Cancelled, "CANCELLED"),
            InvokeError::GuestBytes { asked, limit, .. } => limited(
                status(Code::ResourceExhausted, "LIMIT_GUEST_BYTES"),
                asked,
                limit,
            ),
            InvokeError::WindowBytes { asked, limit, .. } => limited(
                status(Code::ResourceExhausted, "LIMIT_WINDOW_BYTES"),
                asked,
                limit,
            ),
            InvokeError::ResultBytes { asked, limit, .. } => limited(
                status(Code::ResourceExhausted, "LIMIT_RESULT_BYTES"),
                asked,
                limit,
            ),
            InvokeError::LogBytes { asked, limit, .. } => limited(
                status(Code::ResourceExhausted, "LIMIT_LOG_BYTES"),
                asked,
                limit,
            ),
            InvokeError::Wasm32 { asked, .. } => limited(
                status(Code::ResourceExhausted, "LIMIT_WASM32"),
                asked,
                1 << 32,
            ),
            InvokeError::Memory { error, .. } => {
                let inner = Self::from(error);
                Self { message, ..inner }
            }
            InvokeError::Host { .. } => status(Code::Internal, "HOST"),
        }
    }
}

fn limited(status: Status, asked: u64, limit: u64) -> Status {
    status.with("asked", asked).with("limit", limit)
}

/// A segment that Linux would not make: ours to explain, not the caller's fault.
pub(super) fn memory(what: &str, error: MemoryError) -> Status {
    let inner = Status::from(error);
    Status {
        message: format!("{what}: {}", inner.message),
        ..inner
    }
}
