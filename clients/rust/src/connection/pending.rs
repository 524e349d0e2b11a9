//! A request under way, as a future.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::Connection;
use super::frames::Reply;
use crate::error::Error;
use crate::wire::Op;

/// A request under way.
///
/// Dropping it takes the interest away: a running INVOKE is cancelled, and leases that still
/// arrive are released.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(super) connection: Arc<Connection>,
    pub(super) op: Op,
    pub(super) sequence: u32,
    pub(super) done: bool,
}

impl Pending {
    pub(crate) fn sequence(&self) -> u32 {
        self.sequence
    }
}

impl Future for Pending {
    type Output = Result<Reply, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let shared = &self.connection.shared;
        // A future that was carried over a fork must not touch the lock.
        if let Err(error) = shared.check_owner() {
            return Poll::Ready(Err(error));
        }
        let mut state = shared.state.lock();
        let answer = match (state.routes.take(self.sequence), state.end.clone()) {
            (Some(reply), _) => Ok(reply),
            (None, Some(end)) => {
                state.routes.remove(self.sequence);
                Err(end.into())
            }
            (None, None) => {
                state.routes.wake_by(self.sequence, context.waker());
                return Poll::Pending;
            }
        };
        drop(state);
        self.done = true;
        Poll::Ready(answer)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let shared = &self.connection.shared;
        if self.done || shared.check_owner().is_err() {
            return;
        }
        let mut state = shared.state.lock();
        match state.routes.abandon(self.sequence) {
            Some(reply) => shared.release(&mut state, reply.leases()),
            None if self.op == Op::Invoke => shared.cancel(&mut state, self.sequence),
            None => {}
        }
    }
}
