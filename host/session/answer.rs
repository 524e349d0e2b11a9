//! What a request to run or open a kernel is answered, exactly once.

use std::sync::Arc;

use strait_tensor::TensorSpec;

use crate::engine::Report;
use crate::error::{Code, Reason, Status};
use crate::lease::LiveSegment;

/// A result that the caller can map, read or publish.
#[derive(Clone, Debug)]
pub struct InvokedResult {
    /// The output port.
    pub port: String,
    /// What holds it; one tensor, named as the port.
    pub segment: Arc<LiveSegment>,
    /// The name it was published under.
    pub name: Option<String>,
}

/// What an invocation leaves.
#[derive(Debug)]
pub struct Invoked {
    /// In the kernel's order.
    pub results: Vec<InvokedResult>,
    /// What is told of it, without the queue.
    pub report: Report,
    /// Waiting for a worker, in seconds.
    pub queue_seconds: f64,
}

/// The outputs that an invocation would have: ports in the kernel's order, and their specs.
pub type Outputs = Vec<(String, TensorSpec)>;

type Callback<T> = Box<dyn FnOnce(Result<T, Status>) + Send>;

/// The one answer that a request gets, even if the worker that ran it is lost.
pub struct Answer<T = Arc<Invoked>>(Option<Callback<T>>);

impl<T> std::fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer")
            .field("given", &self.0.is_none())
            .finish()
    }
}

impl<T> Answer<T> {
    /// Calls `callback` exactly once.
    pub fn new(callback: impl FnOnce(Result<T, Status>) + Send + 'static) -> Self {
        Self(Some(Box::new(callback)))
    }

    pub(super) fn give(mut self, result: Result<T, Status>) {
        if let Some(callback) = self.0.take() {
            callback(result);
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            callback(Err(Status::new(
                Code::Internal,
                Reason::Host,
                "the worker that ran this was lost; the host's log has the reason",
            )));
        }
    }
}
