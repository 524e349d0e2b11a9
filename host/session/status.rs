//! Every room's errors as a [`Status`]: one exhaustive match each. What an invocation failed of is told by `engine/error.rs`.

use strait_memory::{AdoptError, MemoryError};
use strait_tensor::LayoutError;

use super::pipeline::PipelineError;
use super::queue::QueueFull;
use super::state::WrongState;
use crate::engine::LoadError;
use crate::error::{Code, Reason, Status, out_of_descriptors, used_up};
use crate::lease::{LeaseError, SealError};
use crate::plugin::{CheckError, PluginError};

impl From<LeaseError> for Status {
    fn from(error: LeaseError) -> Self {
        let (code, reason) = match &error {
            LeaseError::NoLease(_) => (Code::NotFound, Reason::SegmentNotFound),
            LeaseError::Expired { .. } | LeaseError::NotYours(_) => {
                (Code::FailedPrecondition, Reason::LeaseExpired)
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
                Self::new(Code::InvalidArgument, Reason::BadSegment, error.to_string())
            }
            SealError::TamperedResult(_) => {
                Self::new(Code::Internal, Reason::BadAnswer, error.to_string())
            }
            SealError::Lost(_) => Self::new(Code::Internal, Reason::Host, error.to_string()),
        }
    }
}

impl From<AdoptError> for Status {
    fn from(error: AdoptError) -> Self {
        let message = error.to_string();
        match error {
            AdoptError::Budget(exceeded) => {
                Self::new(Code::ResourceExhausted, used_up(&exceeded), message)
            }
            AdoptError::System { source, .. } if out_of_descriptors(&source) => {
                Self::no_descriptors(&message)
            }
            AdoptError::System { .. } => Self::new(Code::Internal, Reason::Host, message),
            AdoptError::NotMemfd { .. }
            | AdoptError::NotTmpfs { .. }
            | AdoptError::Resizable { .. }
            | AdoptError::Writable { .. }
            | AdoptError::Unaligned { .. }
            | AdoptError::OutOfRange { .. }
            | AdoptError::Overlap { .. }
            | AdoptError::Hole { .. }
            | AdoptError::Leased => Self::new(Code::InvalidArgument, Reason::BadSegment, message),
        }
    }
}

impl From<LayoutError> for Status {
    fn from(error: LayoutError) -> Self {
        Self::new(Code::InvalidArgument, Reason::BadTensor, error.to_string())
    }
}

impl From<WrongState> for Status {
    fn from(error: WrongState) -> Self {
        Self::new(
            Code::FailedPrecondition,
            Reason::WrongState,
            error.to_string(),
        )
        .with("from", error.from.to_string())
        .with("to", error.to.to_string())
    }
}

impl From<QueueFull> for Status {
    fn from(error: QueueFull) -> Self {
        let reason = match &error {
            QueueFull::Host { .. } => Reason::BudgetExceeded,
            QueueFull::Quota { .. } => Reason::QuotaExceeded,
        };
        Self::new(Code::ResourceExhausted, reason, error.to_string())
    }
}

impl From<PipelineError> for Status {
    fn from(error: PipelineError) -> Self {
        let code = Code::InvalidArgument;
        let status = Self::new(code, Reason::BadPipeline, error.to_string());
        match error {
            PipelineError::Text { at, .. } => status.with("character", at),
            PipelineError::Graph(_) => status,
            PipelineError::Stage { number, kernel, .. } => {
                status.with("stage", number).with("kernel", kernel)
            }
        }
    }
}

impl From<PluginError> for Status {
    fn from(error: PluginError) -> Self {
        let (code, reason) = match &error {
            PluginError::Description { .. } => (Code::InvalidArgument, Reason::BadPlugin),
            PluginError::NameTaken(_) => (Code::AlreadyExists, Reason::NameTaken),
            PluginError::KernelNotFound { .. } => (Code::NotFound, Reason::KernelNotFound),
            PluginError::Ambiguous { .. } => (Code::FailedPrecondition, Reason::AmbiguousKernel),
        };
        Self::new(code, reason, error.to_string())
    }
}

impl From<LoadError> for Status {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Plugin(error) => error.into(),
            LoadError::NoWorker(_) | LoadError::CompilersBusy { .. } | LoadError::Artifact(_) => {
                Self::new(Code::Internal, Reason::Host, error.to_string())
            }
            LoadError::NotAPlugin(_)
            | LoadError::NotOffered(_)
            | LoadError::CompileTime { .. }
            | LoadError::CompileMemory { .. }
            | LoadError::CompilerLost(_)
            | LoadError::DescriberLost(_)
            | LoadError::Describe(_) => {
                Self::new(Code::InvalidArgument, Reason::BadPlugin, error.to_string())
            }
        }
    }
}

impl From<CheckError> for Status {
    fn from(error: CheckError) -> Self {
        let (reason, name) = match &error {
            CheckError::UnknownInput { port, .. } => (Reason::UnknownInput, port),
            CheckError::MissingInput { port, .. } => (Reason::MissingInput, port),
            CheckError::BadInput { port, .. } => (Reason::BadInput, port),
            CheckError::UnknownParameter { name, .. } => (Reason::UnknownParameter, name),
            CheckError::MissingParameter { name, .. } => (Reason::MissingParameter, name),
            CheckError::BadParameter { name, .. } => (Reason::BadParameter, name),
            CheckError::UnknownOutput { port, .. } => (Reason::UnknownOutput, port),
        };
        Self::new(Code::InvalidArgument, reason, error.to_string()).with("name", name.as_str())
    }
}

/// A segment that Linux would not make: ours to explain, not the caller's fault.
pub(super) fn memory(what: &str, error: MemoryError) -> Status {
    let inner = Status::from(error);
    Status {
        message: format!("{what}: {}", inner.message),
        ..inner
    }
}
