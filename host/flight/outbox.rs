//! What an exchange answers, on its way to a client that may not read.
//!
//! ```text
//! thread of the exchange (may wait) ─▶ Writer ─▶ what came of one chunk ─▶ Outbox::next ─▶ tonic
//! ```

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_flight::FlightData;
use futures::stream::{self, BoxStream, StreamExt};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use super::call::Call;
use super::refused::host_bug;
use crate::error::Status;

#[derive(Debug, Default)]
struct State {
    /// What came of one chunk, and is not taken.
    messages: VecDeque<FlightData>,
    /// Nothing follows the messages but this.
    end: Option<Result<(), Status>>,
    /// Nobody takes anything any more.
    is_left: bool,
    /// Then: some messages were not taken.
    is_unread: bool,
}

/// The messages between a thread and tonic, which takes them as its client reads.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    /// For the thread.
    taken: Condvar,
    /// For a task.
    moved: Notify,
    /// For tonic.
    came: Notify,
    /// An eventfd that is told, too, when something is taken.
    told: Option<Arc<OwnedFd>>,
}

impl Outbox {
    /// One of which `eventfd` is told when something is taken, or nothing is any more.
    pub(super) fn told_by(eventfd: Arc<OwnedFd>) -> Self {
        Self {
            told: Some(eventfd),
            ..Self::default()
        }
    }

    fn tell(&self) {
        self.taken.notify_all();
        self.moved.notify_one();
        if let Some(told) = &self.told {
            // Full of such, it is readable all the same.
            let _ = rustix::io::write(told, &1_u64.to_ne_bytes());
        }
    }

    /// The next message as soon as there is one, or the end. For one task.
    pub(super) async fn next(&self) -> Option<Result<FlightData, Status>> {
        loop {
            let next = self.state.lock().next();
            if let Some(next) = next {
                self.tell();
                return next;
            }
            // Whoever wakes nobody leaves a permit.
            self.came.notified().await;
        }
    }

    /// Nobody is there any more.
    pub(super) fn leave(&self) {
        let mut state = self.state.lock();
        state.is_left = true;
        state.is_unread |= !state.messages.is_empty();
        state.messages.clear();
        drop(state);
        self.tell();
    }
}

/// Leaves an outbox.
struct Left(Arc<Outbox>);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Who takes the messages, and what ends with that, before the outbox is left.
struct Taker<T> {
    _held: T,
    outbox: Left,
}

/// The messages as tonic takes them, errors as those of `call`. `held` is dropped with them.
pub(super) fn replies<T: Send + 'static>(
    call: &Call,
    outbox: Arc<Outbox>,
    held: T,
) -> BoxStream<'static, Result<FlightData, tonic::Status>> {
    let taker = Taker {
        _held: held,
        outbox: Left(outbox),
    };
    let errors = call.clone();
    let messages = stream::unfold(taker, |taker| async {
        let next = taker.outbox.0.next().await?;
        Some((next, taker))
    });
    messages
        .map(move |message| message.map_err(|status| errors.failed(&status)))
        .boxed()
}

impl State {
    fn next(&mut self) -> Option<Option<Result<FlightData, Status>>> {
        if let Some(message) = self.messages.pop_front() {
            return Some(Some(Ok(message)));
        }
        match self.end.as_mut()? {
            Ok(()) => Some(None),
            failed => Some(std::mem::replace(failed, Ok(())).err().map(Err)),
        }
    }
}

/// What became of messages that were offered.
pub(super) enum Offered {
    Taken,
    /// There are others still.
    Full(VecDeque<FlightData>),
    /// Nobody is there.
    Left,
}

/// Who fills an outbox; its end is told, whatever happens to the writer.
#[derive(Debug)]
pub(super) struct Writer(pub(super) Arc<Outbox>);

impl Writer {
    /// Puts messages in if there are no others, without waiting.
    pub(super) fn offer(&self, messages: VecDeque<FlightData>) -> Offered {
        let mut state = self.0.state.lock();
        if state.is_left {
            return Offered::Left;
        }
        if !state.messages.is_empty() {
            return Offered::Full(messages);
        }
        state.messages = messages;
        drop(state);
        self.0.came.notify_one();
        Offered::Taken
    }

    /// Waits until one more of the messages is taken, or `until`; whether there was time.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut state = self.0.state.lock();
        let before = state.messages.len();
        while !state.is_left && state.messages.len() == before && before > 0 {
            if self.0.taken.wait_until(&mut state, until).timed_out() {
                return false;
            }
        }
        true
    }

    /// Puts a message in once there is room. False if nobody is there.
    pub(super) async fn put(&self, message: FlightData) -> bool {
        let mut messages = VecDeque::from([message]);
        loop {
            messages = match self.offer(messages) {
                Offered::Taken => return true,
                Offered::Left => return false,
                Offered::Full(messages) => messages,
            };
            self.0.moved.notified().await;
        }
    }

    /// Nobody takes anything any more.
    pub(super) fn is_left(&self) -> bool {
        self.0.state.lock().is_left
    }

    /// All that was put in is taken.
    pub(super) fn is_taken(&self) -> bool {
        let state = self.0.state.lock();
        state.messages.is_empty() && !state.is_unread
    }

    /// Nothing follows but this. What waits behind a failure to read is thrown away with `is_stalled`.
    pub(super) fn end(self, result: Result<(), Status>, is_stalled: bool) {
        self.finish(result, is_stalled);
    }

    /// As [`Self::end`], for one that stays.
    pub(super) fn finish(&self, result: Result<(), Status>, is_stalled: bool) {
        let mut state = self.0.state.lock();
        if state.end.is_none() {
            state.end = Some(result);
        }
        if is_stalled {
            state.messages.clear();
        }
        drop(state);
        self.0.came.notify_one();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let lost = || host_bug("exchanging batches", "nobody told its end");
        let has_end = self.0.state.lock().end.is_some();
        if !has_end {
            self.finish(Err(lost()), false);
        }
    }
}
