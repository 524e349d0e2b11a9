//! What a request to run or open a kernel is answered, exactly once.

use std::sync::Arc;

use strait_memory::Charge;
use strait_protocol::StageReport;
use strait_tensor::TensorSpec;

use crate::engine::Report;
use crate::error::{Code, Reason, Status};
use crate::lease::LiveSegment;

/// A result that the caller can map, read or publish.
#[derive(Clone, Debug)]
pub struct InvokedResult {
    /// The output port.
    pub port: String,
    /// What it has become.
    pub body: ResultBody,
    /// The name it was published under.
    pub name: Option<String>,
}

/// Where a result is.
#[derive(Clone, Debug)]
pub enum ResultBody {
    /// In a segment, with one tensor, named as the port.
    Segment(Arc<LiveSegment>),
    /// Here: element type and sizes, and the elements, row-major. Only who asked for such results gets them.
    Inline(TensorSpec, Arc<InlineBytes>),
}

/// The elements of a small result, charged to its principal until nobody needs them any more.
#[derive(Debug)]
pub struct InlineBytes {
    bytes: Vec<u8>,
    _charge: Charge,
}

impl InlineBytes {
    pub(super) fn new(bytes: Vec<u8>, charge: Charge) -> Self {
        Self {
            bytes,
            _charge: charge,
        }
    }
}

impl AsRef<[u8]> for InlineBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl InvokedResult {
    /// What holds it, if it is not here.
    #[must_use]
    pub fn segment(&self) -> Option<&Arc<LiveSegment>> {
        match &self.body {
            ResultBody::Segment(segment) => Some(segment),
            ResultBody::Inline(..) => None,
        }
    }
}

/// What an invocation leaves.
#[derive(Debug)]
pub struct Invoked {
    /// In the kernel's order.
    pub results: Vec<InvokedResult>,
    /// What is told of it, without the queue.
    pub report: Report,
    /// What is told of each stage of a pipeline.
    pub stages: Vec<StageReport>,
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
