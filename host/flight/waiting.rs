//! A call that waits for an invocation.

use tokio::sync::oneshot;

use super::call::Call;
use super::refused::host_bug;
use crate::error::Status;
use crate::session::{self, Answer};

/// Ends the wait of a caller that hung up.
struct CancelOnDrop(Option<session::Call>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = self.0.take() {
            cancel.cancel();
        }
    }
}

/// The answer to what `start` starts. It ends when the caller hangs up.
pub(super) async fn answered<T: Send + 'static>(
    call: &Call,
    start: impl FnOnce(Answer<T>) -> session::Call,
) -> Result<T, Status> {
    let (sender, receiver) = oneshot::channel();
    let answer = Answer::new(move |result| {
        // Nobody receives it if the caller hung up.
        let _ = sender.send(result);
    });
    let mut guard = CancelOnDrop(Some(start(answer)));
    let _working = call.working();
    let result = receiver.await;
    guard.0 = None;
    result.map_err(|error| host_bug("waiting for an invocation", error))?
}
