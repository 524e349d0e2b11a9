//! How long an upload's messages are, from where they pass to where they are decoded.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

/// The lengths of the messages that were passed to tonic and not taken from it, in their order.
///
/// A message's parts share one buffer of that length, whatever of it they are.
#[derive(Clone, Debug, Default)]
pub(super) struct Lengths(Arc<Mutex<VecDeque<u32>>>);

impl Lengths {
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        let found = request.extensions().get::<Self>();
        found.cloned().unwrap_or_default()
    }

    /// A message has begun to pass.
    pub(super) fn put(&self, length: u32) {
        self.0.lock().push_back(length);
    }

    /// That of the next message.
    pub(super) fn take(&self) -> Option<u32> {
        self.0.lock().pop_front()
    }
}
