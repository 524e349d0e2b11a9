//! Refusals below the calls: of tonic itself, and of a body on its way to it.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Code, Reason, Status};

pub(super) fn bad_request(message: impl Into<String>) -> Status {
    Status::new(Code::InvalidArgument, Reason::BadRequest, message)
}

pub(super) fn bad_tensor(message: impl Into<String>) -> Status {
    Status::new(Code::InvalidArgument, Reason::BadTensor, message)
}

/// A failure of ours that arrow reports.
pub(super) fn host_bug(doing: &str, error: impl std::fmt::Display) -> Status {
    Status::new(
        Code::Internal,
        Reason::Host,
        format!("{doing}: {error}; this is a bug of strait"),
    )
}

/// An error of tonic's own.
pub(super) fn foreign(name: &str, status: &tonic::Status) -> Status {
    match status.code() {
        tonic::Code::Unimplemented => Status::new(
            Code::Unimplemented,
            Reason::UnsupportedOp,
            match status.message() {
                "" => "there is no such call; Flight's are there".to_owned(),
                message => format!("{message}; send it uncompressed"),
            },
        ),
        tonic::Code::Internal => malformed(name, status),
        _ => Status::new(Code::Cancelled, Reason::Cancelled, status.message()),
    }
}

/// A message that cannot be decoded.
pub(super) fn malformed(name: &str, status: &tonic::Status) -> Status {
    bad_request(format!(
        "the request is not the message that {name} takes: {}; \
         names, paths and the kinds of actions are text in UTF-8",
        status.message()
    ))
}

/// Why a body was cut short, for whoever finds that it was.
#[derive(Clone, Debug, Default)]
pub(super) struct Refused(Arc<Mutex<Option<Status>>>);

impl Refused {
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        let found = request.extensions().get::<Self>();
        found.cloned().unwrap_or_default()
    }

    pub(super) fn take(&self) -> Option<Status> {
        self.0.lock().take()
    }

    pub(super) fn set(&self, status: Status) {
        *self.0.lock() = Some(status);
    }
}
